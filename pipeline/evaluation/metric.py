"""What a search maximises and heads are compared by: a row per score, for tuning, comparison and the table.

A row has a function of scikit-learn's kind, such as `cohen_kappa_score`. Every comparison is made by resampling units (images,
groups, sets of copies) and works for any such function; a score that is a mean of shares says so instead, which is a thousand
times faster. Within the package a score
is higher where it is better, so that of log loss is minus the loss; `Metric.text` writes it as users know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from pipeline.evaluation.intervals import Interval, numbered
from pipeline.evaluation.predictions import Predictions

SMALLEST_PROBABILITY = 1e-15
"""Log loss counts a smaller probability of the true class as this one, so that one image cannot make it infinite."""

SLOW_RESAMPLES = 200
"""Samples drawn, and blocks left out, for a score without `shares`, each of which calls its function anew."""


def counted(n: int, units: NDArray[np.int64] | None, what: str = "images") -> str:
    """Say how many images there are, and of how many groups where not each is one of its own."""
    groups = n if units is None else len(np.unique(units))
    return f"{n:,} {what}" if groups == n else f"{n:,} {what} of {groups:,} group{'s' if groups > 1 else ''}"


def per_unit(values: NDArray[np.float64], units: NDArray[np.int64] | None) -> NDArray[np.float64]:
    """Sum what images add to a score into what units add.

    values : ndarray of shape (n,), with the score as mean
    Returns an ndarray of shape (n_units,), with the score as mean and n_units times its variance as variance: that of a
    ratio of sums over units, as units differ in size (Cochran 1977, chapter 11).
    """
    if units is None:
        return values
    place, mean = numbered(units, len(values)), values.mean()
    sums = np.bincount(place, values - mean)
    return np.asarray(mean + sums * (len(sums) / len(values)))


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
        return mean_share(np.concatenate([counts @ self.above, counts @ self.below], axis=1))

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


def mean_share(sums: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean of shares, shape (r,), from sums above and then below, together of shape (r, 2 n_classes)."""
    above, below = np.split(np.asarray(sums, dtype=np.float64), 2, axis=1)
    shares = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return np.asarray(shares.sum(axis=1) / np.maximum((below > 0).sum(axis=1), 1))


@dataclass(frozen=True)
class Metric:
    """One score: how it is called, how it is computed, how it is written."""

    name: str
    """As in `tuning.scoring`."""
    title: str
    needs: Literal["labels", "probabilities", "values"]
    """What of a head's predictions it looks at; probabilities are of shape (n, n_classes)."""
    function: Callable[[NDArray[Any], NDArray[Any]], float] | None = None
    """(y, predictions) -> the score as users know it; None where `shares` tells it."""
    shares: Callable[[Predictions], Shares] | None = None
    """The score as a mean of shares, better when higher, which is quickly resampled."""
    higher_is_better: bool = True
    per_class: bool = False
    """Whether it is a mean over classes, so that a few images of a rare class weigh much, and not over images."""
    low: float = 0.0
    high: float = 1.0
    """Its range, higher being better."""
    digits: int = 1
    unit: str = "points"
    """Of a difference: points are hundredths."""
    targets: tuple[str, ...] = ("classification",)
    """The kinds of target it serves."""

    @property
    def needs_probabilities(self) -> bool:
        """Whether it looks at probabilities and not at labels."""
        return self.needs == "probabilities"

    @property
    def lower_is_better(self) -> bool:
        """Whether users know it as a loss."""
        return not self.higher_is_better

    @property
    def mean_of_images(self) -> bool:
        """Whether it is the mean of a number per image, so that the scores of folds tell that of all held-out images."""
        return self.shares is not None and not self.per_class

    @property
    def scale(self) -> float:
        """What a score is multiplied by to be written; negative where lower is better for users."""
        return (100.0 if self.unit == "points" else 1.0) * (1 if self.higher_is_better else -1)

    @property
    def bounded(self) -> bool:
        """Whether it has a worst value."""
        return bool(np.isfinite(self.low))

    def score(self, predictions: Predictions) -> float:
        """Return the score of one head, higher is better.

        Raises
        ------
        ValueError
            When it needs probabilities and the predictions have none.
        """
        said = predictions.probabilities if self.needs_probabilities else predictions.y_pred
        if said is None:
            raise ValueError(f"{self.title} needs probabilities, and there are none")
        if self.shares is not None:
            return float(self.shares(predictions).weighted(np.ones((1, len(predictions))))[0])
        assert self.function is not None, f"{self.name} has neither function nor shares"
        return (1 if self.higher_is_better else -1) * float(self.function(predictions.y_true, said))

    def contributions(self, predictions: Predictions) -> NDArray[np.float64]:
        """Return what each unit adds: shape (m,), with the score as mean and m times its variance as variance.

        A unit is an image, a group or a set of copies. For a score without `shares` it is a block of units, and what it adds
        comes from leaving it out (the delete-a-group jackknife, Kott 2001).
        """
        if self.shares is not None:
            return per_unit(self.shares(predictions).contributions(), predictions.units)
        whole, place = self.score(predictions), predictions.unit_numbers
        blocks = min(SLOW_RESAMPLES, int(place.max()) + 1)
        without = np.array(
            [self.score(predictions.rows(np.flatnonzero(place % blocks != block))) for block in range(blocks)]
        )
        return np.asarray(whole + (blocks - 1) * (without.mean() - without))

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


