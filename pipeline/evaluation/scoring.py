"""Scores of one head on one set of images, each with a 95 % interval.

Accuracy has Wilson's interval, balanced accuracy and macro F1 one made of Wilson's of each class, which holds with a few
images of a rare class too; log loss a normal interval of its mean, any other score a bootstrap. Images that are not
independent count for as many as they are worth. `per_class` and `confusion_matrix` break the same counts down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.metrics import confusion_matrix as count_pairs
from sklearn.metrics import precision_recall_fscore_support

from pipeline.evaluation.intervals import Interval, critical, effective_size, share_interval, wilson
from pipeline.evaluation.metric import ACCURACY, METRICS, Metric, drawn, rescored, unit_sums
from pipeline.evaluation.predictions import Predictions

RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """How well `n` images were labelled; an interval is the 95 % interval of the number before it.

    `tuned` is the score in the metric of the search where that is none of the others, as users know it. `units` is how many
    of the images, groups or sets of copies are independent; None when all images are.
    """

    n: int
    correct: int
    accuracy: float
    interval: Interval
    balanced_accuracy: float
    balanced_accuracy_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    log_loss: float | None
    log_loss_interval: Interval | None
    tuned: float | None = None
    tuned_interval: Interval | None = None
    units: int | None = None

    def of(self, metric: Metric) -> tuple[float | None, Interval | None]:
        """Return the score in a metric with its interval; None and None where it is not known."""
        if metric is ACCURACY:
            return self.accuracy, self.interval
        if hasattr(self, metric.name):
            return getattr(self, metric.name), getattr(self, f"{metric.name}_interval")
        return self.tuned, self.tuned_interval


@dataclass(frozen=True)
class ClassScores:
    """One row of the per-class table; `interval` is Wilson's for the recall."""

    label: str
    support: int
    predicted: int
    precision: float
    recall: float
    interval: Interval
    f1: float


def scores(predictions: Predictions, seed: int = 0, metric: Metric = ACCURACY) -> Scores:
    """Score predictions of n images, at least 1; metric : the score of the search.

    Balanced accuracy is the mean recall of the classes that occur in the truth; macro F1 the mean over classes that occur in
    either.
    """
    macro: dict[str, Any] = {}
    for name in ("balanced_accuracy", "macro_f1"):
        row = METRICS[name]
        macro |= {name: row.score(predictions), f"{name}_interval": _class_mean_interval(row, predictions)}
    loss, loss_interval, tuned, tuned_interval = None, None, None, None
    if predictions.probabilities is not None:
        loss, loss_interval = _mean_interval(METRICS["log_loss"], predictions)
        if metric.name not in Scores.__dataclass_fields__:
            tuned, tuned_interval = _resampled(metric, predictions, seed)
    units = predictions.units
    return Scores(
        n=len(predictions),
        correct=int(predictions.correct.sum()),
        accuracy=float(predictions.correct.mean()),
        interval=share_interval(predictions.correct, units),
        **macro,
        log_loss=loss,
        log_loss_interval=loss_interval,
        tuned=tuned,
        tuned_interval=tuned_interval,
        units=None if units is None else len(np.unique(units)),
    )


def _mean_interval(metric: Metric, predictions: Predictions) -> tuple[float, Interval]:
    """Return a loss that is a mean over images, with the normal interval."""
    losses = -metric.contributions(predictions)
    mean = float(losses.mean())
    half = critical(predictions.units) * float(losses.std(ddof=1)) / np.sqrt(len(losses)) if len(losses) > 1 else np.inf
    return mean, (max(0.0, mean - half), mean + half)


def _class_mean_interval(metric: Metric, predictions: Predictions) -> Interval:
    """Return the interval of a mean over classes of recalls or of F1, recovered from each class's own interval.

    The distances from a class's share to the ends of its interval stand for its standard error, and those of all classes are
    combined by the correlations between what the units add to them. A bootstrap of three images of a class knows no more than
    these three. F1 is 2 J / (1 + J) for the share J of right ones among the images that are of the class or are called so.
    Source: Zou and Donner 2008 (variance estimates recovery).
    """
    assert metric.shares is not None
    shares, f1 = metric.shares(predictions), metric.name == "macro_f1"
    width = shares.shape[1] // 2
    above, below = np.split(shares.sum(axis=0), 2)
    present = np.flatnonzero(below)
    share, z = above[present] / below[present], critical(predictions.units)
    ends = np.empty((len(present), 2))
    for row, code in enumerate(present):
        rows = (predictions.y_true == code) | (f1 & (predictions.y_pred == code))
        within = None if predictions.units is None else predictions.units[rows]
        size = effective_size(predictions.correct[rows], within)
        ends[row] = wilson(float(predictions.correct[rows].mean()) * size, size, z)
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
    sign = 1.0 if metric.higher_is_better else -1.0
    weighted, m = rescored(metric, [predictions]), int(predictions.unit_numbers.max()) + 1
    draws = sign * np.concatenate([weighted(counts) for counts in drawn(m, seed, metric.draws(RESAMPLES))])[:, 0]
    low, high = np.quantile(draws, [0.025, 0.975])
    return sign * metric.score(predictions), (float(low), float(high))


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): shape (n_classes, n_classes)."""
    codes = np.arange(len(predictions.classes))
    return np.asarray(count_pairs(predictions.y_true, predictions.y_pred, labels=codes), dtype=np.int64)


def per_class(predictions: Predictions) -> tuple[ClassScores, ...]:
    """Return precision, recall and F1 of every class, in their order; an undefined share is 0."""
    truth, guess, units = predictions.y_true, predictions.y_pred, predictions.units
    codes = np.arange(len(predictions.classes))
    found = precision_recall_fscore_support(truth, guess, labels=codes, zero_division=0.0)
    made = []
    for code, precision, recall, f1, support in zip(codes, *found, strict=True):
        rows = truth == code
        within = None if units is None else units[rows]
        interval = share_interval(guess[rows] == code, within) if support else (0.0, 1.0)
        label, predicted = predictions.classes[code], int(np.sum(guess == code))
        made.append(ClassScores(label, int(support), predicted, float(precision), float(recall), interval, float(f1)))
    return tuple(made)
