"""Scores of one head on one set of images, each with a 95 % interval.

Accuracy has Wilson's interval, balanced accuracy and macro F1 a percentile bootstrap over images, log loss a normal
interval of its mean. `per_class` and `confusion_matrix` break the same counts down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from pipeline.metrics.intervals import Interval, wilson
from pipeline.metrics.metric import SMALLEST_PROBABILITY

RESAMPLES = 1000


@dataclass(frozen=True)
class Scores:
    """How well `n` images were labelled; an interval is the 95 % interval of the number before it."""

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
) -> Scores:
    """Score predictions of shape (n,) against the truth.

    probabilities : ndarray of shape (n, n_classes), columns in the order of `classes`; None where the head has none.
    Balanced accuracy is the mean recall of the classes that occur in the truth; macro F1 the mean over classes that occur
    in either. A true label outside `classes` counts as wrong, with the smallest probability.
    """
    truth, guess = np.asarray(y_true).astype(str), np.asarray(y_pred).astype(str)
    if len(truth) != len(guess) or not len(truth):
        raise ValueError(
            f"{len(truth)} true labels and {len(guess)} predicted ones; both need the same number, at least 1"
        )
    cells = _Cells.of(truth, guess)
    correct = int(np.sum(truth == guess))
    balanced, macro = cells.balanced_and_macro(cells.counts[None, :])
    draws = np.random.default_rng(seed).multinomial(len(truth), cells.counts / len(truth), size=RESAMPLES)
    balanced_draws, macro_draws = cells.balanced_and_macro(draws)
    loss, loss_interval = None, None
    if probabilities is not None:
        losses = row_log_losses(truth, probabilities, classes)
        loss = float(losses.mean())
        half = 1.959964 * float(losses.std(ddof=1)) / np.sqrt(len(losses)) if len(losses) > 1 else np.inf
        loss_interval = (max(0.0, loss - half), loss + half)
    return Scores(
        n=len(truth),
        correct=correct,
        accuracy=correct / len(truth),
        interval=wilson(correct, len(truth)),
        balanced_accuracy=float(balanced[0]),
        balanced_accuracy_interval=_ends(balanced_draws),
        macro_f1=float(macro[0]),
        macro_f1_interval=_ends(macro_draws),
        log_loss=loss,
        log_loss_interval=loss_interval,
    )


def row_log_losses(
    y_true: ArrayLike, probabilities: NDArray[np.floating], classes: Sequence[str]
) -> NDArray[np.float64]:
    """Return minus the log of each true class's probability: shape (n,), nats."""
    columns = class_columns(y_true, classes)
    chosen = np.asarray(probabilities, dtype=np.float64)[np.arange(len(columns)), np.maximum(columns, 0)]
    losses: NDArray[np.float64] = -np.log(np.clip(np.where(columns < 0, 0.0, chosen), SMALLEST_PROBABILITY, 1.0))
    return losses


def class_columns(labels: ArrayLike, classes: Sequence[str]) -> NDArray[np.intp]:
    """Return each label's place in `classes`, -1 where it is not there: shape (n,)."""
    place = {label: column for column, label in enumerate(classes)}
    return np.array([place.get(label, -1) for label in np.asarray(labels).astype(str)], dtype=np.intp)


def confusion_matrix(y_true: ArrayLike, y_pred: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """Count images by true class (row) and predicted class (column): shape (n_classes, n_classes)."""
    rows, columns = class_columns(y_true, classes), class_columns(y_pred, classes)
    known = (rows >= 0) & (columns >= 0)
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(matrix, (rows[known], columns[known]), 1)
    return matrix


def per_class(y_true: ArrayLike, y_pred: ArrayLike, classes: Sequence[str]) -> tuple[ClassScores, ...]:
    """Return precision, recall and F1 of every class, in the order of `classes`; an undefined share is 0."""
    truth, guess = np.asarray(y_true).astype(str), np.asarray(y_pred).astype(str)
    rows = []
    for label in classes:
        hits = int(np.sum((truth == label) & (guess == label)))
        support, predicted = int(np.sum(truth == label)), int(np.sum(guess == label))
        precision, recall = hits / max(predicted, 1), hits / max(support, 1)
        f1 = 2 * hits / max(support + predicted, 1)
        rows.append(ClassScores(label, support, predicted, precision, recall, wilson(hits, support), f1))
    return tuple(rows)


@dataclass(frozen=True)
class _Cells:
    """The occupied cells of a confusion matrix, so that a thousand classes cost no million of them."""

    counts: NDArray[np.int64]
    truth: sparse.csr_array
    guess: sparse.csr_array
    hits: sparse.csr_array

    @staticmethod
    def of(truth: NDArray[np.str_], guess: NDArray[np.str_]) -> _Cells:
        labels, codes = np.unique(np.concatenate([truth, guess]), return_inverse=True)
        pairs = codes[: len(truth)] * len(labels) + codes[len(truth) :]
        occupied, counts = np.unique(pairs, return_counts=True)
        rows, columns = np.divmod(occupied, len(labels))
        cells = np.arange(len(occupied))

        def indicator(which: NDArray[np.intp], where: NDArray[np.bool_]) -> sparse.csr_array:
            entries = (np.ones(int(where.sum())), (cells[where], which[where]))
            return sparse.csr_array(entries, shape=(len(cells), len(labels)))

        every = np.ones(len(cells), dtype=bool)
        return _Cells(counts, indicator(rows, every), indicator(columns, every), indicator(rows, rows == columns))

    def balanced_and_macro(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return balanced accuracy and macro F1 of each row of cell counts: two arrays of shape (n_rows,)."""
        support, predicted, hits = counts @ self.truth, counts @ self.guess, counts @ self.hits
        seen, either = support > 0, (support + predicted) > 0
        recalls = np.divide(hits, support, out=np.zeros_like(hits), where=seen)
        f1 = np.divide(2 * hits, support + predicted, out=np.zeros_like(hits), where=either)
        return recalls.sum(axis=1) / seen.sum(axis=1), f1.sum(axis=1) / either.sum(axis=1)


def _ends(draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return (float(low), float(high))
