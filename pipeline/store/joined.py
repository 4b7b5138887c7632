"""Several stores side by side, read as one whose vectors are theirs in a row: nothing is copied on disk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.io.digests import Digests, fingerprint
from pipeline.store.reader import FeatureStore


@dataclass(frozen=True)
class JoinedStores:
    """Content digest -> the vectors of all of `stores`, one behind the other."""

    stores: tuple[FeatureStore, ...]

    @property
    def dim(self) -> int:
        """Numbers in one vector."""
        return sum(store.dim for store in self.stores)

    @property
    def digest(self) -> str:
        """Names the state of all stores."""
        return fingerprint({"stores": [store.digest for store in self.stores]})

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, shape (n, 2), whether one of the stores has no vector for it."""
        missing: NDArray[np.bool_] = np.any([store.missing(digests) for store in self.stores], axis=0)
        return missing

    def read(self, digests: Digests) -> NDArray[np.float32]:
        """Return the vectors of n digests in the order asked, shape (n, dim); StoreError as the stores raise it."""
        return self.read_at(*self.locate(digests), digests)

    def locate(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of each digest in each store, both of shape (n, stores)."""
        segments, rows = zip(*(store.locate(digests) for store in self.stores), strict=True)
        return np.stack(segments, axis=1), np.stack(rows, axis=1)

    def read_at(self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests) -> NDArray[np.float32]:
        """Like `read`, for digests that were located before."""
        result = np.empty((len(rows), self.dim), np.float32)
        start = 0
        for number, store in enumerate(self.stores):
            result[:, start : start + store.dim] = store.read_at(segments[:, number], rows[:, number], digests)
            start += store.dim
        return result
