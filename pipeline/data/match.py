"""Which images are the same: equal texts and equal contents as numbers, and rows of one table in another; 10 million in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.io.digests import Digests

Texts = NDArray[np.object_]
"""n texts: ndarray of shape (n,), object dtype, each a `str`."""

Rows = NDArray[np.int64]
"""Row numbers: int64 of shape (n,), -1 for none."""


def texts(values: list[str]) -> Texts:
    """Return an object array of shape (n,)."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def encode(texts: Texts) -> tuple[NDArray[np.int64], list[str]]:
    """Return each text's code, int64 of shape (n,), and the distinct texts in order of first appearance."""
    encoded = pa.array(texts, pa.large_string()).dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def content_codes(digests: Digests) -> NDArray[np.int64]:
    """Return a number for each image's content, int64 of shape (n,): equal contents, equal numbers from 0 up."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    codes = np.zeros(len(order), dtype=np.int64)
    codes[order[1:]] = np.cumsum((ordered[1:] != ordered[:-1]).any(axis=1))
    return codes


def leakage_units(digests: Digests, groups: Texts | None) -> NDArray[np.int64]:
    """Return a unit for each image, int64 of shape (n,), numbered from 0 up.

    Two images are of one unit when a chain of shared contents and shared groups joins them. Were they parted between
    training and test, the score would be too good.
    """
    contents = content_codes(digests)
    if groups is None or len(groups) == 0:
        return contents
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    codes, names = encode(groups)
    alone = groups == ""  # an image of no group is a group of its own
    codes[alone] = len(names) + np.arange(np.count_nonzero(alone))
    ends = codes, contents + codes.max() + 1
    joined = coo_array((np.ones(len(codes), dtype=bool), ends), shape=(ends[1].max() + 1,) * 2)
    units = connected_components(joined, directed=False)[1][codes]
    return np.unique(units, return_inverse=True)[1].astype(np.int64)


def match_texts(old: Texts, new: Texts) -> Rows:
    """Return for each new text the row of the equal old text, int64 of shape (n_new,), or -1; both are sorted and distinct."""
    if np.array_equal(old, new):
        return np.arange(len(new))
    found = pc.index_in(pa.array(new, pa.large_string()), value_set=pa.array(old, pa.large_string()))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)  # type: ignore[no-any-return]


def match_digests(old: Digests, new: Digests) -> Rows:
    """Return for each new digest, uint64 (n_new, 2), the first row with the equal old digest: int64 of shape (n_new,), -1 for none."""
    codes = content_codes(np.concatenate([old, new]))
    first = np.full(len(codes), -1, dtype=np.int64)
    first[codes[: len(old)][::-1]] = np.arange(len(old))[::-1]
    return first[codes[len(old) :]]


@dataclass(frozen=True)
class Difference:
    """How two states of a data set differ, as numbers of images."""

    added: int = 0
    changed: int = 0
    renamed: int = 0
    removed: int = 0

    def __str__(self) -> str:
        """Say it as `3 added, 1 removed`; only what there is."""
        return ", ".join(f"{count:,} {name}" for name, count in vars(self).items() if count)


def difference(old_paths: Texts, old_digests: Digests, new_paths: Texts, new_digests: Digests) -> Difference:
    """Compare two states by path, object arrays of shape (n,), and content, uint64 of shape (n, 2); paths are sorted.

    A new path whose content was at a path that is gone is renamed; a path with other content is changed.
    """
    rows = match_texts(old_paths, new_paths)
    known = rows >= 0
    changed = int((old_digests[rows[known]] != new_digests[known]).any(axis=1).sum())
    gone = np.ones(len(old_paths), dtype=bool)
    gone[rows[known]] = False
    n_gone, n_fresh = int(gone.sum()), int((~known).sum())
    codes = content_codes(np.concatenate([old_digests[gone], new_digests[~known]]))
    before, now = (np.bincount(part, minlength=len(codes)) for part in (codes[:n_gone], codes[n_gone:]))
    renamed = int(np.minimum(before, now).sum())
    return Difference(n_fresh - renamed, changed, renamed, n_gone - renamed)
