"""Heads: the classifiers that are put on frozen features, one row each in a table.

A head is data: its name, how to build its scikit-learn pipeline from a seed, and the space its parameters are searched
in. The scaler sits inside the pipeline, so every fold fits its own. To add one, add a row to `HEADS`, or name a `Head`
of your own in the config as `package.module:ATTRIBUTE`.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from skopt.space import Categorical, Dimension, Integer, Real

from pipeline.config import HeadConfig, Scalar, guess
from pipeline.errors import HeadError

Params = Mapping[str, Any]
Vectors = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """A classifier for features: what it is called, how it is built, where its parameters are searched."""

    name: str
    build: Callable[[int], Pipeline]
    """Seed -> an unfitted scikit-learn Pipeline, the classifier as its last step."""
    space: Mapping[str, Dimension]
    """Parameter of the last step (or `step__parameter` of any) -> the dimension it is searched in."""
    defaults: Params
    """A value for each parameter of the space: the first trial."""
    simplicity: int = 100
    """Rank from simple and cheap (0) up: of heads that score alike, the lowest rank is recommended."""
    probabilities: bool = False
    """Whether the fitted head has `predict_proba`."""
    linear: bool = False
    """Whether `linear_parts` can write the fitted head as one linear layer."""
    takes_class_weight: bool = False
    evaluator: str = "generic"
    """How trials share work, a row of `pipeline.tuning.evaluation.EVALUATORS`; `generic` fits each fold from scratch."""
    fixed: Params = field(default_factory=dict)
    """Parameters that the config holds at one value."""


def _forest(seed: int) -> Pipeline:
    # Trees compare one feature with a threshold, so a scaler would change nothing. More trees are never worse on
    # average, so their number is not searched.
    return Pipeline([("head", RandomForestClassifier(n_estimators=300, random_state=seed))])


def _tree(seed: int) -> Pipeline:
    return Pipeline([("head", DecisionTreeClassifier(random_state=seed))])


def _scaled(classifier: Callable[[int], Any], seed: int) -> Pipeline:
    return Pipeline([("scaler", StandardScaler()), ("head", classifier(seed))])


def _logistic_regression(seed: int) -> LogisticRegression:
    return LogisticRegression(max_iter=1000, random_state=seed)


def _linear_svm(seed: int) -> LinearSVC:
    # The dual's coordinate descent needs far more than the default 1,000 passes at large C.
    return LinearSVC(max_iter=5000, random_state=seed)


def _rbf_svm(seed: int) -> SVC:
    return SVC(cache_size=500, random_state=seed)


def _ridge(seed: int) -> RidgeClassifier:
    return RidgeClassifier(random_state=seed)


def _knn(seed: int) -> KNeighborsClassifier:
    return KNeighborsClassifier()


def _nearest_centroid(seed: int) -> NearestCentroid:
    return NearestCentroid()


def _mlp(seed: int) -> MLPClassifier:
    return MLPClassifier(max_iter=100, random_state=seed)


def _log(low: float, high: float) -> Real:
    return Real(low, high, prior="log-uniform")


_ROWS = (
    Head(
        name="nearest_centroid",
        build=partial(_scaled, _nearest_centroid),
        space={"shrink_threshold": Categorical([None, 0.1, 0.3, 1.0, 3.0])},
        defaults={"shrink_threshold": None},
        simplicity=0,
        probabilities=True,
    ),
    Head(
        name="ridge",
        build=partial(_scaled, _ridge),
        space={"alpha": _log(1e-2, 1e6)},
        defaults={"alpha": 100.0},
        simplicity=1,
        linear=True,
        takes_class_weight=True,
        evaluator="ridge",
    ),
    Head(
        name="logistic_regression",
        build=partial(_scaled, _logistic_regression),
        space={"C": _log(1e-6, 1e2)},
        defaults={"C": 0.1},
        simplicity=2,
        probabilities=True,
        linear=True,
        takes_class_weight=True,
        evaluator="logistic_regression",
    ),
    Head(
        name="linear_svm",
        build=partial(_scaled, _linear_svm),
        space={"C": _log(1e-6, 1e1)},
        defaults={"C": 0.01},
        simplicity=3,
        linear=True,
        takes_class_weight=True,
        evaluator="linear_svm",
    ),
    Head(
        name="decision_tree",
        build=_tree,
        space={
            "max_depth": Integer(2, 32),
            "min_samples_leaf": Integer(1, 64, prior="log-uniform"),
            "criterion": Categorical(["gini", "entropy"]),
        },
        defaults={"max_depth": 16, "min_samples_leaf": 1, "criterion": "gini"},
        simplicity=4,
        probabilities=True,
        takes_class_weight=True,
    ),
    Head(
        name="knn",
        build=partial(_scaled, _knn),
        space={
            "n_neighbors": Integer(1, 64, prior="log-uniform"),
            "weights": Categorical(["uniform", "distance"]),
            "metric": Categorical(["euclidean", "cosine"]),
        },
        defaults={"n_neighbors": 5, "weights": "distance", "metric": "cosine"},
        simplicity=5,
        probabilities=True,
    ),
    Head(
        name="random_forest",
        build=_forest,
        space={"max_features": _log(0.005, 0.5), "min_samples_leaf": Integer(1, 16, prior="log-uniform")},
        defaults={"max_features": 0.05, "min_samples_leaf": 1},
        simplicity=6,
        probabilities=True,
        takes_class_weight=True,
        evaluator="forest",
    ),
    Head(
        name="rbf_svm",
        build=partial(_scaled, _rbf_svm),
        space={"C": _log(1e-1, 1e3), "gamma": _log(1e-5, 1e-1)},
        # Scaled features have a mean squared norm of their dimension; 0.002 is scikit-learn's "scale" at 512.
        defaults={"C": 10.0, "gamma": 0.002},
        simplicity=7,
        takes_class_weight=True,
        evaluator="rbf_svm",
    ),
    Head(
        name="mlp",
        build=partial(_scaled, _mlp),
        space={
            "hidden_layer_sizes": Integer(32, 512, prior="log-uniform"),
            "alpha": _log(1e-6, 1e0),
            "learning_rate_init": _log(1e-4, 1e-2),
        },
        defaults={"hidden_layer_sizes": 128, "alpha": 1e-4, "learning_rate_init": 1e-3},
        simplicity=8,
        probabilities=True,
    ),
)

HEADS: Mapping[str, Head] = {row.name: row for row in _ROWS}
"""The built-in heads by name."""


def configure(head: Head, params: Params, seed: int) -> Pipeline:
    """Build a head's unfitted pipeline with its parameters set; `C` means the last step's `C`."""
    pipeline = head.build(seed)
    last = pipeline.steps[-1][0]
    named = {key if "__" in key else f"{last}__{key}": value for key, value in {**head.fixed, **params}.items()}
    return pipeline.set_params(**named)


def resolve(config: HeadConfig) -> Head:
    """Return the head a config names, with its space narrowed or widened and its class weights set.

    A range is `[low, high]` and keeps its prior, a categorical parameter takes the list of its choices, and a list of
    one value fixes the parameter. Defaults outside a new range move to its nearest end.

    Raises
    ------
    HeadError
        With one line for every problem of this head.
    """
    head = _load(config.name) if ":" in config.name else HEADS[config.name]
    problems: list[str] = []
    space, defaults, fixed = dict(head.space), dict(head.defaults), dict(head.fixed)
    for key, values in config.space.items():
        if key not in head.space:
            hint = guess(key, list(head.space))
            problems.append(f"space.{key}: unknown parameter{hint}; this head is searched over {', '.join(head.space)}")
        elif problem := _mismatch(head.space[key], values):
            problems.append(f"space.{key}: {problem}")
        elif len(values) == 1:
            fixed[key] = values[0]
            del space[key], defaults[key]
        else:
            space[key] = _changed(head.space[key], values)
            defaults[key] = _nearest(space[key], defaults[key])
    build = head.build
    if config.class_weight is not None:
        if head.takes_class_weight:
            build = partial(_weighted, head.build, config.class_weight)
        else:
            able = ", ".join(name for name, row in HEADS.items() if row.takes_class_weight)
            problems.append(
                f"class_weight: {config.class_weight!r} is not possible with this head; heads that take it: {able}"
            )
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise HeadError(f"head {config.name}: {len(problems)} {plural}", problems)
    return replace(head, build=build, space=space, defaults=defaults, fixed=fixed)


def resolve_all(configs: Sequence[HeadConfig]) -> tuple[Head, ...]:
    """Resolve every head of a config; a `HeadError` lists the problems of all of them."""
    heads: list[Head] = []
    problems: list[str] = []
    for config in configs:
        try:
            heads.append(resolve(config))
        except HeadError as error:
            problems += [f"{config.name}: {problem}" for problem in error.problems] or [error.message]
    names = [head.name for head in heads]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{name}: two heads have this name; give yours another" for name in twice]
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise HeadError(f"heads: {len(problems)} {plural}", problems)
    return tuple(heads)


def linear_parts(pipeline: Pipeline) -> tuple[Vectors, Vectors, Vectors, Vectors]:
    """Write a fitted linear head as a layer: scores = ((x - mean) / scale) @ weights.T + bias.

    Returns
    -------
    weights : ndarray of shape (n_classes, dim)
        Rows in the order of `classes_`. With two classes scikit-learn keeps one row w; here it is split into -w/2 and
        w/2, whose softmax gives the same probabilities and whose larger score is the same class.
    bias : ndarray of shape (n_classes,)
    mean, scale : ndarray of shape (dim,)
        Of the scaler inside the pipeline.

    Raises
    ------
    HeadError
        When the head is not linear.
    """
    classifier = pipeline[-1]
    scalers = [step for _, step in pipeline.steps[:-1]]
    foreign = len(scalers) > 1 or any(not isinstance(step, StandardScaler) for step in scalers)
    if foreign or not hasattr(classifier, "coef_"):
        able = ", ".join(name for name, row in HEADS.items() if row.linear)
        raise HeadError(
            f"a {type(classifier).__name__} is not a linear layer over scaled features; heads that are: {able}"
        )
    weights = np.asarray(classifier.coef_, dtype=np.float64).reshape(-1, classifier.n_features_in_)
    bias = np.asarray(classifier.intercept_, dtype=np.float64).reshape(-1)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    dim = weights.shape[1]
    scaler = scalers[0] if scalers else None
    mean = np.zeros(dim) if scaler is None or scaler.mean_ is None else np.asarray(scaler.mean_, dtype=np.float64)
    scale = np.ones(dim) if scaler is None or scaler.scale_ is None else np.asarray(scaler.scale_, dtype=np.float64)
    return weights, bias, mean, scale


def identity(head: Head, seed: int) -> dict[str, Any]:
    """Return what determines a head's results, as plain data: its pipeline, its space, its defaults."""
    pipeline = head.build(seed)
    params = pipeline.get_params(deep=True)
    return {
        "name": head.name,
        "pipeline": {key: _stable(params[key]) for key in sorted(params) if key != "steps"},
        # skopt leaves the prior of an integer out of its text.
        "space": {key: [_stable(row), str(getattr(row, "prior", None))] for key, row in head.space.items()},
        "defaults": {key: _stable(value) for key, value in head.defaults.items()},
        "fixed": {key: _stable(value) for key, value in head.fixed.items()},
        "evaluator": head.evaluator,
    }


