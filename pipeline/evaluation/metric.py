"""The table of metrics, one row each, for tuning, comparison and the leaderboard.

A row has a function in scikit-learn's style, such as `cohen_kappa_score`. Comparisons resample units (images, groups, sets of
copies), which works for any such function; a mean of shares gives its `shares` instead, which is a thousand times faster. Within
the package higher scores are better, so log loss is stored as minus the loss; `Metric.text` writes it as users know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

from pipeline.data.targets import Target
from pipeline.evaluation.intervals import Interval, numbered
from pipeline.evaluation.predictions import Predictions

SMALLEST_PROBABILITY = 1e-15
"""Log loss clips the probability of the true class here, so that one image cannot make it infinite."""

Weighted = Callable[[NDArray[np.number]], NDArray[np.float64]]
"""Function from weights of n images, shape (r, n), to scores, float64 of shape (r,)."""

SLOW_RESAMPLES = 200
"""Most bootstrap samples, and jackknife blocks, for a metric without `shares`: each calls its function once more."""


def counted(n: int, units: NDArray[np.int64] | None, what: str = "images") -> str:
    """Say how many images there are, and in how many groups if there are fewer groups.

    units : int64 of shape (n,), the unit of each image; None where each is its own
    """
    groups = n if units is None else len(np.unique(units))
    return f"{n:,} {what}" if groups == n else f"{n:,} {what} of {groups:,} group{'s' if groups > 1 else ''}"


def mean_share(sums: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean over classes of numerator / denominator, from columns of numerators, then of denominators.

    Classes with denominator 0 are left out. A plain mean over images is one class with denominator 1 for every image.

    sums : of any float dtype, shape (r, 2 n_classes); returns float64 of shape (r,)
    """
    above, below = np.split(np.asarray(sums, dtype=np.float64), 2, axis=1)
    shares = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return np.asarray(shares.sum(axis=1) / np.maximum((below > 0).sum(axis=1), 1))


def unit_sums(images: sparse.csr_array, units: NDArray[np.int64] | None) -> sparse.csr_array:
    """Sum rows of images by unit.

    images : sparse array of shape (n, k), float64; units : int64 of shape (n,), None where each image is its own;
        returns one of shape (n_units, k), float64
    """
    if units is None:
        return images
    place = numbered(units, len(units))
    return sparse.csr_array((np.ones(len(place)), (place, np.arange(len(place))))) @ images


