"""The record of a head, the dimensions of its search space, how it becomes a pipeline, and a linear one a layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.errors import HeadError

if TYPE_CHECKING:
    from pipeline.heads.tuning.evaluation import Evaluator

Params = Mapping[str, Any]
Prior = Literal["uniform", "log-uniform"]
Layer = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Weights of shape (n_classes, dim) and biases of shape (n_classes,), float64: scores = x @ weights.T + bias."""


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


@dataclass(frozen=True)
class Head:
    """A classifier for features: what it is called, how it is built, where its parameters are searched."""

    name: str
    build: Callable[[int], Pipeline]
    """Seed -> an unfitted scikit-learn Pipeline, the classifier as its last step."""
    space: Mapping[str, Dimension]
    """Parameter of the last step (or `step__parameter` of any) -> the dimension it is searched in; scikit-optimize's are
    taken as well."""
    defaults: Params
    """A value for each parameter of the space: the first trial."""
    simplicity: float = 100
    """Rank from simple and cheap (0) up: of heads that score alike, the lowest rank is recommended."""
    probabilities: bool = False
    """Whether the fitted head has `predict_proba`."""
    linear: bool = False
    """Whether `as_layer` can write the fitted head as one linear layer."""
    takes_class_weight: bool = False
    targets: tuple[str, ...] = ("classification",)
    """The kinds of target it serves, as `pipeline.data.targets` names them."""
    evaluator: Evaluator | None = None
    """How trials share work, such as that of another head; without one each fold is fitted from scratch."""
    fixed: Params = field(default_factory=dict)
    """Parameters that the config holds at one value."""
    fit: Callable[[Pipeline, Any, Any], Pipeline] = Pipeline.fit
    """(its pipeline, X, y) -> the pipeline, fitted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", {key: dimension(given) for key, given in self.space.items()})


def configure(head: Head, params: Params, seed: int) -> Pipeline:
    """Build a head's unfitted pipeline with its parameters set; `C` means the last step's `C`."""
    pipeline = head.build(seed)
    last = pipeline.steps[-1][0]
    named = {key if "__" in key else f"{last}__{key}": value for key, value in {**head.fixed, **params}.items()}
    return pipeline.set_params(**named)


def identity(head: Head, seed: int) -> dict[str, Any]:
    """Return what determines a head's results, as plain data: its pipeline, its space, its defaults."""
    pipeline = head.build(seed)
    params = pipeline.get_params(deep=True)
    return {
        "name": head.name,
        "pipeline": {key: _stable(params[key]) for key in sorted(params) if key != "steps"},
        "space": {key: [_stable(row), str(row.prior)] for key, row in head.space.items()},
        "defaults": {key: _stable(value) for key, value in head.defaults.items()},
        "fixed": {key: _stable(value) for key, value in head.fixed.items()},
        "evaluator": "generic" if head.evaluator is None else head.evaluator.name,
        "fit": _stable(head.fit),
    }


def _stable(value: Any) -> str:
    """A value's text without the memory addresses that change from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def as_layer(pipeline: Pipeline) -> Layer:
    """Write a fitted pipeline of scalers, PCA and a linear classifier as one layer on the raw features.

    Weights (n_classes, dim) and biases (n_classes,), float64, have the order of `classes_`; two classes get two rows, -w/2 and
    w/2, whose softmax is the same probability.

    HeadError where a step is not linear.
    """
    classifier = pipeline[-1]
    if not hasattr(classifier, "coef_"):
        from pipeline.heads.table import HEADS  # whose rows are made of this module's

        able = ", ".join(name for name, row in HEADS.items() if row.linear)
        raise HeadError(f"a {type(classifier).__name__} is no linear layer; heads that are: {able}")
    # Of two classes a ridge keeps one dimension less than the other linear classifiers.
    weights = np.asarray(classifier.coef_, dtype=np.float64).reshape(-1, classifier.n_features_in_)
    bias = np.zeros(len(weights)) + np.asarray(classifier.intercept_, dtype=np.float64)
    for _, step in reversed(pipeline.steps[:-1]):
        if type(step) is StandardScaler:
            weights = weights / (1.0 if step.scale_ is None else step.scale_)
            bias = bias - weights @ step.mean_ if step.mean_ is not None and step.with_mean else bias
        elif type(step) is PCA:
            if step.whiten:
                weights = weights / np.sqrt(np.maximum(step.explained_variance_, np.finfo(np.float64).eps))
            weights = weights @ step.components_
            bias = bias - weights @ step.mean_
        elif step is not None and step != "passthrough":
            raise HeadError(
                f"a {type(step).__name__} before the head cannot be folded into a layer; only: StandardScaler, PCA"
            )
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights, bias
