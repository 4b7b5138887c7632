"""Scores of one head on one set of images, each with a 95 % interval.

Accuracy has Wilson's interval, balanced accuracy and macro F1 one made of Wilson's of each class, which holds with a few
images of a rare class too; log loss a normal interval of its mean, any other score a bootstrap. Images that are not
independent count for as many as they are worth. `per_class` and `confusion_matrix` break the same counts down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.metrics import confusion_matrix as count_pairs
from sklearn.metrics import precision_recall_fscore_support

from pipeline.evaluation.intervals import Interval, critical, effective_size, share_interval, wilson
from pipeline.evaluation.metric import ACCURACY, METRICS, Answers, Metric, Together, numbered, per_unit

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


def scores(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    probabilities: NDArray[np.floating] | None,
    classes: Sequence[str],
    seed: int = 0,
    units: NDArray[np.int64] | None = None,
    metric: Metric = ACCURACY,
) -> Scores:
    """Score predictions of shape (n,) against the truth.

    probabilities : ndarray of shape (n, n_classes), columns in the order of `classes`; None where the head has none.
    units : ndarray of shape (n,), int64: images that are not independent share a number; None when all are.
    metric : the score of the search. Balanced accuracy is the mean recall of the classes that occur in the truth; macro F1 the
    mean over classes that occur in either. A true label outside `classes` counts as wrong, with the smallest probability.
    """
    truth, guess = np.asarray(y_true).astype(str), np.asarray(y_pred).astype(str)
    if len(truth) != len(guess) or not len(truth):
        raise ValueError(
            f"{len(truth)} true labels and {len(guess)} predicted ones; both need the same number, at least 1"
        )
    answers = answers_of(truth, guess, probabilities, classes, units)
    macro: dict[str, Any] = {}
    for name in ("balanced_accuracy", "macro_f1"):
        macro |= {name: METRICS[name].score(answers), f"{name}_interval": _class_mean_interval(METRICS[name], answers)}
    loss, loss_interval = (None, None) if probabilities is None else _mean_interval(METRICS["log_loss"], answers)
    tuned, tuned_interval = None, None
    if metric.name not in Scores.__dataclass_fields__ and probabilities is not None:
        tuned, tuned_interval = _resampled(metric, answers, seed)
    return Scores(
        n=len(truth),
        correct=int(answers.correct.sum()),
        accuracy=float(answers.correct.mean()),
        interval=share_interval(answers.correct, answers.units),
        **macro,
        log_loss=loss,
        log_loss_interval=loss_interval,
        tuned=tuned,
        tuned_interval=tuned_interval,
        units=None if units is None else len(np.unique(units)),
    )


def answers_of(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    probabilities: NDArray[np.floating] | None,
    classes: Sequence[str],
    units: NDArray[np.int64] | None = None,
) -> Answers:
    """Return labels as the codes that metrics work on; labels outside `classes` come after them, with probability 0."""
    known = set(classes)
    names = (
        *classes,
        *sorted({*np.asarray(y_true).astype(str).tolist(), *np.asarray(y_pred).astype(str).tolist()} - known),
    )
    if probabilities is not None and len(names) > probabilities.shape[1]:
        probabilities = np.pad(probabilities, ((0, 0), (0, len(names) - probabilities.shape[1])))
    place = None if units is None else numbered(units, len(units))
    return Answers(class_columns(y_true, names), class_columns(y_pred, names), probabilities, place)


def _mean_interval(metric: Metric, answers: Answers) -> tuple[float, Interval]:
    """Return a loss that is a mean over images, with the normal interval."""
    assert metric.shares is not None
    losses = -per_unit(metric.shares(answers).contributions(), answers.units)
    mean = float(losses.mean())
    half = critical(answers.units) * float(losses.std(ddof=1)) / np.sqrt(len(losses)) if len(losses) > 1 else np.inf
    return mean, (max(0.0, mean - half), mean + half)


def _class_mean_interval(metric: Metric, answers: Answers) -> Interval:
    """Return the interval of a mean over classes of recalls or of F1, recovered from each class's own interval.

    The distances from a class's share to the ends of its interval stand for its standard error, and those of all classes are
    combined by the correlations between what the units add to them. A bootstrap of three images of a class knows no more than
    these three. F1 is 2 J / (1 + J) for the share J of right answers among the images that are of the class or are called so.
    Source: Zou and Donner 2008 (variance estimates recovery).
    """
    assert metric.shares is not None
    shares, f1 = metric.shares(answers), metric.name == "macro_f1"
    above, below = (np.asarray(part.sum(axis=0)).reshape(-1) for part in (shares.above, shares.below))
    present = np.flatnonzero(below)
    share, z = above[present] / below[present], critical(answers.units)
    ends = np.empty((len(present), 2))
    for row, code in enumerate(present):
        rows = (answers.truth == code) | (f1 & (answers.guess == code))
        within = None if answers.units is None else numbered(answers.units[rows], int(rows.sum()))
        size = effective_size(answers.correct[rows], within)
        ends[row] = wilson(float(answers.correct[rows].mean()) * size, size, z)
    ends = 2 * ends / (1 + ends) if f1 else ends
    influence = (shares.above[:, present] - shares.below[:, present] * share) / below[present]
    added = sparse.csr_array(influence) if answers.units is None else _indicator(answers.units) @ influence
    spread = np.sqrt(np.asarray(added.multiply(added).sum(axis=0)).reshape(-1))
    known = spread > 0

    def half(distances: NDArray[np.float64]) -> float:
        together = added @ np.divide(distances, spread, out=np.zeros_like(spread), where=known)
        return float(np.sqrt(np.sum(together**2) + np.sum(distances[~known] ** 2)) / len(distances))

    mean = float(share.mean())
    return max(0.0, mean - half(share - ends[:, 0])), min(1.0, mean + half(ends[:, 1] - share))


def _indicator(units: NDArray[np.int64]) -> sparse.csr_array:
    return sparse.csr_array((np.ones(len(units)), (units, np.arange(len(units)))))


def _resampled(metric: Metric, answers: Answers, seed: int) -> tuple[float, Interval]:
    """Return any score as users know it, with the percentile interval of the bootstrap over units."""
    sign = 1.0 if metric.higher_is_better else -1.0
    one = Together(metric, (answers,))
    draws = sign * np.concatenate([one.weighted(counts) for counts in one.resamples(seed, RESAMPLES)])[:, 0]
    low, high = np.quantile(draws, [0.025, 0.975])
    return sign * metric.score(answers), (float(low), float(high))


def class_columns(labels: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return each label's place in `classes`, -1 where it is not there: shape (n,)."""
    place = {label: column for column, label in enumerate(classes)}
    return np.array([place.get(label, -1) for label in np.asarray(labels).astype(str)], dtype=np.int64)


