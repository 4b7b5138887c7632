"""Which images may not be parted: copies of one content, and the images of one group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.io.digests import Digests


def content_codes(digests: Digests) -> NDArray[np.int64]:
    """Return a number for each image's content, int64 of shape (n,): equal contents, equal numbers from 0 up."""
    if len(digests) == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    codes = np.empty(len(order), dtype=np.int64)
    codes[order] = np.cumsum(fresh) - 1
    return codes


def leakage_units(digests: Digests, groups: NDArray[np.object_] | None) -> NDArray[np.int64]:
    """Return a unit for each image, int64 of shape (n,), numbered from 0 up.

    Two images are of one unit when a chain of shared contents and shared groups joins them. Were they parted between
    training and test, the score would be too good.
    """
    contents = content_codes(digests)
    if groups is None or len(groups) == 0:
        return contents
    import pyarrow as pa

    encoded = pa.array(groups, pa.large_string()).dictionary_encode()
    codes = encoded.indices.to_numpy().astype(np.int64)
    names = encoded.dictionary.to_pylist()
    if "" in names:  # an image of no group is a group of its own
        alone = codes == names.index("")
        codes[alone] = len(names) + np.arange(np.count_nonzero(alone))
    return _joined(_numbered(codes), contents)


def _joined(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join rows that share a value in either array: the smallest number spreads until nothing changes."""
    units = first
    while True:
        spread = _smallest(units, second)
        spread = _smallest(spread, first)
        if np.array_equal(spread, units):
            return _numbered(units)
        units = spread


def _smallest(values: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each row the smallest value among the rows with its key."""
    smallest: NDArray[np.int64] = np.full(keys.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, keys, values)
    result: NDArray[np.int64] = smallest[keys]
    return result


def _numbered(values: NDArray[Any]) -> NDArray[np.int64]:
    """Number distinct values from 0 up."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)
