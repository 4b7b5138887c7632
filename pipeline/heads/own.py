"""Heads of the user's own, named in the config as `package.module:ATTRIBUTE`."""

from __future__ import annotations

import re

from pipeline.config import guess
from pipeline.errors import HeadError, number_of
from pipeline.heads.head import Head, configure
from pipeline.heads.tuning.evaluation import Evaluator
from pipeline.io.process import users_module


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
