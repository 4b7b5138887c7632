"""Vectors of many contents as one array on disk, from one store or several concatenated; and nearest-neighbour search in them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from pipeline.io.digests import Digests, fingerprint
from pipeline.store.format import slices
from pipeline.store.reader import COPY_BYTES, FeatureStore

SPARE = 8
"""Extra candidates whose distances are recomputed from differences in float64: float32 products cannot order near copies."""


@dataclass(frozen=True)
class JoinedStores:
    """Several stores side by side: content digest -> their concatenated vectors. Nothing is copied on disk."""

    stores: tuple[FeatureStore, ...]

    @property
    def dim(self) -> int:
        """Numbers in one vector."""
        return sum(store.dim for store in self.stores)

    @property
    def digest(self) -> str:
        """Digest of the state of all stores."""
        return fingerprint({"stores": [store.digest for store in self.stores]})

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether any store lacks its vector: bool of shape (n,)."""
        missing: NDArray[np.bool_] = np.any([store.missing(digests) for store in self.stores], axis=0)
        return missing

    def read(self, digests: Digests) -> NDArray[np.float32]:
        """Return the vectors of n digests, uint64 of shape (n, 2), as float32 of shape (n, dim); StoreError as the stores raise it."""
        return self.read_at(*self.locate(digests), digests)

    def locate(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of each of n digests in each of k stores, both int64 of shape (n, k)."""
        segments, rows = zip(*(store.locate(digests) for store in self.stores), strict=True)
        return np.stack(segments, axis=1), np.stack(rows, axis=1)

    def read_at(
        self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests, view: bool = False
    ) -> NDArray[np.float32]:
        """Like `read`, for n located digests: `segments` and `rows` are int64 of shape (n, k). Never a view."""
        result = np.empty((len(rows), self.dim), np.float32)
        stop = 0
        for number, store in enumerate(self.stores):
            start, stop = stop, stop + store.dim
            result[:, start:stop] = store.read_at(segments[:, number], rows[:, number], digests, view)
        return result


@dataclass(frozen=True, eq=False, repr=False)
class StoredRows(NDArrayOperatorsMixin):
    """The vectors of n digests, float32 of shape (n, dim), as an array that reads and checks only the indexed rows.

    NumPy's operators, functions and methods read all rows: `X - X.mean(axis=0)`. A slice, or `numpy.asarray` of the whole, gives a
    read-only view of the mapped file if its rows are consecutive there; a mask or row indices give a copy. `segments` and `rows`,
    int64 of shape (n,), or (n, k) for k joined stores, locate each vector.
    """

    store: FeatureStore | JoinedStores
    digests: Digests
    segments: NDArray[np.int64]
    rows: NDArray[np.int64]

    @staticmethod
    def of(store: FeatureStore | JoinedStores, digests: Digests) -> StoredRows:
        """Locate n digests, uint64 of shape (n, 2), without reading their vectors; StoreError when some are missing."""
        digests = np.asarray(digests).reshape(-1, 2)
        return StoredRows(store, digests, *store.locate(digests))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"StoredRows of shape {self.shape}, float32, on disk"

    @property
    def shape(self) -> tuple[int, int]:
        """(n, dim)."""
        return len(self.rows), self.store.dim

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32, whatever the dtype in the store."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array in memory."""
        return 4 * len(self) * self.store.dim

    def __getitem__(self, places: Any) -> NDArray[np.float32]:
        if isinstance(places, tuple):
            first, *rest = places
            found: NDArray[np.float32] = self[first]
            return found[(*rest,)] if isinstance(first, (int, np.integer)) else found[(slice(None), *rest)]
        if isinstance(places, (int, np.integer)):
            vector: NDArray[np.float32] = self[[places]][0]
            return vector
        return self.store.read_at(
            self.segments[places], self.rows[places], self.digests[places], view=isinstance(places, slice)
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        vectors = self[:]
        return np.array(vectors, dtype) if copy else np.asarray(vectors, dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [each[:] if isinstance(each, StoredRows) else each for each in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self[:], name)

    def part(self, places: NDArray[np.integer]) -> StoredRows:
        """Select rows, of any integer dtype, shape (k,), without reading them."""
        return StoredRows(self.store, self.digests[places], self.segments[places], self.rows[places])

    def file_order(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the permutation, int64 of shape (k,), that sorts k rows by their position on disk."""
        rows, segments = (each[places].reshape(len(places), -1)[:, 0] for each in (self.rows, self.segments))
        return np.lexsort((rows, segments))


@dataclass(frozen=True, eq=False)
class Nearest:
    """An exact nearest-neighbour search by cosine among n contents; the first search reads and checks the store's files."""

    vectors: StoredRows
    """The vectors in file order."""
    order: NDArray[np.int64]
    """The index of each among the n contents, shape (n,)."""

    @staticmethod
    def of(store: FeatureStore | JoinedStores, digests: Digests) -> Nearest:
        """Prepare a search among n digests, uint64 of shape (n, 2); StoreError when some have no vector."""
        rows = StoredRows.of(store, digests)
        order = rows.file_order(np.arange(len(rows)))
        return Nearest(rows.part(order), order)

    @property
    def _blocks(self) -> list[slice]:
        return [*slices(len(self.vectors), 4 * self.vectors.shape[1], COPY_BYTES)]

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """1 / length of each vector, float32 of shape (n,); 0 for a zero vector, which is similar to none."""
        lengths = np.empty(len(self.vectors), np.float32)
        for part in self._blocks:
            block = self.vectors[part]
            lengths[part] = np.sqrt(np.einsum("ij,ij->i", block, block))
        return np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)

    def find(self, queries: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Find for each of k vectors the nearest of the n contents and 1 - cosine, nearest first.

        queries : float32 of shape (k, dim); returns int64 and float64 of shape (k, min(count, n))
        """
        wanted = min(count + SPARE, len(self.vectors))
        units = (queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-30)).astype(np.float32)
        best = np.full((len(queries), wanted), -np.inf, np.float32)
        rows = np.zeros(best.shape, np.int64)
        for part in self._blocks:
            cosines = units @ self.vectors[part].T
            cosines *= self.scales[part]
            better = np.flatnonzero(cosines.max(axis=1) > best.min(axis=1))  # few, after the first blocks
            numbers = np.broadcast_to(np.arange(part.start, part.stop), (len(better), cosines.shape[1]))
            found = np.concatenate([best[better], cosines[better]], axis=1)
            numbers = np.concatenate([rows[better], numbers], axis=1)
            first = np.argpartition(-found, wanted - 1, axis=1)[:, :wanted]
            best[better], rows[better] = np.take_along_axis(found, first, 1), np.take_along_axis(numbers, first, 1)
        places, distances = self.order[rows], np.empty(rows.shape)
        for query, (unit, own) in enumerate(zip(units, rows, strict=True)):
            candidates = self.vectors[own].astype(np.float64) * self.scales[own, None]
            distances[query] = ((candidates - unit) ** 2).sum(axis=1) / 2
        nearest = np.lexsort((places, distances), axis=1)[:, :count]
        return np.take_along_axis(places, nearest, 1), np.take_along_axis(distances, nearest, 1)