def _log_probability(y: NDArray[np.int64], probabilities: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the log of each true class's probability; scikit-learn's `log_loss` cuts float32 off at 1e-7."""
    own = np.asarray(probabilities[np.arange(len(y)), y], dtype=np.float64)
    return np.asarray(np.log(np.clip(own, SMALLEST_PROBABILITY, 1.0)))


def _roc_auc(y: NDArray[np.int64], probabilities: NDArray[np.floating]) -> float:
    """Return the mean over the classes that occur of each against the rest, by ranks (Mann and Whitney 1947).

    `roc_auc_score` of scikit-learn gives the same a dozen times slower, and refuses a class that is missing. Of one class
    alone it is 0.5, as nothing can be ordered.
    """
    present, counts = np.unique(y, return_counts=True)
    if len(present) < 2:
        return 0.5
    ranks = stats.rankdata(probabilities[:, present], axis=0)
    sums = np.sum(ranks * (y[:, None] == present), axis=0)
    return float(np.mean((sums - counts * (counts + 1) / 2) / (counts * (len(y) - counts))))


TOP = 5


def _among_top_k(predictions: Predictions) -> NDArray[np.bool_]:
    likeliest = np.argsort(_probabilities(predictions), axis=1, kind="stable")[:, ::-1][:, :TOP]
    return np.asarray((likeliest == predictions.y_true[:, None]).any(axis=1))


def _probabilities(predictions: Predictions) -> NDArray[np.floating]:
    assert predictions.probabilities is not None, "the metric needs probabilities"
    return predictions.probabilities


def _mean_of(values: NDArray[np.floating] | NDArray[np.bool_]) -> Shares:
    column = np.asarray(values, dtype=np.float64)[:, None]
    return Shares(sparse.csr_array(column), sparse.csr_array(np.ones_like(column)))


def _recalls(predictions: Predictions) -> Shares:
    return Shares(_at(predictions, predictions.y_true, predictions.correct), _at(predictions, predictions.y_true))


def _f1(predictions: Predictions) -> Shares:
    below = _at(predictions, predictions.y_true) + _at(predictions, predictions.y_pred)
    return Shares(2 * _at(predictions, predictions.y_true, predictions.correct), sparse.csr_array(below))


def _at(
    predictions: Predictions, columns: NDArray[np.int64], where: NDArray[np.bool_] | None = None
) -> sparse.csr_array:
    """Return 1 for each image in its column, for the images `where` or all."""
    n = len(columns)
    rows = np.arange(n) if where is None else np.flatnonzero(where)
    width = int(max(predictions.y_true.max(initial=0), predictions.y_pred.max(initial=0))) + 1
    # Two columns at least: one alone would be taken for a plain mean.
    return sparse.csr_array((np.ones(len(rows)), (rows, columns[rows])), shape=(n, max(width, 2)))


ACCURACY = Metric("accuracy", "accuracy", "labels", shares=lambda predictions: _mean_of(predictions.correct))

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric("balanced_accuracy", "balanced accuracy", "labels", shares=_recalls, per_class=True),
        Metric("macro_f1", "macro F1", "labels", shares=_f1, per_class=True),
        Metric(
            "log_loss",
            "log loss",
            "probabilities",
            higher_is_better=False,
            shares=lambda predictions: _mean_of(_log_probability(predictions.y_true, _probabilities(predictions))),
            low=-np.inf,
            high=0.0,
            digits=3,
            unit="nats",
        ),
        Metric("roc_auc", "ROC AUC", "probabilities", _roc_auc, per_class=True),
        Metric(
            f"top_{TOP}_accuracy",
            f"top-{TOP} accuracy",
            "probabilities",
            shares=lambda predictions: _mean_of(_among_top_k(predictions)),
        ),
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
    columns: tuple[Predictions, ...]

    @cached_property
    def _patterns(self) -> tuple[sparse.csr_array | None, tuple[Shares, ...]]:
        assert self.metric.shares is not None
        if self.metric.needs_probabilities:
            return None, tuple(self.metric.shares(column) for column in self.columns)
        codes = np.stack([self.columns[0].y_true, *(column.y_pred for column in self.columns)], axis=1)
        _, first, place = np.unique(codes, axis=0, return_index=True, return_inverse=True)
        n, place = len(codes), place.reshape(-1)
        groups = sparse.csr_array((np.ones(n), (np.arange(n), place)), shape=(n, len(first)))
        return groups, tuple(self.metric.shares(column.rows(first)) for column in self.columns)

    def resamples(self, seed: int, count: int) -> Iterator[NDArray[np.int64]]:
        """Draw bootstrap samples of the units: yields arrays of shape (r, n), how often each image was drawn.

        `count` rows in all, or fewer for a score that is slow to compute.
        """
        place = self.columns[0].unit_numbers
        m, rng = int(place.max()) + 1, np.random.default_rng(seed)
        count = count if self.metric.shares is not None else min(count, SLOW_RESAMPLES)
        step = max(1, _CELLS // len(place))
        for start in range(0, count, step):
            rows = range(min(step, count - start))
            yield np.stack([np.bincount(rng.integers(0, m, m), minlength=m)[place] for _ in rows])

    def weighted(self, counts: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return every head's score with each image taken so many times.

        counts : ndarray of shape (r, n); returns an ndarray of shape (r, n_heads), NaN where no image was taken
        """
        if self.metric.shares is None:
            drawn = [np.repeat(np.arange(len(row)), row) for row in counts]
            scores = [
                [self.metric.score(column.rows(rows)) if len(rows) else np.nan for column in self.columns]
                for rows in drawn
            ]
            return np.array(scores)
        groups, shares = self._patterns
        weights = np.asarray(counts, dtype=np.float64) if groups is None else np.asarray(counts @ groups)
        return np.stack([column.weighted(weights) for column in shares], axis=1)
