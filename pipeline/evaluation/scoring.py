"""Scores of one head on one set of images, each with a 95 % interval.

Accuracy has Wilson's interval; balanced accuracy and macro F1 combine the Wilson intervals of their classes, which is valid with
few images of a rare class too; log loss has a normal interval of its mean, shares of labels and mAP one on the log-odds scale, any
other score a bootstrap. Dependent images count by their effective sample size. `per_class` and `confusion_matrix` break the same counts down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats
from scipy.special import expit, logit
from sklearn.metrics import confusion_matrix as count_pairs
from sklearn.metrics import precision_recall_fscore_support

from pipeline.data.classes import MultiLabel
from pipeline.evaluation.intervals import Interval, agreed, critical, effective_size, freedom, share_interval, wilson
from pipeline.evaluation.metric import ACCURACY, METRICS, Metric, bootstrap, metrics_for, unit_sums
from pipeline.evaluation.predictions import Predictions

RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """Scores of predictions for `n` images: by metric name the scores as users know them, and 95 % intervals.

    `units` is the number of independent groups or sets of copies; None when all images are independent.
    """

    n: int
    values: Mapping[str, float]
    intervals: Mapping[str, Interval]
    units: int | None = None

    def __getitem__(self, name: str) -> float | None:
        return self.values.get(name)

    def of(self, metric: Metric) -> tuple[float | None, Interval | None]:
        """Return the score in a metric with its interval; None and None where it is unknown."""
        name = metric.name if metric.name in self.values else "tuned"
        return self.values.get(name), self.intervals.get(name)

    @property
    def accuracy(self) -> float:
        """The share of images that were labelled right."""
        return self.values["accuracy"]

    @property
    def interval(self) -> Interval:
        """The interval of the accuracy."""
        return self.intervals["accuracy"]

    @property
    def correct(self) -> int:
        """How many images were labelled right."""
        return round(self.n * self.accuracy)

    def to_record(self) -> dict[str, Any]:
        """Return one plain mapping for JSON."""
        spans = {_named(name): span for name, span in self.intervals.items()}
        return {"n": self.n, **self.values, **spans, "units": self.units}

    @staticmethod
    def from_record(raw: Mapping[str, Any]) -> Scores:
        """Return what `to_record` wrote; version 0.1 has null for unknown scores, and `tuned` for the tuned metric's."""
        found = {name: value for name, value in raw.items() if isinstance(value, float)}
        spans = {name: tuple(raw[_named(name)]) for name in found if raw.get(_named(name))}
        return Scores(raw["n"], found, spans, raw.get("units"))


