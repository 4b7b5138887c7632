"""Classification targets, with one class or any number of labels per image: heads are fitted on class codes and return a score per class,
or on a column of 0 and 1 per label and return log-odds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

from pipeline.data.index import SEPARATOR, DatasetIndex, encode
from pipeline.errors import DatasetError, first

ScoreKind = Literal["probability", "decision"]

Calibrate = Callable[[NDArray[np.floating], str | None], NDArray[np.float64] | None]
"""(an estimator's scores, their kind) -> calibrated probabilities with as many columns; None if there is no calibration."""

Flags = NDArray[np.bool_]

EXAMPLES = 5

NO, YES = {"0", "0.0", "false", "no"}, {"1", "1.0", "true", "yes"}
"""The values of a cell in a column for one label, in any case."""

SMALLEST = 1e-6
"""The lowest probability in log-odds: forests and neighbours return 0 and 1, whose log-odds are infinite."""


@dataclass(frozen=True)
class Classification:
    """One class per image: the distinct texts of the index's label column, sorted."""

    classes: tuple[str, ...] = ()
    kind: ClassVar[str] = "classification"
    constant: ClassVar[str] = "majority"
    """The name of the constant baseline, which looks at no image."""
    exclusive: ClassVar[bool] = True
    """Whether an image has exactly one class, so that a prediction is simply right or wrong."""
    stored_as: ClassVar[type] = str

    @staticmethod
    def of(index: DatasetIndex) -> Classification:
        """Return the target of an index, whose labels are the classes."""
        return Classification(index.classes)

    @property
    def width(self) -> int:
        """The largest number of outputs per image: one per class."""
        return len(self.classes)

    @staticmethod
    def as_classes(index: DatasetIndex) -> DatasetIndex:
        """Return the index with labels to count images by: the labels themselves."""
        return index

    @staticmethod
    def in_words(index: DatasetIndex) -> str:
        """Describe the labels, such as `in 3 classes`."""
        return f"in {len(index.classes):,} classes"

    def encode(self, index: DatasetIndex) -> NDArray[Any]:
        """Return y, int64 of shape (n,): the code of each image's class, its position in `classes`; KeyError for an unknown label."""
        codes, names = encode(index.labels)
        place = {name: code for code, name in enumerate(self.classes)}
        return np.array([place[name] for name in names], dtype=np.int64)[codes]

    def decode(self, y: NDArray[np.int64]) -> NDArray[np.str_]:
        """Return the class names, str, of codes, int64: both of shape (n,)."""
        return np.asarray(self.classes, dtype=str)[y]

    def restored(self, names: ArrayLike) -> NDArray[np.int64]:
        """Return the codes of class names, int64 of shape (n,); ValueError for a name that is no class."""
        codes = class_columns(names, self.classes)
        if codes.min(initial=0) < 0:
            raise ValueError(f"a label is none of the classes {', '.join(self.classes)}")
        return codes

    def strata(self, y: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the strata of folds and of the test split: a number from 0 per image, int64 of shape (n,)."""
        return y

    def problem(self, y_train: NDArray[np.int64]) -> str | None:
        """Return why no head can be fitted on these training images, y_train int64 of shape (n,); None if one can."""
        found = len(np.unique(y_train))
        return None if found > 1 else f"the training images are of {found} class; a classifier needs at least 2"

    def narrowed(self, y: NDArray[Any]) -> tuple[Classification, NDArray[np.int64], NDArray[Any]]:
        """Return the target of the classes that occur in y, of any dtype and shape (n,), its codes, int64 (n,), and y by code."""
        present, codes = np.unique(y, return_inverse=True)
        return Classification(tuple(map(str, present))), codes.astype(np.int64), present

    def anew(self, y: NDArray[Any]) -> tuple[Classification, NDArray[np.int64]]:
        """Return a target for other labels y, of any dtype and shape (n,), and the y to fit an estimator on: int64 (n,)."""
        return self.narrowed(y)[:2]

    def learned(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return the y to fit an estimator on: y itself, of any dtype, shape (n,)."""
        return y

    def told(self, said: NDArray[Any]) -> NDArray[Any]:
        """Return an estimator's predictions as y: unchanged, of any dtype, shape (n,)."""
        return said

    def settled(self, y: Any, y_pred: Any, probabilities: Any = None, by: str = "") -> Classification:
        """Return the target with parameters fitted on out-of-fold predictions, of shape (n,): classes have none."""
        return self

    def decided(self, y: Any, y_pred: NDArray[Any], scores: Any, by: str, folds: Any = None) -> NDArray[Any]:
        """Return the final predictions, of any dtype, shape (n,): the likeliest class, as there are no thresholds to choose."""
        return y_pred

    def only(self, y: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.float32], ScoreKind] | None:
        """Return constant predictions (codes, probabilities, kind of scores) for n images if y has a single class, else None.

        y : int64 of shape (m,); the codes are int64 of shape (n,), the probabilities float32 of shape (n, width)
        """
        if not (y == y[0]).all():
            return None
        said = np.full(n, y[0], dtype=np.int64)
        return said, np.eye(self.width, dtype=np.float32)[said], "probability"

    def answers(
        self, estimator: Any, X: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32] | None, ScoreKind | None]:
        """Return the predictions of an estimator of codes for n vectors: codes, scores, and the kind of scores.

        X : float32 of shape (n, dim); codes are int64 of shape (n,), scores float32 of shape (n, width)
        """
        places, columns, kind = said(estimator, X)
        present = np.asarray(estimator.classes_, dtype=np.int64)
        if columns is None or kind is None:
            return present[places], None, None
        return present[places], expand_scores(columns, present, self.width, kind), kind

    def recalled(self, estimator: Any, X: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.floating] | None]:
        """Return an estimator's predictions for the rows that it was fitted on: positions in its own classes, and their scores.

        X : float32 of shape (n, dim); the positions are int64 of shape (n,), the scores of the estimator's float dtype and
            shape (n, len(classes_)), None if it has none
        """
        places, columns, _ = said(estimator, X)
        return places.astype(np.int64), columns

    def predict(
        self, estimator: Any, X: NDArray[np.float32], calibrate: Calibrate
    ) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
        """Return codes, and probabilities: 0 for a class without training images; None if the head has no probabilities.

        X : float32 of shape (n, dim); codes are int64 of shape (n,), probabilities float64 of shape (n, width)
        """
        places, raw, kind = said(estimator, X)
        codes = np.asarray(estimator.classes_[places])
        calibrated = None if raw is None else calibrate(raw, kind)
        if raw is None or (calibrated is None and kind == "decision"):
            return codes, None
        probabilities = np.zeros((len(raw), self.width))
        probabilities[:, estimator.classes_] = raw if calibrated is None else calibrated
        return codes, probabilities

    def counted_as(self, label: str) -> str:
        """Return the key that predictions are counted by: the label."""
        return str(label)

    def csv_columns(self, top: int) -> list[str]:
        """Return the CSV columns of a prediction: its label and probability, then those of the next likeliest classes."""
        later = range(2, min(top, self.width) + 1)
        return ["label", "probability", *(f"{name}_{rank}" for rank in later for name in ("label", "probability"))]

    def csv_cells(self, label: str | None, probabilities: Sequence[float] | NDArray[Any] | None, top: int) -> list[str]:
        """Return the CSV cells of one prediction; empty where there is no label, or only a label.

        probabilities : of any float dtype, shape (n_classes,); None if the head has none
        """
        count = min(top, self.width)
        if label is None or probabilities is None:
            return [label or "", *[""] * (2 * count - 1)]
        # The predicted label comes first, even if another is exactly as likely.
        order = sorted(range(self.width), key=lambda place: (self.classes[place] != label, -probabilities[place]))
        return [cell for place in order[:count] for cell in (self.classes[place], f"{probabilities[place]:.6f}")]


