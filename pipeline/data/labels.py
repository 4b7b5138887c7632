"""Multi-label: any number of labels for each image, none included.

Heads are fitted on a column of 0 and 1 for each label, and what they say is a log-odds for each. Probabilities and the threshold
from which on a label is said are found for every label by itself, out of fold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from pipeline.data.classes import Calibrate, ScoreKind
from pipeline.data.index import SEPARATOR, DatasetIndex
from pipeline.data.match import encode
from pipeline.errors import DatasetError, first

Flags = NDArray[np.bool_]

EXAMPLES = 5

NO, YES = {"0", "0.0", "false", "no"}, {"1", "1.0", "true", "yes"}
"""What a cell of a column for one label may say, in any case."""

SMALLEST = 1e-6
"""Forests and neighbours say 0 and 1, whose log-odds are infinite."""


@dataclass(frozen=True)
class MultiLabel:
    """Several labels for each image: those in the cells of one column, or the columns of which each says 0 or 1.

    `thresholds` are the probabilities from which on each label is said, () where they are not known yet.
    """

    classes: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()
    kind: ClassVar[str] = "multilabel"
    constant: ClassVar[str] = "shares"
    exclusive: ClassVar[bool] = False
    stored_as: ClassVar[type] = str

    @staticmethod
    def of(index: DatasetIndex) -> MultiLabel:
        """Return the target of an index: all labels that occur, or its columns.

        Raises
        ------
        DatasetError
            With the cells that are neither 0 nor 1, or the columns whose names cannot be labels.
        """
        if index.labels.ndim == 1:
            return MultiLabel(tuple(sorted({name for text in encode(index.labels)[1] for name in _names(text)})))
        wrong = [name for name in index.names if SEPARATOR in name]
        if wrong:
            raise DatasetError(f"columns {', '.join(wrong)}: {SEPARATOR!r} stands between labels; rename them")
        target = MultiLabel(index.names)
        target.encode(index)
        return target

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> MultiLabel:
        """Return what `to_record` wrote down."""
        classes, thresholds = tuple(map(str, record["classes"])), tuple(map(float, record["thresholds"]))
        if len(thresholds) not in (0, len(classes)):
            raise ValueError("a threshold for each label")
        return MultiLabel(classes, thresholds)

    def to_record(self) -> dict[str, Any]:
        """Return all there is to know of it as plain values for JSON."""
        return {"kind": self.kind, "classes": list(self.classes), "thresholds": list(self.thresholds)}

    @property
    def width(self) -> int:
        """How many labels there are."""
        return len(self.classes)

    @staticmethod
    def as_classes(index: DatasetIndex) -> DatasetIndex:
        """Return the images under texts that a person would count them by: each once for every label that it has."""
        target = MultiLabel.of(index)
        y = target.encode(index)
        rows, places = np.nonzero(np.column_stack([y, ~y.any(axis=1)]))
        texts = np.array([*target.classes, "(no label)"], dtype=object)[places]
        return replace(index.rows(rows), labels=texts, names=("label",))

    @staticmethod
    def in_words(index: DatasetIndex) -> str:
        """Return what the images are told apart by, such as `with 7 labels, 1.9 on average`."""
        target = MultiLabel.of(index)
        mean = target.encode(index).sum(axis=1).mean() if len(index) else 0.0
        return f"with any of {target.width:,} labels, {mean:.1f} on average"

    def encode(self, index: DatasetIndex) -> NDArray[Any]:
        """Return y, bool of shape (n, k): which labels each image has; KeyError for one that is none of them.

        Raises
        ------
        DatasetError
            With the cells of several columns that are neither 0 nor 1.
        """
        if index.labels.ndim == 1:
            codes, texts = encode(index.labels)
            return self._flags(texts)[codes]
        words = np.char.lower(index.labels.astype(str))
        said = np.isin(words, sorted(YES))
        wrong = ~(said | np.isin(words, sorted(NO)))
        if wrong.any():
            rows = np.flatnonzero(wrong.any(axis=1))
            found = [f"{index.paths[row]}: {index.names[wrong[row].argmax()]} is {index.labels[row][wrong[row].argmax()]!r}" for row in rows]  # fmt: skip
            raise DatasetError(
                f"{len(rows):,} of {len(index):,} images have a cell that is neither 0 nor 1, which each column of labels needs",
                first(found, EXAMPLES),
            )
        return np.asarray(said)

    def _flags(self, texts: Sequence[str]) -> Flags:
        place = {name: code for code, name in enumerate(self.classes)}
        y = np.zeros((len(texts), self.width), dtype=bool)
        for row, text in enumerate(texts):
            y[row, [place[name] for name in _names(text)]] = True
        return y

    def decode(self, y: Flags) -> NDArray[np.str_]:
        """Return the labels of each image with `|` between them, shape (n,), of y, shape (n, k)."""
        kinds, codes = np.unique(y, axis=0, return_inverse=True)
        texts = [SEPARATOR.join(np.array(self.classes, dtype=object)[row]) for row in kinds]
        return np.asarray(texts, dtype=str)[codes.reshape(-1)] if texts else np.empty(0, dtype=str)

    def restored(self, names: ArrayLike) -> Flags:
        """Return y, shape (n, k), of labels with `|` between them, shape (n,); KeyError for one that is none of them."""
        return self._flags(np.asarray(names).astype(str).tolist())

    def strata(self, y: Flags) -> NDArray[np.int64]:
        """Return what folds and the test split keep in proportion: the place of each label that an image has, -1 for the others,
        and one more for an image without any; shape (n, k + 1)."""
        whole = np.column_stack([y, ~y.any(axis=1)])
        return np.where(whole, np.arange(self.width + 1), -1)

    def problem(self, y_train: Flags) -> str | None:
        """Say why no head can be fitted on these training images; None where one can."""
        if self.width < 2:
            return (
                f"there is {self.width} label; several are needed, and for one alone set dataset.target: classification"
            )
        some = y_train.any(axis=0) & ~y_train.all(axis=0)
        return None if some.any() else "every label is on all training images or on none; nothing can be learned"

    def narrowed(self, y: Flags) -> tuple[MultiLabel, Flags, NDArray[np.int64]]:
        """Return the target, y of shape (n, k), and the places of its labels: a label that nobody has is learned as such."""
        return self, y, np.arange(self.width)

    def anew(self, y: NDArray[Any]) -> tuple[MultiLabel, NDArray[np.int64]]:
        """Return the target of other labels, of which y has a column of 0 and 1 each, and what an estimator is fitted on: (n, k)."""
        names = self.classes if y.shape[1] == self.width else tuple(map(str, range(y.shape[1])))
        return MultiLabel(names), self.learned(y > 0)

    def unnarrowed(self, y: Flags, present: NDArray[np.int64]) -> Flags:
        """Return y as it is."""
        return y

    def widened(self, columns: NDArray[np.floating], present: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return scores as they are, shape (n, k)."""
        return columns.astype(np.float32)

    def learned(self, y: Flags) -> NDArray[np.int64]:
        """Return what an estimator is fitted on: 0 and 1, shape (n, k)."""
        return y.astype(np.int64)

    def told(self, said: NDArray[Any]) -> Flags:
        """Return y for what an estimator says."""
        return np.asarray(said) > 0

    def settled(
        self, y: Flags, y_pred: Flags, probabilities: NDArray[np.floating] | None, by: str = "each"
    ) -> MultiLabel:
        """Return the target with the thresholds that probabilities out of fold tell, all of shape (n, k); `by` as `Metric.threshold`."""
        return self if probabilities is None else replace(self, thresholds=tuple(_thresholds(y, probabilities, by)))

    def decided(
        self,
        y: Flags,
        y_pred: Any,
        scores: NDArray[np.floating] | None,
        by: str,
        folds: NDArray[np.int64] | None = None,
    ) -> Any:
        """Return the labels that are said of images, bool of shape (n, k), with thresholds chosen on the images of the other folds.

        Without folds, of shape (n,), they are chosen on the images themselves: what the order of the scores allows at most.
        scores : probabilities, or what `by` need not be '' for, shape (n, k); `by` as `Metric.threshold`
        """
        if scores is None:
            return y_pred
        found = np.empty(y.shape, dtype=bool)
        for fold in (0,) if folds is None else np.unique(folds):
            held = np.ones(len(y), dtype=bool) if folds is None else folds == fold
            known = held if folds is None or held.all() else ~held
            found[held] = scores[held] >= np.array(_thresholds(y[known], scores[known], by))
        return found

    def only(self, y: Flags, n: int) -> tuple[Flags, NDArray[np.float32], ScoreKind] | None:
        """Return all that can be said of n images where all of y have the same labels; None where a head can be fitted on it."""
        if (y != y[0]).any():
            return None
        said = np.repeat(y[:1], n, axis=0)
        return said, log_odds(said), "decision"

    def answers(self, estimator: Any, X: NDArray[np.float32]) -> tuple[Flags, NDArray[np.float32], ScoreKind]:
        """Return what an estimator says of n vectors: the labels that it takes to be likelier than not, and log-odds; (n, k)."""
        scores = said(estimator, X)
        return scores > 0, scores, "decision"

    def recalled(self, estimator: Any, X: NDArray[np.float32]) -> tuple[Flags, NDArray[np.float32]]:
        """Return what an estimator says of the rows that it was fitted on."""
        scores = said(estimator, X)
        return scores > 0, scores

    def predict(
        self, estimator: Any, X: NDArray[np.float32], calibrate: Calibrate
    ) -> tuple[Flags, NDArray[np.float64] | None]:
        """Return the labels that reach their thresholds, and the probability of each: both of shape (n, k)."""
        scores = said(estimator, X)
        calibrated = calibrate(scores, "decision")
        probabilities = expit(scores.astype(np.float64)) if calibrated is None else calibrated
        return probabilities >= np.array(self.thresholds or 0.5), probabilities

    def counted_as(self, label: str) -> str:
        """Return what predictions are counted by: how many labels they are."""
        count = len(_names(str(label)))
        return "no label" if count == 0 else f"{count} label{'s' if count > 1 else ''}"

    def csv_columns(self, top: int) -> list[str]:
        """Return the names of a prediction's cells: its labels, and the probability of each that there is."""
        return ["labels", *(f"probability_{name}" for name in self.classes)]

    def csv_cells(self, label: str | None, probabilities: Sequence[float] | NDArray[Any] | None, top: int) -> list[str]:
        """Return the cells of one prediction; empty ones where there is none.

        probabilities : shape (k,)
        """
        if label is None or probabilities is None:
            return [label or "", *[""] * self.width]
        return [label, *(f"{share:.6f}" for share in probabilities)]


