"""Search strategies: generators of the points to try next, which are sent the scores of the last round.

Every strategy tries the head's defaults first and yields each point once. With any strategy, a space that has at most as many
points as there are trials is searched completely. Only `bayes` needs scikit-optimize, and imports it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.errors import HeadError, first_line
from pipeline.heads.head import Categorical, Dimension, Head, Integer, Params, Real

Rounds = Generator[list[Params], "Sequence[float | None]", None]
"""Yields rounds of points and is sent one score per point: higher is better, None if there is none."""

DRAWS = 400
"""Number of random points from which the surrogate chooses."""

APART = 0.02
"""Minimum distance of a new point from those tried, as a share of the range in at least one dimension."""

STEP = 3.0
"""Factor between neighbours on a logarithmic scale; on a linear scale, the step is an eighth of the range."""
MOST_CHOICES = 4
"""Maximum number of neighbours of an unordered choice, evenly spaced in its list."""


def require(strategy: str) -> None:
    """Check that the library of a strategy can be imported; HeadError if it cannot."""
    if strategy == "bayes":
        try:
            import skopt  # noqa: F401
        except Exception as error:  # an incompatible scikit-learn may raise any error
            raise HeadError(
                f"tuning.strategy: bayes needs scikit-optimize, which cannot be imported ({first_line(error)}); install it, or "
                "set tuning.strategy to random or grid"
            ) from None


def rounds(strategy: str, space: Mapping[str, Dimension], defaults: Params, trials: int, seed: int) -> Rounds:
    """Return the rounds of a strategy: `bayes`, `random` or `grid`; only `grid` is finite on a continuous space."""
    make = _grid if cardinality(space) <= trials else STRATEGIES[strategy]
    return make(space, defaults, trials, max(1, min(8, trials // 4)), seed)


def cardinality(space: Mapping[str, Dimension]) -> float:
    """Return the number of points in a space; infinity if a dimension is continuous."""
    return math.prod(map(_count, space.values()))


def _count(dimension: Dimension) -> float:
    if isinstance(dimension, Categorical):
        return len(dimension.categories)
    return dimension.high - dimension.low + 1 if isinstance(dimension, Integer) else math.inf


def _grid(space: Mapping[str, Dimension], defaults: Params, trials: int, size: int, seed: int) -> Rounds:
    """Yield the defaults, then a grid of at most `trials - 1` points, evenly spaced on each dimension's own scale."""
    budget, shape = trials if cardinality(space) <= trials else max(1, trials - 1), dict.fromkeys(space, 1)
    while True:  # add points to the axis with the fewest, as far as the budget and the axes allow
        size_of = math.prod(shape.values())
        open_axes = [
            key
            for key, count in shape.items()
            if count < _count(space[key]) and size_of // count * (count + 1) <= budget
        ]
        if not open_axes:
            break
        shape[min(open_axes, key=lambda key: shape[key])] += 1
    axes = [_axis(space[key], count) for key, count in shape.items()]
    points: list[Params] = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    points = [dict(defaults), *(point for point in points if point != dict(defaults))][:trials]
    # In random order, so that an interrupted search has covered the whole grid coarsely.
    points[1:] = [points[1 + place] for place in np.random.default_rng(seed).permutation(len(points) - 1)]
    yield from (points[start : start + size] for start in range(0, len(points), size))


def _random(space: Mapping[str, Dimension], defaults: Params, trials: int, size: int, seed: int) -> Rounds:
    """Yield the defaults, then independent draws from each dimension's prior."""
    generator = np.random.RandomState(seed)  # as in `_bayes`, since scikit-optimize supports no other type
    batch, seen = list[Params]([defaults]), {_key(defaults)}
    while True:
        while len(batch) < size and len(seen) < cardinality(space):
            point = {key: _draw(row, float(generator.uniform())) for key, row in space.items()}
            if _key(point) not in seen:
                seen.add(_key(point))
                batch.append(point)
        if not batch:
            return
        yield batch
        batch = []


def _bayes(space: Mapping[str, Dimension], defaults: Params, trials: int, size: int, seed: int) -> Rounds:
    """Yield the defaults and a Latin hypercube, then rounds chosen by a Gaussian process that is fitted once per round.

    A round is the point with the highest expected improvement and the optima of functions drawn from the process
    (Thompson sampling, Kandasamy et al. 2018): asking `Optimizer` for several points would refit it for each.
    """
    from skopt import Optimizer
    from skopt.sampler import Lhs
    from skopt.space import Space

    # `Optimizer` sets this transformation on its own copies of the dimensions; these need the same.
    theirs = Space([_of_skopt(row) for row in space.values()])
    theirs.set_transformer("normalize")
    seen, tried = set[str](), list[list[Any]]()

    def plain(point: Sequence[Any]) -> Params:
        return {key: _plain(row, value) for (key, row), value in zip(space.items(), point, strict=True)}

    def fresh(points: Iterable[Sequence[Any]]) -> list[list[Any]]:
        """Return the first `size` points with parameters that were not tried yet."""
        kept = list[list[Any]]()
        for point in points:
            key = _key(plain(point))
            if key not in seen and len(kept) < size:
                seen.add(key)
                kept.append(list(point))
        return kept

    generator = np.random.RandomState(seed)
    optimizer = Optimizer(
        theirs.dimensions,
        base_estimator="GP",
        n_initial_points=1,
        acq_func="EI",
        acq_optimizer="sampling",
        acq_optimizer_kwargs={"n_points": 1000},
        random_state=generator.randint(2**31 - 1),
        avoid_duplicates=False,
    )
    lhs = Lhs(lhs_type="centered", criterion=None)
    first = lhs.generate(theirs.dimensions, max(1, size - 1), random_state=generator)
    start = list[Any]()
    for key, row in space.items():
        choice = isinstance(row, Categorical)
        start.append(str(list(row.categories).index(defaults[key])) if choice else defaults[key])  # type: ignore[union-attr]
    batch = fresh([start, *first])
    while batch:
        values = yield [plain(point) for point in batch]
        tried += batch
        scored = [(point, -value) for point, value in zip(batch, values, strict=True) if value is not None]
        if scored:
            optimizer.tell([point for point, _ in scored], [value for _, value in scored])
        if optimizer.models:
            wanted = [optimizer.ask(), *_thompson(optimizer.models[-1], theirs, size - 1, generator, tried)]
        else:
            wanted = theirs.rvs(size, random_state=generator)
        spare = theirs.rvs(DRAWS, random_state=generator)
        batch = fresh(wanted) or fresh(spare)


