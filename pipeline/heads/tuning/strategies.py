"""Strategies: which points of a search space to try next, as generators that are sent the scores of the last round.

Every strategy tries the head's defaults first and gives out each point once. A space with no more points than trials is
tried completely, whatever the strategy. Only `bayes` needs scikit-optimize, and imports it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import HeadError, first_line
from pipeline.heads.head import Categorical, Dimension, Head, Integer, Params, Real

Rounds = Generator[list[Params], "Sequence[float | None]", None]
"""Yields rounds of points; is sent one score per point, higher is better, None where there is none."""

DRAWS = 400
"""Random points of the space among which the surrogate chooses."""

APART = 0.02
"""Points nearer than this share of every range to one already tried teach nothing new."""

STEP = 3.0
"""How many times a neighbour is larger or smaller where a search is on a logarithmic scale; an eighth of the range elsewhere."""
MOST_CHOICES = 4
"""Neighbours of a choice that has no order, evenly taken."""


def require(strategy: str) -> None:
    """See that the library of a strategy can be imported; HeadError where it cannot."""
    if strategy == "bayes":
        try:
            import skopt  # noqa: F401
        except Exception as error:  # beside another scikit-learn it may fail in any way
            raise HeadError(
                f"tuning.strategy: bayes needs scikit-optimize, which cannot be imported ({first_line(error)}); install it, or "
                "set tuning.strategy to random or grid"
            ) from None


def rounds(strategy: str, space: Mapping[str, Dimension], defaults: Params, trials: int, seed: int) -> Rounds:
    """Return the rounds of a strategy: `bayes`, `random` or `grid`; endless but for `grid`."""
    size = max(1, min(8, trials // 4))
    if cardinality(space) <= trials:
        return _grid(space, defaults, int(cardinality(space)), size, seed)
    return STRATEGIES[strategy](space, defaults, trials, size, seed)


def cardinality(space: Mapping[str, Dimension]) -> float:
    """Return how many points a space has; infinity when a dimension is continuous."""
    return math.prod(_count(dimension) for dimension in space.values())


def _grid(space: Mapping[str, Dimension], defaults: Params, trials: int, size: int, seed: int) -> Rounds:
    """The defaults, then a grid of at most `trials - 1` points, evenly spaced along each dimension's own scale."""
    budget = trials if cardinality(space) <= trials else max(1, trials - 1)
    axes = [_axis(dimension, count) for dimension, count in zip(space.values(), _shape(space, budget), strict=True)]
    points: list[Params] = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    points = [dict(defaults), *(point for point in points if point != dict(defaults))][:trials]
    # Neighbours apart, so that a search that runs out of time has seen the whole grid coarsely.
    points[1:] = [points[1 + place] for place in np.random.default_rng(seed).permutation(len(points) - 1)]
    yield from (points[start : start + size] for start in range(0, len(points), size))


def _random(space: Mapping[str, Dimension], defaults: Params, trials: int, size: int, seed: int) -> Rounds:
    """The defaults, then independent draws from each dimension's prior."""
    generator = np.random.RandomState(seed)  # as in `_bayes`, where scikit-optimize takes no other
    seen = {_key(defaults)}
    batch = [dict(defaults)]
    while len(seen) <= cardinality(space):
        while len(batch) < size and len(seen) < cardinality(space):
            point = {key: _draw(row, float(generator.uniform())) for key, row in space.items()}
            if _key(point) not in seen:
                seen.add(_key(point))
                batch.append(point)
        if not batch:
            return
        yield list(batch)
        batch = []


def _bayes(space: Mapping[str, Dimension], defaults: Params, trials: int, size: int, seed: int) -> Rounds:
    """The defaults and a Latin hypercube, then rounds chosen with a Gaussian process fitted once per round.

    A round is the point of the highest expected improvement and points that are best in functions drawn from the
    process (Thompson sampling, Kandasamy et al. 2018): asking `Optimizer` for several at once would refit it for each.
    """
    from skopt import Optimizer
    from skopt.sampler import Lhs

    code = _Code(space)
    generator = np.random.RandomState(seed)
    optimizer = Optimizer(
        code.space.dimensions,
        base_estimator="GP",
        n_initial_points=1,
        acq_func="EI",
        acq_optimizer="sampling",
        acq_optimizer_kwargs={"n_points": 1000},
        random_state=generator.randint(2**31 - 1),
        avoid_duplicates=False,
    )
    first = Lhs(lhs_type="centered", criterion=None).generate(
        code.space.dimensions, max(1, size - 1), random_state=generator
    )
    batch = _fresh([code.encode(defaults), *first], [], code, size)
    tried: list[list[Any]] = []
    while batch:
        values = yield [code.decode(point) for point in batch]
        tried += batch
        told = [(point, -value) for point, value in zip(batch, values, strict=True) if value is not None]
        if told:
            optimizer.tell([point for point, _ in told], [value for _, value in told])
        if optimizer.models:
            wanted = [optimizer.ask(), *_thompson(optimizer.models[-1], code, size - 1, generator, tried)]
        else:
            wanted = code.space.rvs(size, random_state=generator)
        spare = code.space.rvs(DRAWS, random_state=generator)
        batch = _fresh(wanted, tried, code, size) or _fresh(spare, tried, code, size)


STRATEGIES: Mapping[str, Callable[[Mapping[str, Dimension], Params, int, int, int], Rounds]] = {
    "bayes": _bayes,
    "random": _random,
    "grid": _grid,
}