def _names(text: str) -> list[str]:
    return [name for name in text.split(SEPARATOR) if name]


def log_odds(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Return the logarithm of p / (1 - p), of the same shape, finite also at 0 and 1."""
    return np.asarray(logit(np.clip(np.asarray(probabilities, np.float64), SMALLEST, 1 - SMALLEST)), dtype=np.float32)


def said(estimator: Any, X: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log-odds of each label, or what else is above 0 where it is likelier than not, shape (n, k)."""
    if hasattr(estimator, "decision_function"):
        return np.asarray(estimator.decision_function(X), dtype=np.float32)
    found = estimator.predict_proba(X)
    if isinstance(found, list):  # a label that no fitted row has, or all have, has one column alone
        columns = zip(found, estimator.classes_, strict=True)
        found = np.stack([shares @ (np.asarray(known) == 1) for shares, known in columns], axis=1)
    return log_odds(found)


def _thresholds(y: Flags, scores: NDArray[np.floating], by: str) -> list[float]:
    """Return a threshold for each label; y, scores : shape (n, k)."""
    values = np.asarray(scores, dtype=np.float64)
    if by == "each":
        return list(map(best_threshold, y.T, values.T))
    return [best_threshold(y.ravel(), values.ravel()) if by == "all" else 0.5] * y.shape[1]


def best_threshold(y: Flags, scores: NDArray[np.float64]) -> float:
    """Return the score from which on saying a label has the highest F1, halfway between two that occur; y : shape (n,).

    1 and above all of them where no image has the label.
    """
    order = np.argsort(-scores, kind="stable")
    p, right = scores[order], np.cumsum(y[order])
    ends = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)  # images that are equally likely are all said or none
    if not right[-1]:
        return max(1.0, float(np.nextafter(p[0], np.inf)))
    best = ends[np.argmax(2 * right[ends] / (ends + 1 + right[-1]))]
    # The last is lowered by more than float32 rounds it.
    return float(p[best] + p[best + 1]) / 2 if best + 1 < len(p) else float(p[best] - 1e-6 * abs(p[best]))
