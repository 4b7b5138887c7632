"""Targets: what is to be said of an image, one frozen record for each kind.

A record knows how the columns of the index become y, what estimators are fitted on and what they say, what folds and the test
split keep in proportion, and what predictions look like in a file. It names no metric and no head: their rows say which kinds
they serve. A new kind is a record with the same members in a file of its own and a row in `TARGETS`; whoever holds a target asks
it and never looks which kind it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from pipeline.config import NO_LABELS
from pipeline.data.classes import Classification, MultiLabel
from pipeline.data.index import DatasetIndex
from pipeline.data.numbers import Regression
from pipeline.errors import DatasetError

Target = Classification | MultiLabel | Regression
"""Any kind of target."""

TARGETS: Mapping[str, type[Target]] = {target.kind: target for target in (Classification, MultiLabel, Regression)}
"""By the name that `dataset.target` and the rows of metrics and heads have for it."""

CONSTANT_GUESSES = frozenset(target.constant for target in TARGETS.values())
"""What the guesses that look at no image are called."""


_NOTHING_TO_LEARN = (
    "these images were embedded without labels, so there is nothing to learn from; give each class a folder of its own, or list the "
    "images in a manifest with labels, and run `manyheads features`, which embeds none of them again"
)


def record_of(target: Target) -> dict[str, Any]:
    """Return all there is to know of a target as plain values for JSON; of classes the kind is not told."""
    kind = {} if target.kind == Classification.kind else {"kind": target.kind}
    return kind | {name: list(value) for name, value in vars(target).items()}


def target_of(record: Mapping[str, Any]) -> Target:
    """Return the target that `record_of` wrote down; KeyError, TypeError or ValueError for what is none."""
    kind = TARGETS[record.get("kind", Classification.kind)]
    for field in fields(kind):
        if not isinstance(record[field.name], list | tuple):
            raise ValueError(field.name)
    names, *numbers = (record[field.name] for field in fields(kind))
    if any(len(known) not in (0, len(names)) for known in numbers):
        raise ValueError("a number for each name")
    return kind(tuple(map(str, names)), *(tuple(map(float, known)) for known in numbers))


def countable(index: DatasetIndex, kinds: Sequence[str]) -> Iterator[tuple[str, str, DatasetIndex]]:
    """Yield what `DatasetIndex.by_target` does, the images under texts that a person would count them by."""
    for column, kind, part in index.by_target(kinds):
        yield column, kind, TARGETS[kind_of(kind)].as_classes(part)


def kind_of(asked: str) -> str:
    """Return the kind of target that `dataset.target` means: of `auto` classes; DatasetError where it says that there are no labels."""
    if asked == NO_LABELS:
        raise DatasetError(_NOTHING_TO_LEARN)
    return Classification.kind if asked == "auto" else asked


def choose(index: DatasetIndex, asked: str) -> Target:
    """Return the target of an index, of the kind that `dataset.target` asks for; DatasetError where no image has a label."""
    if len(index) and not (index.labels != "").any():
        raise DatasetError(_NOTHING_TO_LEARN)
    return TARGETS[kind_of(asked)].of(index)
