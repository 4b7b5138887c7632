"""From a config's words to a head, built-in or the user's own: its space narrowed, widened or held at one point, its class weights set."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline

from pipeline.config import HeadConfig, Scalar, guess, unknown
from pipeline.errors import HeadError, number_of
from pipeline.experiment import plain
from pipeline.heads.head import Categorical, Dimension, Head, Integer, Params, configure
from pipeline.heads.table import TABLES
from pipeline.heads.tuning.evaluation import Evaluator
from pipeline.io.process import users_module


def resolve(config: HeadConfig, kind: str = "classification") -> Head:
    """Return the head a config names for a kind of target, with its space narrowed or widened and its class weights set.

    A range is `[low, high]` and keeps its prior, a categorical parameter takes the list of its choices, and a list of
    one value fixes the parameter. Defaults outside a new range move to its nearest end. A HeadError has one line for every problem.
    """
    heads = TABLES[kind].known
    if ":" not in config.name and config.name not in heads:
        known = any(config.name in table.known for table in TABLES.values())
        what = f"head for {kind}" if known else "head"
        raise HeadError(unknown(what, config.name, tuple(heads), ", or package.module:ATTRIBUTE"))
    head = load_own(config.name) if ":" in config.name else heads[config.name]
    if head.name in TABLES[kind].optional:
        head.build(0)
    if kind not in head.targets:
        raise HeadError(f"head {head.name}: serves {' and '.join(head.targets)}, and dataset.target is {kind}")
    problems: list[str] = []
    space, defaults, fixed = dict(head.space), dict(head.defaults), dict(head.fixed)
    for key, values in config.space.items():
        if key not in head.space:
            hint = guess(key, list(head.space))
            problems.append(
                f"space.{key}: unknown parameter{hint}; this head is searched over {', '.join(head.space) or 'none'}"
            )
        elif problem := _mismatch(head.space[key], values):
            problems.append(f"space.{key}: {problem}")
        elif len(values) == 1:
            fixed[key] = values[0]
            del space[key], defaults[key]
        else:
            space[key], defaults[key] = _changed(head.space[key], values, defaults[key])
    build = head.build
    if config.class_weight is not None:
        if head.takes_class_weight:
            build = partial(_weighted, head.build, config.class_weight)
        else:
            able = ", ".join(name for name, row in heads.items() if row.takes_class_weight) or "none"
            problems.append(
                f"class_weight: {config.class_weight!r} is not possible with this head; heads that take it: {able}"
            )
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise HeadError(f"head {config.name}: {len(problems)} {plural}", problems)
    return replace(head, build=build, space=space, defaults=defaults, fixed=fixed)


def serving(configs: Sequence[HeadConfig] | None, kind: str) -> tuple[HeadConfig, ...] | None:
    """Return those of a config's heads that serve a kind of target, None where none does, and those that nobody knows, which
    `resolve` tells."""

    def serves(config: HeadConfig) -> bool:
        if ":" in config.name:
            return kind in load_own(config.name).targets
        return config.name in TABLES[kind].known or not any(config.name in table.known for table in TABLES.values())

    return tuple(filter(serves, configs or ())) or None


def resolve_all(configs: Sequence[HeadConfig] | None, kind: str = "classification") -> tuple[Head, ...]:
    """Resolve every head of a config for a kind of target, None being all; a `HeadError` lists the problems of all of them."""
    if configs is None:
        return tuple(TABLES[kind].heads.values())
    heads: list[Head] = []
    problems: list[str] = []
    for config in configs:
        try:
            heads.append(resolve(config, kind))
        except HeadError as error:
            problems += [f"{config.name}: {problem}" for problem in error.problems] or [error.message]
    names = [head.name for head in heads]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{name}: two heads have this name; give yours another" for name in twice]
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise HeadError(f"heads: {len(problems)} {plural}", problems)
    return tuple(heads)


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


def _changed(dimension: Dimension, values: Sequence[Any], default: Any) -> tuple[Dimension, Any]:
    """Return a dimension with other values, and the one of them that is nearest to its default."""
    if isinstance(dimension, Categorical):
        return Categorical(tuple(values)), default if default in values else values[0]
    low, high = values
    return replace(dimension, low=low, high=high), min(max(default, low), high)


def held_at(head: Head, params: Params) -> Head:
    """Return a head whose space is one point, as a leaderboard has it; HeadError where the head has other parameters now."""
    if set(params) != set(head.space):
        raise HeadError(
            f"head {head.name}: its stored parameters are {', '.join(params) or 'none'}, and it is searched over "
            f"{', '.join(head.space) or 'none'} now; run `manyheads heads` again"
        )
    point = {}
    for key, value in params.items():
        dimension = head.space[key]
        choices = dimension.categories if isinstance(dimension, Categorical) else ()
        point[key] = next((choice for choice in choices if plain(choice) == plain(value)), value)  # JSON has made lists
    return replace(head, space={key: Categorical((value,)) for key, value in point.items()}, defaults=point)


def load_own(path: str) -> Head:
    """Import a user's own head from `package.module:ATTRIBUTE`."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise HeadError(f"head {path!r}: expected package.module:ATTRIBUTE, such as my_heads:GRADIENT_BOOSTING")
    module = users_module(module_name, f"head {path!r}", HeadError)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if isinstance(value, Head)]
        known = f"; its heads: {', '.join(names)}" if names else "; it holds no pipeline.heads.Head"
        raise HeadError(f"head {path!r}: {module_name!r} has no {attribute!r}{guess(attribute, names)}{known}")
    head = getattr(module, attribute)
    if not isinstance(head, Head):
        raise HeadError(f"head {path!r}: is of type {type(head).__name__}, expected a pipeline.heads.Head")
    problems = _flaws(head)
    if problems:
        raise HeadError(f"head {path!r}: {number_of(len(problems), 'problem')}", problems)
    return head


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
    if head.evaluator is not None and not isinstance(head.evaluator, Evaluator):
        problems.append(
            f"evaluator: {head.evaluator!r} is none; expected that of a built-in head, such as pipeline.heads.RIDGE.evaluator, or None"
        )
    try:
        configure(head, head.defaults, 0)
    except Exception as error:  # a user's build may fail in any way
        problems.append(f"build: a pipeline with the defaults cannot be built ({type(error).__name__}: {error})")
    return problems
