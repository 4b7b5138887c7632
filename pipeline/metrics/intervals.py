"""Intervals that say how far a score can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]
"""Lower and upper end."""


def wilson(correct: int, n: int, level: float = 0.95) -> Interval:
    """Return Wilson's score interval for a share of `correct` out of `n`.

    Keeps its coverage near 0 and 1, where the normal interval fails. Source: Wilson 1927; Brown, Cai, DasGupta 2001.
    """
    if n == 0:
        return (0.0, 1.0)
    z = float(stats.norm.ppf(0.5 + level / 2))
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the exact end is 0 and 1; rounding would leave it a hair outside.
    low = 0.0 if correct == 0 else max(0.0, float(centre - half))
    high = 1.0 if correct == n else min(1.0, float(centre + half))
    return (low, high)


def mean_interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of independent values, shape (n,); infinite for n = 1."""
    n = len(values)
    if n < 2:
        return (-np.inf, np.inf)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    mean = float(np.mean(values))
    return (mean - half, mean + half)


def repeated_interval(scores: Sequence[float], test_share: float | None = None) -> Interval:
    """Return the corrected resampled t interval for the mean of fold scores, shape (k,); infinite for one fold.

    Folds share training images, so the variance counts 1/k + n_test/n_train times and not 1/k. test_share : n_test /
    n_train, 1/(k - 1) when not given. Source: Nadeau and Bengio 2003.
    """
    k = len(scores)
    if k < 2:
        return (-np.inf, np.inf)
    share = 1 / (k - 1) if test_share is None else test_share
    half = float(stats.t.ppf(0.975, k - 1) * np.sqrt((1 / k + share) * np.var(scores, ddof=1)))
    mean = float(np.mean(scores))
    return (mean - half, mean + half)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.intp]], float], n: int, seed: int, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of `n` rows.

    `statistic` gets the drawn row numbers, shape (n,). Source: Efron and Tibshirani 1993, chapter 13.
    """
    rng = np.random.default_rng(seed)
    values = np.array([statistic(rng.integers(0, n, n)) for _ in range(resamples)])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high))
