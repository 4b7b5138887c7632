"""What a search maximises and heads are compared by: one record per `tuning.scoring`, for tuning, comparison and the table.

Within the package a score is higher where it is better, so that of log loss is minus the loss; `Metric.text` writes it as
users know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipeline.metrics.intervals import Interval

SMALLEST_PROBABILITY = 1e-15
"""Log loss counts a smaller probability of the true class as this one, so that one image cannot make it infinite."""


@dataclass(frozen=True)
class Answers:
    """What one head said of n images, as a metric looks at it.

    truth, guess : ndarray of shape (n,), int64: codes from 0, the same for all heads that are compared
    log_probabilities : ndarray of shape (n,), float64: of the true classes; None where a head gives none
    """

    truth: NDArray[np.int64]
    guess: NDArray[np.int64]
    log_probabilities: NDArray[np.float64] | None = None

    @staticmethod
    def of(
        truth: NDArray[np.int64], guess: NDArray[np.int64], probabilities: NDArray[np.floating] | None = None
    ) -> Answers:
        """Return the answers of a head with these probabilities, of shape (n, n_classes)."""
        if probabilities is None:
            return Answers(truth, guess)
        own = probabilities[np.arange(len(truth)), truth].astype(np.float64)
        return Answers(truth, guess, np.log(np.clip(own, SMALLEST_PROBABILITY, 1.0)))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Which images were labelled right: shape (n,)."""
        return np.equal(self.truth, self.guess)

    def rows(self, which: NDArray[np.intp]) -> Answers:
        """Return the answers to some of the images."""
        own = None if self.log_probabilities is None else self.log_probabilities[which]
        return Answers(self.truth[which], self.guess[which], own)


@dataclass(frozen=True)
class Shares:
    """A score as the mean over classes of a share: the sum of `above` over the images by the sum of `below`.

    above, below : sparse arrays of shape (n, n_classes). A class with nothing below takes no part. A plain mean over images
    is one class with 1 below for every image.
    """

    above: sparse.csr_array
    below: sparse.csr_array

    def weighted(self, counts: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the score with each image taken so many times; counts : of shape (r, n). Returns shape (r,)."""
        above, below = np.asarray(counts @ self.above), np.asarray(counts @ self.below)
        shares = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return np.asarray(shares.sum(axis=1) / np.maximum((below > 0).sum(axis=1), 1))

    def contributions(self) -> NDArray[np.float64]:
        """Return what each image adds: shape (n,), with the score as mean and n times its variance as variance.

        The score plus its influence function (the infinitesimal jackknife, Efron 1982), exact for a plain mean.
        """
        n = self.above.shape[0]
        if self.above.shape[1] == 1:
            return np.asarray(self.above.sum(axis=1)).reshape(n)
        above, below = (np.asarray(part.sum(axis=0)).reshape(-1) for part in (self.above, self.below))
        inverse = np.divide(1.0, below, out=np.zeros_like(below), where=below > 0)
        share, present = above * inverse, np.count_nonzero(below)
        influence = self.above @ inverse - self.below @ (share * inverse)
        return np.asarray(share.sum() / present + influence * (n / present))


@dataclass(frozen=True)
class Metric:
    """One score: how it is called, how it is computed from answers, how it is written."""

    name: str
    """As in `tuning.scoring`."""
    title: str
    shares: Callable[[Answers], Shares]
    low: float = 0.0
    high: float = 1.0
    """Its range, higher being better."""
    scale: float = 100.0
    """What a score is multiplied by to be written; negative where lower is better for users."""
    digits: int = 1
    unit: str = "points"
    """Of a difference."""
    per_class: bool = False
    """Whether it is a mean over classes, so that a few images of a rare class weigh much, and not over images."""

    @property
    def needs_probabilities(self) -> bool:
        """Whether it looks at probabilities and not at labels."""
        return self.name == "log_loss"

    @property
    def lower_is_better(self) -> bool:
        """Whether users know it as a loss."""
        return self.scale < 0

    @property
    def bounded(self) -> bool:
        """Whether it has a worst value."""
        return bool(np.isfinite(self.low))

    def score(self, answers: Answers) -> float:
        """Return the score of one head, higher is better."""
        shares = self.shares(answers)
        if not self.per_class:
            return float(shares.contributions().mean())
        return float(shares.weighted(np.ones((1, shares.above.shape[0])))[0])

    def clipped(self, interval: Interval) -> Interval:
        """Return an interval of a score without what no score can be."""
        return (float(np.clip(interval[0], self.low, self.high)), float(np.clip(interval[1], self.low, self.high)))

    def clipped_difference(self, interval: Interval) -> Interval:
        """Return an interval of a difference of two scores without what no difference can be."""
        span = self.high - self.low
        return (float(np.clip(interval[0], -span, span)), float(np.clip(interval[1], -span, span)))

    def text(self, score: float) -> str:
        """Write a score: a percentage without its sign, or a loss."""
        return f"{self.scale * score + 0.0:.{self.digits}f}"

    def spread_text(self, spread: float) -> str:
        """Write a standard deviation."""
        return f"{abs(self.scale) * spread:.{self.digits}f}"

    def interval_text(self, interval: Interval) -> str:
        """Write a score's interval, the lower number first."""
        low, high = sorted(self.scale * end for end in self.clipped(interval))
        return f"[{low + 0.0:.{self.digits}f}, {high + 0.0:.{self.digits}f}]"

    def gap_text(self, difference: float) -> str:
        """Write by how much a score is better than another, with its sign: positive is better, also of a loss."""
        return f"{abs(self.scale) * difference + 0.0:+.{self.digits}f}"


def _mean_of(values: NDArray[np.floating] | NDArray[np.bool_]) -> Shares:
    column = np.asarray(values, dtype=np.float64)[:, None]
    return Shares(sparse.csr_array(column), sparse.csr_array(np.ones_like(column)))


def _accuracy(answers: Answers) -> Shares:
    return _mean_of(answers.correct)


def _log_probability(answers: Answers) -> Shares:
    if answers.log_probabilities is None:
        raise ValueError("log loss needs probabilities, and these answers have none")
    return _mean_of(answers.log_probabilities)


def _recalls(answers: Answers) -> Shares:
    return Shares(_at(answers, answers.truth, answers.correct), _at(answers, answers.truth))


def _f1(answers: Answers) -> Shares:
    below = _at(answers, answers.truth) + _at(answers, answers.guess)
    return Shares(2 * _at(answers, answers.truth, answers.correct), sparse.csr_array(below))


def _at(answers: Answers, columns: NDArray[np.int64], where: NDArray[np.bool_] | None = None) -> sparse.csr_array:
    """Return 1 for each image in its column, for the images `where` or all."""
    n = len(columns)
    rows = np.arange(n) if where is None else np.flatnonzero(where)
    width = int(max(answers.truth.max(initial=0), answers.guess.max(initial=0))) + 1
    # Two columns at least: one alone would be taken for a plain mean.
    return sparse.csr_array((np.ones(len(rows)), (rows, columns[rows])), shape=(n, max(width, 2)))


ACCURACY = Metric("accuracy", "accuracy", _accuracy)

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric("balanced_accuracy", "balanced accuracy", _recalls, per_class=True),
        Metric("macro_f1", "macro F1", _f1, per_class=True),
        Metric("log_loss", "log loss", _log_probability, low=-np.inf, high=0.0, scale=-1.0, digits=3, unit="nats"),
    )
}
"""By the name that `tuning.scoring` has for it."""


