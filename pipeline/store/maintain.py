"""What is done to a whole store: status, repair, collecting stale rows, merging. Each returns what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io.digests import Digests
from pipeline.store import journal, lock
from pipeline.store.opener import StoreFile
from pipeline.store.reader import FeatureStore
from pipeline.store.segment import damaged_rows, open_segment
from pipeline.store.snapshot import Table, newest_snapshot
from pipeline.store.verify import verify
from pipeline.store.writer import StoreWriter

COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class StoreStatus:
    """A store at a glance."""

    path: Path
    identity: dict[str, Any]
    fingerprint: str
    digest: str
    generation: int
    rows: int
    dim: int
    dtype: str
    segments: int
    feature_bytes: int
    disk_bytes: int
    journal_groups: int
    journal_rows: int
    stale_rows: int | None
    """Rows that no image of the index points at; None when the index was not given."""
    missing_rows: int | None
    """Contents of the index that have no row, not even in the journal."""
    quarantined: int
    canary_rows: int
    writer: str | None
    """Who writes to it now."""


def status(path: str | Path, live: Digests | None = None, others: Digests | None = None) -> StoreStatus:
    """Describe a store or a packed file.

    `live`, shape (n, 2), are the contents of the index, and `others` those that other experiments use.
    """
    path = Path(path)
    store = FeatureStore.open(path)
    groups = journal.groups(path) if path.is_dir() else []
    waiting = [open_segment(group, store.store_type).arrays["content"] for group in groups]
    stale = missing = None
    if live is not None:
        live = np.unique(np.asarray(live, np.uint64).reshape(-1, 2), axis=0)
        absent = live[store.missing(live)]
        used = live if others is None else np.unique(np.concatenate([live, others]), axis=0)
        stale = store.rows - int((~store.missing(used)).sum())
        here = np.isin(_one(absent), _one(np.concatenate(waiting))) if waiting else np.zeros(len(absent), np.bool_)
        missing = int((~here).sum())
    return StoreStatus(
        path,
        store.identity,
        store.fingerprint,
        store.digest,
        store.generation,
        store.rows,
        store.dim,
        store.dtype.name,
        len(store.segments),
        sum(entry.rows for entry in store.segments) * store.store_type.row_bytes,
        disk_bytes(path),
        len(groups),
        sum(map(len, waiting)),
        stale,
        missing,
        len(list((path / journal.QUARANTINE).iterdir())) if (path / journal.QUARANTINE).is_dir() else 0,
        len(store.canary),
        lock.holder(path) if path.is_dir() else None,
    )


def disk_bytes(path: Path) -> int:
    """Return the bytes of all files of a store."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@dataclass(frozen=True)
class RepairReport:
    """What `repair` did; the damaged contents count as missing from now on."""

    path: Path
    generation: int
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
    generation = report.generation
    before = _quarantined(path)
    if not report.ok:
        with _open_existing(path) as writer:
            writer.rewrite(lambda file: _all_but(file, damaged_rows(file)), set_aside=True)
        generation = newest_snapshot(path).generation
    return RepairReport(path, generation, report.damaged, tuple(sorted(_quarantined(path) - before)))


def _all_but(file: StoreFile, rows: NDArray[np.intp]) -> NDArray[np.bool_]:
    keep = np.ones(len(file.bulk), np.bool_)
    keep[rows] = False
    return keep


def _quarantined(path: Path) -> set[str]:
    folder = path / journal.QUARANTINE
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


@dataclass(frozen=True)
class CollectReport:
    """What `collect` removed."""

    path: Path
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
    wanted = _one(np.asarray(live, np.uint64).reshape(-1, 2))
    with _open_existing(path) as writer:
        writer.rewrite(lambda file: np.isin(_one(file.arrays["content"]), wanted))
    return CollectReport(path, before, newest_snapshot(path).rows, bytes_before, disk_bytes(path))


def _one(digests: Digests) -> NDArray[np.void]:
    """View n digests as n single values that can be compared."""
    view: NDArray[np.void] = np.ascontiguousarray(digests, "<u8").reshape(-1, 2).view("V16").ravel()
    return view


def _open_existing(path: Path) -> StoreWriter:
    snapshot = newest_snapshot(path)
    return StoreWriter.open(path, snapshot.identity, snapshot.store_type.dim, snapshot.store_type.dtype)


@dataclass(frozen=True)
class MergeReport:
    """What `merge` took from each source."""

    path: Path
    added: tuple[tuple[Path, int], ...]
    rows: int


def merge(path: str | Path, sources: Sequence[str | Path]) -> MergeReport:
    """Add the rows of other stores or packed files of the same identity, such as those of several machines.

    Raises
    ------
    StoreError
        When an identity, a dim, a dtype or the features of the built-in probe images differ.
    """
    path = Path(path)
    stores = [FeatureStore.open(source) for source in sources]
    if not stores:
        raise StoreError(f"{path}: nothing to merge; name at least one other store")
    added = []
    for store in stores:
        canary = store.canary if len(store.canary) else None
        with StoreWriter.open(path, store.identity, store.dim, store.store_type.dtype, canary) as writer:
            added.append((store.path, copy_rows(store, writer)))
    return MergeReport(path, tuple(added), newest_snapshot(path).rows)


def copy_rows(store: FeatureStore, writer: StoreWriter, content: Digests | None = None) -> int:
    """Append the rows of some contents, or all in the order they lie there; return how many were new."""
    content = in_order(store.table) if content is None else content
    step = max(1, COPY_BYTES // (store.dim * 4))
    count = 0
    for start in range(0, len(content), step):
        piece = content[start : start + step]
        count += writer.append(piece, store.read(piece))
    return count


def in_order(table: Table) -> Digests:
    """Return the digests of a table in the order of their segments and rows."""
    content, segment, row = table.all()
    return content[np.lexsort((row, segment))]