ANY_CLASSES = Classification()
"""A classification target for callers that need no class names."""


def class_columns(labels: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return each label's position in `classes`, -1 if it is not there: int64 of shape (n,), for labels of any dtype."""
    place = {label: column for column, label in enumerate(classes)}
    return np.array([place.get(label, -1) for label in np.asarray(labels).astype(str).tolist()], dtype=np.int64)


def said(
    estimator: Any, X: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.floating] | None, ScoreKind | None]:
    """Return predictions as positions in `classes_`, with probabilities, or else decision values, one column per class.

    The predicted class is the one with the highest score, even where the estimator's `predict` differs: scikit-learn's
    NearestCentroid uses one distance in `predict` and another for its probabilities, and an SVC without `break_ties` takes the
    first of equals. `predict` is used only for classifiers without a score per class.

    X : float32 of shape (n, dim); the positions are intp of shape (n,), the columns of shape (n, len(classes_)): decision
        values float64, probabilities of the estimator's float dtype
    """
    model = estimator[-1] if hasattr(estimator, "steps") else estimator
    pairs = getattr(model, "decision_function_shape", "ovr") == "ovo" and len(estimator.classes_) > 2
    if hasattr(estimator, "predict_proba"):
        shares = estimator.predict_proba(X)
        return shares.argmax(axis=1), shares, "probability"
    if hasattr(estimator, "decision_function") and not pairs:
        columns = scores_as_columns(estimator.decision_function(X))
        return columns.argmax(axis=1), columns, "decision"
    return np.searchsorted(estimator.classes_, estimator.predict(X)), None, None


