"""The stored vectors nearest to some others: exact, by one product of matrices for each block of a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pipeline.io.digests import Digests
from pipeline.store.reader import COPY_BYTES, FeatureStore, JoinedStores, StoredRows

SPARE = 8
"""More vectors than are asked for are compared once more by differences, in float64: a product cannot order near copies."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """A search among the vectors of n contents by the cosine; they stay in the store's files, which the first search reads and checks."""

    vectors: StoredRows
    """In the order in which they lie on disk."""
    order: NDArray[np.int64]
    """The place of each among the n contents, shape (n,)."""

    @staticmethod
    def of(store: FeatureStore | JoinedStores, digests: Digests) -> Nearest:
        """Search among n digests, uint64 of shape (n, 2); StoreError when some have no vector."""
        rows = StoredRows.of(store, digests)
        order = rows.file_order(np.arange(len(rows)))
        return Nearest(rows.part(order), order)

    def _blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        step = max(1, COPY_BYTES // (4 * self.vectors.shape[1]))
        for start in range(0, len(self.vectors), step):
            part = slice(start, start + step)
            yield part, self.vectors[part]

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """One over the length of each vector, float32 of shape (n,); 0 for a vector of zeros, which is like no other."""
        lengths = np.empty(len(self.vectors), np.float32)
        for part, block in self._blocks():
            lengths[part] = np.sqrt(np.einsum("ij,ij->i", block, block))
        return np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)

    def find(self, queries: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return for each of k vectors the nearest of the n contents and 1 - cosine, nearest first.

        queries : float32 of shape (k, dim); returns int64 and float64 of shape (k, min(count, n))
        """
        wanted = min(count + SPARE, len(self.vectors))
        units = (queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-30)).astype(np.float32)
        best = np.full((len(queries), wanted), -np.inf, np.float32)
        rows = np.zeros(best.shape, np.int64)
        for part, block in self._blocks():
            cosines = units @ block.T
            cosines *= self.scales[part]
            better = np.flatnonzero(cosines.max(axis=1) > best.min(axis=1))  # few, after the first blocks
            numbers = np.broadcast_to(np.arange(len(block)) + part.start, (len(better), len(block)))
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