_CELLS = 1 << 21
"""Counts that are held at once while images are drawn: 16 MB."""


@dataclass(frozen=True)
class Together:
    """Several heads on the same images, to be scored again and again with the images weighted.

    Images that all heads answered alike count as one, so that resampling costs little where heads agree.
    """

    metric: Metric
    columns: tuple[Answers, ...]

    @cached_property
    def _patterns(self) -> tuple[sparse.csr_array | None, tuple[Shares, ...]]:
        if self.metric.needs_probabilities:
            return None, tuple(self.metric.shares(column) for column in self.columns)
        codes = np.stack([self.columns[0].truth, *(column.guess for column in self.columns)], axis=1)
        _, first, place = np.unique(codes, axis=0, return_index=True, return_inverse=True)
        n, place = len(codes), place.reshape(-1)
        groups = sparse.csr_array((np.ones(n), (np.arange(n), place)), shape=(n, len(first)))
        return groups, tuple(self.metric.shares(column.rows(first)) for column in self.columns)

    def resamples(self, seed: int, count: int) -> Iterator[NDArray[np.int64]]:
        """Draw bootstrap samples: yields arrays of shape (r, n), how often each image was drawn, `count` rows in all."""
        n, rng = len(self.columns[0].truth), np.random.default_rng(seed)
        step = max(1, _CELLS // n)
        for start in range(0, count, step):
            rows = range(min(step, count - start))
            yield np.stack([np.bincount(rng.integers(0, n, n), minlength=n) for _ in rows])

    def weighted(self, counts: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return every head's score with each image taken so many times.

        counts : ndarray of shape (r, n); returns an ndarray of shape (r, n_heads)
        """
        groups, shares = self._patterns
        weights = np.asarray(counts, dtype=np.float64) if groups is None else np.asarray(counts @ groups)
        return np.stack([column.weighted(weights) for column in shares], axis=1)