def _stable(value: Any) -> str:
    """A value's text without the memory addresses that change from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _weighted(build: Callable[[int], Pipeline], class_weight: str, seed: int) -> Pipeline:
    pipeline = build(seed)
    pipeline[-1].set_params(class_weight=class_weight)
    return pipeline


def _mismatch(dimension: Dimension, values: Sequence[Scalar]) -> str | None:
    """Say why the config's values cannot replace a dimension, or None."""
    if isinstance(dimension, Categorical):
        return _choice_mismatch(dimension, values)
    kind = "whole numbers" if isinstance(dimension, Integer) else "numbers"
    wanted = (int,) if isinstance(dimension, Integer) else (int, float)
    if len(values) not in {1, 2} or any(isinstance(value, bool) or not isinstance(value, wanted) for value in values):
        return f"expected [low, high] in {kind}, such as [{dimension.low}, {dimension.high}], got {list(values)}"
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    if not all(math.isfinite(value) for value in numbers):
        return f"expected finite {kind}, got {list(values)}"
    if dimension.prior == "log-uniform" and numbers[0] <= 0:
        return f"is searched on a logarithmic scale, so low must be above 0, got {list(values)}"
    if len(numbers) == 2 and numbers[0] >= numbers[1]:
        return f"expected low below high, got {list(values)}"
    return None


