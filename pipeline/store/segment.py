"""A segment: features of some images in one immutable file, named by its digest. A journal group has the same form."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io.digests import Digests
from pipeline.store.format import BLOCK_BYTES, Chunks, Composed, StoreType, compose
from pipeline.store.opener import StoreFile, open_file

SEGMENTS = "segments"
TEMPORARY = "tmp"
SEGMENT_BYTES = 1 << 30
"""Most bytes of features in one segment; a larger seal makes several."""


@dataclass(frozen=True)
class SegmentEntry:
    """A segment as the snapshot knows it."""

    digest: str
    rows: int
    bytes: int

    def path(self, store: Path) -> Path:
        """Where the segment's file is."""
        return store / SEGMENTS / f"{self.digest}.h5"


def compose_segment(store_type: StoreType, content: Digests, chunks: Chunks) -> Composed:
    """Lay out a segment of the given contents; `chunks` gives their features in the same order."""
    rows = len(content)
    arrays = {"content": np.ascontiguousarray(content, "<u8").reshape(rows, 2)}
    bulk = (store_type.dtype, (rows, store_type.dim))
    return compose("segment", store_type.attributes(rows), arrays, bulk, chunks)


def open_segment(
    path: Path, store_type: StoreType, digest: str | None = None, data: mmap.mmap | None = None
) -> StoreFile:
    """Open a segment or journal group and check that it belongs to this store."""
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


def damaged_rows(file: StoreFile) -> NDArray[np.intp]:
    """Check every block and every number of a segment; return the rows that cannot be used."""
    row_bytes = file.bulk.shape[1] * file.bulk.dtype.itemsize
    bad: set[int] = set()
    for block in file.bad_blocks():
        last = min((block + 1) * BLOCK_BYTES, file.bulk.nbytes) - 1
        bad.update(range(block * BLOCK_BYTES // row_bytes, last // row_bytes + 1))
    step = max(1, (4 << 20) // row_bytes)
    for start in range(0, len(file.bulk), step):
        wrong = ~np.isfinite(file.bulk[start : start + step]).all(axis=1)
        bad.update((np.flatnonzero(wrong) + start).tolist())
    return np.array(sorted(bad), dtype=np.intp)


def split(rows: int, store_type: StoreType, limit: int) -> Iterable[tuple[int, int]]:
    """Cut a number of rows into the ranges of segments of at most `limit` bytes."""
    step = max(1, limit // store_type.row_bytes)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]
