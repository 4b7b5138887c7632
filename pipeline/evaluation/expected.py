"""What the answers out of fold let expect of the test: a prediction interval of its accuracy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.evaluation.intervals import Interval

LEVEL = 0.999
"""Of a leaderboard of ten rows, whose answers go together, less than one in a hundred has a row outside by chance."""


def expected_accuracy(
    correct: NDArray[np.bool_],
    n_test: int,
    groups: NDArray[np.integer] | None = None,
    test_groups: NDArray[np.integer] | None = None,
    allowance: float = 0.0,
    level: float = LEVEL,
) -> Interval:
    """Return the prediction interval of the accuracy on n_test more images of the same kind.

    Given how many were right out of fold, how many will be is beta-binomial (Jeffreys' prior). Images of a group are alike,
    so that they count as fewer: by the design effect 1 + (size - 1) * correlation (Kish 1965).

    correct : ndarray of shape (n,): which images were labelled right out of fold
    groups, test_groups : ndarrays of shape (n,) and (n_test,), the group of each image; None where each is its own
    allowance : what fitting on all training images may add to the accuracy, for the upper end
    """
    n, right = len(correct), int(correct.sum())
    alike = 0.0 if groups is None else _alike(correct, groups)
    trained, tested = (1 + alike * (_mean_size(images) - 1) for images in (groups, test_groups))
    count = max(1, round(n_test / tested))
    low, high = (
        stats.betabinom.ppf(tail, count, right / trained + 0.5, (n - right) / trained + 0.5) / count
        for tail in ((1 - level) / 2, (1 + level) / 2)
    )
    return (float(low), float(min(1.0, high + allowance)))


def _mean_size(groups: NDArray[np.integer] | None) -> float:
    """Return the size of the group of a random image."""
    if groups is None or len(groups) == 0:
        return 1.0
    sizes = np.unique(groups, return_counts=True)[1]
    return float((sizes**2).sum() / sizes.sum())


PRIOR_GROUPS = 5
"""Groups with errors whose images are all alike, taken to have been seen besides: few errors tell little of how alike."""


def _alike(correct: NDArray[np.bool_], groups: NDArray[np.integer]) -> float:
    """Return the correlation of correctness within groups, from 0 to 1, rather too high than too low."""
    place, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    away = np.bincount(place, weights=correct - correct.mean())
    pairs, within = float((sizes * (sizes - 1)).sum()), float(((correct - correct.mean()) ** 2).sum())
    together = float((away**2).sum()) - within
    found = together / pairs * len(correct) / within if pairs and within else 1.0
    rarer = correct if correct.mean() < 0.5 else ~correct
    seen = len(np.unique(place[rarer]))
    return float(np.clip((seen * found + PRIOR_GROUPS) / (seen + PRIOR_GROUPS), 0.0, 1.0))
