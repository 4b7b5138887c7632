"""Features in memory or on disk, and how both are read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from pipeline.store import StoredRows

Features = NDArray[np.float32] | StoredRows
"""A matrix X of shape (n, dim), float32: in memory, or on disk for the heads that can work there."""

BLOCK_BYTES = 4 << 20
"""Features read at once. A fixed size, so that results do not depend on how much memory there is."""


def on_disk(X: Features) -> bool:
    """Whether features, float32 of shape (n, dim), stay in a store's files; nobody else asks what kind they are."""
    return isinstance(X, StoredRows)


def blocks(X: Features, rows: NDArray[np.int64] | None = None) -> Iterator[tuple[Any, NDArray[np.float32]]]:
    """Yield places in `rows` (all rows in order where none are given) and the features there, a block at a time.

    Rows on disk are read in the order in which they lie there. With `rows` the blocks are copies; without, those of an
    array in memory are views.

    X : float32 of shape (n, dim); rows : int64 of shape (k,); a block is float32 of shape (m, dim), its place a slice,
        or with `rows` an integer array of shape (m,)
    """
    step = max(1, BLOCK_BYTES // (4 * X.shape[1]))
    if rows is None:
        slices = (slice(start, min(start + step, len(X))) for start in range(0, len(X), step))
        yield from ((place, X[place]) for place in slices)
    else:
        order = X.file_order(rows) if isinstance(X, StoredRows) else np.arange(len(rows))
        for start in range(0, len(rows), step):
            place = order[start : start + step]
            yield place, X[rows[place]]


def part(X: Features, rows: NDArray[np.int64]) -> Features:
    """Return some rows: a copy of what is in memory, and still unread what is on disk.

    X : float32 of shape (n, dim); rows : int64 of shape (k,); returns float32 of shape (k, dim)
    """
    return X.part(rows) if isinstance(X, StoredRows) else X[rows]


@dataclass(frozen=True)
class Standardised:
    """Rows of X, standardised as they are read."""

    X: Features
    rows: NDArray[np.int64]
    scaler: StandardScaler

    @staticmethod
    def of(X: Features, rows: NDArray[np.int64]) -> Standardised:
        """Read the rows once for their means and standard deviations.

        X : float32 of shape (n, dim); rows : int64 of shape (k,)
        """
        scaler = StandardScaler()
        for _, block in blocks(X, rows):
            scaler.partial_fit(block)
        return Standardised(X, rows, scaler)

    def blocks(self) -> Iterator[tuple[Any, NDArray[np.float32]]]:
        """Yield places in `rows`, integers of shape (m,), and the standardised features there, float32, (m, dim)."""
        shift, factor = self.scaler.mean_.astype(np.float32), (1 / self.scaler.scale_).astype(np.float32)
        for place, block in blocks(self.X, self.rows):
            block -= shift
            block *= factor
            yield place, block

    def products(self) -> NDArray[np.float64]:
        """Return X'X of the standardised rows, float64 of shape (dim, dim)."""
        dim = self.X.shape[1]
        total = np.zeros((dim, dim))
        for _, block in self.blocks():
            total += block.T @ block
        return total
