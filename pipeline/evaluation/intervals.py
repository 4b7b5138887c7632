"""Confidence intervals of scores, and prediction intervals of the accuracy on more images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Interval = tuple[float, float]
"""Lower and upper end."""

Z = float(stats.norm.ppf(0.975))
"""Half width of a 95 % normal interval in standard errors."""


def wilson(correct: float, n: float, z: float = Z) -> Interval:
    """Return Wilson's score interval for a share of `correct` out of `n`, which need not be integers (SciPy's need).

    It keeps its coverage near 0 and 1, where the normal interval fails. Source: Wilson 1927; Brown, Cai, DasGupta 2001.
    """
    if n <= 0:
        return (0.0, 1.0)
    share = correct / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and n the exact end is 0 and 1; rounding would leave it a hair outside.
    low = 0.0 if correct == 0 else max(0.0, float(centre - half))
    high = 1.0 if correct == n else min(1.0, float(centre + half))
    return (low, high)


def tango(only_a: float, only_b: float, n: float, z: float = Z) -> Interval:
    """Return the score interval for the difference of two shares of the same n images; counts need not be integers.

    only_a, only_b : how many images only the first, and only the second, has right. Where both agree on all images the half width is
    z^2 / (n + z^2). Source: Tango 1998; the restricted estimate is his equation 4.
    """

    def score(difference: float) -> float:
        b = (2 * n - only_a + only_b) * difference - only_a - only_b
        c = -only_b * difference * (1 - difference)
        only = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * only + difference * (1 - difference))
        return float((only_a - only_b - n * difference) / np.sqrt(max(variance, 1e-300)))

    observed, edge = (only_a - only_b) / n, 1 - 1e-12
    low = optimize.brentq(lambda d: score(d) - z, -edge, observed) if score(-edge) > z and observed > -edge else -1.0
    high = optimize.brentq(lambda d: score(d) + z, observed, edge) if score(edge) < -z and observed < edge else 1.0
    return (float(low), float(high))


def numbered(units: NDArray[np.int64] | None, n: int) -> NDArray[np.int64]:
    """Return the unit of each of n images, int64 of shape (n,), numbered from 0 without a gap."""
    return np.arange(n) if units is None else np.unique(units, return_inverse=True)[1].reshape(-1)


def agreed(classes: Sequence[NDArray[np.int64]], z: float) -> float:
    """Return the interval width of a mean over classes of shares that are all 1: z^2 / (m + z^2) for a class of m units.

    classes : for each class the units of its images, int64 of shape (k,)
    """
    sizes = np.array([len(np.unique(units)) for units in classes])
    return float(np.sqrt(np.sum((z * z / (sizes + z * z)) ** 2)) / len(sizes))


def unit_size(units: NDArray[np.int64] | None) -> float:
    """Return the expected unit size of a random image, which is the largest possible design effect.

    units : int64 of shape (n,), the unit of each image; None where each is its own
    """
    if units is None or not len(units):
        return 1.0
    return float(np.sum(np.unique(units, return_counts=True)[1] ** 2) / len(units))


def effective_size(values: NDArray[np.floating] | NDArray[np.bool_], units: NDArray[np.int64] | None) -> float:
    """Return the effective sample size: how many independent images would give the mean of the values the same variance.

    It is n divided by the design effect (Kish 1965), which is the variance of the mean (delete-one-unit jackknife) over that of
    n independent images. The effect is at least 1 and at most `unit_size`, and equals `unit_size` where the values do not vary.

    values : ndarray of shape (n,); units : ndarray of shape (n,), int64, or None where each image is its own
    """
    n = len(values)
    if units is None:
        return float(n)
    place, largest = numbered(units, n), unit_size(units)
    centred = np.asarray(values, dtype=np.float64) - np.mean(values)
    sizes, squares = np.bincount(place), float(np.sum(centred**2))
    m = len(sizes)
    if m < 2 or squares == 0.0:
        return n / largest
    left_out = np.bincount(place, centred) / (1 - sizes / n)
    effect = (m - 1) / m * float(np.sum(left_out**2)) / squares
    return n / min(max(effect, 1.0), largest)


def freedom(units: NDArray[np.int64]) -> float:
    """Return the degrees of freedom of a variance between units: their effective number minus 1, at least 1.

    units : int64 of shape (n,), the unit of each image
    """
    return max(len(units) / unit_size(units) - 1, 1.0)


def critical(units: NDArray[np.int64] | None) -> float:
    """Return the critical value of a 95 % interval: normal for independent images, Student's for units.

    units : int64 of shape (n,), the unit of each image; None where each is its own
    """
    return Z if units is None else float(stats.t.ppf(0.975, freedom(units)))


def share_interval(values: NDArray[np.bool_], units: NDArray[np.int64] | None) -> Interval:
    """Return Wilson's interval for the share of true values at the effective sample size.

    values : bool of shape (n,); units : int64 of shape (n,), None where each image is its own
    """
    size = effective_size(values, units)
    return wilson(float(np.mean(values)) * size, size, critical(units))


def mean_interval(values: NDArray[np.float64], level: float = 0.95) -> Interval:
    """Return Student's t interval for the mean of independent values, float64 of shape (n,); infinite for n = 1."""
    return _student(values, 1 / max(len(values), 1), level)