@dataclass(frozen=True)
class Metric:
    """One metric: its name, its computation and its format."""

    name: str
    """Name in `tuning.scoring`."""
    title: str
    needs: Literal["labels", "probabilities", "values"]
    """Kind of predictions it is computed from; probabilities are of shape (n, n_classes)."""
    function: Callable[[NDArray[Any], NDArray[Any]], float] | None = None
    """(y, predictions) -> the score as users know it; None where `shares` or `weighted` defines it."""
    shares: Callable[[Predictions], sparse.csr_array] | None = None
    """Numerators and denominators of each image, float64 of shape (n, 2 n_classes) or (n, 2), where the score is the `mean_share` of
    their sums, higher being better; such scores are resampled fast."""
    weighted: Callable[[Predictions], Weighted] | None = None
    """Fast scores under image weights: weights of shape (r, n) to scores of shape (r,)."""
    influence: Callable[[Predictions], NDArray[np.float64]] | None = None
    """Derivative of each label's part of the score with respect to each image's weight, float64 of shape (n, labels), if known."""
    excess: Callable[[Predictions], float] | None = None
    """Mean upward bias of the score with few images, if known."""
    pooled: bool = False
    """Whether it is a ratio of sums over images and not a mean of one number per image."""
    lower_is_better: bool = False
    """Whether users know it as a loss."""
    per_class: bool = False
    """Whether it is a mean over classes, in which few images of a rare class weigh much, and not over images."""
    low: float = 0.0
    high: float = 1.0
    """Range of the score, higher being better."""
    digits: int = 1
    unit: str = "points"
    """Unit of a difference: points are hundredths."""
    targets: tuple[str, ...] = ("classification",)
    """Kinds of target it applies to."""
    column: str | None = None
    """Header of its leaderboard column; None where it has one only if it is tuned."""
    threshold: Literal["", "each", "all"] = ""
    """Decision threshold for several labels: maximises each label's own F1 ('each') or that of all labels together ('all'); '' is a
    probability of 0.5."""
    ranks: bool = False
    """Whether it depends only on the order of the predicted numbers."""
    in_units: bool = False
    """Whether it has the unit of the predicted number, so that it cannot be averaged over numbers of different units."""

    @property
    def needs_probabilities(self) -> bool:
        """Whether it is computed from probabilities."""
        return self.needs == "probabilities"

    @property
    def sign(self) -> int:
        """Factor between a score of the package and one as users know it: -1 for a loss, else 1."""
        return -1 if self.lower_is_better else 1

    @property
    def mean_of_images(self) -> bool:
        """Whether it is the mean of one number per image, so that fold scores average to the score of all held-out images."""
        return self.shares is not None and not self.per_class and not self.pooled

    @property
    def scale(self) -> float:
        """Factor from a score to the written number; negative for a loss."""
        return self.sign * (100.0 if self.unit == "points" else 1.0)

    @property
    def percent(self) -> str:
        """Suffix of a written score: ' %' or nothing."""
        return " %" if self.unit == "points" else ""

    @property
    def header(self) -> str:
        """Its title, with a % sign where it is written in per cent."""
        return f"{self.title}{self.percent and ', %'}"

    @property
    def bounded(self) -> bool:
        """Whether it has a worst value."""
        return bool(np.isfinite(self.low))

    def score(self, predictions: Predictions) -> float:
        """Return the score of one head, higher being better; ValueError when it needs probabilities and there are none."""
        said = predictions.probabilities if self.needs_probabilities else predictions.y_pred
        if said is None:
            raise ValueError(f"{self.title} needs probabilities, and there are none")
        if self.shares is not None:
            return float(mean_share(self.shares(predictions).sum(axis=0)[None])[0])
        if self.weighted is not None:
            return float(self.weighted(predictions)(np.ones((1, len(predictions))))[0])
        assert self.function is not None, f"{self.name} has neither function nor shares"
        return self.sign * float(self.function(predictions.y_true, said))

    def contributions(self, predictions: Predictions) -> NDArray[np.float64]:
        """Return the contributions of m units, float64 of shape (m,): their mean is the score, their variance m times the score's.

        A unit is an image, a group or a set of copies. For a mean of shares a contribution is the score plus the influence function
        (infinitesimal jackknife, Efron 1982; for ratios of sums over units, Cochran 1977, chapter 11). For other metrics the units
        form blocks, whose contributions come from leaving out one at a time (delete-a-group jackknife, Kott 2001).
        """
        if self.shares is not None:
            units = unit_sums(self.shares(predictions), predictions.units)
            above, below = np.split(units.sum(axis=0), 2)
            inverse = np.divide(1.0, below, out=np.zeros_like(below), where=below > 0)
            share, present = above * inverse, np.count_nonzero(below)
            influence = units @ np.concatenate([inverse, -share * inverse])
            return np.asarray(share.sum() / present + influence * (units.shape[0] / present))
        if self.influence is not None:
            added = unit_sums(sparse.csr_array(self.influence(predictions)), predictions.units).sum(axis=1)
            return np.asarray(self.score(predictions) + len(added) * added)
        whole, place = self.score(predictions), predictions.unit_numbers
        blocks = min(SLOW_RESAMPLES, int(place.max()) + 1)
        without = np.array(
            [self.score(predictions.rows(np.flatnonzero(place % blocks != block))) for block in range(blocks)]
        )
        return np.asarray(whole + (blocks - 1) * (without.mean() - without))

    def draws(self, count: int) -> int:
        """Return how many of `count` samples to draw: fewer for a slow metric."""
        return count if self.shares is not None else min(count, SLOW_RESAMPLES)

    def clipped_difference(self, interval: Interval) -> Interval:
        """Clip the interval of a difference of two scores to the range of differences."""
        span = self.high - self.low
        low, high = np.clip(interval, -span, span).tolist()
        return low, high

    def _written(self, number: float, sign: str = "") -> str:
        """Write a number with `digits` decimals, or, in units of the predicted number, with `digits` significant digits."""
        after = self.digits
        if self.in_units and number:
            after = min(max(self.digits - 1 - int(np.floor(np.log10(abs(number)))), 0), 12)
        return f"{number + 0.0:{sign},.{after}f}"

    def text(self, score: float) -> str:
        """Write a score: a percentage without the % sign, or a loss."""
        return self._written(self.scale * score)

    def user_text(self, value: float) -> str:
        """Write a score in users' convention, such as a positive loss, or a standard deviation."""
        return self._written(abs(self.scale) * value)

    def interval_text(self, interval: Interval) -> str:
        """Write a score's interval, the lower number first."""
        low, high = sorted(self.scale * end for end in np.clip(interval, self.low, self.high).tolist())
        return f"[{self._written(low)}, {self._written(high)}]"

    def gap_text(self, difference: float) -> str:
        """Write the lead of one score over another with its sign: positive is better, for a loss too."""
        return self._written(abs(self.scale) * difference, "+")