STRATEGIES: Mapping[str, Callable[[Mapping[str, Dimension], Params, int, int, int], Rounds]] = {
    "bayes": _bayes,
    "random": _random,
    "grid": _grid,
}


def _of_skopt(row: Dimension) -> Any:
    from skopt import space

    if isinstance(row, Categorical):  # given as indices, since skopt cannot encode mixed types
        return space.Categorical([str(place) for place in range(len(row.categories))])
    kind = space.Integer if isinstance(row, Integer) else space.Real
    return kind(row.low, row.high, prior=row.prior)


def _plain(row: Dimension, value: Any) -> Any:
    """Convert skopt's numpy scalar to a plain value; numbers are rounded to six digits, for readability."""
    if isinstance(row, Categorical):
        return row.categories[int(value)]
    if isinstance(row, Integer):
        return round(float(value))
    return min(max(float(f"{float(value):.6g}"), float(row.low)), float(row.high))


def _thompson(
    model: Any, space: Any, count: int, generator: np.random.RandomState, tried: Sequence[list[Any]]
) -> list[list[Any]]:
    """Return the minima of functions drawn from a fitted process, at a distance from each other and from the points tried."""
    if count < 1:
        return []
    points = space.rvs(DRAWS, random_state=generator)
    unit = np.asarray(space.transform(points), dtype=np.float64)  # scaled to the surrogate's unit cube
    drawn = np.asarray(model.sample_y(unit, n_samples=count, random_state=generator.randint(2**31 - 1)))
    taken, chosen = list(np.asarray(space.transform(list(tried)), dtype=np.float64)), []
    for column in drawn.reshape(len(points), count).T:
        for place in np.argsort(column):
            if np.abs(unit[place] - np.array(taken)).max(axis=1).min() > APART:
                taken.append(unit[place])
                chosen.append(points[place])
                break
    return chosen


def _key(params: Params) -> str:
    return repr(sorted(params.items()))


def _axis(dimension: Dimension, count: int) -> list[Any]:
    """Return `count` values of a dimension, evenly spaced on its scale, with both ends; fewer if rounded integers coincide."""
    if isinstance(dimension, Categorical):
        return list(dimension.categories)[:count]
    if count == _count(dimension):
        return list(range(int(dimension.low), int(dimension.high) + 1))
    return sorted(
        {_plain(dimension, _at(dimension, share)) for share in (np.linspace(0, 1, count) if count > 1 else [0.5])}
    )


def _at(dimension: Real | Integer, share: float) -> float:
    """Return the value at a share of the way from low to high on the dimension's scale."""
    low, high = float(dimension.low), float(dimension.high)
    return float(low * (high / low) ** share if dimension.prior == "log-uniform" else low + (high - low) * share)


def _draw(dimension: Dimension, share: float) -> Any:
    """Return the value at a share of the way through a dimension, consistent with scikit-optimize's draws."""
    if isinstance(dimension, Categorical):
        return dimension.categories[round(share * (len(dimension.categories) - 1))]
    return _plain(dimension, _at(dimension, share))


def neighbours(head: Head, params: Params) -> list[Params]:
    """Return points of a head's space that differ from `params` in one parameter, by a step in either direction or another choice."""
    return [
        {**params, key: value}
        for key, dimension in head.space.items()
        for value in dict.fromkeys(_beside(dimension, params[key]))
        if value != params[key]
    ]


def _beside(dimension: Dimension, value: Any) -> list[Any]:
    if isinstance(dimension, Categorical):
        choices = list(dimension.categories)
        if isinstance(value, (int, float)) and value in choices:  # ordered: the adjacent ones
            place = choices.index(value)
            return choices[max(0, place - 1) : place + 2]
        others = [choice for choice in choices if choice != value]
        return [others[place] for place in np.linspace(0, len(others) - 1, min(len(others), MOST_CHOICES)).astype(int)]
    step = (dimension.high - dimension.low) / 8
    sides = (value / STEP, value * STEP) if dimension.prior == "log-uniform" else (value - step, value + step)
    inside = [min(max(side, dimension.low), dimension.high) for side in sides]
    return [round(side) for side in inside] if isinstance(value, int) else inside