def _named(metric: str) -> str:
    return "interval" if metric == "accuracy" else f"{metric}_interval"


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class, or of one of several labels, which also have an average precision and a threshold.

    `interval` is that of the recall, or of a label's average precision, both None for a label that no image has.
    """

    label: str
    support: int
    predicted: int
    precision: float
    recall: float
    f1: float
    average_precision: float | None
    interval: Interval | None
    threshold: float | None


def scores(predictions: Predictions, seed: int = 0, metric: Metric | None = None) -> Scores:
    """Score predictions of n >= 1 images in `metric` and in every metric of their target that has a leaderboard column.

    Balanced accuracy is the mean recall of the classes that occur in the truth; macro F1 is the mean over the classes that occur
    in the truth or the predictions.
    """
    known, values, intervals = predictions.probabilities is not None, dict[str, float](), dict[str, Interval]()
    for row in metrics_for(predictions.target):
        if (row.column is not None or row is metric) and (known or not row.needs_probabilities):
            values[row.name], intervals[row.name] = _scored(row, predictions, seed)
    units = None if predictions.units is None else len(np.unique(predictions.units))
    return Scores(len(predictions), values, intervals, units)


def _scored(metric: Metric, predictions: Predictions, seed: int) -> tuple[float, Interval]:
    """Return a score as users know it, and its interval by the method for its metric."""
    if metric.shares is ACCURACY.shares:
        return float(predictions.correct.mean()), share_interval(predictions.correct, predictions.units)
    if metric.shares is not None and metric.per_class:
        return metric.score(predictions), _class_mean_interval(metric, predictions)
    if metric.mean_of_images and not metric.bounded:
        return _mean_interval(metric, predictions)
    if metric.influence is not None or metric.shares is not None:
        return _log_odds_interval(metric, predictions)
    if not metric.per_class:
        return _distance_interval(metric, predictions)
    return _resampled(metric, predictions, seed)


def _mean_interval(metric: Metric, predictions: Predictions) -> tuple[float, Interval]:
    """Return a loss that is a mean over images, and its normal interval."""
    losses = -metric.contributions(predictions)
    mean = float(losses.mean())
    half = critical(predictions.units) * float(losses.std(ddof=1)) / np.sqrt(len(losses)) if len(losses) > 1 else np.inf
    return mean, (max(0.0, mean - half), mean + half)


def _distance_interval(metric: Metric, predictions: Predictions) -> tuple[float, Interval]:
    """Return a score and its interval, made on a logarithmic scale of the distance to the best score, which is never below 0.

    The standard error is that of the jackknife over units.
    """
    added, sign = metric.contributions(predictions), metric.sign
    score = metric.score(predictions)
    error = critical(predictions.units) * float(added.std(ddof=1)) / np.sqrt(len(added))
    distance = max(metric.high - score, 1e-12)
    factor = np.exp(error / distance)
    low, high = sorted(sign * (metric.high - distance * end) for end in (factor, 1 / factor))
    return sign * score, (low, high)


def _log_odds_interval(metric: Metric, predictions: Predictions) -> tuple[float, Interval]:
    """Return a score between 0 and 1, or -1 and 0, and its interval on the log-odds scale with the jackknife's standard error.

    The lower end is centred on the score minus its `excess`, the upper end on the score minus half of it, which simulations with few
    images per label support. A perfect score does not vary, so its labels get the width of Wilson's intervals of their images.
    """
    units, z, score = predictions.unit_numbers, critical(predictions.units), metric.score(predictions)
    parts = [units[part] for part in predictions.members] if metric.per_class else [units]
    if units.max() == 0:
        low, high = metric.low, metric.high
    elif metric.high - score < 1e-9:
        low, high = score - agreed(parts, z), score
    else:
        added = metric.contributions(predictions)
        error = z * float(added.std(ddof=1)) / np.sqrt(len(added))
        if metric.influence is not None:
            sizes = np.array([len(np.unique(part)) for part in parts])
            error = _error_of_labels(metric.influence(predictions), sizes, predictions.units)
        above, excess = score - metric.low, metric.excess(predictions) if metric.excess else 0.0
        around = np.clip([above - excess, above - excess / 2], 1e-6, 1 - 1e-6)
        ends = expit(logit(around) + np.array([-error, error]) / (around * (1 - around))) + metric.low
        low, high = min(float(ends[0]), score), max(float(ends[1]), score)
    return (-score, (-high, -low)) if metric.lower_is_better else (score, (low, high))


def _error_of_labels(
    influence: NDArray[np.float64], sizes: NDArray[np.integer], units: NDArray[np.int64] | None
) -> float:
    """Return the half width of Student's interval of a mean over labels, valid where few units have a label.

    The degrees of freedom combine those of the labels (Satterthwaite 1946), but are at most those of all units.
    influence : shape (n, labels); sizes : the number of units that have each label, shape (labels,)
    """
    spare = np.maximum(sizes - 1, 1)
    added = unit_sums(sparse.csr_array(influence), units).toarray() * (sizes / spare)
    variances = np.sum(added**2, axis=0)
    worth = float(variances.sum() ** 2 / max(np.sum(variances**2 / spare), 1e-300))
    most = len(added) - 1 if units is None else freedom(units)
    scale = stats.t.ppf(0.975, max(1.0, min(worth, most))) * np.sqrt(len(added) / max(len(added) - 1, 1))
    return float(scale * np.sqrt(np.sum(added.sum(axis=1) ** 2)))


def _class_mean_interval(metric: Metric, predictions: Predictions) -> Interval:
    """Return the interval of a mean over classes of recalls or F1, recovered from each class's own interval.

    The distances from a class's share to the ends of its interval take the place of standard errors, and are combined with the
    correlations of the units' contributions. (A bootstrap fails with three images of a class.) F1 is 2 J / (1 + J) for the share J
    of right ones among the images that belong to the class or are predicted to. Source: Zou and Donner 2008 (variance estimates
    recovery).
    """
    assert metric.shares is not None
    shares, f1 = metric.shares(predictions), metric.name == "macro_f1"
    width = shares.shape[1] // 2
    above, below = np.split(shares.sum(axis=0), 2)
    present = np.flatnonzero(below)
    share, z = above[present] / below[present], critical(predictions.units)
    ends = np.empty((len(present), 2))
    y_true, y_pred = predictions.y_true, predictions.y_pred
    for row, code in enumerate(present):
        one = y_true.ndim == 1
        truth, guess = (y_true == code, y_pred == code) if one else (y_true[:, code], y_pred[:, code])
        rows = truth | (f1 & guess)
        right, within = (truth & guess)[rows], None if predictions.units is None else predictions.units[rows]
        size = effective_size(right, within)
        ends[row] = wilson(float(right.mean()) * size, size, z)
    ends = 2 * ends / (1 + ends) if f1 else ends
    influence = (shares[:, present] - shares[:, width + present] * share) / below[present]
    added = unit_sums(sparse.csr_array(influence), predictions.units)
    spread = np.sqrt(np.asarray(added.multiply(added).sum(axis=0)).reshape(-1))
    known = spread > 0

    def half(distances: NDArray[np.float64]) -> float:
        together = added @ np.divide(distances, spread, out=np.zeros_like(spread), where=known)
        return float(np.sqrt(np.sum(together**2) + np.sum(distances[~known] ** 2)) / len(distances))

    mean = float(share.mean())
    return max(0.0, mean - half(share - ends[:, 0])), min(1.0, mean + half(ends[:, 1] - share))


def _resampled(metric: Metric, predictions: Predictions, seed: int) -> tuple[float, Interval]:
    """Return any score as users know it, with the percentile interval of the bootstrap over units."""
    sign = metric.sign
    draws = sign * bootstrap(metric, [predictions], seed, RESAMPLES)[:, 0]
    low, high = np.quantile(draws, [0.025, 0.975])
    return sign * metric.score(predictions), (float(low), float(high))


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): int64 of shape (n_classes, n_classes)."""
    codes = np.arange(len(predictions.classes))
    return np.asarray(count_pairs(predictions.y_true, predictions.y_pred, labels=codes), dtype=np.int64)