def _roc_auc(y: NDArray[np.int64], probabilities: NDArray[np.floating]) -> float:
    """Return the mean one-vs-rest ROC AUC over the classes that occur, by ranks (Mann and Whitney 1947); 0.5 for one class.

    scikit-learn's `roc_auc_score` gives the same a dozen times slower, and rejects missing classes.
    """
    present, counts = np.unique(y, return_counts=True)
    if len(present) < 2:
        return 0.5
    ranks = stats.rankdata(probabilities[:, present], axis=0)
    sums = np.sum(ranks * (y[:, None] == present), axis=0)
    return float(np.mean((sums - counts * (counts + 1) / 2) / (counts * (len(y) - counts))))


TOP = 5


def _probabilities(predictions: Predictions) -> NDArray[np.floating]:
    assert predictions.probabilities is not None, "the metric needs probabilities"
    return predictions.probabilities


def _mean_of(values: NDArray[np.floating] | NDArray[np.bool_]) -> sparse.csr_array:
    return sparse.csr_array(np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1))


def _log_probability(predictions: Predictions) -> sparse.csr_array:
    """Return shares of the log probability of each true class; scikit-learn's `log_loss` clips float32 at 1e-7."""
    own = _probabilities(predictions)[np.arange(len(predictions)), predictions.y_true].astype(np.float64)
    return _mean_of(np.log(np.clip(own, SMALLEST_PROBABILITY, 1.0)))


def _among_top_k(predictions: Predictions) -> sparse.csr_array:
    likeliest = np.argsort(_probabilities(predictions), axis=1, kind="stable")[:, ::-1][:, :TOP]
    return _mean_of((likeliest == predictions.y_true[:, None]).any(axis=1))


def _f1(predictions: Predictions) -> sparse.csr_array:
    return _by_class(predictions, predictions.y_true, predictions.y_pred)


def _by_class(predictions: Predictions, *below: NDArray[np.int64]) -> sparse.csr_array:
    """Return shares: each image adds 1 to the denominators of the given classes and, if right, as much to its class's numerator."""
    if predictions.y_true.ndim > 1:
        flags = sum(codes.astype(np.float64) for codes in below)
        right = len(below) * (predictions.y_true & predictions.y_pred)
        return sparse.csr_array(np.column_stack([right, flags]))
    n, k, correct = len(predictions), len(below), predictions.correct
    width = int(max(predictions.y_true.max(initial=0), predictions.y_pred.max(initial=0))) + 1
    values = np.concatenate([k * correct.astype(np.float64), np.ones(k * n)])
    columns = np.concatenate([predictions.y_true, *(width + codes for codes in below)])
    return sparse.csr_array((values, (np.tile(np.arange(n), k + 1), columns)), shape=(n, 2 * width))


