"""Comparison of heads: paired tests, corrected for multiple comparisons and for selection of the best.

Every test is paired: two heads are compared on the same images or the same folds. Resampling works on units: images, or groups
and sets of copies where images are not independent. The group of rows with no evidence of a difference from the best is used for
selection, so it comes from pooled out-of-fold predictions; the test images only confirm it. All comparisons use the tuned metric.
Sources: McNemar 1947 (exact form); Tango 1998 (paired shares); Noreen 1989 and Yeh 2000 (randomisation test for any metric);
Dietterich 1998; Nadeau and Bengio 2003; Holm 1979; Hothorn, Bretz and Westfall 2008 (the largest studentised difference); Demsar
2006 (several data sets).

The score of the best of many is optimistic. The bias is estimated from out-of-fold predictions by the bootstrap of Tsamardinos,
Greasidou and Borboudakis 2018 (BBC-CV), or from fold scores of trials alone by Tibshirani and Tibshirani 2009.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.evaluation.intervals import Interval, agreed, critical, effective_size, freedom, tango
from pipeline.evaluation.metric import ACCURACY, Metric, bootstrap, drawn, mean_share, rescored, unit_sums
from pipeline.evaluation.predictions import Predictions, joined

LEVEL = 0.05
RESAMPLES = 2000
DRAWS = 4000
_COINS = 1 << 20
"""Most random bits in memory at once."""


@dataclass(frozen=True)
class Paired:
    """A paired difference (first minus second), its 95 % interval and p-value."""

    difference: float
    interval: Interval
    p_value: float

    def __post_init__(self) -> None:
        # JSON has no infinity: an infinite end was written as null.
        low, high = self.interval
        object.__setattr__(self, "interval", (-np.inf if low is None else low, np.inf if high is None else high))

    @property
    def shown(self) -> int:
        """1 if the first is shown to be better, -1 if the second is, 0 if there is no evidence of a difference.

        The interval and the test have to agree: with few disagreements the interval is too narrow, while the test is exact.
        """
        if self.p_value >= LEVEL or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.interval[0] > 0 else -1

    @property
    def points(self) -> str:
        """The difference of two shares in points, with its interval."""
        low, high = self.interval
        return f"{100 * self.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"

    @property
    def verdict(self) -> str:
        """Whether the first is worth having, in words."""
        return {1: "it helps", 0: "that it helps is not shown", -1: "it does harm"}[self.shown]


@dataclass(frozen=True)
class Difference:
    """How far one row is behind the best one.

    `difference`, `interval` (simultaneous over all pairs of rows) and `p_value` (adjusted) are for the out-of-fold score,
    best minus row, higher being better; `test` is the same on the test images (`paired_answers`, Holm), `folds` on the fold
    scores (corrected t, Holm). Parts without data are None.
    """

    key: str
    difference: float
    interval: Interval
    p_value: float
    no_evidence: bool
    test: Paired | None = None
    folds: Paired | None = None


def mcnemar(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> float:
    """Return the exact two-sided McNemar p-value for two heads on the same images, bool of shape (n,) each."""
    only_a, only_b = _discordant(correct_a, correct_b)
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_answers(metric: Metric, a: Predictions, b: Predictions, seed: int) -> Paired:
    """Compare two heads on the same images in any metric: difference, 95 % interval, p-value.

    For accuracy: the score interval of a paired difference, and McNemar's exact test where images are independent. For other
    metrics and for groups: a bootstrap and `exchange_test`.
    """
    difference, p_value = metric.score(a) - metric.score(b), paired_p(metric, a, b, seed)
    if metric is ACCURACY:
        return Paired(difference, paired_interval(a, b, critical(a.units)), p_value)
    low, high = bootstrap_difference(metric, a, b, seed)
    least = least_half_width(metric, a, b, critical(a.units))
    return Paired(difference, (min(low, difference - least), max(high, difference + least)), p_value)


def paired_p(metric: Metric, a: Predictions, b: Predictions, seed: int) -> float:
    """Return the p-value of two heads being equally good, valid for few disagreements too."""
    if metric is ACCURACY and a.units is None:
        return mcnemar(a.correct, b.correct)
    return exchange_test(metric, a, b, seed)


def paired_interval(a: Predictions, b: Predictions, z: float) -> Interval:
    """Return the score interval of accuracy(a) - accuracy(b) at the effective sample size."""
    only_a, only_b = _discordant(a.correct, b.correct)
    n = len(a)
    worth = effective_size(a.correct.astype(np.float64) - b.correct, a.units) / n
    return tango(only_a * worth, only_b * worth, n * worth, z)


def least_half_width(metric: Metric, a: Predictions, b: Predictions, z: float) -> float:
    """Return the smallest half width of the interval of a difference, that of two heads which agree on every image.

    The score interval of a paired difference then allows disagreement on a share z^2 / (m + z^2) of m units. A mean over classes
    combines the shares of its classes. For an unbounded loss a unit counts as the range of the contributions of the images, and for
    a metric of numbers, on which heads hardly ever agree, as the range of their differences.
    """
    units = a.unit_numbers
    if metric.per_class:
        return agreed([units[part] for part in a.members], z)
    m = int(units.max()) + 1
    if metric.bounded:
        span = metric.high - metric.low
    else:
        other = metric.contributions(b) if metric.needs == "values" else 0.0
        span = float(np.ptp(metric.contributions(a) - other))
    return span * z * z / (m + z * z)


def bootstrap_difference(
    metric: Metric, a: Predictions, b: Predictions, seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Return the 95 % bootstrap interval of score(a) - score(b), units drawn with replacement, in any metric.

    The expanded percentile interval of Hesterberg 2015 corrects for the bootstrap's too small variance with few units; for a mean
    over classes the units of the rarest class count.
    """
    draws, units = bootstrap(metric, [a, b], seed, resamples), a.unit_numbers
    parts = [units[part] for part in a.members] if metric.per_class else [units]
    m = max(2, min(len(np.unique(part)) for part in parts))
    tail = float(stats.norm.cdf(-np.sqrt(m / (m - 1)) * stats.t.ppf(0.975, m - 1)))
    low, high = np.quantile(draws[:, 0] - draws[:, 1], [tail, 1 - tail])
    return (float(low), float(high))


