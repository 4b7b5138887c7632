"""Racing: stop fitting the remaining folds of parameters that can no longer win by more than noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

STAGE = 2
"""Folds fitted between two looks. A fixed number, so that results do not depend on how many run in parallel."""

CONFIDENCE = 2.0
"""Standard errors a candidate must lie behind the leader, on the same folds, to be stopped."""


def stages(n_folds: int, race: bool) -> list[list[int]]:
    """Return the folds in the groups between which candidates may be stopped."""
    size = STAGE if race and n_folds > STAGE else n_folds
    return [list(range(start, min(start + size, n_folds))) for start in range(0, n_folds, size)]


def behind(candidate: NDArray[np.float64], leader: NDArray[np.float64], held_out_rows: float, bounded: bool) -> bool:
    """Whether a candidate is too far behind the leader after the same k folds to be worth the rest.

    The differences of the pairs have a standard error from their own spread, but never less than two heads that agree
    on half of their errors would show: sqrt(p (1 - p) / rows) per fold. Unbounded scores (log loss) have no such floor,
    so there the leader's own spread over the folds serves.

    candidate, leader : ndarray of shape (k,), k >= 2
    held_out_rows : mean number of rows a fold holds out
    """
    difference = candidate - leader
    share = float(np.clip(leader.mean(), 0.02, 0.98))
    floor = np.sqrt(share * (1 - share) / held_out_rows) if bounded else float(leader.std(ddof=1))
    error = max(float(difference.std(ddof=1)), float(floor)) / np.sqrt(len(difference))
    return bool(difference.mean() + CONFIDENCE * error < 0)