def _pooled_f1(predictions: Predictions) -> sparse.csr_array:
    """Return the F1 shares summed over labels: numerator and denominator of each image, shape (n, 2)."""
    above, below = np.split(_f1(predictions).toarray(), 2, axis=1)
    return sparse.csr_array(np.stack([above.sum(axis=1), below.sum(axis=1)], axis=1))


def _wrong_labels(predictions: Predictions) -> sparse.csr_array:
    return _mean_of(-np.mean(predictions.y_true != predictions.y_pred, axis=1))


def _errors(predictions: Predictions) -> sparse.csr_array:
    """Return shares of minus each image's mean absolute error."""
    off = np.abs(predictions.y_true - predictions.y_pred)
    return _mean_of(-(off if off.ndim == 1 else off.mean(axis=1)))


def _rmse(y: NDArray[np.float64], guess: NDArray[np.float64]) -> float:
    """Return the same as scikit-learn's `root_mean_squared_error`, whose argument checks take fifty times as long."""
    return float(np.mean(np.sqrt(np.mean((y - guess) ** 2, axis=0))))


def _r2(y: NDArray[np.float64], guess: NDArray[np.float64]) -> float:
    """Return the same as `r2_score`, the mean over columns; a constant column gives 1 if predicted exactly, else 0."""
    left, there_is = np.sum((y - guess) ** 2, axis=0), np.sum((y - y.mean(axis=0)) ** 2, axis=0)
    known = there_is > 0
    return float(np.mean(np.where(known, 1 - left / np.where(known, there_is, 1.0), left == 0)))


def _spearman(y: NDArray[np.float64], guess: NDArray[np.float64]) -> float:
    """Return the rank correlation, the mean over columns; a constant column gives 0."""
    columns = zip(np.atleast_2d(y.T), np.atleast_2d(guess.T), strict=True)
    ranks = [[stats.rankdata(part) - (len(y) + 1) / 2 for part in pair] for pair in columns]
    return float(np.mean([a @ b / max(np.sqrt((a @ a) * (b @ b)), 1e-12) for a, b in ranks]))


