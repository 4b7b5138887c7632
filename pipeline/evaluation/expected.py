"""What the answers out of fold let expect of the test: a prediction interval of its accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.evaluation.intervals import Interval, effective_size, unit_size

LEVEL = 0.999
"""Of a leaderboard of ten rows, whose answers go together, less than one in a hundred has a row outside by chance."""


def expected_accuracy(
    correct: NDArray[np.bool_],
    n_test: int,
    groups: NDArray[np.int64] | None = None,
    test_groups: NDArray[np.int64] | None = None,
    allowance: float = 0.0,
    level: float = LEVEL,
) -> Interval:
    """Return the prediction interval of the accuracy on n_test more images of the same kind.

    Given how many were right out of fold, how many will be is beta-binomial (Jeffreys' prior). Images of a group are alike,
    so that they count as fewer: by the design effect 1 + (size - 1) * correlation (Kish 1965).

    correct : ndarray of shape (n,), bool: which images were labelled right out of fold
    groups, test_groups : ndarrays of shape (n,) and (n_test,), int64: groups of the images; None where each is its own
    allowance : what fitting on all training images may add to the accuracy, for the upper end
    """
    n, right = len(correct), int(correct.sum())
    alike = _alike(correct, groups)
    trained, tested = (1 + alike * (unit_size(images) - 1) for images in (groups, test_groups))
    count = max(1, round(n_test / tested))
    low, high = (
        stats.betabinom.ppf(tail, count, right / trained + 0.5, (n - right) / trained + 0.5) / count
        for tail in ((1 - level) / 2, (1 + level) / 2)
    )
    return (float(low), float(min(1.0, high + allowance)))


PRIOR_GROUPS = 5
"""Groups with errors whose images are all alike, taken to have been seen besides: few errors tell little of how alike."""


def _alike(correct: NDArray[np.bool_], groups: NDArray[np.int64] | None) -> float:
    """Return the correlation of correctness within groups, from 0 to 1, rather too high than too low."""
    if groups is None:
        return 0.0
    effect, largest = len(correct) / effective_size(correct, groups), unit_size(groups)
    found = (effect - 1) / (largest - 1) if largest > 1 else 1.0
    rarer = correct if correct.mean() < 0.5 else ~correct
    seen = len(np.unique(groups[rarer]))
    return (seen * found + PRIOR_GROUPS) / (seen + PRIOR_GROUPS)