def _choice_mismatch(dimension: Categorical, values: Sequence[Scalar]) -> str | None:
    if not values:
        return f"expected at least one choice of {list(dimension.categories)}, got none"
    if len({repr(value) for value in values}) < len(values):
        return f"a choice is given twice in {list(values)}"
    kinds = {_kind(choice) for choice in dimension.categories}
    words = [choice for choice in dimension.categories if isinstance(choice, str)]
    for value in values:
        if _kind(value) not in kinds:
            return f"{value!r} is not a choice; expected a list of {', '.join(sorted(kinds))}, such as {list(dimension.categories)}"
        if isinstance(value, str) and value not in words:
            return f"{value!r} is not a choice{guess(value, words)}; allowed: {', '.join(words)}"
    return None


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, (bool, np.bool_)):
        return "true or false"
    return "text" if isinstance(value, str) else "numbers"


def _changed(dimension: Dimension, values: Sequence[Scalar]) -> Dimension:
    if isinstance(dimension, Categorical):
        return Categorical(list(values))
    kind = Integer if isinstance(dimension, Integer) else Real
    return kind(values[0], values[1], prior=dimension.prior)


def _nearest(dimension: Dimension, value: Any) -> Any:
    if isinstance(dimension, Categorical):
        return value if value in dimension.categories else dimension.categories[0]
    return min(max(value, dimension.low), dimension.high)


