"""Parameters that an earlier search chose: a head that has them and no others, what lies beside them, and what they say out of fold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from pipeline.config import TuningConfig
from pipeline.data.targets import Target
from pipeline.errors import HeadError
from pipeline.evaluation import metric_of
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.experiment import plain
from pipeline.heads.head import Head, Params
from pipeline.heads.space import Categorical, Dimension
from pipeline.heads.tuning.evaluation import counting_warnings
from pipeline.heads.tuning.events import search_identity
from pipeline.heads.tuning.features import Features
from pipeline.heads.tuning.fold_fits import FoldFits
from pipeline.heads.tuning.folds import Folds
from pipeline.heads.tuning.journal import Journal
from pipeline.heads.tuning.projection import Projections, without_scaler
from pipeline.heads.tuning.records import FoldOutcome, Problem

STEP = 3.0
"""How many times a neighbour is larger or smaller where a search is on a logarithmic scale; an eighth of the range elsewhere."""
MOST_CHOICES = 4
"""Neighbours of a choice that has no order, evenly taken."""


def held_at(head: Head, params: Params) -> Head:
    """Return a head whose space is one point, as a leaderboard has it; HeadError where the head has other parameters now."""
    if set(params) != set(head.space):
        raise HeadError(
            f"head {head.name}: its stored parameters are {', '.join(params) or 'none'}, and it is searched over "
            f"{', '.join(head.space) or 'none'} now; run `manyheads heads` again"
        )
    point = {key: _choice(head.space[key], value) for key, value in params.items()}
    return replace(head, space={key: Categorical((value,)) for key, value in point.items()}, defaults=point)


def _choice(dimension: Dimension, value: Any) -> Any:
    """Return what JSON has made a list of as it was."""
    choices = dimension.categories if isinstance(dimension, Categorical) else ()
    return next((choice for choice in choices if plain(choice) == plain(value)), value)


def neighbours(head: Head, params: Params) -> list[Params]:
    """Return points of a head's space that differ from one in one parameter: by a step to either side, or by another choice."""
    return [
        {**params, key: value}
        for key, dimension in head.space.items()
        for value in dict.fromkeys(_beside(dimension, params[key]))
        if value != params[key]
    ]


def _beside(dimension: Dimension, value: Any) -> Iterator[Any]:
    if isinstance(dimension, Categorical):
        others = [choice for choice in dimension.categories if choice != value]
        if isinstance(value, (int, float)) and value in dimension.categories:  # in order: the next to either side
            place = dimension.categories.index(value)
            others = list(dimension.categories[max(0, place - 1) : place + 2])
        yield from (
            others[place] for place in np.linspace(0, len(others) - 1, min(len(others), MOST_CHOICES)).astype(int)
        )
        return
    step = (dimension.high - dimension.low) / 8
    sides = (value / STEP, value * STEP) if dimension.prior == "log-uniform" else (value - step, value + step)
    for side in sides:
        inside = min(max(side, dimension.low), dimension.high)
        yield round(inside) if isinstance(value, int) else inside


def fit_folds(
    head: Head,
    points: Sequence[Params],
    X: Features,
    y: NDArray[Any],
    folds: Folds,
    tuning: TuningConfig,
    seed: int,
    journal: Path,
    projections: Projections | None,
    target: Target,
) -> list[list[FoldOutcome]]:
    """Fit each of some points on every fold, as a search does, and choose nothing; a list of outcomes by fold for each point.

    The arguments are those of `tune`; only the name of the search is written to `journal`.
    """
    narrowed, codes, _ = target.narrowed(y)
    problem = Problem(head, X, codes, narrowed, tuple(folds), seed)
    if tuning.pca is not None:
        shared = projections or Projections(X, tuning.pca, tuning.whiten)
        problem = replace(problem, head=without_scaler(head), projections=shared)
    tuning = tuning.model_copy(update={"scoring": metric_of(tuning.scoring, narrowed).name})
    book = Journal.open(journal, search_identity(problem, tuning))
    try:
        fits = FoldFits(problem, tuning, book)
        with counting_warnings(), threadpool_limits(limits=1, user_api="blas"):
            return [fits.on_every_fold(params) for params in points]
    finally:
        book.close()


def growing(folds: Folds, strata: NDArray[np.int64], sizes: Sequence[int], seed: int) -> Folds:
    """Return each fold with so many of its training images, for every size: a learning curve's fits, size by size.

    strata : ndarray of shape (n,), int64, what every part has in proportion; of shape (n, k), with -1 for none, by the rarest of a row
    """
    if strata.ndim > 1:
        there = strata >= 0
        strata = np.where(there, there.sum(axis=0), len(strata) + 1).argmin(axis=1)
    orders = [train[stratified_order(strata[train], seed + fold)] for fold, (train, _) in enumerate(folds)]
    parts = [(size, order, held) for size in sizes for order, (_, held) in zip(orders, folds, strict=True)]
    return tuple((np.sort(order[:size]), held) for size, order, held in parts)
