"""What a snapshot says: which segments there are, and for each content its segment and row, searched without reading it all."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io.digests import Digests
from pipeline.store.format import SEGMENTS, StoreType
from pipeline.store.opener import StoreFile, open_file


@dataclass(frozen=True)
class SegmentEntry:
    """A segment as the snapshot knows it."""

    digest: str
    rows: int
    bytes: int

    def path(self, store: Path) -> Path:
        """Where the segment's file is."""
        return store / SEGMENTS / f"{self.digest}.h5"


def open_segment(
    path: Path, store_type: StoreType, digest: str | None = None, data: mmap.mmap | None = None
) -> StoreFile:
    """Open a segment or a group of the journal, which has the same form, and check that it belongs to this store."""
    file = open_file(path, "segment", digest, data)
    if file.store_type != store_type:
        raise StoreError(f"{path}: belongs to another store: it has {file.store_type}, expected {store_type}")
    return file


def open_entry(store: Path, entry: SegmentEntry, store_type: StoreType, data: mmap.mmap | None = None) -> StoreFile:
    """Open a segment that a snapshot names, and compare it with what the snapshot says about it."""
    try:
        file = open_segment(entry.path(store), store_type, entry.digest, data)
    except FileNotFoundError:
        raise StoreError(
            f"{entry.path(store)}: is missing with {entry.rows} features; put it back, or run 'manyheads store repair'"
        ) from None
    if (file.number("rows"), file.size) != (entry.rows, entry.bytes):
        raise StoreError(f"{file.path}: has {file.number('rows')} rows in {file.size} bytes, the snapshot says {entry}")
    return file


def unchecked(line: int, positions: NDArray[Any]) -> None:
    """The check of a table that was made just now, which trusts all positions, int64 of shape (k,)."""


@dataclass(frozen=True)
class Table:
    """Content digests in order, and the place of each.

    `lines`, shape (4, n), uint64, perhaps memory-mapped: first and second half of the digests, segment, row. `check` is
    called with a line (0 to 3) and the positions in it before these are trusted.
    """

    lines: NDArray[np.uint64]
    check: Callable[[int, NDArray[Any]], None] = unchecked

    def __len__(self) -> int:
        return len(self.lines[0])

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """Return the position of each of k digests, uint64 of shape (k, 2), in the table: int64 of shape (k,), -1 for none.

        Raises
        ------
        StoreError
            When the table is damaged where they are looked for, or not in order.
        """
        wanted = np.ascontiguousarray(digests, np.uint64).reshape(-1, 2)
        # In the order of the table, neighbours share pages: many times faster in a large one.
        order = np.argsort(wanted[:, 0], kind="stable")
        positions = np.full(len(wanted), -1, np.int64)
        if len(self) and len(wanted):
            positions[order] = self._find_in_order(wanted[order])
        return positions

    def _find_in_order(self, wanted: Digests) -> NDArray[np.int64]:
        (first, second), size = self.lines[:2], len(self)
        low = self._search(wanted[:, 0], "left")
        at = np.minimum(low, size - 1)
        following = np.minimum(low + 1, size - 1)
        self.check(0, following)
        # Two contents hardly ever share their first half, but a stranger's table may be all one number.
        several = (low + 1 < size) & (first[at] == wanted[:, 0]) & (first[following] == wanted[:, 0])
        if several.any():
            start, stop, half = low[several], self._search(wanted[several, 0], "right"), wanted[several, 1]
            while (unsure := start < stop).any():
                middle = np.minimum((start + stop) // 2, size - 1)
                self.check(1, middle[unsure])
                above = second[middle] < half
                start = np.where(unsure & above, middle + 1, start)
                stop = np.where(unsure & ~above, middle, stop)
            at[several] = np.minimum(start, size - 1)
        self.check(0, at)
        self.check(1, at)
        return np.where((first[at] == wanted[:, 0]) & (second[at] == wanted[:, 1]), at, -1)

    def _search(self, wanted: NDArray[np.uint64], side: Literal["left", "right"]) -> NDArray[np.intp]:
        """Like `numpy.searchsorted` of uint64 of shape (k,) in the first halves; it reads what nobody has checked, so its end is."""
        first, size = self.lines[0], len(self)
        found = np.searchsorted(first, wanted, side)
        before, at = np.maximum(found - 1, 0), np.minimum(found, size - 1)
        self.check(0, before)
        self.check(0, at)
        below = np.less if side == "left" else np.less_equal
        if not (((found == 0) | below(first[before], wanted)) & ((found == size) | ~below(first[at], wanted))).all():
            self.check(0, np.arange(size))  # damage is told as such
            raise StoreError("not a valid feature store file: its table is not sorted")
        return found

    def place(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of k positions; all three int64 of shape (k,)."""
        self.check(2, positions)
        self.check(3, positions)
        return self.lines[2][positions].astype(np.int64), self.lines[3][positions].astype(np.int64)

    def all(self) -> tuple[Digests, NDArray[np.int64], NDArray[np.int64]]:
        """Return every digest, uint64 of shape (n, 2), with its segment number and row, int64 of shape (n,)."""
        everything = np.arange(len(self))
        self.check(0, everything)
        self.check(1, everything)
        return self.lines[:2].T.copy(), *self.place(everything)

    def in_file_order(self) -> Digests:
        """Return every digest, uint64 of shape (n, 2), in the order of segments and rows."""
        content, segment, row = self.all()
        return content[np.lexsort((row, segment))]


def sorted_table(content: Digests, segment: NDArray[Any], row: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the four lines of a table, uint64 of shape (4, n), sorted by content, which is uint64 of shape (n, 2).

    `segment` and `row` are numbers of shape (n,).
    """
    # By the first half alone, which is as good as always enough; a stable sort merges parts that are sorted already.
    order = np.argsort(content[:, 0], kind="stable")
    first = content[order, 0]
    if (first[1:] == first[:-1]).any():
        order = np.lexsort((content[:, 1], content[:, 0]))
    lines = (content[:, 0], content[:, 1], segment, row)
    return np.stack([np.asarray(line)[order].astype("<u8") for line in lines])
