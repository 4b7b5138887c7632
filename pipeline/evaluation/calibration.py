"""Do probabilities mean what they say? Fit them on out-of-fold scores, measure them, correct them for other priors.

Sources: temperature, Guo et al. 2017; sigmoid, Platt 1999 with his smoothed targets; expected calibration error,
Naeini et al. 2015; prior correction and its estimate by expectation-maximisation, Saerens et al. 2002.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from pipeline.evaluation.intervals import Interval, share_interval
from pipeline.evaluation.metric import numbered

MOST_BINS = 15
IMAGES_PER_BIN = 20
"""With fewer in a bin the error measured would mostly be chance."""


@dataclass(frozen=True)
class Calibrator:
    """Turns a head's scores into probabilities by numbers fitted on out-of-fold scores.

    `slopes` and `offsets` hold one number for all classes (temperature and margins: 1/T and 0) or one per class (sigmoid).
    """

    method: str
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]

    def probabilities(self, scores: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return probabilities of shape (n, n_classes) for decision scores or log-probabilities of the same shape."""
        return _APPLY[self.method](np.asarray(scores, dtype=np.float64), self)


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose top probability lies from `low` to `high`: their mean confidence and how often they were right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed: expected calibration error, Brier score, log loss, the reliability table."""

    ece: float
    brier: float
    log_loss: float
    bins: tuple[ReliabilityBin, ...]


def scores_as_columns(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return decision scores with one column per class: a binary head's single score s becomes (-s, s)."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 1 or values.shape[1] == 1:
        values = values.reshape(-1)
        return np.stack([-values, values], axis=1)
    return values


def fit_calibrator(scores: NDArray[np.floating], y: NDArray[np.integer], method: str = "temperature") -> Calibrator:
    """Fit a calibrator on out-of-fold scores.

    scores : ndarray of shape (n, n_classes), decision scores or log-probabilities; y : column of each true class, (n,).
    method : 'temperature' (one number, never changes the predicted class), 'sigmoid' (two numbers per class), or 'margins'
        (temperature of `margins`, for the scores that scikit-learn's SVC gives three classes or more).
    """
    return _FIT[method](np.asarray(scores, dtype=np.float64), np.asarray(y))


def margins(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return how clearly each class wins over the others, from the scores of scikit-learn's `SVC.decision_function`.

    With 'ovr' an SVC scores a class by the pairs it wins, plus m / (3 (|m| + 1)) for the sum m of its decision values in
    these pairs. The count leads, so the likeliest class of every image is about one ahead of the next, however sure
    the SVC is; that is in m. The class that leads by count keeps the highest margin, just so where others have as clear a one.

    scores : ndarray of shape (n, n_classes), n_classes >= 3; so is what is returned
    """
    rest = scores - np.round(scores)
    rest = np.clip(rest, -_MOST_REST, _MOST_REST)
    found: NDArray[np.float64] = 3 * rest / (1 - 3 * np.abs(rest))
    rows = np.arange(len(found))
    found[rows, scores.argmax(axis=1)] = found.max(axis=1) + _AHEAD
    return found


_MOST_REST = (1 - 1e-4) / 3
"""A class's margin is at most 10,000: beyond it float32 scores do not tell it from infinity."""

_AHEAD = 1e-3
"""In units of the SVC's margin: too little to be seen in a probability, enough to decide which is the highest."""


def _fit_margins(scores: NDArray[np.float64], y: NDArray[np.integer]) -> Calibrator:
    return replace(_fit_temperature(margins(scores), y), method="margins")


def _fit_temperature(scores: NDArray[np.float64], y: NDArray[np.integer]) -> Calibrator:
    scale = float(np.std(scores - scores.mean(axis=1, keepdims=True))) or 1.0

    def loss(log_slope: float) -> float:
        logits = scores * (np.exp(log_slope) / scale)
        return -float(np.mean(_log_softmax(logits)[np.arange(len(y)), y]))

    found = optimize.minimize_scalar(loss, bounds=(-7.0, 7.0), method="bounded", options={"xatol": 1e-4})
    return Calibrator("temperature", (float(np.exp(found.x) / scale),), (0.0,))


def _fit_sigmoid(scores: NDArray[np.float64], y: NDArray[np.integer]) -> Calibrator:
    fitted = [_platt(scores[:, column], y == column) for column in range(scores.shape[1])]
    return Calibrator("sigmoid", tuple(slope for slope, _ in fitted), tuple(offset for _, offset in fitted))


def _platt(score: NDArray[np.float64], positive: NDArray[np.bool_]) -> tuple[float, float]:
    """Fit slope and offset of a logistic curve to one class, with Platt's targets, which never reach 0 and 1."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    target = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_negative + 2))
    scale = float(np.std(score)) or 1.0
    scaled = score / scale

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logit = parameters[0] * scaled + parameters[1]
        value = float(np.mean(np.logaddexp(0.0, logit) - target * logit))
        residual = _sigmoid(logit) - target
        return value, np.array([np.mean(residual * scaled), np.mean(residual)])

    start = np.array([1.0, np.log((n_positive + 1) / (n_negative + 1))])
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None), (None, None)])
    return float(found.x[0] / scale), float(found.x[1])


def _apply_temperature(scores: NDArray[np.float64], calibrator: Calibrator) -> NDArray[np.float64]:
    probabilities: NDArray[np.float64] = np.exp(_log_softmax(scores * calibrator.slopes[0]))
    return probabilities


def _apply_margins(scores: NDArray[np.float64], calibrator: Calibrator) -> NDArray[np.float64]:
    return _apply_temperature(margins(scores), calibrator)


def _apply_sigmoid(scores: NDArray[np.float64], calibrator: Calibrator) -> NDArray[np.float64]:
    each = _sigmoid(scores * np.array(calibrator.slopes) + np.array(calibrator.offsets))
    probabilities: NDArray[np.float64] = each / np.maximum(each.sum(axis=1, keepdims=True), 1e-300)
    return probabilities


_FIT: Mapping[str, Callable[[NDArray[np.float64], NDArray[np.integer]], Calibrator]] = {
    "temperature": _fit_temperature,
    "sigmoid": _fit_sigmoid,
    "margins": _fit_margins,
}
_APPLY: Mapping[str, Callable[[NDArray[np.float64], Calibrator], NDArray[np.float64]]] = {
    "temperature": _apply_temperature,
    "sigmoid": _apply_sigmoid,
    "margins": _apply_margins,
}


def measure_calibration(
    probabilities: NDArray[np.floating],
    y: NDArray[np.integer],
    bins: int | None = None,
    units: NDArray[np.int64] | None = None,
) -> Calibration:
    """Measure probabilities of shape (n, n_classes) against the true columns y, shape (n,).

    Bins hold about equal numbers of images, so that none is nearly empty, and by default 20 or nearly so many. Images that are
    equally sure share a bin, as nothing but their order could part them, so the numbers differ where there are many of these.
    units : ndarray of shape (n,), int64: images that are not independent share a number; None when all are.
    Brier is the sum over classes of squared errors, from 0 (sure and right) to 2 (sure and wrong); log loss is in nats.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == y
    order = np.argsort(confidence, kind="stable")
    bins = min(MOST_BINS, max(1, len(order) // IMAGES_PER_BIN)) if bins is None else bins
    table, gap = [], 0.0
    for rows in np.split(order, _cuts(confidence[order], min(bins, len(order)))):
        accuracy, mean = float(right[rows].mean()), float(confidence[rows].mean())
        gap += len(rows) / len(order) * abs(accuracy - mean)
        ends = (float(confidence[rows[0]]), float(confidence[rows[-1]]))
        within = None if units is None else numbered(units[rows], len(rows))
        table.append(ReliabilityBin(*ends, len(rows), mean, accuracy, share_interval(right[rows], within)))
    truth = np.zeros_like(p)
    truth[np.arange(len(y)), y] = 1.0
    brier = float(np.mean(np.sum((p - truth) ** 2, axis=1)))
    loss = -float(np.mean(np.log(np.clip(p[np.arange(len(y)), y], 1e-15, 1.0))))
    return Calibration(gap, brier, loss, tuple(table))


def _cuts(values: NDArray[np.float64], bins: int) -> list[int]:
    """Return where to cut sorted values into at most so many parts of about equal size, never between two equal ones.

    A part that would have less than half of its size joins the next.
    """
    n, cuts = len(values), [0]
    # Equal to float32 is equal, as predictions are kept in it: rounding must not cut a constant guess.
    allowed = np.flatnonzero(np.diff(values.astype(np.float32))) + 1
    for part in range(1, bins if len(allowed) else 0):
        cut = int(allowed[np.abs(allowed - part * n / bins).argmin()])
        if min(cut - cuts[-1], n - cut) >= n / bins / 2:
            cuts.append(cut)
    return cuts[1:]


def correct_priors(
    probabilities: NDArray[np.floating], trained: NDArray[np.floating], wanted: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Return probabilities as they would be had the classes been as frequent as `wanted`, not as `trained`.

    Both priors have shape (n_classes,) and sum to 1. Use it when classes were weighted or sampled in training.
    """
    weighted = np.asarray(probabilities, dtype=np.float64) * (np.asarray(wanted) / np.maximum(trained, 1e-12))
    corrected: NDArray[np.float64] = weighted / np.maximum(weighted.sum(axis=1, keepdims=True), 1e-300)
    return corrected


def estimate_priors(
    probabilities: NDArray[np.floating], trained: NDArray[np.floating], steps: int = 500
) -> NDArray[np.float64]:
    """Estimate how frequent each class is among unlabelled images from calibrated probabilities, shape (n_classes,)."""
    priors = np.asarray(trained, dtype=np.float64)
    for _ in range(steps):
        updated = correct_priors(probabilities, trained, priors).mean(axis=0)
        if np.abs(updated - priors).max() < 1e-9:
            break
        priors = updated
    return priors


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    value: NDArray[np.float64] = np.exp(-np.logaddexp(0.0, -x))
    return value


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = x - x.max(axis=1, keepdims=True)
    value: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return value
