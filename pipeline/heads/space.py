"""The dimensions of a search space; scikit-optimize's of the same names are taken as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.errors import HeadError

Prior = Literal["uniform", "log-uniform"]


@dataclass(frozen=True, repr=False)
class Real:
    """A number from `low` to `high`, both included, evenly likely on its own scale or on a logarithmic one."""

    low: float
    high: float
    prior: Prior = "uniform"

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __repr__(self) -> str:
        # scikit-optimize's text, which the journals of searches hold.
        return f"Real(low={self.low}, high={self.high}, prior='{self.prior}', transform='identity')"


@dataclass(frozen=True, repr=False)
class Integer:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int
    prior: Prior = "uniform"

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)

    def __repr__(self) -> str:
        return f"Integer(low={self.low}, high={self.high}, prior='{self.prior}', transform='identity')"


@dataclass(frozen=True, repr=False)
class Categorical:
    """One of some choices, which may be of any type."""

    categories: tuple[Any, ...]
    prior: None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))

    def __contains__(self, value: Any) -> bool:
        return value in self.categories

    def __repr__(self) -> str:
        return f"Categorical(categories={self.categories}, prior=None)"


Dimension = Real | Integer | Categorical


def dimension(given: Any) -> Dimension:
    """Return a dimension as one of these types; HeadError for what is neither one nor scikit-optimize's."""
    if isinstance(given, Real | Integer | Categorical):
        return given
    if hasattr(given, "categories"):
        return Categorical(given.categories)
    if all(hasattr(given, name) for name in ("low", "high", "prior", "dtype")):
        kind = Integer if np.issubdtype(np.dtype(given.dtype), np.integer) else Real
        return kind(given.low, given.high, given.prior)
    raise HeadError(
        f"{given!r} is no dimension of a search space; expected a Real, Integer or Categorical of pipeline.heads"
    )
