"""Is one head better than another? Paired tests, corrected for many comparisons and for having picked the best.

Every test is paired: two heads are compared on the same images or the same folds. The group of rows with no evidence of a
difference from the best comes from pooled out-of-fold predictions, because it is used to choose; the test images only
confirm. All of it is in the metric that was tuned. Sources: McNemar 1947 (exact form); Noreen 1989 and Yeh 2000 (the same by
exchanging answers, for any metric); Dietterich 1998; Nadeau and Bengio 2003; Holm 1979; Hothorn, Bretz and Westfall 2008
(the largest studentised difference); Demsar 2006 (several data sets).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipeline.metrics.intervals import Interval
from pipeline.metrics.metric import ACCURACY, Answers, Metric, Together

LEVEL = 0.05
RESAMPLES = 2000
DRAWS = 4000


@dataclass(frozen=True)
class Paired:
    """A paired difference (first minus second), its 95 % interval and p-value."""

    difference: float
    interval: Interval
    p_value: float


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
    """Return the exact two-sided McNemar p-value for two heads on the same images, shape (n,) each."""
    only_a, only_b = _discordant(correct_a, correct_b)
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_bootstrap(
    correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], seed: int, resamples: int = RESAMPLES
) -> Interval:
    """Return the 95 % percentile interval of accuracy(a) - accuracy(b), images drawn with replacement."""
    n, (only_a, only_b) = len(correct_a), _discordant(correct_a, correct_b)
    shares = [only_a / n, only_b / n, (n - only_a - only_b) / n]
    draws = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return (float(low), float(high))


def paired_test(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], seed: int) -> Paired:
    """Compare two heads on the same images: difference in accuracy, bootstrap interval, exact McNemar p-value."""
    difference = float(np.mean(correct_a) - np.mean(correct_b))
    return Paired(difference, paired_bootstrap(correct_a, correct_b, seed), mcnemar(correct_a, correct_b))


def paired_answers(metric: Metric, a: Answers, b: Answers, seed: int) -> Paired:
    """Compare two heads on the same images in any metric: difference, paired bootstrap interval, p-value.

    The p-value is McNemar's exact one for accuracy, and that of `exchange_test` for other metrics.
    """
    if metric is ACCURACY:
        return paired_test(a.correct, b.correct, seed)
    difference = metric.score(a) - metric.score(b)
    return Paired(difference, bootstrap_difference(metric, a, b, seed), _paired_p(metric, a, b, seed))


def bootstrap_difference(metric: Metric, a: Answers, b: Answers, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Return the 95 % bootstrap interval of score(a) - score(b), images drawn with replacement, in any metric.

    The expanded percentile interval of Hesterberg 2015: drawn shares vary less than shares of few images do, by the number
    of images of the rarest class where the score is a mean over classes.
    """
    both = Together(metric, (a, b))
    draws = np.concatenate([both.weighted(counts) for counts in both.resamples(seed, resamples)])
    images = np.bincount(a.truth)
    m = max(2, int(images[images > 0].min() if metric.per_class else len(a.truth)))
    tail = float(stats.norm.cdf(-np.sqrt(m / (m - 1)) * stats.t.ppf(0.975, m - 1)))
    low, high = np.quantile(draws[:, 0] - draws[:, 1], [tail, 1 - tail])
    return (float(low), float(high))


def exchange_test(metric: Metric, a: Answers, b: Answers, seed: int, draws: int = RESAMPLES) -> float:
    """Return the two-sided p-value of a paired randomisation test: each image's two answers change sides by a coin.

    What McNemar's exact test is for accuracy, for any metric, and as it is right for few images too. Sources: Noreen 1989;
    Yeh 2000.
    """
    observed, rng = abs(metric.score(a) - metric.score(b)), np.random.default_rng(seed)
    exchanged = _exchanged_shares if metric.per_class else _exchanged_means
    beyond = sum(int(np.sum(np.abs(part) >= observed - 1e-12)) for part in exchanged(metric, a, b, rng, draws))
    return (1 + beyond) / (1 + draws)


_CELLS = 1 << 20
"""Coins that are held at once."""


