"""Classification: one class for each image.

Heads are fitted on codes: places in the classes. What a fitted classifier says is a score for each of its classes, and the
likeliest of them as the label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.data.index import DatasetIndex
from pipeline.data.match import encode

ScoreKind = Literal["probability", "decision"]

Calibrate = Callable[[NDArray[np.floating], str | None], NDArray[np.float64] | None]
"""(an estimator's scores, their kind) -> probabilities, with as many columns; None where nothing is known of them."""


@dataclass(frozen=True)
class Classification:
    """One class for each image: the label column of the index, its distinct texts in order."""

    classes: tuple[str, ...] = ()
    kind: ClassVar[str] = "classification"
    constant: ClassVar[str] = "majority"
    """What the guess that looks at no image is called."""
    exclusive: ClassVar[bool] = True
    """Whether an image is of just one of the classes, so that it is labelled right or wrong."""
    stored_as: ClassVar[type] = str

    @staticmethod
    def of(index: DatasetIndex) -> Classification:
        """Return the target of an index: its labels are the classes."""
        return Classification(index.classes)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> Classification:
        """Return what `to_record` wrote down."""
        if not isinstance(record["classes"], list | tuple):
            raise ValueError("classes")
        return Classification(tuple(map(str, record["classes"])))

    def to_record(self) -> dict[str, Any]:
        """Return all there is to know of it as plain values for JSON."""
        return {"classes": list(self.classes)}

    @property
    def width(self) -> int:
        """How many numbers a head says of an image at most: one for each class."""
        return len(self.classes)

    @staticmethod
    def as_classes(index: DatasetIndex) -> DatasetIndex:
        """Return the images under texts that a person would count them by: their labels."""
        return index

    @staticmethod
    def in_words(index: DatasetIndex) -> str:
        """Return what the images are told apart by, such as `in 3 classes`."""
        return f"in {len(index.classes):,} classes"

    def encode(self, index: DatasetIndex) -> NDArray[Any]:
        """Return y, shape (n,), int64: each image's place in `classes`; KeyError for a label that is none of them."""
        codes, names = encode(index.labels)
        place = {name: code for code, name in enumerate(self.classes)}
        return np.array([place[name] for name in names], dtype=np.int64)[codes]

    def decode(self, y: NDArray[np.int64]) -> NDArray[np.str_]:
        """Return the names, str, of classes given by their places, int64: both of shape (n,)."""
        return np.asarray(self.classes, dtype=str)[y]

    def restored(self, names: ArrayLike) -> NDArray[np.int64]:
        """Return the places of names, int64 of shape (n,); ValueError for one that is no class."""
        codes = class_columns(names, self.classes)
        if codes.min(initial=0) < 0:
            raise ValueError(f"a label is none of the classes {', '.join(self.classes)}")
        return codes

    def strata(self, y: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what folds and the test split keep in proportion: a number from 0 for each image, shape (n,), int64."""
        return y

    def problem(self, y_train: NDArray[np.int64]) -> str | None:
        """Say why no head can be fitted on these training images, y_train int64 of shape (n,); None where one can."""
        found = len(np.unique(y_train))
        return None if found > 1 else f"the training images are of {found} class; a classifier needs at least 2"

    def narrowed(self, y: NDArray[Any]) -> tuple[Classification, NDArray[np.int64], NDArray[Any]]:
        """Return the target of the classes that occur in y, y in its codes, and the values of y by code.

        y : of any dtype, shape (n,); the codes are int64 of shape (n,), the values of the dtype of y and shape
            (len(classes),)
        """
        present, codes = np.unique(y, return_inverse=True)
        return Classification(tuple(map(str, present))), codes.astype(np.int64), present

    def anew(self, y: NDArray[Any]) -> tuple[Classification, NDArray[np.int64]]:
        """Return the target of other labels y, of any dtype and shape (n,), and what an estimator is fitted on: int64 of shape (n,)."""
        return self.narrowed(y)[:2]

    def unnarrowed(self, codes: NDArray[np.int64], present: NDArray[Any]) -> NDArray[Any]:
        """Return the values of y, of its dtype, for codes that `narrowed` made, int64: both of shape (n,)."""
        return present[codes]

    def widened(self, columns: NDArray[np.floating], present: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return scores of the classes that occur with a column for every class: 0 for the others.

        columns : of any float dtype, shape (n, len(present)); present : of any integer dtype; returns float32 of shape
            (n, width)
        """
        whole = np.zeros((len(columns), self.width), dtype=np.float32)
        whole[:, present] = columns
        return whole

    def learned(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return what an estimator is fitted on: y itself, of any dtype, shape (n,)."""
        return y

    def told(self, said: NDArray[Any]) -> NDArray[Any]:
        """Return y for what an estimator says: as it is, of any dtype, shape (n,)."""
        return said

    def settled(
        self, y: NDArray[np.int64], y_pred: NDArray[np.int64], probabilities: Any = None, by: str = ""
    ) -> Classification:
        """Return the target with what answers out of fold tell of it: of classes nothing.

        y, y_pred : int64 of shape (n,)
        """
        return self

    def decided(self, y: Any, y_pred: NDArray[Any], scores: Any, by: str, folds: Any = None) -> NDArray[Any]:
        """Return what is said of images, of any dtype, shape (n,): the likeliest class; no threshold is chosen on others."""
        return y_pred

    def only(self, y: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.float32], ScoreKind] | None:
        """Return all that can be said of n images where y has one class; None where a head can be fitted on it.

        y : int64 of shape (m,); said are codes, int64 of shape (n,), and probabilities, float32 of shape (n, width)
        """
        if not (y == y[0]).all():
            return None
        probabilities = np.zeros((n, self.width), dtype=np.float32)
        probabilities[:, y[0]] = 1
        return np.full(n, y[0], dtype=np.int64), probabilities, "probability"

    def answers(
        self, estimator: Any, X: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32] | None, ScoreKind | None]:
        """Return what an estimator of codes says of n vectors: codes, scores, and the kind of scores.

        X : float32 of shape (n, dim); codes are int64 of shape (n,), scores float32 of shape (n, width)
        """
        places, columns, kind = said(estimator, X)
        present = np.asarray(estimator.classes_, dtype=np.int64)
        if columns is None or kind is None:
            return present[places], None, None
        return present[places], expand_scores(columns, present, self.width, kind), kind

    def recalled(self, estimator: Any, X: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.floating] | None]:
        """Return what an estimator says of the rows that it was fitted on: places in its own classes, and their scores.

        X : float32 of shape (n, dim); the places are int64 of shape (n,), the scores of the estimator's float dtype and
            shape (n, len(classes_)), None where it has none
        """
        places, columns, _ = said(estimator, X)
        return places.astype(np.int64), columns

    def predict(
        self, estimator: Any, X: NDArray[np.float32], calibrate: Calibrate
    ) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
        """Return codes, and probabilities: 0 for a class never seen, None without any.

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
        """Return what predictions are counted by: the label."""
        return str(label)

    def csv_columns(self, top: int) -> list[str]:
        """Return the names of a prediction's cells: its label and probability, then those of the next likely ones."""
        later = range(2, min(top, self.width) + 1)
        return ["label", "probability", *(f"{name}_{rank}" for rank in later for name in ("label", "probability"))]

    def csv_cells(self, label: str | None, probabilities: Sequence[float] | NDArray[Any] | None, top: int) -> list[str]:
        """Return the cells of one prediction; empty ones where there is no label, or nothing but the label.

        probabilities : of any float dtype, shape (n_classes,); None where the head has none
        """
        count = min(top, self.width)
        if label is None or probabilities is None:
            return [label or "", *[""] * (2 * count - 1)]
        # The head's own label comes first, also where another is exactly as likely.
        order = sorted(range(self.width), key=lambda place: (self.classes[place] != label, -probabilities[place]))
        return [cell for place in order[:count] for cell in (self.classes[place], f"{probabilities[place]:.6f}")]


ANY_CLASSES = Classification()
"""Classes that nobody needs the names of."""


def class_columns(labels: ArrayLike, classes: Sequence[str]) -> NDArray[np.int64]:
    """Return each label's place in `classes`, -1 where there is none: int64 of shape (n,), for labels of any dtype."""
    place = {label: column for column, label in enumerate(classes)}
    return np.array([place.get(label, -1) for label in np.asarray(labels).astype(str).tolist()], dtype=np.int64)


def said(
    estimator: Any, X: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.floating] | None, ScoreKind | None]:
    """Return places in `classes_`, and probabilities or else decision values with a column for each of them.

    The label is the class with the highest score, whatever `predict` says: scikit-learn's NearestCentroid measures
    distances in another way there than for its probabilities, and an SVC without `break_ties` takes the first of equals.
    A classifier without a score per class is asked to predict.

    X : float32 of shape (n, dim); the places are intp of shape (n,), the columns of shape (n, len(classes_)): decision
        values float64, probabilities of the estimator's float dtype
    """
    model = estimator[-1] if hasattr(estimator, "steps") else estimator
    pairs = getattr(model, "decision_function_shape", "ovr") == "ovo"
    kinds: tuple[tuple[str, ScoreKind], ...] = (("predict_proba", "probability"), ("decision_function", "decision"))
    for name, kind in kinds:
        if hasattr(estimator, name) and not (pairs and kind == "decision" and len(estimator.classes_) > 2):
            columns = getattr(estimator, name)(X)
            columns = columns if kind == "probability" else scores_as_columns(columns)
            return columns.argmax(axis=1), columns, kind
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
    scores: NDArray[np.floating], present: NDArray[np.int64], n_classes: int, kind: str
) -> NDArray[np.float32]:
    """Give an estimator's scores one column per class of the whole problem.

    scores : ndarray of shape (n,) for two classes, or (n, len(present))
    present : ndarray of shape (len(present),), int64: the classes the estimator was fitted on
    Returns an ndarray of shape (n, n_classes). One decision value z of two classes becomes -z and z. An absent class gets
    probability 0, or 1 less than the row's lowest decision value.
    """
    if scores.ndim == 1:
        scores = np.stack([-scores, scores], axis=1)
    if len(present) == n_classes:
        return scores.astype(np.float32)
    absent = 0.0 if kind == "probability" else scores.min(axis=1, keepdims=True) - 1
    full = np.zeros((len(scores), n_classes), dtype=np.float32) + np.float32(absent)
    full[:, present] = scores
    return full