def _load(path: str) -> Head:
    """Import a user's own head from `package.module:ATTRIBUTE`."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise HeadError(f"head {path!r}: expected package.module:ATTRIBUTE, such as my_heads:GRADIENT_BOOSTING")
    try:
        with _current_folder_importable():
            module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail at import in any way
        raise HeadError(
            f"head {path!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "it must be installed or lie in the folder the command is run in"
        ) from error
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if isinstance(value, Head)]
        known = f"; its heads: {', '.join(names)}" if names else "; it holds no pipeline.heads.Head"
        raise HeadError(f"head {path!r}: {module_name!r} has no {attribute!r}{guess(attribute, names)}{known}")
    head = getattr(module, attribute)
    if not isinstance(head, Head):
        raise HeadError(f"head {path!r}: is a {type(head).__name__}, expected a pipeline.heads.Head")
    problems = _flaws(head)
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise HeadError(f"head {path!r}: {len(problems)} {plural}", problems)
    return head


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Let a user's module be found in the folder the command is run in, as `python -m` would."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _flaws(head: Head) -> list[str]:
    """Say what is wrong with a user's own head, before anything is spent on it."""
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", head.name):
        problems.append(f"name: {head.name!r} names files; use letters, digits, '.', '_' and '-'")
    for key in sorted(set(head.space) ^ set(head.defaults)):
        where = "space" if key in head.space else "defaults"
        problems.append(f"{where}.{key}: the space and the defaults must name the same parameters")
    for key in sorted(set(head.space) & set(head.defaults)):
        if head.defaults[key] not in head.space[key]:
            problems.append(f"defaults.{key}: {head.defaults[key]!r} is not in {head.space[key]!r}")
    try:
        configure(head, head.defaults, 0)
    except Exception as error:  # a user's build may fail in any way
        problems.append(f"build: a pipeline with the defaults cannot be built ({type(error).__name__}: {error})")
    return problems
