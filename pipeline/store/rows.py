"""Rows of a store that stay in its files: for features that are larger than memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.io.digests import Digests
from pipeline.store.joined import JoinedStores
from pipeline.store.reader import FeatureStore


@dataclass(frozen=True)
class StoredRows:
    """The vectors of n digests, which look like a matrix of shape (n, dim), float32, and are read when they are asked for.

    `X[places]` reads, checks and returns the vectors at some places; what is read is mapped, so the system may drop it from
    memory at any time. `segments` and `rows`, both of shape (n,), int64, say where each vector lies; (n, k) of k joined stores.
    """

    store: FeatureStore | JoinedStores
    digests: Digests
    segments: NDArray[np.int64]
    rows: NDArray[np.int64]

    @staticmethod
    def of(store: FeatureStore | JoinedStores, digests: Digests) -> StoredRows:
        """Find n digests in a store without reading their vectors; StoreError when some are missing."""
        digests = np.asarray(digests).reshape(-1, 2)
        return StoredRows(store, digests, *store.locate(digests))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, dim)."""
        return len(self.rows), self.store.dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32, whatever the store holds."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes the matrix would take in memory."""
        return 4 * len(self) * self.store.dim

    def __getitem__(self, places: slice | NDArray[np.integer]) -> NDArray[np.float32]:
        return self.store.read_at(self.segments[places], self.rows[places], self.digests[places])

    def part(self, places: NDArray[np.integer]) -> StoredRows:
        """Return some of the rows, still unread."""
        return StoredRows(self.store, self.digests[places], self.segments[places], self.rows[places])

    def file_order(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how to sort places into the order in which their vectors lie on disk, as `argsort` does."""
        rows, segments = (each[places].reshape(len(places), -1)[:, 0] for each in (self.rows, self.segments))
        return np.lexsort((rows, segments))
