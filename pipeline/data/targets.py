"""Targets: the task to learn, one frozen record per kind; those of classes are in `classes.py`, that of numbers is here.

A record converts the index's columns to y, to the values that estimators are fitted on, and back from their predictions; it defines the
strata of folds and of the test split, and the format of predictions in files. A new kind is a record with the same members and a row in
`TARGETS`, in the metrics and in the heads; callers use the members and never check the kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.config import NO_LABELS
from pipeline.data.classes import Calibrate, Classification, MultiLabel, ScoreKind
from pipeline.data.index import DatasetIndex
from pipeline.errors import DatasetError, first

Numbers = NDArray[np.float64]

LEVEL = 0.9
"""The coverage of a prediction interval."""

MOST_STRATA, IMAGES_PER_STRATUM = 10, 20

EXAMPLES = 5

QUARTERS = 4


@dataclass(frozen=True)
class Regression:
    """One or several numbers per image, from the label columns of the index.

    Heads are fitted on standardised numbers, so that penalties and learning rates do not depend on the unit. `centre` and `scale` are the
    parameters of the standardisation, `low` and `high` the range of the training images, `half` half the width of a prediction interval;
    each has an entry per column, () if not yet known. Unless stated otherwise, y is float64 of shape (n,), or (n, k) for several columns.
    """

    columns: tuple[str, ...] = ("label",)
    centre: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    half: tuple[float, ...] = ()
    kind: ClassVar[str] = "regression"
    constant: ClassVar[str] = "mean"
    exclusive: ClassVar[bool] = False
    stored_as: ClassVar[type] = np.float64
    classes: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def of(index: DatasetIndex) -> Regression:
        """Return the target of an index, fitted on its training images; DatasetError if some labels are no finite numbers."""
        bare = Regression(index.names)
        train = index.select("train", "validation")
        return bare.fitted(bare.encode(train if len(train) else index))

    def fitted(self, y: Numbers) -> Regression:
        """Return the target with the range and the standardisation of some images' numbers."""
        if not len(y):
            return self
        flat = self._flat(y)
        spread = flat.std(axis=0)
        found = flat.mean(axis=0), np.where(spread > 0, spread, 1.0), flat.min(axis=0), flat.max(axis=0)
        centre, scale, low, high = (tuple(part.tolist()) for part in found)
        return replace(self, centre=centre, scale=scale, low=low, high=high)

    def _flat(self, y: NDArray[Any]) -> NDArray[Any]:
        return y.reshape(len(y), self.width)

    @property
    def width(self) -> int:
        """The number of outputs per image."""
        return len(self.columns)

    @staticmethod
    def as_classes(index: DatasetIndex) -> DatasetIndex:
        """Return the index with labels to count images by: the quarters of the numbers' range."""
        target = Regression.of(index)
        y = target._flat(target.encode(index))
        ends = np.linspace(target.low, target.high, QUARTERS + 1)
        place = (ends[1:-1, None] <= y).sum(axis=0)
        words = [
            [f"quarter {k}: {low:.4g} to {high:.4g}" for k, (low, high) in enumerate(pairwise(column), 1)]
            for column in ends.T
        ]
        texts = [" and ".join(words[k][row[k]] for k in range(target.width)) for row in place]
        return replace(index, labels=np.array(texts, dtype=object), names=("label",))

    @staticmethod
    def in_words(index: DatasetIndex) -> str:
        """Describe the labels, such as `with a number from 0 to 9`."""
        target = Regression.of(index)
        ranges = [f"{low:.4g} to {high:.4g}" for low, high in zip(target.low, target.high, strict=True)]
        if target.width == 1:
            return f"with a number from {ranges[0]}"
        return "with " + ", ".join(f"{name} from {told}" for name, told in zip(target.columns, ranges, strict=True))

    def encode(self, index: DatasetIndex) -> NDArray[Any]:
        """Return y; DatasetError for labels that are not finite numbers."""
        try:
            y = index.labels.astype(np.float64)
        except ValueError:
            y = np.full(index.labels.shape, np.nan)
            for place, text in np.ndenumerate(index.labels):
                y[place] = as_number(text)
        wrong = ~np.isfinite(self._flat(y)).all(axis=1)
        if wrong.any():
            found = [f"{path}: {label}" for path, label in zip(index.paths[wrong], index.labels[wrong], strict=True)]
            raise DatasetError(
                f"{int(wrong.sum()):,} of {len(index):,} images have a label that is no finite number, which a target of numbers needs",
                first(found, EXAMPLES),
            )
        return y

    def decode(self, y: Numbers) -> Numbers:
        """Return the numbers unchanged."""
        return y

    def restored(self, stored: NDArray[np.float64]) -> Numbers:
        """Return the numbers from a file unchanged."""
        return stored

    def strata(self, y: Numbers) -> NDArray[np.int64]:
        """Return the strata of folds and of the test split, int64 (n,): the quantile of each image, of up to ten.

        With several numbers it is the quantile of the sum of the standardised numbers.
        """
        order = np.argsort(np.argsort(self.fitted(y).learned(y).reshape(len(y), -1).sum(axis=1), kind="stable"))
        count = max(2, min(MOST_STRATA, len(y) // IMAGES_PER_STRATUM))
        return np.asarray(order * count // max(len(y), 1), dtype=np.int64)

    def problem(self, y_train: Numbers) -> str | None:
        """Return why no head can be fitted on these training images; None if one can."""
        flat = self._flat(y_train)
        same = [name for name, column in zip(self.columns, flat.T, strict=True) if not len(flat) or np.ptp(column) == 0]
        return (
            f"all training images have the same number in {', '.join(same)}; nothing can be learned" if same else None
        )

    def narrowed(self, y: Numbers) -> tuple[Regression, Numbers, NDArray[np.int64]]:
        """Return the target of y, y, and an empty int64 array in place of classes."""
        return (self if self.scale else self.fitted(y)), y, np.empty(0, np.int64)

    def anew(self, y: Numbers) -> tuple[Regression, Numbers]:
        """Return a target for other numbers y, and the y to fit an estimator on."""
        names = self.columns if y[:1].size == self.width else tuple(map(str, range(y.shape[1])))
        target = Regression(names).fitted(y)
        return target, target.learned(y)

    def learned(self, y: Numbers) -> Numbers:
        """Return the y to fit an estimator on: the standardised numbers."""
        return ((self._flat(y) - self.centre) / self.scale).reshape(y.shape)

    def decided(self, y: Any, y_pred: Any, scores: Any, by: str, folds: Any = None) -> Any:
        """Return the predictions unchanged."""
        return y_pred

    def settled(self, y: Numbers, y_pred: Numbers, probabilities: Any = None, by: str = "") -> Regression:
        """Return the target with the width of prediction intervals, fitted on out-of-fold predictions.

        Half the width is the (n + 1) * 0.9-th smallest of n residuals, so that an interval has 90 % coverage (split conformal
        prediction, Vovk et al. 2005; cross-conformal with folds, Vovk 2015).
        """
        residuals = np.sort(np.abs(self._flat(y) - self._flat(y_pred)), axis=0)
        place = int(np.ceil((len(residuals) + 1) * LEVEL)) - 1
        return replace(self, half=tuple(residuals[min(place, len(residuals) - 1)].tolist()))

    def only(self, y: Numbers, n: int) -> tuple[Numbers, None, None] | None:
        """Return constant predictions for n images if all of y are equal; None if a head can be fitted on y."""
        return None if (y != y[0]).any() else (np.repeat(y[:1], n, axis=0), None, None)

    def answers(self, estimator: Any, X: NDArray[np.float32]) -> tuple[Numbers, None, ScoreKind | None]:
        """Return an estimator's predictions for n vectors in the unit of y; there are no scores."""
        return self.told(estimator.predict(X)), None, None

    def told(self, standardised: NDArray[np.floating]) -> Numbers:
        """Return an estimator's predictions, standardised numbers of any float dtype and the shape of y, in the unit of y."""
        whole = self._flat(np.asarray(standardised, dtype=np.float64)) * self.scale + self.centre
        return np.asarray(whole[:, 0] if self.width == 1 else whole)

    def recalled(self, estimator: Any, X: NDArray[np.float32]) -> tuple[Numbers, None]:
        """Return an estimator's predictions for the rows that it was fitted on."""
        return self.answers(estimator, X)[:2]

    def predict(self, estimator: Any, X: NDArray[np.float32], calibrate: Calibrate) -> tuple[Numbers, None]:
        """Return the predicted numbers; there are no probabilities."""
        return self.answers(estimator, X)[:2]

    def inside(self, y: Numbers, y_pred: Numbers) -> NDArray[np.bool_]:
        """Return which numbers are within their prediction interval, bool of shape (n, k)."""
        return np.asarray(np.abs(self._flat(y) - self._flat(y_pred)) <= self.half)

    def counted_as(self, label: Any) -> str:
        """Return the key that predictions are counted by: outside the training images' range, on which side; '' if within."""
        notes = {self.note(place, number) for place, number in enumerate(np.atleast_1d(label).tolist())}
        return " and ".join(sorted(notes - {""}))

    def csv_columns(self, top: int) -> list[str]:
        """Return the CSV columns of a prediction: each number, the ends of its interval, and a note."""
        names = ["prediction"] if self.width == 1 else list(self.columns)
        return [f"{name}{end}" for name in names for end in ("", "_low", "_high", "_note")]

    def csv_cells(self, label: Any, probabilities: Sequence[float] | NDArray[Any] | None, top: int) -> list[str]:
        """Return the CSV cells of one prediction, `label`, a number or float64 of shape (k,); empty if there is none."""
        if label is None:
            return [""] * (4 * self.width)
        cells = []
        for place, number in enumerate(np.atleast_1d(label).tolist()):
            ends = [f"{number + sign * self.half[place]:.8g}" for sign in (-1, 1)] if self.half else ["", ""]
            cells += [f"{number:.8g}", *ends, self.note(place, number)]
        return cells

    def note(self, place: int, number: float) -> str:
        """Return a note for a prediction outside the training images' range; '' if it is within."""
        if not self.low or self.low[place] <= number <= self.high[place]:
            return ""
        side = "below" if number < self.low[place] else "above"
        return f"{side} the training images' {self.low[place]:.6g} to {self.high[place]:.6g}"


def as_number(text: str) -> float:
    """Return the number in a text; NaN if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


Target = Classification | MultiLabel | Regression
"""Any kind of target."""

TARGETS: Mapping[str, type[Target]] = {target.kind: target for target in (Classification, MultiLabel, Regression)}
"""The kinds of targets, by their name in `dataset.target` and in the rows of metrics and heads."""

CONSTANT_GUESSES = frozenset(target.constant for target in TARGETS.values())
"""The names of the constant baselines, which look at no image."""


_NOTHING_TO_LEARN = (
    "these images were embedded without labels, so there is nothing to learn from; give each class a folder of its own, or list the "
    "images in a manifest with labels, and run `manyheads features`, which embeds none of them again"
)


def record_of(target: Target) -> dict[str, Any]:
    """Return a target as plain values for JSON; classification has no `kind` field."""
    kind = {} if target.kind == Classification.kind else {"kind": target.kind}
    return kind | {name: list(value) for name, value in vars(target).items()}


def target_of(record: Mapping[str, Any]) -> Target:
    """Restore the target stored by `record_of`; KeyError, TypeError or ValueError for an invalid record."""
    kind = TARGETS[record.get("kind", Classification.kind)]
    for field in fields(kind):
        if not isinstance(record[field.name], list | tuple):
            raise ValueError(field.name)
    names, *numbers = (record[field.name] for field in fields(kind))
    if any(len(known) not in (0, len(names)) for known in numbers):
        raise ValueError("a number for each name")
    return kind(tuple(map(str, names)), *(tuple(map(float, known)) for known in numbers))


def countable(index: DatasetIndex, kinds: Sequence[str]) -> Iterator[tuple[str, str, DatasetIndex]]:
    """Yield the parts of `DatasetIndex.by_target`, with labels to count images by."""
    for column, kind, part in index.by_target(kinds):
        yield column, kind, TARGETS[kind_of(kind)].as_classes(part)


def kind_of(asked: str) -> str:
    """Return the kind of target for a value of `dataset.target`: `auto` is classification; DatasetError if there are no labels."""
    if asked == NO_LABELS:
        raise DatasetError(_NOTHING_TO_LEARN)
    return Classification.kind if asked == "auto" else asked


def choose(index: DatasetIndex, asked: str) -> Target:
    """Return the target of an index for a value of `dataset.target`; DatasetError if no image has a label."""
    if len(index) and not (index.labels != "").any():
        raise DatasetError(_NOTHING_TO_LEARN)
    return TARGETS[kind_of(asked)].of(index)