def exchange_test(metric: Metric, a: Predictions, b: Predictions, seed: int, draws: int = RESAMPLES) -> float:
    """Return the two-sided p-value of a paired randomisation test, which swaps each unit's two predictions at random.

    It generalises McNemar's exact test to any metric and to groups, and is valid for few of them too.
    Sources: Noreen 1989; Yeh 2000.
    """
    units, rng = a.unit_numbers, np.random.default_rng(seed)
    draws = metric.draws(draws)
    m, gap = int(units.max()) + 1, _gap_of(metric, a, b, units)
    observed, beyond = abs(gap(np.ones((1, m), dtype=np.int64))[0]), 0
    for part in np.array_split(np.arange(draws), max(1, draws * m // _COINS)):
        beyond += int(np.sum(np.abs(gap(rng.integers(0, 2, (len(part), m)))) >= observed - 1e-12))
    return (1 + beyond) / (1 + draws)


def _gap_of(
    metric: Metric, a: Predictions, b: Predictions, units: NDArray[np.int64]
) -> Callable[[NDArray[np.int64]], NDArray[np.float64]]:
    """Return a function from coins of shape (r, n_units), 0 where a unit's predictions are swapped, to score(a) - score(b)."""
    both, n = joined([a, b]), len(units)
    if metric.shares is None:
        scored = rescored(metric, [replace(both, units=np.concatenate([units, units + units.max() + 1]))])

        def gap(coins: NDArray[np.int64]) -> NDArray[np.float64]:
            stay, change = np.concatenate([coins, 1 - coins], axis=1), np.concatenate([1 - coins, coins], axis=1)
            return (scored(stay) - scored(change))[:, 0]

        return gap
    shares = metric.shares(both)
    first, second = unit_sums(shares[:n], units), unit_sums(shares[n:], units)
    moves = first - second
    differ = np.flatnonzero(abs(moves).sum(axis=1))
    moves, first, second = moves[differ], first.sum(axis=0), second.sum(axis=0)

    def fast(coins: NDArray[np.int64]) -> NDArray[np.float64]:
        moved = (1 - coins[:, differ]) @ moves
        return mean_share(first - moved) - mean_share(second + moved)

    return fast


def corrected_t(scores_a: Sequence[float], scores_b: Sequence[float], test_share: float) -> Paired:
    """Compare two heads on the same folds by the corrected resampled t-test.

    The variance over folds is multiplied by 1/k + n_test/n_train, because the folds share training images; the naive
    1/k gives false positives. test_share : n_test / n_train, 0.25 for five folds.
    """
    differences = np.asarray(scores_a, dtype=np.float64) - np.asarray(scores_b, dtype=np.float64)
    k, mean = len(differences), float(np.mean(differences))
    if k < 2:
        return Paired(mean, (-np.inf, np.inf), 1.0)
    error = float(np.sqrt((1 / k + test_share) * np.var(differences, ddof=1)))
    half = float(stats.t.ppf(0.975, k - 1)) * error
    if error == 0.0:
        return Paired(mean, (mean, mean), 1.0 if mean == 0.0 else 0.0)
    return Paired(mean, (mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / error, k - 1)))


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Return Holm's adjusted p-values, which control the family-wise error rate.

    p_values : of length k; returns float64 of shape (k,)
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order]))
    adjusted = np.empty_like(p)
    adjusted[order] = steps
    return adjusted


