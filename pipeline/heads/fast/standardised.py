"""Standardised rows, read block by block: what every fit on disk starts from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from pipeline.heads.tuning.features import Features, blocks
from pipeline.store import StoredRows


@dataclass(frozen=True)
class Standardised:
    """Rows of X in the order in which they lie on disk, standardised as they are read."""

    X: Features
    rows: NDArray[np.int64]
    scaler: StandardScaler

    @staticmethod
    def of(X: Features, rows: NDArray[np.int64]) -> Standardised:
        """Read the rows once for their means and standard deviations."""
        rows = X.in_file_order(rows) if isinstance(X, StoredRows) else np.sort(rows)
        scaler = StandardScaler()
        for _, block in blocks(X, rows):
            scaler.partial_fit(block)
        return Standardised(X, rows, scaler)

    def blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield places in `rows` and the standardised features there."""
        shift, factor = self.scaler.mean_.astype(np.float32), (1 / self.scaler.scale_).astype(np.float32)
        for place, block in blocks(self.X, self.rows):
            block -= shift
            block *= factor
            yield place, block

    def products(self) -> NDArray[np.float64]:
        """Return X'X of the standardised rows, shape (dim, dim)."""
        dim = self.X.shape[1]
        total = np.zeros((dim, dim))
        for _, block in self.blocks():
            total += block.T @ block
        return total
