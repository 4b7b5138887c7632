"""Learning curves: accuracy by number of labelled images, its extrapolation, and the cost of accuracy.

The curve is `error(n) = floor + scale * n**-rate`; its extrapolation is tested by holding back the largest sizes from the fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Interval, mean_interval


@dataclass(frozen=True)
class CurvePoint:
    """Accuracy with `size` training images: mean over draws of the images, its 95 % t interval, the individual scores."""

    size: int
    accuracy: float
    interval: Interval
    scores: tuple[float, ...]


@dataclass(frozen=True)
class PowerLaw:
    """error(n) = floor + scale * n**-rate."""

    floor: float
    scale: float
    rate: float

    def accuracy(self, sizes: NDArray[np.floating] | Sequence[float]) -> NDArray[np.float64]:
        """Return the accuracy expected at each of k sizes: float64 of shape (k,)."""
        return np.asarray(1.0 - self.floor - self.scale * np.asarray(sizes, dtype=np.float64) ** -self.rate)


@dataclass(frozen=True)
class HeldBack:
    """An extrapolation from smaller sizes to this size, and the accuracy measured there, if any."""

    size: int
    predicted: float
    interval: Interval
    measured: float | None

    @property
    def inside(self) -> bool:
        """Whether the measured accuracy lies in the predicted interval."""
        return self.measured is not None and self.interval[0] <= self.measured <= self.interval[1]


@dataclass(frozen=True)
class LearningCurve:
    """Measured points, the fitted curve, its test on held-back sizes, and the forecast for more labels."""

    points: tuple[CurvePoint, ...]
    law: PowerLaw | None
    held_back: tuple[HeldBack, ...]
    forecast: tuple[HeldBack, ...]
    """Forecast for 2 and 4 times the present images; `measured` is None."""


def curve_sizes(n: int, n_classes: int, steps: int = 7) -> tuple[int, ...]:
    """Return about `steps` sizes, log-spaced from a few images per class to all n."""
    smallest = min(n, max(2 * n_classes, 10))
    return tuple(sorted({round(float(size)) for size in np.geomspace(smallest, n, steps)}))


def stratified_order(y: NDArray[np.generic], seed: int) -> NDArray[np.intp]:
    """Return an order of all rows, intp of shape (n,), in which every prefix is stratified; y of shape (n,)."""
    rng = np.random.default_rng(seed)
    keys = np.empty(len(y))
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        keys[rows] = (np.arange(len(rows)) + rng.uniform(0.0, 1.0)) / len(rows)
    return np.argsort(keys, kind="stable")


def curve_scores(
    build: Callable[[int], Any],
    train: tuple[NDArray[np.floating], NDArray[np.generic]],
    test: tuple[NDArray[np.floating], NDArray[np.generic]],
    sizes: Sequence[int],
    seed: int,
) -> NDArray[np.float64]:
    """Fit a cheap head on growing subsets of cached features; return its accuracy on fixed rows, one draw at every size.

    build : seed -> unfitted scikit-learn estimator; train, test : X of any float dtype, shape (n, dim), and y of any
    dtype, shape (n,). Every seed draws its own nested, stratified subsets. Rows of `test` must not be used in training.
    Returns float64 of shape (n_sizes,); NaN where a subset has one class only.
    """
    (X, y), (X_test, y_test) = train, test
    order = stratified_order(y, seed)
    scores = np.full(len(sizes), np.nan)
    for row, size in enumerate(sizes):
        part = order[:size]
        if len(np.unique(y[part])) > 1:
            scores[row] = np.mean(build(seed).fit(X[part], y[part]).predict(X_test) == y_test)
    return scores


def curve_from_scores(
    sizes: Sequence[int], scores: Sequence[NDArray[np.float64]], seed: int, labels: int | None = None
) -> LearningCurve:
    """Make the curve, its test and its forecast from measured scores per size.

    The forecast is for 2 and 4 times `labels`, the number of labelled images (default: the largest size).

    scores : for each size float64 of shape (n_draws,)
    """
    points = tuple(
        CurvePoint(size, float(np.mean(row)), mean_interval(np.asarray(row)), tuple(np.asarray(row).tolist()))
        for size, row in zip(sizes, scores, strict=True)
    )
    if len(points) < 4:
        return LearningCurve(points, None, (), ())
    hidden, there_are = 2 if len(points) >= 6 else 1, labels or points[-1].size
    held_back: tuple[HeldBack, ...] = ()
    if len(points) - hidden >= 4:
        held_back = _predict(points[:-hidden], {point.size: point.accuracy for point in points[-hidden:]}, seed)
    ahead = _predict(points, {2 * there_are: None, 4 * there_are: None}, seed)
    return LearningCurve(points, _fit(points), held_back, ahead)


RATES = np.geomspace(0.05, 2.0, 80)
RESAMPLES = 100


def _fit(points: Sequence[CurvePoint], means: NDArray[np.float64] | None = None) -> PowerLaw:
    """Fit the law by weighted least squares; means : accuracies to fit instead of the points' own, shape (n_points,).

    For a given rate the law is linear in floor and scale, so every rate of a grid is solved at once, with neither below 0.
    """
    sizes = np.array([point.size for point in points], dtype=np.float64)
    errors = 1.0 - (np.array([point.accuracy for point in points]) if means is None else means)
    # A few draws estimate a size's spread badly, so none is taken to be below half the median.
    spread = np.array([float(np.std(point.scores)) for point in points])
    weight = np.maximum(spread, max(float(np.median(spread)) / 2, 0.003)) ** -2.0
    weight /= weight.sum()
    x = (sizes / sizes[0]) ** -RATES[:, None]
    x_mean, e_mean = x @ weight, float(errors @ weight)
    slope = ((x - x_mean[:, None]) * (errors - e_mean)) @ weight / (((x - x_mean[:, None]) ** 2) @ weight)
    floor = e_mean - slope * x_mean
    through_zero = (x * errors) @ weight / ((x**2) @ weight)
    slope, floor = np.where(floor < 0, through_zero, slope), np.maximum(floor, 0.0)
    slope, floor = np.maximum(slope, 0.0), np.where(slope < 0, e_mean, floor)
    best = int(np.argmin(((floor[:, None] + slope[:, None] * x - errors) ** 2) @ weight))
    return PowerLaw(float(floor[best]), float(slope[best] * sizes[0] ** RATES[best]), float(RATES[best]))


def _predict(points: Sequence[CurvePoint], measured: Mapping[int, float | None], seed: int) -> tuple[HeldBack, ...]:
    """Extrapolate to sizes with an interval by resampling the draws of each size and refitting the law.

    The bootstrap of a three-parameter law through few points is too narrow, so the variance of the fit's residuals is added.
    """
    rng, law, sizes, draws = np.random.default_rng(seed), _fit(points), list(measured), []
    for _ in range(RESAMPLES):
        means = np.array([np.mean(rng.choice(point.scores, len(point.scores))) for point in points])
        draws.append(_fit(points, means).accuracy(sizes))
    misfit = law.accuracy([point.size for point in points]) - [point.accuracy for point in points]
    spread = np.mean([np.var(point.scores) / len(point.scores) for point in points[-3:]])
    half = 1.96 * np.sqrt(np.var(draws, axis=0) + np.mean(misfit**2) + spread)
    told = zip(measured.items(), law.accuracy(sizes).tolist(), half.tolist(), strict=True)
    return tuple(HeldBack(size, p, (p - h, p + h), found) for (size, found), p, h in told)


def ahead(curve: LearningCurve, size: int, seed: int) -> HeldBack:
    """Extrapolate a curve of four points or more to `size` labelled images; `measured` is None."""
    return _predict(curve.points, {size: None}, seed)[0]


def pareto(cost: Sequence[float], value: Sequence[float]) -> list[bool]:
    """Say for each candidate whether it is Pareto-optimal: no other has more value for no more cost, or less cost for no less value."""
    c, v = np.asarray(cost), np.asarray(value)
    beaten = ((c <= c[:, None]) & (v > v[:, None])) | ((c < c[:, None]) & (v >= v[:, None]))
    kept: list[bool] = np.logical_not(beaten.any(axis=1)).tolist()
    return kept
