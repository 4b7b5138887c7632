"""The record of a head, and how it becomes a pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sklearn.pipeline import Pipeline

from pipeline.heads.space import Dimension, dimension

if TYPE_CHECKING:
    from pipeline.heads.tuning.evaluation import Evaluator

Params = Mapping[str, Any]


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
