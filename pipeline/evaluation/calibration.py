"""Calibration: turn out-of-fold scores into probabilities, measure their calibration, correct them for other priors.

Sources: temperature, Guo et al. 2017; expected calibration error, Naeini et al. 2015; prior correction, Saerens et al. 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.special import expit, log_softmax, softmax

from pipeline.evaluation.intervals import Interval, share_interval
from pipeline.evaluation.metric import SMALLEST_PROBABILITY

MOST_BINS = 15
IMAGES_PER_BIN = 20
"""Images per bin: with fewer the measured error would mostly be chance."""
SIGMOIDS = "sigmoids"
MOST_REST = (1 - 1e-4) / 3
"""Limits a class's margin to 10,000: float32 scores cannot tell larger margins from infinity."""
AHEAD = 1e-3
"""Added to the margin of the predicted class: too little to show in a probability, enough to break a tie."""


@dataclass(frozen=True)
class Calibrator:
    """Turns a head's scores into probabilities, fitted on out-of-fold scores: `slopes` is (1/T,), `offsets` (0,).

    With several labels ('sigmoids') each label has its own slope and offset.
    """

    method: str
    slopes: tuple[float, ...]
    offsets: tuple[float, ...] = (0.0,)

    def probabilities(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return probabilities for decision scores or log-probabilities.

        scores : of any float dtype, shape (n, n_classes); returns float64 of the same shape
        """
        if self.method == SIGMOIDS:
            return np.asarray(expit(np.asarray(scores, dtype=np.float64) * self.slopes + self.offsets))
        logits = _LOGITS[self.method](np.asarray(scores, dtype=np.float64)) * self.slopes[0]
        return np.asarray(softmax(logits, axis=1))


@dataclass(frozen=True)
class ReliabilityBin:
    """Images with top probabilities from `low` to `high`: their mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """Calibration of probabilities: expected calibration error, Brier score, log loss, the reliability table."""

    ece: float
    brier: float
    log_loss: float
    bins: tuple[ReliabilityBin, ...]


def fit_calibrator(scores: NDArray[np.floating], y: NDArray[np.integer], method: str = "temperature") -> Calibrator:
    """Fit a temperature on out-of-fold scores; it never changes the most likely class.

    scores : ndarray of shape (n, n_classes), of any float dtype, decision scores or log-probabilities
    y : column of each true class, of any integer dtype, shape (n,)
    method : 'temperature', or 'margins' (temperature of `margins`, for scikit-learn's SVC with three classes or more).
    """
    values, rows = _LOGITS[method](np.asarray(scores, dtype=np.float64)), np.arange(len(y))
    scale = float(np.std(values - values.mean(axis=1, keepdims=True))) or 1.0

    def loss(log_slope: float) -> float:
        return -float(np.mean(log_softmax(values * (np.exp(log_slope) / scale), axis=1)[rows, y]))

    found = optimize.minimize_scalar(loss, bounds=(-7.0, 7.0), method="bounded", options={"xatol": 1e-4})
    return Calibrator(method, (float(np.exp(found.x) / scale),))


def fit_sigmoids(scores: NDArray[np.floating], y: NDArray[np.bool_]) -> Calibrator:
    """Fit a sigmoid for each label on out-of-fold scores, both of shape (n, k); the order of the images is kept.

    Source: Platt 1999, with his targets, which keep the probabilities of a rare label away from 0 and 1.
    """
    fitted = [_sigmoid(column, flags) for column, flags in zip(np.asarray(scores, np.float64).T, y.T, strict=True)]
    return Calibrator(SIGMOIDS, *(tuple(map(float, part)) for part in zip(*fitted, strict=True)))


def _sigmoid(scores: NDArray[np.float64], y: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the slope (above 0) and the offset of one label's sigmoid; scores and y of shape (n,)."""
    count, n = int(y.sum()), len(y)
    targets = np.where(y, (count + 1) / (count + 2), 1 / (n - count + 2))
    middle, scale = float(scores.mean()), float(scores.std()) or 1.0
    x, mean = (scores - middle) / scale, float(targets.mean())

    def loss(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = np.exp(point[0]) * x + point[1]
        off = expit(z) - targets
        return float(np.mean(np.logaddexp(0, z) - targets * z)), np.array([off @ (z - point[1]), off.sum()]) / n

    start = np.array([0.0, np.log(mean / (1 - mean))])
    slope, offset = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(-7, 7), (-30, 30)]).x
    return np.exp(slope) / scale, offset - np.exp(slope) * middle / scale


def margins(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the margin of each class, recovered from the scores of scikit-learn's `SVC.decision_function`.

    With 'ovr' the score of a class is the number of pairs it wins, plus m / (3 (|m| + 1)) for the sum m of its decision values in
    these pairs. The count dominates, so the top class leads by about one however confident the SVC is; m holds the confidence.
    The class with the highest score gets the highest margin too, so predictions do not change.

    scores : ndarray of shape (n, n_classes), n_classes >= 3, of any float dtype; returns an array of the same shape and dtype
    """
    rest = np.clip(scores - np.round(scores), -MOST_REST, MOST_REST)
    found: NDArray[np.float64] = 3 * rest / (1 - 3 * np.abs(rest))
    rows = np.arange(len(found))
    found[rows, scores.argmax(axis=1)] = found.max(axis=1) + AHEAD
    return found


_LOGITS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "temperature": np.asarray,
    "margins": margins,
}
"""Method -> function from scores to the logits that the temperature divides."""


def measure_calibration(
    probabilities: NDArray[np.floating],
    y: NDArray[np.integer],
    bins: int | None = None,
    units: NDArray[np.int64] | None = None,
) -> Calibration:
    """Measure probabilities of shape (n, n_classes) against the true columns y, shape (n,).

    Bins hold about equal numbers of images, by default about 20. Images of equal confidence share a bin, so the numbers differ
    where there are many of these.
    units : ndarray of shape (n,), int64: images that are not independent share a number; None when all are.
    Brier is the sum over classes of squared errors, from 0 (sure and right) to 2 (sure and wrong); log loss is in nats.
    """
    p, rows = np.asarray(probabilities, dtype=np.float64), np.arange(len(y))
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    order = np.argsort(confidence, kind="stable")
    bins = min(MOST_BINS, max(1, len(order) // IMAGES_PER_BIN)) if bins is None else bins
    table, gap = [], 0.0
    for part in np.split(order, _cuts(confidence[order], min(bins, len(order)))):
        accuracy, mean = float(right[part].mean()), float(confidence[part].mean())
        gap += len(part) / len(order) * abs(accuracy - mean)
        ends = (float(confidence[part[0]]), float(confidence[part[-1]]))
        interval = share_interval(right[part], None if units is None else units[part])
        table.append(ReliabilityBin(*ends, len(part), mean, accuracy, interval))
    truth = np.zeros_like(p)
    truth[rows, y] = 1.0
    brier = float(np.mean(np.sum((p - truth) ** 2, axis=1)))
    loss = -float(np.mean(np.log(np.clip(p[rows, y], SMALLEST_PROBABILITY, 1.0))))
    return Calibration(gap, brier, loss, tuple(table))


def _cuts(values: NDArray[np.float64], bins: int) -> list[int]:
    """Return the cuts of sorted values into at most `bins` parts of about equal size, never between equal values.

    A part of less than half the usual size joins the next.
    """
    n, cuts = len(values), [0]
    # Compare as float32, in which predictions are stored: rounding must not cut a constant prediction.
    allowed = np.flatnonzero(np.diff(values.astype(np.float32))) + 1
    for part in range(1, bins if len(allowed) else 0):
        cut = int(allowed[np.abs(allowed - part * n / bins).argmin()])
        if min(cut - cuts[-1], n - cut) >= n / bins / 2:
            cuts.append(cut)
    return cuts[1:]


def correct_priors(
    probabilities: NDArray[np.floating], trained: NDArray[np.floating], wanted: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Correct probabilities for a change of class frequencies from `trained` to `wanted`.

    Use it when classes were weighted or sampled in training.

    probabilities : of any float dtype, shape (n, n_classes); returns float64 of the same shape
    trained, wanted : of any float dtype, shape (n_classes,), sum 1
    """
    weighted = np.asarray(probabilities, dtype=np.float64) * (np.asarray(wanted) / np.maximum(trained, 1e-12))
    return np.asarray(weighted / np.maximum(weighted.sum(axis=1, keepdims=True), 1e-300))