def repeated_interval(scores: Sequence[float]) -> Interval:
    """Return the corrected resampled t interval for the mean of k fold scores; infinite for one fold.

    Folds share training images, so the variance is multiplied by 1/k + n_test/n_train, n_test/n_train being 1/(k - 1), in place of
    1/k. Source: Nadeau and Bengio 2003.
    """
    k = len(scores)
    return _student(np.asarray(scores), 1 / k + 1 / max(k - 1, 1))


def _student(values: NDArray[np.float64], share: float, level: float = 0.95) -> Interval:
    """Return the t interval for a mean whose variance is `share` times that of the values."""
    n = len(values)
    if n < 2:
        return (-np.inf, np.inf)
    half = float(stats.t.ppf(0.5 + level / 2, n - 1) * np.sqrt(share * np.var(values, ddof=1)))
    mean = float(np.mean(values))
    return (mean - half, mean + half)


EXPECTED_LEVEL = 0.999
"""Coverage: of leaderboards with ten correlated rows, less than one in a hundred has a row outside by chance."""
PRIOR_GROUPS = 5
"""Pseudo-groups with a correlation of 1 that are added as a prior: few errors tell little about the correlation."""


def expected_accuracy(
    correct: NDArray[np.bool_],
    n_test: int,
    groups: NDArray[np.int64] | None = None,
    test_groups: NDArray[np.int64] | None = None,
    allowance: float = 0.0,
    level: float = EXPECTED_LEVEL,
) -> Interval:
    """Return the prediction interval of the accuracy on n_test more images of the same kind.

    Given the number right out of fold, the number right on the test is beta-binomial (Jeffreys' prior). Images of a group are
    correlated, so both numbers are divided by the design effect 1 + (size - 1) * correlation (Kish 1965).

    correct : ndarray of shape (n,), bool: which images were labelled right out of fold
    groups, test_groups : ndarrays of shape (n,) and (n_test,), int64: groups of the images; None where each is its own
    allowance : possible gain in accuracy from fitting on all training images, added to the upper end
    """
    n, right, alike = len(correct), int(correct.sum()), _alike(correct, groups)
    trained, tested = (1 + alike * (unit_size(images) - 1) for images in (groups, test_groups))
    count = max(1, round(n_test / tested))
    tails, shape = [(1 - level) / 2, (1 + level) / 2], (right / trained + 0.5, (n - right) / trained + 0.5)
    low, high = (stats.betabinom.ppf(tails, count, *shape) / count).tolist()
    return (low, min(1.0, high + allowance))


def _alike(correct: NDArray[np.bool_], groups: NDArray[np.int64] | None) -> float:
    """Return a conservative (high) estimate of the correlation of correctness within groups, from 0 to 1."""
    if groups is None:
        return 0.0
    effect, largest = len(correct) / effective_size(correct, groups), unit_size(groups)
    found = (effect - 1) / (largest - 1) if largest > 1 else 1.0
    rarer = correct if correct.mean() < 0.5 else ~correct
    seen = len(np.unique(groups[rarer]))
    return (seen * found + PRIOR_GROUPS) / (seen + PRIOR_GROUPS)
