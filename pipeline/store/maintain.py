"""What is done to a whole store: status, repair, collecting stale rows, merging. Each returns what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import StoreError
from pipeline.io.digests import Digests, digest_keys
from pipeline.store import journal, lock
from pipeline.store.reader import FeatureStore, newest_snapshot
from pipeline.store.segment import damaged_rows, open_segment
from pipeline.store.verify import verify
from pipeline.store.writer import StoreWriter


@dataclass(frozen=True)
class StoreStatus:
    """A store at a glance."""

    store: FeatureStore
    disk_bytes: int
    journal_rows: int
    """Rows of a run that did not end."""
    stale_rows: int | None
    """Rows that no image of the index points at; None when the index was not given."""
    missing_rows: int | None
    """Contents of the index that have no row, not even in the journal."""
    quarantined: int
    writer: str | None
    """Who writes to it now."""


def status(path: str | Path, live: Digests | None = None, others: Digests | None = None) -> StoreStatus:
    """Describe a store or a packed file.

    `live`, shape (n, 2), are the contents of the index, and `others` those that other experiments use.
    """
    path = Path(path)
    store = FeatureStore.open(path)
    waiting = [open_segment(group, store.store_type).arrays["content"] for group in journal.groups(path)]
    stale = missing = None
    if live is not None:
        live = np.unique(np.asarray(live, np.uint64).reshape(-1, 2), axis=0)
        used = live if others is None else np.unique(np.concatenate([live, others]), axis=0)
        stale = store.rows - int((~store.missing(used)).sum())
        absent = digest_keys(live[store.missing(live)])
        missing = int((~np.isin(absent, digest_keys(np.concatenate([np.zeros((0, 2), np.uint64), *waiting])))).sum())
    rows = sum(map(len, waiting))
    return StoreStatus(store, disk_bytes(path), rows, stale, missing, len(_quarantined(path)), lock.holder(path))


def disk_bytes(path: Path) -> int:
    """Return the bytes of all files of a store."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did; the damaged contents count as missing from now on."""

    damaged: Digests
    quarantined: tuple[str, ...]


def repair(path: str | Path) -> RepairReport:
    """Drop exactly the damaged rows of a store, keep every good one, and set damaged files aside.

    The next `manyheads features` embeds what was dropped.
    """
    path = Path(path)
    if path.is_file():
        raise StoreError(f"{path}: a packed file cannot be repaired; pack the store again")
    report = verify(path, full=True)
    before = _quarantined(path)
    if not report.ok:
        with _open_existing(path) as writer:
            writer.rewrite(lambda file: ~np.isin(np.arange(len(file.bulk)), damaged_rows(file)), set_aside=True)
    return RepairReport(report.damaged, tuple(sorted(_quarantined(path) - before)))


def _quarantined(path: Path) -> set[str]:
    folder = path / journal.QUARANTINE
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


@dataclass(frozen=True)
class CollectReport:
    """What `collect` removed."""

    rows_before: int
    rows_after: int
    bytes_before: int
    bytes_after: int


def collect(path: str | Path, live: Digests) -> CollectReport:
    """Remove the rows of contents that are not in `live`, shape (n, 2), and every file the newest state does not need.

    Readers that have the store open go on reading what they opened.
    """
    path = Path(path)
    before, bytes_before = newest_snapshot(path).rows, disk_bytes(path)
    wanted = digest_keys(np.asarray(live, np.uint64).reshape(-1, 2))
    with _open_existing(path) as writer:
        writer.rewrite(lambda file: np.isin(digest_keys(file.arrays["content"]), wanted))
    return CollectReport(before, newest_snapshot(path).rows, bytes_before, disk_bytes(path))


def _open_existing(path: Path) -> StoreWriter:
    snapshot = newest_snapshot(path)
    return StoreWriter.open(path, snapshot.identity, snapshot.store_type.dim, snapshot.store_type.dtype)


def merge(path: str | Path, sources: Sequence[str | Path]) -> dict[Path, int]:
    """Add the rows of other stores or packed files of the same identity, such as those of several machines.

    Returns how many were new in each.

    Raises
    ------
    StoreError
        When an identity, a dim, a dtype or the features of the built-in probe images differ.
    """
    path = Path(path)
    stores = [FeatureStore.open(source) for source in sources]
    if not stores:
        raise StoreError(f"{path}: nothing to merge; name at least one other store")
    added = {}
    for store in stores:
        canary = store.canary if len(store.canary) else None
        with StoreWriter.open(path, store.identity, store.dim, store.store_type.dtype, canary) as writer:
            added[store.path] = copy_rows(store, writer)
    return added


def copy_rows(store: FeatureStore, writer: StoreWriter, content: Digests | None = None) -> int:
    """Append the rows of some contents, or all in the order they lie there; return how many were new."""
    content = store.table.in_file_order() if content is None else content
    return sum(writer.append(content[part], features) for part, features in store.pieces(content))
