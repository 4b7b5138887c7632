"""Targets: what is to be said of an image, one frozen record for each kind.

A record knows how the columns of the index become y, what folds and the test split keep in proportion, and what predictions
look like in a CSV. It names no metric and no head: their rows say which kinds they serve. A new kind is a record with the
same members and a row in `TARGETS`; whoever holds a target asks it and never looks which kind it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import DatasetIndex
from pipeline.data.match import encode


@dataclass(frozen=True)
class Classification:
    """One class for each image: the label column of the index, its distinct texts in order."""

    classes: tuple[str, ...]
    kind: ClassVar[str] = "classification"

    @staticmethod
    def of(index: DatasetIndex) -> Classification:
        """Return the target of an index: its labels are the classes."""
        return Classification(index.classes)

    @property
    def width(self) -> int:
        """How many numbers a head says of an image at most: one for each class."""
        return len(self.classes)

    def encode(self, index: DatasetIndex) -> NDArray[np.int64]:
        """Return y, shape (n,), int64: each image's place in `classes`; KeyError for a label that is none of them."""
        codes, names = encode(index.labels)
        place = {name: code for code, name in enumerate(self.classes)}
        return np.array([place[name] for name in names], dtype=np.int64)[codes]

    def strata(self, y: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what folds and the test split keep in proportion: a number from 0 for each image, shape (n,), int64."""
        return y

    def problem(self, y_train: NDArray[np.int64]) -> str | None:
        """Say why no head can be fitted on these training images; None where one can."""
        found = len(np.unique(y_train))
        return None if found > 1 else f"the training images are of {found} class; a classifier needs at least 2"

    def csv_columns(self, top: int) -> list[str]:
        """Return the names of a prediction's cells: its label and probability, then those of the next likely ones."""
        later = range(2, min(top, self.width) + 1)
        return ["label", "probability", *(f"{name}_{rank}" for rank in later for name in ("label", "probability"))]

    def csv_cells(self, label: str | None, probabilities: Sequence[float] | NDArray[Any] | None, top: int) -> list[str]:
        """Return the cells of one prediction; empty ones where there is no label, or nothing but the label.

        probabilities : shape (n_classes,), None where the head has none
        """
        count = min(top, self.width)
        if label is None or probabilities is None:
            return [label or "", *[""] * (2 * count - 1)]
        # The head's own label comes first, also where another is exactly as likely.
        order = sorted(range(self.width), key=lambda place: (self.classes[place] != label, -probabilities[place]))
        return [cell for place in order[:count] for cell in (self.classes[place], f"{probabilities[place]:.6f}")]


Target = Classification
"""Any kind of target."""

TARGETS: Mapping[str, type[Target]] = {Classification.kind: Classification}
"""By the name that the rows of metrics and heads have for it."""