def _exchanged_means(
    metric: Metric, a: Answers, b: Answers, rng: np.random.Generator, draws: int
) -> Iterator[NDArray[np.float64]]:
    """Yield differences of the two scores after coins: each image's own difference changes its sign."""
    gaps = (metric.shares(a).contributions() - metric.shares(b).contributions()) / len(a.truth)
    gaps = gaps[gaps != 0]
    bytes_each = -(-len(gaps) // 8)
    for part in np.array_split(np.arange(draws), max(1, draws * len(gaps) // _CELLS)):
        coins = rng.integers(0, 256, (len(part), bytes_each), dtype=np.uint8)
        yield 2 * (np.unpackbits(coins, axis=1, count=len(gaps)) @ gaps) - gaps.sum()


def _exchanged_shares(
    metric: Metric, a: Answers, b: Answers, rng: np.random.Generator, draws: int
) -> Iterator[NDArray[np.float64]]:
    """Yield the same for a mean over classes; images with the same answers change sides by so many coins at once."""
    _, first, counts = np.unique(
        np.stack([a.truth, a.guess, b.guess], axis=1), axis=0, return_index=True, return_counts=True
    )
    a, b = a.rows(first), b.rows(first)
    both = Together(metric, (Answers(np.concatenate([a.truth, b.truth]), np.concatenate([a.guess, b.guess])),))
    for part in np.array_split(np.arange(draws), max(1, draws * len(counts) // _CELLS)):
        stay = rng.binomial(counts, 0.5, (len(part), len(counts)))
        left, right = np.concatenate([stay, counts - stay], axis=1), np.concatenate([counts - stay, stay], axis=1)
        yield (both.weighted(left) - both.weighted(right))[:, 0]


def corrected_t(scores_a: Sequence[float], scores_b: Sequence[float], test_share: float) -> Paired:
    """Compare two heads on the same folds by the corrected resampled t-test.

    The variance over folds is multiplied by 1/k + n_test/n_train, because the folds share training images; the naive
    1/k finds differences that are not there. test_share : n_test / n_train, 0.25 for five folds.
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
    """Return Holm's adjusted p-values: the chance of any false finding among them stays at the level."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(np.minimum(1.0, (len(p) - np.arange(len(p))) * p[order]))
    adjusted = np.empty_like(p)
    adjusted[order] = steps
    return adjusted


@dataclass(frozen=True)
class _Simultaneous:
    """Differences of the best column to every other, adjusted for all pairs at once."""

    differences: NDArray[np.float64]
    half_widths: NDArray[np.float64]
    p_values: NDArray[np.float64]


def _against_best(
    values: NDArray[np.float64], best: int, folds: int, seed: int, per_class: bool = False
) -> _Simultaneous:
    """Compare column `best` with the others by what each image adds to every row's score, shape (n, k).

    The best was picked on the same rows, so the reference is the largest studentised difference over all k (k - 1) / 2
    pairs (drawn from the normal law with the columns' own covariance, as correlated heads cost little): whichever column
    had won, the error rate holds. Out-of-fold rows share training images, which the variance between rows does not see:
    it is multiplied by 1 + 2 / (folds - 1), the factor that kept false winners under permuted labels below 5 % where 1
    gave up to 10 %; Nadeau and Bengio's own 1 + folds / (folds - 1) gave 0.5 %. A score that is a mean over classes varies
    more than its contributions say to first order: 1 + 3 / (folds - 1) kept false winners with one image in seven of the
    rarest class below 4.1 %, where 2 in place of 3 gave up to 7.8 %.
    """
    n, k = values.shape
    scores = values.mean(axis=0)
    covariance = np.atleast_2d(np.cov(values, rowvar=False, ddof=1)) / n
    covariance *= 1 + (3 if per_class else 2) / max(folds - 1, 1)
    variances = np.diag(covariance)[:, None] + np.diag(covariance)[None, :] - 2 * covariance
    errors = np.sqrt(np.where(variances > 1e-12 / n, variances, np.inf))
    rng = np.random.default_rng(seed)
    drift = rng.multivariate_normal(np.zeros(k), covariance, size=DRAWS, check_valid="ignore")
    parts = [np.abs(part[:, :, None] - part[:, None, :]) / errors for part in np.array_split(drift, 20)]
    largest = np.concatenate([part.reshape(len(part), -1).max(axis=1) for part in parts])
    differences = scores[best] - scores
    p_values = (1 + np.sum(largest[:, None] >= differences / errors[best], axis=0)) / (1 + DRAWS)
    half = np.quantile(largest, 1 - LEVEL) * np.where(np.isfinite(errors[best]), errors[best], 0.0)
    return _Simultaneous(differences, half, np.where(np.arange(k) == best, 1.0, p_values))


def compare(
    out_of_fold: Mapping[str, Answers],
    best: str,
    test: Mapping[str, Answers] | None = None,
    folds: Mapping[str, Sequence[float]] | None = None,
    seed: int = 0,
    metric: Metric = ACCURACY,
) -> tuple[Difference, ...]:
    """Compare every row with the best one, in the order of `out_of_fold`.

    out_of_fold, test : key -> its answers to the same images in the same order for every key. folds : key -> fold scores.
    A row leaves the no-evidence group only when the adjusted test and the paired one (exact McNemar for accuracy, else
    `exchange_test`; it guards small numbers of disagreements) both say that it is worse. Intervals end where the metric
    does: no difference of two accuracies is above 1.
    """
    keys = list(out_of_fold)
    values = np.stack([metric.shares(out_of_fold[key]).contributions() for key in keys], axis=1)
    k = len(folds[best]) if folds and best in folds else 5
    joint = _against_best(values, keys.index(best), k, seed, metric.per_class)
    on_test = (
        _adjusted(
            {key: paired_answers(metric, test[best], test[key], seed) for key in keys if key != best and key in test}
        )
        if test and best in test
        else {}
    )
    on_folds = {}
    if folds and best in folds:
        on_folds = _adjusted(
            {
                key: corrected_t(folds[best], folds[key], 1 / (k - 1))
                for key in keys
                if key != best and len(folds.get(key, ())) == k > 1
            }
        )
    rows = []
    for column, key in enumerate(keys):
        difference, half = float(joint.differences[column]), float(joint.half_widths[column])
        p_value = float(joint.p_values[column])
        worse = p_value < LEVEL and _paired_p(metric, out_of_fold[best], out_of_fold[key], seed) < LEVEL
        rows.append(
            Difference(
                key,
                difference,
                metric.clipped_difference((difference - half, difference + half)),
                p_value,
                not worse,
                on_test.get(key),
                _within(metric, on_folds.get(key)),
            )
        )
    return tuple(rows)


def _paired_p(metric: Metric, a: Answers, b: Answers, seed: int) -> float:
    return mcnemar(a.correct, b.correct) if metric is ACCURACY else exchange_test(metric, a, b, seed)


def _within(metric: Metric, paired: Paired | None) -> Paired | None:
    if paired is None:
        return None
    return Paired(paired.difference, metric.clipped_difference(paired.interval), paired.p_value)


def _adjusted(found: Mapping[str, Paired]) -> dict[str, Paired]:
    adjusted = holm([paired.p_value for paired in found.values()])
    return {
        key: Paired(paired.difference, paired.interval, float(p))
        for (key, paired), p in zip(found.items(), adjusted, strict=True)
    }


def _discordant(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> tuple[int, int]:
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or not len(a):
        raise ValueError(f"a paired comparison needs the same images twice, got {a.shape} and {b.shape}")
    return int(np.sum(a & ~b)), int(np.sum(b & ~a))


@dataclass(frozen=True)
class Ranking:
    """Heads over several data sets: average ranks (1 is best), Friedman's p-value, Nemenyi's critical difference.

    `groups` holds, as column numbers, the largest sets of heads whose average ranks lie within the critical difference.
    """

    average_ranks: tuple[float, ...]
    p_value: float
    critical_difference: float
    groups: tuple[tuple[int, ...], ...]


def rank_over_datasets(scores: NDArray[np.float64]) -> Ranking:
    """Rank heads over several data sets; scores : ndarray of shape (n_datasets, n_heads), higher is better.

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
