"""What all sections of a config share, and the names they may use."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

HEAD_NAMES = (
    "logistic_regression",
    "linear_svm",
    "rbf_svm",
    "random_forest",
    "ridge",
    "knn",
    "nearest_centroid",
    "decision_tree",
    "mlp",
)
"""The built-in heads; `pipeline.heads.HEADS` has a row for each."""

Baseline = Literal["majority", "pixels", "hog"]
BASELINE_NAMES: tuple[Baseline, ...] = ("majority", "pixels", "hog")

Scalar = bool | int | float | str | None


class Section(BaseModel):
    """What every section shares: frozen, strict about types, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Item = TypeVar("Item")


def not_empty(value: tuple[Item, ...]) -> tuple[Item, ...]:
    """Return a list of the config; ValueError when it has no items."""
    # Not `min_length`, which also complains when an item was dropped for a mistake of its own.
    if not value:
        raise ValueError("expected at least one, got an empty list")
    return value


def guess(word: str, allowed: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
