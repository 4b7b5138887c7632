"""The definition of a head, the dimensions of its search space, and its conversion to a pipeline or a linear layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Real:
    """A number from `low` to `high`, both included, uniform on a linear or a logarithmic scale."""

    low: float
    high: float
    prior: Prior = "uniform"

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`, both included."""

    low: int
    high: int
    prior: Prior = "uniform"

    def __contains__(self, value: Any) -> bool:
        return bool(self.low <= value <= self.high)


@dataclass(frozen=True)
class Categorical:
    """A choice among values of any type."""

    categories: Sequence[Any]

    def __contains__(self, value: Any) -> bool:
        return value in self.categories


Dimension = Real | Integer | Categorical


@dataclass(frozen=True)
class Head:
    """A model on features: its name, how to build it, and the search space of its parameters."""

    name: str
    build: Callable[[int], Pipeline]
    """Seed -> an unfitted scikit-learn Pipeline, the classifier as its last step."""
    space: Mapping[str, Dimension]
    """Parameter of the last step (or `step__parameter` of any step) -> its search dimension."""
    defaults: Params
    """A value for each parameter of the space: the first trial."""
    simplicity: float = 100
    """Rank, starting from simple and cheap (0): of heads with similar scores, the one with the lowest rank is recommended."""
    probabilities: bool = False
    """Whether the fitted head has `predict_proba`."""
    linear: bool = False
    """Whether `as_layer` can write the fitted head as one linear layer."""
    takes_class_weight: bool = False
    targets: tuple[str, ...] = ("classification",)
    """The supported kinds of target, as named in `pipeline.data.targets`."""
    evaluator: Evaluator | None = None
    """The method by which trials share work, its own or another head's; without one, every fit starts from scratch."""
    fixed: Params = field(default_factory=dict)
    """Parameters that the config fixes at one value."""
    fit: Callable[[Pipeline, Any, Any], Pipeline] = Pipeline.fit
    """(pipeline, X, y) -> the fitted pipeline."""


def configure(head: Head, params: Params, seed: int) -> Pipeline:
    """Build a head's unfitted pipeline with its parameters set; a name without `__`, such as `C`, belongs to the last step."""
    pipeline = head.build(seed)
    last = pipeline.steps[-1][0]
    named = {key if "__" in key else f"{last}__{key}": value for key, value in {**head.fixed, **params}.items()}
    return pipeline.set_params(**named)


def identity(head: Head, seed: int) -> dict[str, Any]:
    """Return everything that determines a head's results, as text without memory addresses, which change from run to run."""
    params = head.build(seed).get_params(deep=True)
    parts = {
        "pipeline": {key: params[key] for key in sorted(params) if key != "steps"},
        "space": dict(head.space),
        "defaults": dict(head.defaults),
        "fixed": dict(head.fixed),
        "evaluator": head.evaluator and head.evaluator.name,
        "fit": head.fit,
    }
    return {"name": head.name, **{key: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for key, value in parts.items()}}


def as_layer(pipeline: Pipeline) -> Layer:
    """Convert a fitted pipeline of scalers, PCA and a linear classifier into one linear layer on the raw features.

    Weights (n_classes, dim) and biases (n_classes,), float64, are in the order of `classes_`; two classes get two rows, -w/2 and
    w/2, whose softmax gives the same probability.

    HeadError if a step is not linear.
    """
    classifier = pipeline[-1]
    if not hasattr(classifier, "coef_"):
        from pipeline.heads.table import HEADS  # imported here, as the table imports this module

        able = ", ".join(name for name, row in HEADS.items() if row.linear)
        raise HeadError(f"a {type(classifier).__name__} cannot become a linear layer; heads that can: {able}")
    # For two classes, the coefficients of a ridge have one dimension less than those of the other linear classifiers.
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