def per_class(predictions: Predictions) -> tuple[ClassScores, ...]:
    """Return precision, recall and F1 of every class or label in order; an undefined share is 0."""
    truth, guess, units, target = predictions.y_true, predictions.y_pred, predictions.units, predictions.target
    codes, p, made = np.arange(target.width), predictions.probabilities, []
    found = precision_recall_fscore_support(truth, guess, labels=codes, zero_division=0.0)
    for code, label, precision, recall, f1, support in zip(codes, target.classes, *found, strict=True):
        shares = float(precision), float(recall), float(f1)
        scored: tuple[float | None, Interval | None] = (None, None)
        if isinstance(target, MultiLabel):
            predicted, threshold = guess[:, code], (target.thresholds or (0.5,) * target.width)[code]
            if support and p is not None:
                y, said, own = truth[:, [code]], guess[:, [code]], p[:, [code]]
                alone = replace(
                    predictions, y_true=y, y_pred=said, probabilities=own, scores=None, target=MultiLabel((label,))
                )
                scored = _scored(METRICS["mean_average_precision"], alone, 0)
        else:
            rows, predicted, threshold = truth == code, guess == code, None
            within = None if units is None else units[rows]
            scored = None, share_interval(predicted[rows], within) if support else (0.0, 1.0)
        made.append(ClassScores(label, int(support), int(predicted.sum()), *shares, *scored, threshold))
    return tuple(made)
