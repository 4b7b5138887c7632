"""What all sections of a config share, and the names they may use."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

Baseline = Literal["majority", "pixels", "hog"]
BASELINE_NAMES: tuple[Baseline, ...] = ("majority", "pixels", "hog")

Scalar = bool | int | float | str | None


LARGEST = 2**53
"""The largest whole number of a config: beyond it floats are no longer exact."""


class Section(BaseModel):
    """What every section shares: frozen, strict about types, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _within_reason(cls, value: Any) -> Any:
        # No file and no column can have such a name, and a terminal obeys some of them.
        if isinstance(value, str) and any(ord(char) < 32 or ord(char) == 127 for char in value):
            raise ValueError(f"holds a control character: {value[:40]!r}; leave it out")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ValueError(f"expected at most {LARGEST:,}, got a larger number")
        return value


Item = TypeVar("Item")


def not_empty(value: tuple[Item, ...]) -> tuple[Item, ...]:
    """Return a list of the config; ValueError when it has no items."""
    # Not `min_length`, which also complains when an item was dropped for a mistake of its own.
    if not value:
        raise ValueError("expected at least one, got an empty list")
    return value


def device_of(*kinds: str) -> AfterValidator:
    """Return a check that a device is of one of these kinds, `cuda` also with an index."""
    return AfterValidator(lambda value: checked_device(value, kinds))


def checked_device(value: str, kinds: Sequence[str]) -> str:
    """Return a device of one of these kinds, `cuda` also with an index; ValueError for any other."""
    kind, colon, index = value.partition(":")
    if kind not in kinds or (colon and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"should be {', '.join(map(repr, kinds))} or a GPU by number, such as 'cuda:1', got {value!r}")
    return value


def guess(word: str, allowed: Sequence[str]) -> str:
    """Return `, did you mean 'x'?` for the closest allowed word, or nothing."""
    close = difflib.get_close_matches(word, allowed, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