class _Code:
    """Points of a search space as skopt's lists, and back to plain parameters."""

    def __init__(self, space: Mapping[str, Dimension]) -> None:
        from skopt.space import Space

        self._source = space
        # `Optimizer` gives its own copies the transformation of a Gaussian process; these need the same.
        self.space = Space([_of_skopt(row) for row in space.values()])
        self.space.set_transformer("normalize")

    def encode(self, params: Params) -> list[Any]:
        return [
            str(list(row.categories).index(params[key])) if isinstance(row, Categorical) else params[key]
            for key, row in self._source.items()
        ]

    def decode(self, point: Sequence[Any]) -> dict[str, Any]:
        return {key: _plain(row, value) for (key, row), value in zip(self._source.items(), point, strict=True)}

    def unit(self, points: Sequence[Sequence[Any]]) -> NDArray[np.float64]:
        """Points in the cube the surrogate works in: shape (n, columns), 0 to 1."""
        return np.asarray(self.space.transform([list(point) for point in points]), dtype=np.float64)


def _of_skopt(row: Dimension) -> Any:
    from skopt import space

    if isinstance(
        row, Categorical
    ):  # choices may be of mixed types, which skopt cannot encode: it is given their places
        return space.Categorical([str(place) for place in range(len(row.categories))])
    kind = space.Integer if isinstance(row, Integer) else space.Real
    return kind(row.low, row.high, prior=row.prior)


def _plain(row: Dimension, value: Any) -> Any:
    """Turn skopt's numpy scalar into a plain value; six digits are enough of a number and can be read."""
    if isinstance(row, Categorical):
        return row.categories[int(value)]
    if isinstance(row, Integer):
        return int(value)
    return min(max(float(f"{float(value):.6g}"), float(row.low)), float(row.high))


def _thompson(
    model: Any, code: _Code, count: int, generator: np.random.RandomState, tried: Sequence[Sequence[Any]]
) -> list[list[Any]]:
    """Return the points that are lowest in functions drawn from a fitted process, away from each other."""
    if count < 1:
        return []
    points = code.space.rvs(DRAWS, random_state=generator)
    unit = code.unit(points)
    drawn = np.asarray(model.sample_y(unit, n_samples=count, random_state=generator.randint(2**31 - 1)))
    taken = list(code.unit(tried)) if tried else []
    chosen = []
    for column in drawn.reshape(len(points), count).T:
        for place in np.argsort(column):
            if all(np.abs(unit[place] - other).max() > APART for other in taken):
                taken.append(unit[place])
                chosen.append(points[place])
                break
    return chosen


def _fresh(points: Sequence[Any], tried: Sequence[Any], code: _Code, size: int) -> list[list[Any]]:
    """Return the first `size` points that decode to parameters not tried yet."""
    seen = {_key(code.decode(point)) for point in tried}
    fresh: list[list[Any]] = []
    for point in points:
        key = _key(code.decode(point))
        if key not in seen and len(fresh) < size:
            seen.add(key)
            fresh.append(list(point))
    return fresh


def _key(params: Params) -> str:
    return repr(sorted(params.items()))


def _count(dimension: Dimension) -> float:
    if isinstance(dimension, Categorical):
        return len(dimension.categories)
    return dimension.high - dimension.low + 1 if isinstance(dimension, Integer) else math.inf


def _shape(space: Mapping[str, Dimension], budget: int) -> list[int]:
    """Return points per dimension: as even as the budget and the dimensions' own sizes allow."""
    shape = [1] * len(space)
    while True:
        open_axes = [
            place
            for place, dimension in enumerate(space.values())
            if shape[place] < _count(dimension) and math.prod(shape) // shape[place] * (shape[place] + 1) <= budget
        ]
        if not open_axes:
            return shape
        shape[min(open_axes, key=lambda place: shape[place])] += 1


def _axis(dimension: Dimension, count: int) -> list[Any]:
    """Return `count` values of a dimension, evenly spaced on its own scale, both ends included."""
    if isinstance(dimension, Categorical):
        return list(dimension.categories)[:count]
    values = _at(dimension, np.linspace(0, 1, count) if count > 1 else np.array([0.5]))
    if isinstance(dimension, Integer):
        return _whole(values, dimension)
    return [_plain(dimension, value) for value in values]


def _at(dimension: Real | Integer, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the values at shares of the way from low to high on the dimension's own scale."""
    low, high = float(dimension.low), float(dimension.high)
    values: NDArray[np.float64] = (
        low * (high / low) ** shares if dimension.prior == "log-uniform" else low + (high - low) * shares
    )
    return values


def _draw(dimension: Dimension, share: float) -> Any:
    """Return the value at a share of the way through a dimension, to which scikit-optimize's draws agree."""
    if isinstance(dimension, Categorical):
        return dimension.categories[round(share * (len(dimension.categories) - 1))]
    value = float(_at(dimension, np.array([share]))[0])
    return round(value) if isinstance(dimension, Integer) else _plain(dimension, value)


def _whole(values: NDArray[np.float64], dimension: Integer) -> list[int]:
    """Round to whole numbers, moving one that is already taken to the next free one."""
    taken: list[int] = []
    for value in values:
        nearest = sorted(range(int(dimension.low), int(dimension.high) + 1), key=lambda whole: abs(whole - value))
        taken.append(next(whole for whole in nearest if whole not in taken))
    return sorted(taken)


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
