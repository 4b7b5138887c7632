"""Few-shot learning: accuracy with a handful of labelled images per class, on stored features.

An episode draws N classes, K labelled images of each to learn from (support), and other images of them to score on (queries).
Features are centred and scaled to length 1 (Wang et al. 2019), so an inner product is a cosine. Every method but MAML works on inner
products alone. No method is tuned, as with one image per class there is nothing to tune on.

Protocol: Vinyals et al. 2016 (episodes), Snell et al. 2017 (nearest centroid), Finn et al. 2017 and Raghu et al. 2020 (MAML with
the inner loop on the head alone), Chen et al. 2019 (baselines).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from tabulate import tabulate

from pipeline.data.targets import Numbers
from pipeline.evaluation.intervals import Interval, mean_interval
from pipeline.evaluation.strangeness import directions

if TYPE_CHECKING:
    import torch

Integers = NDArray[np.int64]

LEAST_BASE = 4
"""Fewest classes for meta-learning besides the test classes: two to learn from, two for early stopping."""
SPLITS = 4
"""Divisions of the classes among which the episodes are spread, so that no single division decides."""
DRAWS = 20
"""Attempts to split groups between support and queries before the groups count as too few."""
MOST_NUMBERS = 1 << 24
"""Most feature values in memory at once."""
NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Settings of the nearest-neighbour vote of Caron et al. 2021 (DINO); with all neighbours it is Vinyals et al. 2016."""
C = 10.0
"""scikit-learn's C of logistic regression; on features of length 1 its default of 1 is a strong penalty."""
MARGIN = 0.01
"""How far logistic regression may lie behind and still count as equally good."""

MAML = "maml"
INNER_STEPS = 10
META_STEPS, BATCH, EVERY = 100, 4, 25
"""MAML's outer steps, tasks per step, and steps between evaluations on the held-out classes."""
META_QUERIES, TRIALS = 5, 60
"""Queries per class in a meta-training task; tasks of held-out classes that choose the number of outer steps."""
RATE = 0.01
"""Adam's learning rate in the outer loop."""


@dataclass(frozen=True)
class EpisodePlan:
    """Which episodes are drawn: their number, classes per episode (`ways`) and queries per class."""

    ways: int
    queries: int
    episodes: int
    seed: int


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """n images to draw from.

    X : float32 of shape (n, dim); y : the class of each, int64 of shape (n,); units : images that must stay together in support or
    queries share a number, int64 of shape (n,), None where each image is its own
    """

    X: NDArray[np.float32]
    y: Integers
    units: Integers | None = None

    def classes_of(self, least: int) -> Integers:
        """Return the classes with at least `least` images: int64."""
        return np.flatnonzero(np.bincount(self.y) >= least)


class Episodes(NamedTuple):
    """Rows of the support, shape (n, ways * shots), and of the queries, (n, ways * queries), class by class."""

    support: Integers
    query: Integers
    ways: int


class Division(NamedTuple):
    """Classes for meta-training (`base`), for early stopping (`held_out`) and for the test (`novel`)."""

    base: Integers
    held_out: Integers
    novel: Integers