def _ranked(scores: NDArray[np.floating]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Return the order of images, highest score first, and for each place the first and last place of equal score."""
    order = np.argsort(-scores, kind="stable")
    ordered = -scores[order]
    return order, np.searchsorted(ordered, ordered, side="left"), np.searchsorted(ordered, ordered, side="right") - 1


def label_precision(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> Weighted:
    """Return a function from image weights to one label's average precision, NaN where no image has the label.

    The mean precision over the images that have the label, with tied scores taken together, as in scikit-learn's
    `average_precision_score`. y, scores : shape (n,)
    """
    order, _, ends = _ranked(scores)
    own = np.flatnonzero(y[order])
    # For each image with the label: the last such image in its block of tied scores.
    last = np.searchsorted(own, ends[own], side="right") - 1

    def under(weights: NDArray[np.number]) -> NDArray[np.float64]:
        ordered = np.asarray(weights, dtype=np.float64)[:, order]
        above, hits = np.cumsum(ordered, axis=1)[:, ends[own]], ordered[:, own]
        right, total = np.cumsum(hits, axis=1)[:, last], hits.sum(axis=1)
        precision = np.divide(right, above, out=np.zeros_like(right), where=above > 0)
        nothing = np.full(len(total), np.nan)
        return np.asarray(np.divide((hits * precision).sum(axis=1), total, out=nothing, where=total > 0))

    return under


def _columns(predictions: Predictions) -> list[tuple[NDArray[np.bool_], NDArray[np.floating]]]:
    """Return for every label that occurs which images have it, and its scores, each of shape (n,)."""
    pairs = zip(predictions.y_true.T, _probabilities(predictions).T, strict=True)
    return [(flags, scores) for flags, scores in pairs if flags.any()]


def weighted_mean_precision(predictions: Predictions) -> Weighted:
    """Return a function from image weights to the mean average precision (mAP) over labels that occur, 0 if none does."""
    parts = [label_precision(*column) for column in _columns(predictions)]

    def under(weights: NDArray[np.number]) -> NDArray[np.float64]:
        found = np.array([part(weights) for part in parts]).reshape(len(parts), len(weights))
        known = np.isfinite(found)
        return np.asarray(np.where(known, found, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1))

    return under


def influence(predictions: Predictions) -> NDArray[np.float64]:
    """Return the derivatives of the mean average precision by the weight of each image at 1: float64 of shape (n, labels).

    Each label that occurs has a column, and the columns add up to the derivative of the whole. An image's weight counts for its own
    precision if it has the label, and for the precision at every image that is scored no higher.
    """
    columns = _columns(predictions)
    made = np.zeros((len(predictions), max(len(columns), 1)))
    for column, (y, scores) in enumerate(columns):
        order, starts, ends = _ranked(scores)
        flags, above = y[order], ends + 1.0
        right, count = np.cumsum(flags)[ends], flags.sum()
        precision = right / above

        def below(values: NDArray[np.float64], flags: Any = flags, starts: Any = starts) -> NDArray[np.float64]:
            """Sum over the images that have the label and are scored no higher."""
            return np.asarray(np.cumsum((flags * values)[::-1])[::-1][starts])

        change = flags * (precision + below(1 / above) - np.sum(flags * precision) / count) - below(right / above**2)
        made[order, column] = change / count / len(columns)
    return made


def excess(predictions: Predictions) -> float:
    """Return the upward bias of the mean average precision, which arises because each image counts in the precision at itself.

    It is the difference to a precision that leaves out the image itself.
    """
    found = []
    for y, scores in _columns(predictions):
        order, _, ends = _ranked(scores)
        flags, above = y[order], ends + 1
        right = np.cumsum(flags)[ends]
        found.append(np.mean(((above - right) / (above * np.maximum(above - 1.0, 1.0)))[flags]))
    return float(np.mean(found)) if found else 0.0


def _of_numbers(name: str, title: str, function: Any = None, shares: Any = None, **more: Any) -> Metric:
    """Return a metric for numbers: an error in their units, lower being better, or a coefficient with best value 1."""
    error = more.get("in_units", False)
    made = {"low": -np.inf, "high": 0.0 if error else 1.0, "lower_is_better": error, "targets": ("regression",)}
    made |= {"digits": 3, "unit": title, "column": title.split("'")[0]}
    return Metric(name, title, "values", function, shares, **{**made, **more})


def _of_labels(name: str, title: str, shares: Any, **more: Any) -> Metric:
    return Metric(name, title, "labels", shares=shares, targets=("multilabel",), column=title.split()[0], **more)


ACCURACY = Metric(
    "accuracy",
    "accuracy",
    "labels",
    shares=lambda predictions: _mean_of(predictions.correct),
    column="accuracy",
)

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric(
            "balanced_accuracy",
            "balanced accuracy",
            "labels",
            shares=lambda predictions: _by_class(predictions, predictions.y_true),
            per_class=True,
            column="bal.",
        ),
        Metric(
            "mean_average_precision",
            "mAP",
            "probabilities",
            weighted=weighted_mean_precision,
            influence=influence,
            excess=excess,
            per_class=True,
            threshold="each",
            targets=("multilabel",),
            column="mAP",
        ),
        Metric(
            "macro_f1",
            "macro F1",
            "labels",
            shares=_f1,
            per_class=True,
            threshold="each",
            targets=("classification", "multilabel"),
            column="F1",
        ),
        _of_labels("micro_f1", "micro F1", _pooled_f1, pooled=True, threshold="all"),
        _of_labels("subset_accuracy", "subset accuracy", ACCURACY.shares),
        _of_labels("hamming_loss", "Hamming loss", _wrong_labels, lower_is_better=True, low=-1.0, high=0.0),
        Metric(
            "log_loss",
            "log loss",
            "probabilities",
            lower_is_better=True,
            shares=_log_probability,
            low=-np.inf,
            high=0.0,
            digits=3,
            unit="nats",
            column="loss",
        ),
        Metric("roc_auc", "ROC AUC", "probabilities", _roc_auc, per_class=True),
        Metric(f"top_{TOP}_accuracy", f"top-{TOP} accuracy", "probabilities", shares=_among_top_k),
        _of_numbers("mae", "MAE", shares=_errors, in_units=True),
        _of_numbers("rmse", "RMSE", _rmse, in_units=True),
        _of_numbers("r2", "R2", _r2),
        _of_numbers("spearman", "Spearman's rho", _spearman, low=-1.0, ranks=True),
    )
}
"""Metrics by their names in `tuning.scoring`."""


def metrics_for(target: Target) -> tuple[Metric, ...]:
    """Return the metrics of a target, first the default for tuning and tests."""
    serving = [metric for metric in METRICS.values() if target.kind in metric.targets]
    several = target.width > 1
    return tuple(sorted(serving, key=lambda metric: metric.in_units and several))


def metric_of(scoring: str, target: Target) -> Metric:
    """Return the metric that `tuning.scoring` names; `auto` is the target's first."""
    return metrics_for(target)[0] if scoring == "auto" else METRICS[scoring]


_CELLS = 1 << 21
"""Most bootstrap counts in memory at once: 16 MB."""


def drawn(m: int, seed: int, count: int) -> Iterator[NDArray[np.int64]]:
    """Draw `count` bootstrap samples of m units: yields int64 of shape (r, m), how often each unit was drawn."""
    rng, step = np.random.default_rng(seed), max(1, _CELLS // m)
    for start in range(0, count, step):
        r = min(step, count - start)
        units = rng.integers(0, m, (r, m)) + m * np.arange(r)[:, None]
        yield np.bincount(units.reshape(-1), minlength=r * m).reshape(r, m)


def rescored(metric: Metric, heads: Sequence[Predictions]) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Return a function that scores heads on the same images with repeated units.

    It takes the units' counts, int64 of shape (r, n_units), and returns scores, float64 of shape (r, n_heads), which are
    meaningless for a row of zeros.
    """
    if metric.shares is not None:
        sums = [unit_sums(metric.shares(head), head.units) for head in heads]
        return lambda counts: np.stack([mean_share(counts @ part) for part in sums], axis=1)
    place = heads[0].unit_numbers
    if metric.weighted is not None:
        quick = [metric.weighted(head) for head in heads]
        return lambda counts: np.stack([part(counts[:, place]) for part in quick], axis=1)

    def slow(counts: NDArray[np.int64]) -> NDArray[np.float64]:
        taken = [np.repeat(np.arange(len(place)), row[place]) for row in counts]
        return np.array([[metric.score(head.rows(rows)) if len(rows) else np.nan for head in heads] for rows in taken])

    return slow


def bootstrap(metric: Metric, heads: Sequence[Predictions], seed: int, count: int) -> NDArray[np.float64]:
    """Return scores of heads on bootstrap samples of the units of the same images: float64 of shape (draws, n_heads)."""
    weighted, m = rescored(metric, heads), int(heads[0].unit_numbers.max()) + 1
    return np.concatenate([weighted(counts) for counts in drawn(m, seed, metric.draws(count))])