def scores_as_columns(scores: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return decision scores with one column per class: a binary head's single score s becomes (-s, s).

    scores : of any float dtype, shape (n,) or (n, k); returns float64 of shape (n, 2) or (n, k)
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim == 1 or values.shape[1] == 1:
        values = values.reshape(-1)
        return np.stack([-values, values], axis=1)
    return values


def expand_scores(
    scores: NDArray[np.floating], present: NDArray[np.integer], n_classes: int, kind: str
) -> NDArray[np.float32]:
    """Expand an estimator's scores to one column per class of the whole problem: float32 of shape (n, n_classes).

    A binary decision value z becomes -z and z. An absent class gets probability 0, or 1 less than the row's lowest
    decision value.

    scores : of any float dtype, shape (n,) for two classes, or (n, len(present))
    present : of any integer dtype, shape (len(present),): the classes the estimator was fitted on
    """
    if scores.ndim == 1:
        scores = scores_as_columns(scores)
    if len(present) == n_classes:
        return scores.astype(np.float32)
    absent = 0.0 if kind == "probability" else scores.min(axis=1, keepdims=True) - 1
    full = np.zeros((len(scores), n_classes), dtype=np.float32) + np.float32(absent)
    full[:, present] = scores
    return full


@dataclass(frozen=True)
class MultiLabel:
    """Several labels per image, from the cells of one column or from several columns of 0 and 1.

    `thresholds` holds the lowest probability at which each label is predicted, () if not yet chosen. Unless stated otherwise, y
    is bool of shape (n, k), and scores are float32 of that shape.
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

        DatasetError for cells that are neither 0 nor 1, or columns whose names cannot be labels.
        """
        if index.labels.ndim == 1:
            return MultiLabel(tuple(sorted({name for text in encode(index.labels)[1] for name in _names(text)})))
        wrong = [name for name in index.names if SEPARATOR in name]
        if wrong:
            raise DatasetError(f"columns {', '.join(wrong)}: {SEPARATOR!r} stands between labels; rename them")
        target = MultiLabel(index.names)
        target.encode(index)
        return target

    @property
    def width(self) -> int:
        """The number of labels."""
        return len(self.classes)

    @staticmethod
    def as_classes(index: DatasetIndex) -> DatasetIndex:
        """Return the index with labels to count images by: each image once per label."""
        target = MultiLabel.of(index)
        rows, places = np.nonzero(target.strata(target.encode(index)) >= 0)
        texts = np.array([*target.classes, "(no label)"], dtype=object)[places]
        return replace(index.rows(rows), labels=texts, names=("label",))

    @staticmethod
    def in_words(index: DatasetIndex) -> str:
        """Describe the labels, such as `with any of 7 labels, 1.9 on average`."""
        target = MultiLabel.of(index)
        mean = target.encode(index).sum(axis=1).mean() if len(index) else 0.0
        return f"with any of {target.width:,} labels, {mean:.1f} on average"

    def encode(self, index: DatasetIndex) -> NDArray[Any]:
        """Return y, the labels of each image as flags; KeyError for an unknown label, DatasetError for cells other than 0 or 1."""
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
        """Return the labels of each image, joined by `|`, shape (n,)."""
        kinds, codes = np.unique(y, axis=0, return_inverse=True)
        texts = [SEPARATOR.join(np.array(self.classes, dtype=object)[row]) for row in kinds]
        return np.asarray(texts, dtype=str)[codes.reshape(-1)] if texts else np.empty(0, dtype=str)

    def restored(self, names: ArrayLike) -> Flags:
        """Return the y of labels joined by `|`, shape (n,); KeyError for an unknown label."""
        return self._flags(np.asarray(names).astype(str).tolist())

    def strata(self, y: Flags) -> NDArray[np.int64]:
        """Return the strata of folds and of the test split, shape (n, k + 1): the number of each label that an image has, -1 for the
        others; an extra stratum is for images without labels.
        """
        whole = np.column_stack([y, ~y.any(axis=1)])
        return np.where(whole, np.arange(self.width + 1), -1)

    def problem(self, y_train: Flags) -> str | None:
        """Return why no head can be fitted on these training images; None if one can."""
        if self.width < 2:
            return (
                f"there is {self.width} label; several are needed, and for one alone set dataset.target: classification"
            )
        some = y_train.any(axis=0) & ~y_train.all(axis=0)
        return None if some.any() else "every label is on all training images or on none; nothing can be learned"

    def narrowed(self, y: Flags) -> tuple[MultiLabel, Flags, NDArray[np.int64]]:
        """Return the target, y, and the positions of its labels: labels without images are kept."""
        return self, y, np.arange(self.width)

    def anew(self, y: NDArray[Any]) -> tuple[MultiLabel, NDArray[np.int64]]:
        """Return a target for other labels y, with one column per label, and the y to fit an estimator on: (n, k)."""
        names = self.classes if y.shape[1] == self.width else tuple(map(str, range(y.shape[1])))
        return MultiLabel(names), self.learned(y > 0)

    def learned(self, y: Flags) -> NDArray[np.int64]:
        """Return the y to fit an estimator on: 0 and 1, int64 of shape (n, k)."""
        return y.astype(np.int64)

    def told(self, said: NDArray[Any]) -> Flags:
        """Return an estimator's predictions as y."""
        return np.asarray(said) > 0

    def settled(
        self, y: Flags, y_pred: Flags, probabilities: NDArray[np.floating] | None, by: str = "each"
    ) -> MultiLabel:
        """Return the target with thresholds chosen on out-of-fold probabilities, (n, k); `by` as in `Metric.threshold`."""
        return self if probabilities is None else replace(self, thresholds=tuple(_thresholds(y, probabilities, by)))

    def decided(
        self,
        y: Flags,
        y_pred: Any,
        scores: NDArray[np.floating] | None,
        by: str,
        folds: NDArray[np.int64] | None = None,
    ) -> Any:
        """Return the predicted labels of images, with the thresholds for each fold chosen on the other folds.

        Without folds, of shape (n,), they are chosen on the images themselves, which gives an upper bound for this order of scores.
        scores : probabilities, or any scores unless `by` is ''; `by` as in `Metric.threshold`
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
        """Return constant predictions for n images if all of y have the same labels; None if a head can be fitted on y."""
        if (y != y[0]).any():
            return None
        said = np.repeat(y[:1], n, axis=0)
        return said, log_odds(said), "decision"

    def answers(self, estimator: Any, X: NDArray[np.float32]) -> tuple[Flags, NDArray[np.float32], ScoreKind]:
        """Return an estimator's predictions for n vectors: the labels with a probability above 0.5, and log-odds."""
        scores = said_odds(estimator, X)
        return scores > 0, scores, "decision"

    def recalled(self, estimator: Any, X: NDArray[np.float32]) -> tuple[Flags, NDArray[np.float32]]:
        """Return an estimator's predictions for the rows that it was fitted on."""
        return self.answers(estimator, X)[:2]

    def predict(
        self, estimator: Any, X: NDArray[np.float32], calibrate: Calibrate
    ) -> tuple[Flags, NDArray[np.float64] | None]:
        """Return the labels that reach their thresholds, and the probability of each label."""
        scores = said_odds(estimator, X)
        calibrated = calibrate(scores, "decision")
        probabilities = expit(scores.astype(np.float64)) if calibrated is None else calibrated
        return probabilities >= np.array(self.thresholds or 0.5), probabilities

    def counted_as(self, label: str) -> str:
        """Return the key that predictions are counted by: the number of labels."""
        count = len(_names(str(label)))
        return "no label" if count == 0 else f"{count} label{'s' if count > 1 else ''}"

    def csv_columns(self, top: int) -> list[str]:
        """Return the CSV columns of a prediction: its labels, and the probability of every label."""
        return ["labels", *(f"probability_{name}" for name in self.classes)]

    def csv_cells(self, label: str | None, probabilities: Sequence[float] | NDArray[Any] | None, top: int) -> list[str]:
        """Return the CSV cells of one prediction, with probabilities of shape (k,); empty if there is none."""
        if label is None or probabilities is None:
            return [label or "", *[""] * self.width]
        return [label, *(f"{share:.6f}" for share in probabilities)]


def _names(text: str) -> list[str]:
    return [name for name in text.split(SEPARATOR) if name]


def log_odds(probabilities: NDArray[Any]) -> NDArray[np.float32]:
    """Return log(p / (1 - p)), of the same shape; p is clipped, so that the result is finite at 0 and 1."""
    return np.asarray(logit(np.clip(np.asarray(probabilities, np.float64), SMALLEST, 1 - SMALLEST)), dtype=np.float32)


def said_odds(estimator: Any, X: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the log-odds of each label, or another score that is positive if the label is likelier than not, shape (n, k)."""
    if hasattr(estimator, "decision_function"):
        return np.asarray(estimator.decision_function(X), dtype=np.float32)
    found = estimator.predict_proba(X)
    if isinstance(found, list):  # a label that none or all of the fitted rows have gets a single column
        columns = zip(found, estimator.classes_, strict=True)
        found = np.stack([shares @ (np.asarray(known) == 1) for shares, known in columns], axis=1)
    return log_odds(found)


def _thresholds(y: Flags, scores: NDArray[np.floating], by: str) -> list[float]:
    """Return a threshold per label; y, scores : shape (n, k)."""
    values = np.asarray(scores, dtype=np.float64)
    if by == "each":
        return list(map(best_threshold, y.T, values.T))
    return [best_threshold(y.ravel(), values.ravel()) if by == "all" else 0.5] * y.shape[1]


def best_threshold(y: Flags, scores: NDArray[np.float64]) -> float:
    """Return the score threshold with the highest F1, halfway between two neighbouring scores; y : shape (n,).

    If no image has the label, the threshold is at least 1 and above all scores.
    """
    order = np.argsort(-scores, kind="stable")
    p, right = scores[order], np.cumsum(y[order])
    ends = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)  # a threshold cannot separate equal scores
    if not right[-1]:
        return max(1.0, float(np.nextafter(p[0], np.inf)))
    best = ends[np.argmax(2 * right[ends] / (ends + 1 + right[-1]))]
    # The lowest score is reduced by more than float32's rounding error.
    return float(p[best] + p[best + 1]) / 2 if best + 1 < len(p) else float(p[best] - 1e-6 * abs(p[best]))