def divide(classes: Integers, ways: int, rng: np.random.Generator) -> list[Division]:
    """Divide the classes several times, each class being novel about equally often; with too few, once and without a base."""
    novel = max(ways, len(classes) // 2)
    if len(classes) - novel < LEAST_BASE:
        return [Division(classes[:0], classes[:0], classes)]
    held_out = novel + max(2, 2 * (len(classes) - novel) // 5)
    found, order = [], classes
    for number in range(SPLITS):
        order = order[::-1] if number % 2 else rng.permutation(classes)
        found.append(Division(order[held_out:], order[novel:held_out], order[:novel]))
    return found


def draw(
    images: LabelledFeatures,
    classes: Integers,
    ways: int,
    shots: int,
    queries: int,
    count: int,
    rng: np.random.Generator,
) -> Episodes | None:
    """Draw episodes without replacement; None where the images of a class are in too few groups for support and queries."""
    rows, units, wanted = (
        [np.flatnonzero(images.y == label) for label in range(images.y.max() + 1)],
        images.units,
        shots + queries,
    )
    drawn = np.empty((count, ways, wanted), dtype=np.int64)
    for episode in drawn:
        chosen = rng.choice(classes, ways, replace=False).tolist()  # once: classes that are hard to split count as well
        for _ in range(DRAWS):
            mixed = [rng.permutation(rows[label]) for label in chosen]
            if units is not None:
                first = rng.random(units.max() + 1) < 0.5  # which groups are support
                sides = [first[units[own]] for own in mixed]
                pairs = zip(mixed, sides, strict=True)
                mixed = [np.concatenate([own[side][:shots], own[~side][:queries]]) for own, side in pairs]
            if min(map(len, mixed)) >= wanted:
                episode[:] = [own[:wanted] for own in mixed]
                break
        else:
            return None
    return Episodes(drawn[:, :, :shots].reshape(count, -1), drawn[:, :, shots:].reshape(count, -1), ways)


class Products(NamedTuple):
    """Inner products of e episodes, float64, with the rows ordered by class.

    support : between the n support images, (e, n, n); query : between queries and support images, (e, n_queries, n);
    one_hot : the class of each support image, 1 in its column, (n, ways)
    """

    support: Numbers
    query: Numbers
    one_hot: Numbers

    def with_means(self) -> tuple[Numbers, Numbers]:
        """Return inner products of queries and class means, (e, n_queries, ways), and squared lengths of the means, (e, 1, ways)."""
        mean = self.one_hot / self.one_hot.sum(axis=0)
        return self.query @ mean, np.sum(self.support @ mean * mean, axis=1, keepdims=True)


def products(support: NDArray[np.float32], query: NDArray[np.float32], ways: int) -> Products:
    """Compute the inner products of support, float32 of shape (e, n, dim), and queries, float32 of shape (e, n_queries, dim)."""
    across = support.transpose(0, 2, 1)
    one_hot = np.repeat(np.eye(ways), support.shape[1] // ways, axis=0)
    return Products((support @ across).astype(np.float64), (query @ across).astype(np.float64), one_hot)


def cosine_prototypes(given: Products) -> Numbers:
    """Score by the cosine with the mean of each class: float64 of shape (e, n_queries, ways)."""
    inner, lengths = given.with_means()
    return inner / np.sqrt(lengths)


def nearest_centroid(given: Products) -> Numbers:
    """Score by minus the squared distance to the mean of each class (prototypical networks), up to a constant; shape as above."""
    inner, lengths = given.with_means()
    return 2 * inner - lengths


def knn(given: Products) -> Numbers:
    """Score by a vote of the nearest neighbours by cosine, weighted exponentially; shape as above."""
    cosine = given.query
    least = np.sort(cosine, axis=-1)[..., -min(NEIGHBOURS, cosine.shape[-1]), None]
    return np.where(cosine >= least, np.exp((cosine - 1) / TEMPERATURE), 0.0) @ given.one_hot


def logistic_regression(given: Products, tolerance: float = 1e-3, most: int = 500) -> Numbers:
    """Score by multinomial logistic regression without intercept: scikit-learn's optimum, for all episodes at once; shape as above.

    Steps by Böhning's fixed bound on the Hessian (1992) never overshoot; they end when no coefficient's derivative exceeds
    `tolerance`.
    """
    gram, truth = given.support, given.one_hot
    bound = np.linalg.inv(gram / 2 + np.eye(gram.shape[1]) / C)
    dual = np.zeros((len(gram), *truth.shape))
    for _ in range(most):
        slope = softmax(gram @ dual, axis=-1) - truth + dual / C
        if np.abs(slope).max() < tolerance:
            break
        dual -= bound @ slope
    return given.query @ dual


METHODS: Mapping[str, Callable[[Products], Numbers]] = {
    method.__name__: method for method in (logistic_regression, cosine_prototypes, nearest_centroid, knn)
}
"""Method -> function from inner products to scores of the queries, shape (e, n_queries, ways), the highest being predicted."""
PLAIN = logistic_regression.__name__
"""The baseline of all comparisons."""


def share_right(scores: Numbers) -> Numbers:
    """Return the accuracy of each episode, float64 of shape (e,), for queries ordered by class.

    scores : float64 of shape (e, n_queries, ways)
    """
    _, queries, ways = scores.shape
    return np.asarray((scores.argmax(axis=-1) == np.repeat(np.arange(ways), queries // ways)).mean(axis=1))


class MetaLearned(NamedTuple):
    """MAML's meta-parameters: `scale`, float32 of shape (dim,), a weight per feature; `rates`, float64 of shape (INNER_STEPS,).

    The network is frozen, so only the scale of its features and the learning rate of each inner step are meta-learned. The head
    starts at zero: the order of an episode's classes is arbitrary, so the best initial head has equal rows, to which a softmax is
    invariant (Kao et al. 2022).
    """

    scale: NDArray[np.float32]
    rates: Numbers

    def scores(self, support: NDArray[np.float32], query: NDArray[np.float32], ways: int) -> Numbers:
        """Return the queries' scores after the inner loop.

        support, query : features, float32 of shape (e, rows, dim); returns float64 of shape (e, n_queries, ways)
        """
        import torch

        given = products(support * self.scale, query * self.scale, ways)
        with torch.no_grad():
            tensors = [torch.from_numpy(part) for part in (given.support, given.query, given.one_hot, self.rates)]
            return np.asarray(adapted(*tensors))


def learn(
    images: LabelledFeatures, division: Division, ways: int, shots: int, rng: np.random.Generator
) -> MetaLearned | None:
    """Meta-learn on tasks of the base classes, by gradients through the inner steps; None where there are too few groups."""
    import torch
    from torch.nn.functional import cross_entropy

    width, width_held_out = min(ways, len(division.base)), min(ways, len(division.held_out))
    tasks = draw(images, division.base, width, shots, META_QUERIES, META_STEPS * BATCH, rng)
    trials = draw(images, division.held_out, width_held_out, shots, META_QUERIES, TRIALS, rng)
    if tasks is None or trials is None:
        return None
    X = torch.from_numpy(images.X)
    truth = torch.eye(width).repeat_interleave(shots, 0)
    answers = torch.arange(width).repeat_interleave(META_QUERIES).repeat(BATCH)
    scale = torch.zeros(X.shape[1], requires_grad=True)
    rates = torch.zeros(INNER_STEPS, requires_grad=True)  # logarithms, as is `scale`
    outer = torch.optim.Adam([scale, rates], RATE)
    best, found = -1.0, None
    for step in range(META_STEPS + 1):
        if step % EVERY == 0:
            reached = MetaLearned(scale.detach().exp().numpy(), rates.detach().exp().double().numpy())
            said = reached.scores(images.X[trials.support], images.X[trials.query], trials.ways)
            if share_right(said).mean() > best:
                best, found = share_right(said).mean(), reached
        if step < META_STEPS:
            batch = slice(step * BATCH, (step + 1) * BATCH)
            support, query = (X[torch.from_numpy(rows[batch])] * scale.exp() for rows in (tasks.support, tasks.query))
            across = support.transpose(1, 2)
            loss = cross_entropy(adapted(support @ across, query @ across, truth, rates.exp()).flatten(0, 1), answers)
            outer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            outer.step()
    return found


def adapted(support: torch.Tensor, query: torch.Tensor, truth: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Return the queries' scores after the inner loop: gradient steps of a softmax head, written in inner products.

    support : (e, n, n); query : (e, n_queries, n); truth : (n, ways), one-hot; rates : (steps,)
    """
    dual = support.new_zeros(len(support), *truth.shape)
    for rate in rates:
        dual = dual - rate * ((support @ dual).softmax(-1) - truth)
    return query @ dual


def measure(images: LabelledFeatures, plan: EpisodePlan, shots: int) -> tuple[Mapping[str, Numbers], list[str]]:
    """Return each method's accuracy per episode, float64 of shape (episodes,), and notes.

    Where there are too few images for so many shots there is a note and no method.
    """
    classes, found = images.classes_of(shots + plan.queries), defaultdict[str, list[Numbers]](list)
    count, every = len(classes), len(images.classes_of(1))
    if count < plan.ways:
        return {}, [
            f"K = {shots} is left out: {count} classes have {shots} + {plan.queries} images, and {plan.ways} are needed."
        ]
    rng = np.random.default_rng([plan.seed, shots])
    # Every number of shots gets the same divisions, or they would add noise to the curve.
    divisions, notes = divide(classes, plan.ways, np.random.default_rng(plan.seed)), list[str]()
    if count < every:
        notes.append(f"K = {shots}: {count} of {every} classes have {shots} + {plan.queries} images.")
    if not len(divisions[0].base):
        notes.append(
            f"No MAML: it learns on {LEAST_BASE} classes at least beside the {plan.ways} of an episode, and {count} have enough images."
        )
    for part, division in zip(np.array_split(np.arange(plan.episodes), len(divisions)), divisions, strict=True):
        base = np.isin(images.y, division.base)
        normal = replace(images, X=directions(images.X, images.X[base].mean(axis=0) if base.any() else 0.0))
        episodes = draw(normal, division.novel, plan.ways, shots, plan.queries, len(part), rng)
        if episodes is None:
            return {}, [
                f"K = {shots} is left out: the images of a class are in too few groups to part {shots} from the rest."
            ]
        learned = learn(normal, division, plan.ways, shots, rng) if len(division.base) else None
        for name, right in _answers(normal, episodes, learned).items():
            found[name].append(right)
    if len(found.get(MAML, divisions)) < len(divisions):
        del found[MAML]
        notes.append(f"K = {shots}: no MAML, as the images of a class are in too few groups to learn on.")
    return {name: np.concatenate(parts) for name, parts in found.items()}, notes


def _answers(images: LabelledFeatures, episodes: Episodes, learned: MetaLearned | None) -> dict[str, Numbers]:
    """Return each method's accuracy per episode, float64 of shape (n,), computed in blocks."""
    rows = episodes.support.shape[1] + episodes.query.shape[1]
    block = max(1, MOST_NUMBERS // (rows * images.X.shape[1]))
    found = defaultdict[str, list[Numbers]](list)
    for start in range(0, len(episodes.support), block):
        support, query = (images.X[part[start : start + block]] for part in (episodes.support, episodes.query))
        given = products(support, query, episodes.ways)
        for name, method in METHODS.items():
            found[name].append(share_right(method(given)))
        if learned is not None:
            found[MAML].append(share_right(learned.scores(support, query, episodes.ways)))
    return {name: np.concatenate(parts) for name, parts in found.items()}


@dataclass(frozen=True)
class Point:
    """One method at one number of shots: its mean accuracy over episodes, with 95 % intervals."""

    method: str
    shots: int
    accuracy: float
    interval: Interval
    ahead: float
    """Mean lead over logistic regression on the same episodes."""
    ahead_interval: Interval
    """Interval of the lead, simultaneous over the other methods."""


def points_of(shots: int, found: Mapping[str, Numbers]) -> list[Point]:
    """Return the points for one number of shots, from each method's accuracy in the same episodes, float64 of shape (n,).

    Intervals are Student's, as episodes are drawn independently.
    """
    made = []
    for name, right in found.items():
        ahead, level = right - found[PLAIN], 0.05 if name == PLAIN else 0.05 / (len(found) - 1)
        spans = mean_interval(right), mean_interval(ahead, 1 - level)
        made.append(Point(name, shots, float(right.mean()), spans[0], float(ahead.mean()), spans[1]))
    return made


@dataclass(frozen=True)
class FewShot:
    """The results of `manyheads fewshot` on one embedding."""

    embedding: str
    ways: int
    queries: int
    episodes: int
    seed: int
    images: int
    classes: int
    key: str
    """Digest of all inputs of the numbers."""
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, logistic regression first."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    @property
    def shots(self) -> tuple[int, ...]:
        """Images per class that were tried."""
        return tuple(dict.fromkeys(point.shots for point in self.points))

    def at(self, method: str, shots: int) -> Point | None:
        """Return a point; None where the method was not run with so many shots."""
        return next((point for point in self.points if (point.method, point.shots) == (method, shots)), None)

    def verdict(self) -> list[str]:
        """Say for each number of shots whether plain logistic regression is as good as every other method."""
        lines = []
        for shots in self.shots:
            others = [point for point in self.points if point.shots == shots and point.method != PLAIN]
            best, reach = max(others, key=lambda point: point.ahead), max(point.ahead_interval[1] for point in others)
            low, high = (100 * end for end in best.ahead_interval)
            told = (
                f"{best.method} is better than plain {PLAIN} by {100 * best.ahead:.1f} points [{low:.1f}, {high:.1f}]"
            )
            if reach <= MARGIN:
                told = f"plain {PLAIN} is as good: no other is ahead by more than {100 * MARGIN:g} point"
            elif low <= 0:
                told = (
                    f"plain {PLAIN} is not told apart from others, which may be ahead by up to {100 * reach:.1f} points"
                )
            lines.append(f"K = {shots}: {told}.")
        return lines

    def to_text(self) -> str:
        """Return the table, the verdict and the notes, for a terminal."""
        headers, rows = ["accuracy, %", *(f"K = {shots}" for shots in self.shots)], []
        for method in self.methods:
            points = [self.at(method, shots) for shots in self.shots]
            rows.append(
                [
                    method,
                    *(
                        "-" if point is None else f"{100 * point.accuracy:.1f} ± {50 * np.ptp(point.interval):.1f}"
                        for point in points
                    ),
                ]
            )
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * len(self.shots)))
        title = (
            f"{self.embedding}: {self.ways}-way, K images per class, {self.queries} queries per class, {self.episodes:,} "
            f"episodes of {self.images:,} images in {self.classes:,} classes, ± 95 % over episodes"
        )
        return "\n".join([title, "", table, "", *self.verdict(), *self.notes])
