"""The axes of rows that are read block by block: what fits on disk start from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.heads.fast.solvers import Array, Axes, decompose
from pipeline.heads.tuning.features import Features, Standardised


@dataclass(frozen=True)
class Turned:
    """Standardised rows on the axes of their covariance, with a column of ones: a matrix that is never made.

    The axes turn the weights and not the rows: (X V) w = X (V w). It knows the products that `solvers` makes.
    """

    data: Standardised
    vectors: Array

    __array_ufunc__ = None  # an array on the left leaves the product to `__rmatmul__`

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return int(self.vectors.nbytes)

    def __len__(self) -> int:
        return len(self.data.rows)

    def __matmul__(self, weights: Array) -> Array:
        turned = self.vectors @ weights[:-1]
        made = np.empty((len(self), weights.shape[1]), dtype=np.float32)
        for place, block in self.data.blocks():
            made[place] = block @ turned
        made += weights[-1]
        return made

    def __rmatmul__(self, slopes: Array) -> Array:
        return (self.T @ slopes.T).T

    @property
    def T(self) -> _Transposed:
        """The transposed matrix, for its products."""
        return _Transposed(self)


@dataclass(frozen=True)
class _Transposed:
    T: Turned

    __array_ufunc__ = None

    def __matmul__(self, slopes: Array) -> Array:
        vectors = self.T.vectors
        total = np.zeros((len(vectors), slopes.shape[1]))
        for place, block in self.T.data.blocks():
            total += block.T @ slopes[place]
        ones = slopes.sum(axis=0, dtype=np.float64)
        return np.vstack([vectors.T @ total.astype(np.float32), ones[None, :].astype(np.float32)])

    def __rmatmul__(self, weights: Array) -> Array:
        return (self.T @ weights.T).T


def turn_blocks(X: Features, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> Axes:
    """Find the axes of some rows' covariance as `solvers.turn` does, without a copy of the rows.

    X : float32 of shape (n, dim); train, held_out : row numbers, int64 of shape (k,) and (m,)
    """
    data = Standardised.of(X, train)
    total = data.products()
    values, vectors = decompose(total.astype(np.float32))
    if len(total) > len(train):
        vectors = np.ascontiguousarray(vectors[:, values > 1e-6 * values.max()])
    squares = np.append(np.einsum("ij,ij->j", vectors, total @ vectors), len(train))
    others = Turned(Standardised(X, held_out, data.scaler), vectors)
    return Axes(Turned(data, vectors), others, np.maximum(squares, 0).astype(np.float32))