def shared_training(folds: int, metric: Metric) -> float:
    """Return the factor by which the variance of an out-of-fold score is inflated, because folds share training images.

    1 + 2 / (folds - 1) kept false winners under permuted labels below 5 % where 1 gave up to 10 %; Nadeau and Bengio's own
    1 + folds / (folds - 1) gave 0.5 %. A mean over classes varies more than first-order contributions show: with 3 in place of 2,
    false winners with one image in seven of the rarest class stayed below 4.1 %, where 2 gave up to 7.8 %. Ranks of numbers also
    depend on offsets between folds: with 4 false winners were 2.5 %, with 2 they were 7 %. Metrics pooled over several labels
    depend on a fold's one threshold: with 3 false winners were 4.5 %, with 2 they were 8 %.
    """
    return 1 + (4 if metric.ranks else 3 if metric.per_class or metric.pooled else 2) / max(folds - 1, 1)


def _against_best(
    values: NDArray[np.float64], best: int, inflation: float, freedom: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """Compare column `best` with the others by the contributions of m units to k scores, shape (m, k).

    Returns differences (best minus column), their standard errors (infinite where two columns are equal) and p-values, all of
    shape (k,), and the interval's half width in standard errors. The best was picked on the same rows, so the reference distribution
    is that of the largest studentised difference over all k (k - 1) / 2 pairs. It is drawn from a multivariate t distribution with
    the columns' own covariance, because correlated heads need little correction, and `freedom` degrees of freedom.
    """
    m, k = values.shape
    scores = values.mean(axis=0)
    covariance = np.atleast_2d(np.cov(values, rowvar=False, ddof=1)) / m * inflation
    variances = np.diag(covariance)[:, None] + np.diag(covariance)[None, :] - 2 * covariance
    errors = np.sqrt(np.where(variances > 1e-12 / m, variances, np.inf))
    rng = np.random.default_rng(seed)
    drift = rng.multivariate_normal(np.zeros(k), covariance, size=DRAWS, check_valid="ignore")
    drift /= np.sqrt(rng.chisquare(freedom, DRAWS) / freedom)[:, None]
    one, other = np.triu_indices(k, 1)
    parts = [np.abs(part[:, one] - part[:, other]) / errors[one, other] for part in np.array_split(drift, 20)]
    largest = np.concatenate([part.max(axis=1, initial=0.0) for part in parts])
    differences = scores[best] - scores
    p_values = (1 + np.sum(largest[:, None] >= differences / errors[best], axis=0)) / (1 + DRAWS)
    # Where all rows agree all differences are 0, and the factor is that of a single comparison.
    factor = max(float(np.quantile(largest, 1 - LEVEL)), float(stats.t.ppf(0.975, freedom)))
    return differences, errors[best], np.where(np.arange(k) == best, 1.0, p_values), factor


def compare(
    out_of_fold: Mapping[str, Predictions],
    best: str,
    test: Mapping[str, Predictions] | None = None,
    folds: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    metric: Metric = ACCURACY,
) -> tuple[Difference, ...]:
    """Compare every row with the best one, in the order of `out_of_fold`.

    out_of_fold, test : key -> predictions of the same images in the same order with the same units for every key. folds : key
    -> fold scores. A row leaves the no-evidence group only when both the adjusted test and the paired one (`paired_p`, which is
    valid for few disagreements) show that it is worse. Intervals are clipped to the metric's range.
    """
    keys, winner, test, folds = list(out_of_fold), out_of_fold[best], test or {}, folds or {}
    values = np.stack([metric.contributions(out_of_fold[key]) for key in keys], axis=1)
    k = len(folds[best]) if best in folds else 5
    inflation = shared_training(k, metric)
    spare = len(values) - 1 if winner.units is None else freedom(winner.units)
    differences, errors, p_values, factor = _against_best(values, keys.index(best), inflation, spare, seed)
    others, wide = [key for key in keys if key != best], factor * float(np.sqrt(inflation))
    on_test, on_folds, rows = dict[str, Paired](), dict[str, Paired](), []
    for key in others:
        if best in test and key in test:
            on_test[key] = paired_answers(metric, test[best], test[key], seed)
        if best in folds and len(folds.get(key, ())) == k > 1:
            by_fold = corrected_t(folds[best], folds[key], 1 / (k - 1))
            on_folds[key] = replace(by_fold, interval=metric.clipped_difference(by_fold.interval))
    on_test, on_folds = _adjusted(on_test), _adjusted(on_folds)
    for column, key in enumerate(keys):
        row, difference, p_value = out_of_fold[key], float(differences[column]), float(p_values[column])
        if key == best:
            interval = (0.0, 0.0)
        elif metric is ACCURACY:
            interval = paired_interval(winner, row, wide)
        else:
            drawn = factor * float(errors[column]) if np.isfinite(errors[column]) else 0.0
            half = max(drawn, least_half_width(metric, winner, row, wide))
            interval = metric.clipped_difference((difference - half, difference + half))
        same = p_value >= LEVEL or paired_p(metric, winner, row, seed) >= LEVEL
        rows.append(Difference(key, difference, interval, p_value, same, on_test.get(key), on_folds.get(key)))
    return tuple(rows)


def _adjusted(found: Mapping[str, Paired]) -> dict[str, Paired]:
    adjusted = holm([paired.p_value for paired in found.values()]).tolist()
    return {key: replace(found[key], p_value=p) for key, p in zip(found, adjusted, strict=True)}


def _discordant(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[int, int]:
    return int(np.sum(a & ~b)), int(np.sum(b & ~a))


@dataclass(frozen=True)
class Ranking:
    """Heads over several data sets: average ranks (1 is best), Friedman's p-value, Nemenyi's critical difference.

    `groups` holds the maximal sets of heads (column numbers) whose average ranks lie within the critical difference.
    """

    average_ranks: tuple[float, ...]
    p_value: float
    critical_difference: float
    groups: tuple[tuple[int, ...], ...]


def rank_over_datasets(scores: NDArray[np.float64]) -> Ranking:
    """Rank heads over several data sets.

    scores : ndarray of shape (n_datasets, n_heads), float64, higher is better

    Friedman's test with the correction of Iman and Davenport; Nemenyi's critical difference at 5 %. Source: Demsar 2006.
    """
    n, k = scores.shape
    if n < 2 or k < 2:
        raise ValueError(f"ranking needs at least 2 data sets and 2 heads, got {n} and {k}")
    ranks = stats.rankdata(-scores, axis=1).mean(axis=0)
    chi2 = 12 * n / (k * (k + 1)) * float(np.sum((ranks - (k + 1) / 2) ** 2))
    spare = n * (k - 1) - chi2
    p_value = 0.0 if spare <= 0 else float(stats.f.sf((n - 1) * chi2 / spare, k - 1, (k - 1) * (n - 1)))
    critical = float(stats.studentized_range.ppf(1 - LEVEL, k, np.inf) / np.sqrt(2) * np.sqrt(k * (k + 1) / (6 * n)))
    order = np.argsort(ranks, kind="stable")
    groups: list[tuple[int, ...]] = []
    for start in range(k):
        members = tuple(int(i) for i in order[start:] if ranks[i] - ranks[order[start]] <= critical)
        if len(members) > 1 and not any(set(members) <= set(group) for group in groups):
            groups.append(members)
    return Ranking(tuple(float(rank) for rank in ranks), p_value, critical, tuple(groups))


@dataclass(frozen=True)
class Optimism:
    """The selected candidate's `apparent` score, and its score `corrected` for selection with a 95 % interval.

    Both are in the metric of the selection, higher being better.
    """

    candidates: int
    apparent: float
    corrected: float
    interval: Interval

    @property
    def bias(self) -> float:
        """Apparent minus corrected."""
        return self.apparent - self.corrected


def selection_optimism(
    columns: Sequence[Predictions], seed: int, resamples: int = 1000, metric: Metric = ACCURACY
) -> Optimism:
    """Estimate the optimism of selecting the head with the highest score, from out-of-fold predictions of the same images.

    Each bootstrap sample of the units selects its own best head and scores it on the units it did not draw.
    """
    weighted, scores = rescored(metric, columns), list[float]()
    for counts in drawn(int(columns[0].unit_numbers.max()) + 1, seed, metric.draws(resamples)):
        left_out = (counts == 0).astype(np.int64)
        picked = np.argmax(weighted(counts), axis=1)
        judged = weighted(left_out)[np.arange(len(counts)), picked]
        scores += judged[left_out.any(axis=1)].tolist()
    low, high = np.quantile(scores, [0.025, 0.975])
    apparent = max(metric.score(column) for column in columns)
    return Optimism(len(columns), apparent, float(np.mean(scores)), (float(low), float(high)))


def trial_optimism(fold_scores: NDArray[np.float64]) -> float:
    """Estimate the optimism of the best trial's mean score from fold scores, float64 of shape (n_trials, n_folds).

    It is the mean over folds of (the fold's own best score - the winner's score on that fold).
    """
    winner = int(np.argmax(fold_scores.mean(axis=1)))
    return float(np.mean(fold_scores.max(axis=0) - fold_scores[winner]))
