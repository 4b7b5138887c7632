"""Finding rows of one table in another, without a Python loop: 10 million rows in seconds."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.data.units import content_codes
from pipeline.io.digests import Digests

Rows = NDArray[np.int64]
"""Row numbers, shape (n,), -1 for none."""

BLOCK = 1 << 16


@dataclass(frozen=True)
class Difference:
    """How two states of a data set differ, as numbers of images."""

    added: int
    changed: int
    removed: int
    renamed: int

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.renamed)


def match_texts(old: NDArray[np.object_], new: NDArray[np.object_]) -> Rows:
    """Return for each new text the row of the equal old text, or -1; both are sorted and distinct.

    Taken in blocks that end at the same text: most blocks are equal as they are, and a table of one block's hashes
    stays in the processor's cache.
    """
    rows = np.full(len(new), -1, dtype=np.int64)
    start = 0
    for begin in range(0, len(new), BLOCK):
        end = min(begin + BLOCK, len(new))
        stop = len(old) if end == len(new) else bisect_left(old, new[end], lo=start)
        ours, theirs = old[start:stop], new[begin:end]
        if len(ours) == len(theirs) and np.array_equal(ours, theirs):
            rows[begin:end] = np.arange(start, stop)
        else:
            found = pc.index_in(pa.array(theirs, pa.large_string()), value_set=pa.array(ours, pa.large_string()))
            places = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
            rows[begin:end] = np.where(places >= 0, places + start, -1)
        start = stop
    return rows


def match_digests(old: Digests, new: Digests) -> Rows:
    """Return for each new digest the first row with the equal old digest, or -1."""
    codes = content_codes(np.concatenate([old, new]))
    first = np.full(len(codes), -1, dtype=np.int64)
    first[codes[: len(old)][::-1]] = np.arange(len(old))[::-1]
    return first[codes[len(old) :]]


def difference(
    old_paths: NDArray[np.object_], old_digests: Digests, new_paths: NDArray[np.object_], new_digests: Digests
) -> Difference:
    """Compare two states by path and content.

    A new path whose content was at a path that is gone is renamed; a path with other content is changed.
    """
    rows = match_texts(old_paths, new_paths)
    known = rows >= 0
    changed = int((old_digests[rows[known]] != new_digests[known]).any(axis=1).sum())
    gone = np.ones(len(old_paths), dtype=bool)
    gone[rows[known]] = False
    fresh = ~known
    codes = content_codes(np.concatenate([old_digests[gone], new_digests[fresh]]))
    n_gone, n_fresh = int(gone.sum()), int(fresh.sum())
    size = int(codes.max()) + 1 if len(codes) else 0
    moved = np.minimum(np.bincount(codes[:n_gone], minlength=size), np.bincount(codes[n_gone:], minlength=size))
    renamed = int(moved.sum())
    return Difference(n_fresh - renamed, changed, n_gone - renamed, renamed)
