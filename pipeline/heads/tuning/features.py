"""Features in memory or on disk, and how both are read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.store import StoredRows

Features = NDArray[np.float32] | StoredRows
"""A matrix X of shape (n, dim), float32: in memory, or on disk for the heads that can work there."""

BLOCK_BYTES = 4 << 20
"""Features read at once. A fixed size, so that results do not depend on how much memory there is."""


def blocks(X: Features, rows: NDArray[np.int64] | None = None) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield places in `rows` (all rows in order where none are given) and the features there, a block at a time.

    With `rows` the blocks are copies; without, those of an array in memory are views.
    """
    step = max(1, BLOCK_BYTES // (4 * X.shape[1]))
    count = len(X) if rows is None else len(rows)
    for start in range(0, count, step):
        place = slice(start, min(start + step, count))
        yield place, X[place] if rows is None else X[rows[place]]


def part(X: Features, rows: NDArray[np.int64]) -> Features:
    """Return some rows: a copy of what is in memory, and still unread what is on disk."""
    return X.part(rows) if isinstance(X, StoredRows) else X[rows]