def confusion_matrix(y_true: ArrayLike, y_pred: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): shape (n_classes, n_classes)."""
    rows, columns = class_columns(y_true, classes), class_columns(y_pred, classes)
    known = (rows >= 0) & (columns >= 0)
    if not known.any():  # which scikit-learn refuses
        return np.zeros((len(classes), len(classes)), dtype=np.int64)
    return np.asarray(count_pairs(rows[known], columns[known], labels=np.arange(len(classes))), dtype=np.int64)


def per_class(
    y_true: ArrayLike, y_pred: ArrayLike, classes: Sequence[str], units: NDArray[np.int64] | None = None
) -> tuple[ClassScores, ...]:
    """Return precision, recall and F1 of every class, in the order of `classes`; an undefined share is 0.

    units : ndarray of shape (n,), int64: images that are not independent share a number; None when all are.
    """
    truth, guess = np.asarray(y_true).astype(str), np.asarray(y_pred).astype(str)
    found = precision_recall_fscore_support(truth, guess, labels=list(classes), zero_division=0.0)
    made = []
    for label, precision, recall, f1, support in zip(classes, *found, strict=True):
        rows = truth == label
        within = None if units is None else numbered(units[rows], int(support))
        interval = share_interval(guess[rows] == label, within) if support else (0.0, 1.0)
        predicted = int(np.sum(guess == label))
        made.append(ClassScores(label, int(support), predicted, float(precision), float(recall), interval, float(f1)))
    return tuple(made)
