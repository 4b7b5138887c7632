"""What is done to a whole store: verify, repair, removing stale rows, merging. Each returns what it found or did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io.digests import Digests, digest_keys
from pipeline.store.format import BLOCK_BYTES, slices
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.reader import (
    ATTEMPTS,
    FeatureStore,
    generations,
    newest_snapshot,
    no_valid_snapshot,
    open_segment,
    open_snapshot,
    require_generations,
    snapshot_path,
)
from pipeline.store.writer import StoreWriter, groups

# ---- verify: is everything there, and is every byte what was written?


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    full: bool
    generation: int
    """0 for a packed file."""
    rows: int
    problems: tuple[str, ...]
    """Each begins with the name of a file."""
    damaged: Digests
    """Contents whose features cannot be used, uint64 of shape (n, 2); `repair` drops these, so that they are embedded again."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path, full: bool = False) -> VerifyReport:
    """Check a store or a packed file: quick checks every file's head, size and structure, and the table; full reads every byte.

    StoreError when there is no store, or no valid snapshot to start from.
    """
    path = Path(path)
    if path.is_file():
        return _verify_pack(path, full)
    for _ in range(ATTEMPTS):
        numbers = require_generations(path)
        with suppress(FileNotFoundError):  # a writer has removed it meanwhile, and published a newer state
            report = _verify_once(path, full, numbers)
            if report.ok or generations(path) == numbers:
                return report
    raise StoreError(f"{path}: changes faster than it can be checked; run again when its writer has ended")


def _verify_once(path: Path, full: bool, numbers: Sequence[int]) -> VerifyReport:
    problems: list[str] = []

    def wrong(place: Path, error: StoreError) -> None:
        problems.append(f"{place.relative_to(path)}: {error.message.removeprefix(f'{place}: ')}")

    snapshots: list[FeatureStore] = []
    for place in (snapshot_path(path, number) for number in numbers):
        try:
            snapshot = open_snapshot(place)
            _ = snapshot.table  # which checks all of it
            snapshots.append(snapshot)
        except StoreError as error:
            wrong(place, error)
    if not snapshots:
        raise no_valid_snapshot(path, problems)
    newest = snapshots[0]
    content, (segments, rows) = newest.table.lines[:2].T, newest.table.lines[2:].astype(np.int64)
    bad = np.zeros(len(content), np.bool_)
    for number, segment in enumerate(newest.segments):
        mine = np.flatnonzero(segments == number)
        lost = mine
        try:
            file = newest.open_segment(number)
            if not np.array_equal(file.arrays["content"][rows[mine]], content[mine]):
                raise StoreError("does not hold the images that the snapshot says")
            damaged = damaged_rows(file) if full else np.zeros(0, np.intp)
            lost = mine[np.isin(rows[mine], damaged)]
            if len(damaged):
                raise StoreError(f"{len(damaged)} of its {len(file.bulk)} features are damaged or not finite")
        except StoreError as error:
            bad[lost] = True
            wrong(segment, error)
    _check_others(path, snapshots, full, wrong)
    return VerifyReport(full, newest.generation, newest.rows, tuple(problems), content[bad])


def _check_others(
    path: Path, snapshots: Sequence[FeatureStore], full: bool, wrong: Callable[[Path, StoreError], None]
) -> None:
    """Check what the newest snapshot does not need: damage costs the way back, or rows of a run that has not ended."""
    newest, *older = snapshots
    segments = {*(segment for snapshot in older for segment in snapshot.segments)}.difference(newest.segments)
    for place in (*sorted(segments), *groups(path)):
        try:
            file = open_segment(place, newest.store_type, place.stem if place in segments else None)
            if full and len(damaged_rows(file)):
                raise StoreError("is damaged; only the previous snapshot or the next run needs it")
        except FileNotFoundError:
            if place in segments:
                wrong(place, StoreError("is missing; only the previous snapshot needs it"))
        except StoreError as error:
            wrong(place, error)


def damaged_rows(file: StoreFile) -> NDArray[np.intp]:
    """Check every block and number of a segment; return the rows that cannot be used, of dtype intp and shape (k,)."""
    row_bytes = file.store_type.row_bytes
    bad = np.zeros(len(file.bulk), np.bool_)
    for block in file.bad_blocks():
        bad[block * BLOCK_BYTES // row_bytes : -(-(block + 1) * BLOCK_BYTES // row_bytes)] = True
    for part in slices(len(bad), row_bytes, 4 << 20):
        bad[part] |= ~np.isfinite(file.bulk[part]).all(axis=1)
    return np.flatnonzero(bad)


def _verify_pack(path: Path, full: bool) -> VerifyReport:
    file = open_file(path, "pack")
    content = file.arrays["content"]
    wrong = damaged_rows(file) if full else np.zeros(0, np.intp)
    problems = [f"{path.name}: {len(wrong)} of its features are damaged or not finite"] if len(wrong) else []
    if len(np.unique(content, axis=0)) != len(content):
        problems.append(f"{path.name}: it names a content twice")
    return VerifyReport(full, 0, len(content), tuple(problems), content[wrong])


# ---- repair, removing, merging


def repair(path: str | Path) -> VerifyReport:
    """Drop exactly the damaged rows of a store, keep every good one, and set damaged files aside; return what was wrong.

    The next `manyheads features` embeds what was dropped.
    """
    path = Path(path)
    if path.is_file():
        raise StoreError(f"{path}: a packed file cannot be repaired; pack the store again")
    report = verify(path, full=True)
    if not report.ok:
        with _open_existing(path) as writer:
            writer.rewrite(lambda file: ~np.isin(np.arange(len(file.bulk)), damaged_rows(file)), set_aside=True)
    return report


def collect(path: str | Path, live: Digests) -> tuple[int, int]:
    """Remove the rows of contents that are not in `live`, uint64 of shape (n, 2), and every file not needed then.

    Returns how many rows went, and how many stayed. Readers that have the store open go on reading what they opened.
    """
    path = Path(path)
    before, wanted = newest_snapshot(path).rows, digest_keys(np.asarray(live, np.uint64))
    with _open_existing(path) as writer:
        writer.rewrite(lambda file: np.isin(digest_keys(file.arrays["content"]), wanted))
    after = newest_snapshot(path).rows
    return before - after, after


def _open_existing(path: Path) -> StoreWriter:
    snapshot = newest_snapshot(path)
    return StoreWriter.open(path, snapshot.identity, snapshot.dim, snapshot.store_type.dtype)


def merge(path: str | Path, sources: Sequence[str | Path]) -> dict[str | Path, int]:
    """Add the rows of other stores or packed files of the same identity, such as those of several machines.

    `sources` : paths, or addresses that fsspec understands. Returns how many were new in each. StoreError, and nothing is added, when
    an identity, a dim, a dtype or the probe vectors differ.
    """
    stores = [FeatureStore.open(source) for source in sources]
    return dict(zip(sources, copy_rows(stores, Path(path)), strict=True))


def copy_rows(stores: Sequence[FeatureStore], target: Path, content: Digests | None = None) -> list[int]:
    """Add rows of stores to another, of some contents, uint64 of shape (n, 2), or all; return how many were new in each."""
    first = stores[0]
    probe = first.probe if len(first.probe) else None
    with StoreWriter.open(target, first.identity, first.dim, first.store_type.dtype, probe) as writer:
        return [writer.adopt(store, content) for store in stores]
