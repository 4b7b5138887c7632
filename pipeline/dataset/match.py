"""Finding rows of one table in another, without a Python loop: 10 million rows in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.dataset.units import content_codes
from pipeline.digests import Digests

Rows = NDArray[np.int64]
"""Row numbers, shape (n,), -1 for none."""


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
    """Return for each new text the row of the equal old text, or -1; the old ones are distinct."""
    if len(old) == len(new) and np.array_equal(old, new):
        return np.arange(len(new), dtype=np.int64)
    found = pc.index_in(pa.array(new, pa.large_string()), value_set=pa.array(old, pa.large_string()))
    rows: Rows = found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
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
