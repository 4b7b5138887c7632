"""Resolve a config's head, built-in or the user's own, with its search space narrowed, widened or fixed, and its class weights set."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from sklearn.pipeline import Pipeline

from pipeline.config import HeadConfig, Scalar, guess, unknown
from pipeline.errors import HeadError, number_of
from pipeline.experiment import plain
from pipeline.heads.head import Categorical, Dimension, Head, Integer, Params, Real, configure
from pipeline.heads.table import TABLES
from pipeline.io.process import users_module


def resolve(config: HeadConfig, kind: str = "classification") -> Head:
    """Return the head that a config names for a kind of target, with the config's search space and class weights.

    A range `[low, high]` keeps its prior, a categorical parameter takes a list of choices, and a list of one value fixes the
    parameter. Defaults outside a new range move to its nearest end. HeadError with one line per problem.
    """
    heads = TABLES[kind].known
    if ":" not in config.name and config.name not in heads:
        what = "head" if kind == "classification" else f"head for {kind}"
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
        elif isinstance(dimension := head.space[key], Categorical):
            space[key] = Categorical(tuple(values))
            defaults[key] = defaults[key] if defaults[key] in values else values[0]
        else:
            low, high = values
            space[key] = replace(dimension, low=low, high=high)  # type: ignore[arg-type]
            defaults[key] = min(max(defaults[key], low), high)
    build = head.build
    if config.class_weight is not None:
        if head.takes_class_weight:
            build = partial(weighted, head.build, config.class_weight)
        else:
            able = ", ".join(name for name, row in heads.items() if row.takes_class_weight) or "none"
            problems.append(
                f"class_weight: {config.class_weight!r} is not possible with this head; heads that take it: {able}"
            )
    if problems:
        raise HeadError(f"head {config.name}: {number_of(len(problems), 'problem')}", problems)
    return replace(head, build=build, space=space, defaults=defaults, fixed=fixed)


def serving(configs: Sequence[HeadConfig] | None, kind: str) -> tuple[HeadConfig, ...] | None:
    """Return a config's heads that serve a kind of target, and unknown ones, which `resolve` reports; None if none are left."""
    kept = []
    for config in configs or ():
        kinds = [name for name, table in TABLES.items() if config.name in table.known] or [kind]
        if kind in (load_own(config.name).targets if ":" in config.name else kinds):
            kept.append(config)
    return tuple(kept) or None


def resolve_all(configs: Sequence[HeadConfig] | None, kind: str = "classification") -> tuple[Head, ...]:
    """Resolve every head of a config for a kind of target, None for all built-in ones; HeadError lists the problems of all heads."""
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
        raise HeadError(f"heads: {number_of(len(problems), 'problem')}", problems)
    return tuple(heads)


def weighted(build: Callable[[int], Pipeline], class_weight: str | None, seed: int) -> Pipeline:
    """Build a pipeline whose last step has this `class_weight`."""
    pipeline = build(seed)
    pipeline[-1].set_params(class_weight=class_weight)
    return pipeline


def _mismatch(dimension: Dimension, values: Sequence[Scalar]) -> str | None:
    """Return why the config's values cannot replace a dimension, or None if they can."""
    given = list(values)
    if isinstance(dimension, Categorical):
        choices = list(dimension.categories)
        kinds, words = {type(choice) for choice in choices}, [choice for choice in choices if isinstance(choice, str)]
        for value in values:
            if isinstance(value, str) and words and value not in words:
                return f"{value!r} is not a choice{guess(value, words)}; allowed: {', '.join(words)}"
            if type(value) not in kinds and not (type(value) is int and float in kinds):
                return f"{value!r} is not a choice; expected a list such as {choices}"
        return (
            None if values and len({*map(repr, values)}) == len(values) else f"expected distinct choices, got {given}"
        )
    whole = isinstance(dimension, Integer)
    numbers = [value for value in values if type(value) is int or (type(value) is float and not whole)]
    ordered = len(numbers) == len(values) and (len(values) == 1 or (len(values) == 2 and numbers[0] < numbers[1]))
    if not ordered or not all(map(math.isfinite, numbers)):
        kind = "whole numbers" if whole else "numbers"
        return f"expected [low, high] in {kind}, such as [{dimension.low}, {dimension.high}], got {given}"
    if dimension.prior == "log-uniform" and numbers[0] <= 0:
        return f"is searched on a logarithmic scale, so low must be above 0, got {given}"
    return None


def held_at(head: Head, params: Params) -> Head:
    """Return a head whose search space is the single point stored in a leaderboard; HeadError if the head's parameters have changed."""
    if set(params) != set(head.space):
        raise HeadError(
            f"head {head.name}: its stored parameters are {', '.join(params) or 'none'}, and it is searched over "
            f"{', '.join(head.space) or 'none'} now; run `manyheads heads` again"
        )
    point = {}
    for key, value in params.items():
        dimension = head.space[key]
        choices = dimension.categories if isinstance(dimension, Categorical) else ()
        point[key] = next((choice for choice in choices if plain(choice) == plain(value)), value)  # JSON has no tuples
    return replace(head, space={key: Categorical((value,)) for key, value in point.items()}, defaults=point)


def load_own(path: str) -> Head:
    """Import a user's own head from `package.module:ATTRIBUTE`."""
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise HeadError(f"head {path!r}: expected package.module:ATTRIBUTE, such as my_heads:GRADIENT_BOOSTING")
    module = users_module(module_name, f"head {path!r}", HeadError)
    if not hasattr(module, attribute):
        names = [name for name, value in vars(module).items() if isinstance(value, Head)]
        raise HeadError(f"head {path!r}: {module_name!r} has no {attribute!r}{guess(attribute, names)}")
    head = getattr(module, attribute)
    if not isinstance(head, Head):
        raise HeadError(f"head {path!r}: is of type {type(head).__name__}, expected a pipeline.heads.Head")
    problems = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", head.name):
        problems.append(f"name: {head.name!r} cannot be part of a file name; use letters, digits, '.', '_' and '-'")
    if set(head.space) != set(head.defaults):
        problems.append("defaults: expected a value for each parameter of the space, and for no other")
    for key, dimension in head.space.items():
        if not isinstance(dimension, Real | Integer | Categorical):
            problems.append(
                f"space.{key}: expected a Real, Integer or Categorical of pipeline.heads, got {dimension!r}"
            )
        elif key in head.defaults and head.defaults[key] not in dimension:
            problems.append(f"defaults.{key}: {head.defaults[key]!r} is not in {dimension!r}")
    try:
        configure(head, head.defaults, 0)
    except Exception as error:  # a user's build may fail in any way
        problems.append(f"build: a pipeline with the defaults cannot be built ({type(error).__name__}: {error})")
    if problems:
        raise HeadError(f"head {path!r}: {number_of(len(problems), 'problem')}", problems)
    return head
