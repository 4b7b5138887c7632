"""Scores, intervals and comparisons: the numbers are right, and the statistics keep their promises in simulations."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, f, friedmanchisquare, spearmanr
from sklearn.metrics import (
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    log_loss,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
    top_k_accuracy_score,
)
from sklearn.svm import SVC
from sklearn.utils.multiclass import _ovr_decision_function
from statistics_cases import (
    CHEAP_HEADS,
    coverage,
    false_winners,
    false_winners_of_permuted_groups,
    folds_of,
    in_groups,
    out_of_fold,
    true_scores,
)

from pipeline import evaluation as metrics
from pipeline.data import classes
from pipeline.errors import BundleError
from pipeline.evaluation import (
    METRICS,
    HeadPredictions,
    Metric,
    Predictions,
    calibration,
    comparison,
    intervals,
    learning_curve,
)
from pipeline.evaluation.calibration import margins
from pipeline.evaluation.intervals import effective_size
from pipeline.evaluation.leaderboard.recommendation import margin
from pipeline.evaluation.metric import rescored

CLASSES = ("ant", "bee", "cat")


def labelled(n: int = 153, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = rng.choice(CLASSES, n, p=(0.6, 0.3, 0.1))
    guess = np.where(rng.random(n) < 0.8, y, "ant")
    return y, guess, rng.dirichlet([1, 1, 1], n)


# Scores


def test_scores_equal_scikit_learn():
    y, guess, probabilities = labelled()
    found = metrics.scores(Predictions.of(y, guess, CLASSES, probabilities=probabilities))
    assert found.accuracy == np.mean(y == guess)
    assert found.correct == np.sum(y == guess)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, guess))
    assert found["macro_f1"] == pytest.approx(f1_score(y, guess, average="macro"))
    assert found["log_loss"] == pytest.approx(log_loss(y, probabilities, labels=list(CLASSES)))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_macro_scores_equal_scikit_learn_when_classes_are_missing(data):
    n = data.draw(st.integers(1, 30))
    labels = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=n, max_size=n)
    y, guess = np.array(data.draw(labels)), np.array(data.draw(labels))
    found = metrics.scores(Predictions.of(y, guess, ["a", "b", "c", "d"]))
    recalls = [np.mean(guess[y == label] == label) for label in np.unique(y)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(f1_score(y, guess, average="macro", zero_division=0))
    assert found.intervals["balanced_accuracy"][0] <= found.intervals["balanced_accuracy"][1]


def test_scores_do_not_depend_on_the_order_of_images():
    y, guess, probabilities = labelled()
    order = np.random.default_rng(1).permutation(len(y))
    first = metrics.scores(Predictions.of(y, guess, CLASSES))
    assert metrics.scores(Predictions.of(y[order], guess[order], CLASSES)) == first
    shuffled = metrics.scores(Predictions.of(y[order], guess[order], CLASSES, probabilities=probabilities[order]))
    assert shuffled["log_loss"] == pytest.approx(
        metrics.scores(Predictions.of(y, guess, CLASSES, probabilities=probabilities))["log_loss"]
    )


def test_a_sure_mistake_has_a_finite_log_loss():
    found = metrics.scores(Predictions(np.array([0, 1]), np.array([0, 0]), np.array([[1.0, 0.0], [1.0, 0.0]])))
    assert found["log_loss"] == pytest.approx(-np.log(1e-15) / 2)


def test_scores_need_a_guess_for_every_truth():
    with pytest.raises(ValueError, match=r"one row per image in every part, got \{'y_true': 3, 'y_pred': 2\}"):
        Predictions.of(["a"] * 3, ["a"] * 2, ["a"])
    with pytest.raises(ValueError, match="a label is none of the classes a, b"):
        Predictions.of(["a"], ["c"], ["a", "b"])


def test_confusion_matrix_and_class_table_hold_the_same_counts():
    y, guess, _ = labelled()
    said = Predictions.of(y, guess, CLASSES)
    matrix, table = metrics.confusion_matrix(said), metrics.per_class(said)
    assert matrix.sum() == len(y)
    assert [row.support for row in table] == matrix.sum(axis=1).tolist()
    assert [row.predicted for row in table] == matrix.sum(axis=0).tolist()
    assert [row.recall for row in table] == pytest.approx((np.diag(matrix) / matrix.sum(axis=1)).tolist())
    assert np.mean([row.f1 for row in table]) == pytest.approx(f1_score(y, guess, average="macro"))


# Intervals


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (1, 1), (145, 153), (500, 1000)])
def test_wilson_equals_scipy(correct, n):
    expected = binomtest(correct, n).proportion_ci(method="wilson")
    assert metrics.wilson(correct, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_says_nothing():
    assert metrics.wilson(0, 0) == (0.0, 1.0)


def covered(intervals, truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_wilson_covers_the_truth():
    rng = np.random.default_rng(0)
    shares = rng.uniform(0.6, 0.97, 4000)
    hits = rng.binomial(300, shares)
    inside = [
        low <= share <= high
        for share, (low, high) in zip(shares, (metrics.wilson(int(h), 300) for h in hits), strict=True)
    ]
    assert 0.93 <= np.mean(inside) <= 0.97


def test_intervals_of_every_score_cover_the_truth():
    """Three classes with recalls 0.9, 0.8, 0.7 and fixed confusions: the true scores are those of a million images."""
    priors, confusion = np.array([0.5, 0.3, 0.2]), np.array([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]])
    cells = (priors[:, None] * confusion).ravel()
    joint = cells.reshape(3, 3)
    true_f1 = np.mean(2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1)))
    rng = np.random.default_rng(1)
    found = []
    for run in range(400):
        drawn = rng.choice(9, 400, p=cells)
        found.append(metrics.scores(Predictions(drawn // 3, drawn % 3), seed=run))
    assert 0.93 <= covered([s.interval for s in found], float(np.trace(joint))) <= 0.97
    assert 0.93 <= covered([s.intervals["balanced_accuracy"] for s in found], 0.8) <= 0.97
    assert 0.92 <= covered([s.intervals["macro_f1"] for s in found], float(true_f1)) <= 0.97


@pytest.mark.parametrize(
    ("n", "groups", "effect"), [(400, None, 0.0), (150, None, 0.0), (480, 24, 0.7), (240, 12, 0.5)]
)
def test_intervals_cover_the_truth_with_groups_and_rare_classes(n, groups, effect):
    """100 runs: three standard errors below 95 %; tests/proofs has 600. Of a paired difference few disagreements make more."""
    assert min(coverage(100, n, groups, effect).values()) >= 0.88


def test_wilson_of_images_would_not_cover_where_groups_answer_alike():
    truth, inside = true_scores()["accuracy"], []
    for run in range(100):
        (head,) = in_groups(np.random.default_rng(run), 480, 24, 1.0)
        inside.append(intervals.share_interval(head.correct, None))
    assert covered(inside, truth) < 0.8


def test_images_are_worth_less_the_more_their_groups_agree():
    units = np.repeat(np.arange(50), 4)
    alike, mixed = np.repeat(np.arange(50) % 5 > 0, 4).astype(float), (np.arange(200) % 5 > 0).astype(float)
    assert effective_size(alike, units) == pytest.approx(50)
    assert effective_size(mixed, units) == 200
    assert effective_size(np.ones(200), units) == 50  # nothing tells how alike they are
    assert effective_size(mixed, None) == 200


def test_what_groups_add_is_the_sum_of_what_their_images_add():
    """Against groups that are drawn anew: the standard error of the score is that over many samples."""
    metric, found, errors = METRICS["macro_f1"], [], []
    for run in range(200):
        (head,) = in_groups(np.random.default_rng(run), 300, 30, 0.7)
        added = metric.contributions(head)
        assert added.mean() == pytest.approx(metric.score(head))
        assert len(added) <= 30
        found.append(metric.score(head))
        errors.append(added.std(ddof=1) / np.sqrt(len(added)))
    assert np.mean(errors) == pytest.approx(np.std(found), rel=0.15)


@pytest.mark.parametrize("z", [1.96, 2.8])
@pytest.mark.parametrize(
    ("only_a", "only_b", "n"), [(12, 2, 50), (5, 0, 100), (0, 1, 44), (3, 3, 12), (7.5, 1.25, 30.5)]
)
def test_tangos_interval_ends_where_the_score_statistic_says(only_a, only_b, n, z):
    """By definition, and with the likelihood maximised by search: Tango 1998."""
    for end in intervals.tango(only_a, only_b, n, z):

        def surprise(p_b: float, end: float = end) -> float:
            p = np.array([p_b + end, p_b, 1 - 2 * p_b - end])
            return -float(np.sum(np.array([only_a, only_b, n - only_a - only_b]) * np.log(np.maximum(p, 1e-300))))

        found = minimize_scalar(
            surprise, bounds=(max(0, -end), (1 - end) / 2), method="bounded", options={"xatol": 1e-10}
        )
        variance = (2 * found.x + end - end**2) / n
        assert abs((only_a - only_b) / n - end) == pytest.approx(z * np.sqrt(variance), rel=1e-3)


@pytest.mark.parametrize("n", [10, 20, 40])
@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "macro_f1", "log_loss"])
def test_rows_that_agree_on_all_images_are_not_shown_to_be_equal_by_few(name, n):
    """Of ten images nothing can be said to 28 points, of forty to 9; a head five points worse often agrees on all of them."""
    rng = np.random.default_rng(0)
    y, p = np.arange(n) % 2, rng.uniform(0.1, 0.9, n)
    answers = Predictions(y, np.where(np.arange(n) % 7 == 0, 1 - y, y), np.stack([p, 1 - p], axis=1))
    metric, alone = METRICS[name], 3.8415 / (n + 3.8415)
    _, same = metrics.compare({"a": answers, "b": answers}, "a", {"a": answers, "b": answers}, metric=metric)
    assert same.no_evidence
    assert same.test is not None
    assert same.test.p_value == same.p_value == 1
    assert -same.interval[0] == pytest.approx(same.interval[1])
    assert same.interval[1] > same.test.interval[1] > 0.05
    if name == "accuracy":
        assert same.test.interval == pytest.approx((-alone, alone), abs=1e-4)


def test_a_head_five_points_worse_is_seldom_shown_to_be_within_five_points_by_few_images():
    """Where the first is right the second errs in one image of twenty, and never the other way round."""
    for n in (10, 20, 40):
        shown = 0
        for run in range(40):
            rng = np.random.default_rng(run)
            a = rng.random(n) < 0.9
            rows = {"a": said(a), "b": said(a & (rng.random(n) < 0.944))}
            shown += metrics.compare(rows, "a", seed=run)[1].interval[1] <= 0.05
        assert shown <= 2


def test_few_disagreements_are_no_evidence_whatever_their_interval_says():
    found = {
        lost: metrics.paired_answers(METRICS["accuracy"], said(right(100, (0, 100))), said(right(100, (lost, 100))), 0)
        for lost in (5, 6)
    }
    assert found[5].interval[0] > 0
    assert (found[5].shown, found[6].shown) == (0, 1)


def test_paired_interval_covers_the_true_difference_and_unpaired_thinking_is_too_wide():
    rng = np.random.default_rng(2)
    intervals = []
    for run in range(1000):
        hard = rng.random(500)
        a, b = hard < 0.85 + 0.05 * rng.standard_normal(500), hard < 0.80 + 0.05 * rng.standard_normal(500)
        intervals.append(metrics.paired_answers(METRICS["accuracy"], said(a), said(b), seed=run).interval)
    assert 0.93 <= covered(intervals, 0.05) <= 0.97
    widths = np.mean([high - low for low, high in intervals])
    unpaired = 2 * 1.96 * np.sqrt(0.85 * 0.15 / 500 + 0.8 * 0.2 / 500)
    assert widths < 0.6 * unpaired


def test_mean_interval_covers():
    rng = np.random.default_rng(3)
    assert 0.93 <= covered([intervals.mean_interval(rng.normal(0.8, 0.02, 5)) for _ in range(2000)], 0.8) <= 0.97


# Comparison


def right(n: int, *ranges: tuple[int, int]):
    correct = np.zeros(n, dtype=bool)
    for start, stop in ranges:
        correct[start:stop] = True
    return correct


def said(correct) -> Predictions:
    """Predictions that are right where they are to be."""
    return Predictions(np.zeros(len(correct), dtype=np.int64), np.where(correct, 0, 1))


def test_145_against_143_of_153_is_no_evidence():
    rows = {"a": said(right(153, (0, 145))), "b": said(right(153, (0, 140), (150, 153)))}
    assert [row.correct.sum() for row in rows.values()] == [145, 143]
    best, other = metrics.compare(rows, "a", test=rows)
    assert best.no_evidence
    assert other.no_evidence
    assert other.test is not None
    assert other.test.p_value == pytest.approx(binomtest(5, 8).pvalue)
    assert other.test.interval[0] < 0 < other.test.interval[1]
    assert other.difference == pytest.approx(2 / 153)


def test_145_against_120_of_153_is_evidence():
    rows = {"a": said(right(153, (0, 145))), "b": said(right(153, (0, 120)))}
    _, other = metrics.compare(rows, "a", test=rows)
    assert not other.no_evidence
    assert other.test is not None
    assert other.test.p_value < 1e-6
    assert other.interval[0] > 0


def test_mcnemar_counts_only_disagreements():
    assert comparison.mcnemar(right(100, (0, 90)), right(100, (0, 90))) == 1.0
    assert comparison.mcnemar(right(100, (0, 90)), right(100, (10, 100))) == 1.0
    assert comparison.mcnemar(right(20, (0, 10)), right(20)) == pytest.approx(2 * 0.5**10)


def test_corrected_t_is_wider_than_the_naive_one_by_the_published_factor():
    a, b = [0.80, 0.82, 0.79, 0.81, 0.83], [0.78, 0.81, 0.78, 0.78, 0.80]
    found = comparison.corrected_t(a, b, test_share=0.25)
    naive = intervals.mean_interval(np.array(a) - np.array(b))
    assert found.difference == pytest.approx(0.02)
    widths = (found.interval[1] - found.interval[0]) / (naive[1] - naive[0])
    assert widths == pytest.approx(np.sqrt((1 / 5 + 1 / 4) / (1 / 5)))
    assert comparison.corrected_t(a, a, 0.25).p_value == 1.0


def test_holm_by_hand():
    assert comparison.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparison.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    assert comparison.holm([]).tolist() == []


def test_identical_rows_are_never_told_apart():
    rows = {name: said(right(50, (0, 30))) for name in "abc"}
    assert all(row.no_evidence and row.difference == 0 and row.p_value == 1.0 for row in metrics.compare(rows, "b"))


def test_permuted_labels_have_a_false_winner_in_at_most_5_percent_of_200_runs():
    """Five heads, five folds, labels that mean nothing: whoever comes out first must not be called better."""
    false_on_folds, false_on_test, naive = 0, 0, 0
    for run in range(200):
        rng = np.random.default_rng(run)
        y = rng.integers(0, 3, 240)
        X = rng.normal(size=(240, 8)) + 2 * np.eye(3, 8)[y]
        y = rng.permutation(y)
        correct, scores = out_of_fold(X, y, folds_of(y, 5, run))
        best = max(scores, key=lambda name: float(np.mean(scores[name])))
        X_test, y_test = rng.normal(size=(150, 8)), rng.integers(0, 3, 150)
        test = {name: said(head(X, y, X_test) == y_test) for name, head in CHEAP_HEADS.items()}
        found = metrics.compare({name: said(row) for name, row in correct.items()}, best, test, scores, seed=run)
        false_on_folds += any(not row.no_evidence for row in found)
        false_on_test += any(row.test is not None and row.test.p_value < 0.05 for row in found)
        naive += any(comparison.mcnemar(correct[best], correct[name]) < 0.05 for name in correct)
    assert false_on_folds <= 10
    assert false_on_test <= 10
    assert naive > 20, "without the correction for picking the simulation would have no teeth"


def test_a_real_difference_is_found():
    found = 0
    for run in range(30):
        rng = np.random.default_rng(run)
        y = rng.integers(0, 3, 600)
        X = rng.normal(size=(600, 8)) + 1.5 * np.eye(3, 8)[y]
        correct, scores = out_of_fold(X, y, folds_of(y, 5, run), ("centroid", "stump"))
        rows = metrics.compare({name: said(row) for name, row in correct.items()}, "centroid", folds=scores, seed=run)
        found += not rows[1].no_evidence
    assert found >= 28


def test_comparison_is_repeatable_and_ignores_the_order_of_images():
    rng = np.random.default_rng(0)
    rows = {name: said(rng.random(300) < share) for name, share in (("a", 0.9), ("b", 0.85), ("c", 0.7))}
    order = rng.permutation(300)
    first = metrics.compare(rows, "a", seed=5)
    assert metrics.compare(rows, "a", seed=5) == first
    shuffled = metrics.compare({name: row.rows(order) for name, row in rows.items()}, "a", seed=5)
    assert [row.p_value for row in shuffled] == pytest.approx([row.p_value for row in first], abs=0.01)


# The metric that was tuned


@cache
def answers_of_heads(
    n: int, seed: int, sharpness: tuple[float, ...] = (2.0, 1.5), priors: tuple[float, ...] = (0.7, 0.22, 0.08)
) -> list[Predictions]:
    """Uneven classes; a head is right more often and surer the sharper it is. Nobody changes them."""
    rng, k = np.random.default_rng(seed), len(priors)
    y = rng.choice(k, n, p=priors)
    hard = rng.normal(size=(n, k))
    made = []
    for sharp in sharpness:
        logits = 0.8 * hard + 0.6 * rng.normal(size=(n, k)) + sharp * np.eye(k)[y]
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        made.append(Predictions(y, p.argmax(axis=1), p))
    return made


def by_scikit_learn(name: str, answers: Predictions, rows) -> float:
    y, guess = answers.y_true[rows], answers.y_pred[rows]
    if METRICS[name].needs_probabilities:
        assert answers.probabilities is not None
        p = answers.probabilities[rows]
        every = np.arange(p.shape[1])
        if name == "log_loss":
            return -float(log_loss(y, p, labels=every))
        if name == "roc_auc":
            return float(roc_auc_score(y, p, multi_class="ovr", labels=every))
        return float(top_k_accuracy_score(y, p, k=5, labels=every))
    if METRICS[name].needs == "values":
        of_numbers = {
            "mae": lambda: -mean_absolute_error(y, guess),
            "rmse": lambda: -root_mean_squared_error(y, guess),
            "r2": lambda: r2_score(y, guess),
            "spearman": lambda: spearmanr(y, guess).statistic,
        }
        return float(of_numbers[name]())
    if name == "macro_f1":
        return float(f1_score(y, guess, average="macro", zero_division=0.0))
    recalls = [np.mean(guess[y == label] == label) for label in np.unique(y)]
    return float(np.mean(recalls) if name == "balanced_accuracy" else np.mean(y == guess))


SEVEN = (0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05)
"""Shares of seven classes, so that not every class is among the five likeliest."""


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if "classification" in metric.targets])
def test_a_metric_is_the_mean_of_what_images_add_and_can_be_weighted(name):
    first, second = answers_of_heads(150, 0, priors=SEVEN)
    metric = METRICS[name]
    added = metric.contributions(first)
    assert metric.score(first) == pytest.approx(by_scikit_learn(name, first, np.arange(150)))
    assert added.mean() == pytest.approx(metric.score(first))
    drawn = np.random.default_rng(1).integers(0, 150, 150)
    weighted = rescored(metric, (first, second))(np.bincount(drawn, minlength=150)[None])
    assert weighted[0] == pytest.approx([by_scikit_learn(name, head, drawn) for head in (first, second)])


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.targets != ("multilabel",)])
def test_what_images_add_varies_as_the_score_does(name):
    """The standard error from one sample is the spread of the score over many."""
    metric = METRICS[name]
    samples = [answers_of_heads(400, seed, (2.0,), SEVEN)[0] for seed in range(300)]
    added = [metric.contributions(sample) for sample in samples[: 300 if metric.shares else 4]]
    errors = [part.std() / np.sqrt(len(part)) for part in added]
    assert np.mean(errors) == pytest.approx(np.std([metric.score(sample) for sample in samples]), rel=0.12)


@pytest.mark.parametrize("name", ["balanced_accuracy", "macro_f1", "log_loss"])
def test_paired_intervals_of_every_metric_cover_the_true_difference(name):
    metric = METRICS[name]
    many = answers_of_heads(400_000, 99)
    truth = metric.score(many[0]) - metric.score(many[1])
    inside = []
    for seed in range(400):
        low, high = comparison.bootstrap_difference(metric, *answers_of_heads(400, seed), seed, resamples=300)
        inside.append(low <= truth <= high)
    assert 0.93 <= np.mean(inside) <= 0.97


def test_a_head_that_is_five_points_worse_is_seldom_shown_to_be_as_good():
    """At 8 % of errors a row may be 4 points behind; of one that is 5 points behind that may be shown in at most 5 % of runs."""
    passed, equal = 0, 0
    for run in range(300):
        rng = np.random.default_rng(run)
        hard = rng.random(3000)
        rows = {"a": said(hard < 0.92), "b": said(hard + rng.normal(0, 0.001, 3000) < 0.87)}
        rows["c"] = said(hard + rng.normal(0, 0.001, 3000) < 0.92)
        allowed = margin(METRICS["accuracy"], 0.92, 3000)
        found = {row.key: row.interval[1] <= allowed for row in metrics.compare(rows, "a", seed=run)}
        passed, equal = passed + found["b"], equal + found["c"]
    assert passed <= 15
    assert equal == 300


def test_exchanging_answers_is_mcnemars_test_for_accuracy():
    a, b = said(right(60, (0, 50))), said(right(60, (0, 38), (57, 60)))
    exact = comparison.mcnemar(a.correct, b.correct)
    assert comparison.exchange_test(METRICS["accuracy"], a, b, seed=0, draws=5_000) == pytest.approx(exact, abs=0.006)
    assert comparison.exchange_test(METRICS["accuracy"], a, a, seed=0) == 1.0
    y, a_says, b_says = np.array([0, 0, 0, 1, 1, 1, 2]), np.array([0, 1, 0, 1, 1, 1, 2]), np.repeat(0, 7)
    for name in ("balanced_accuracy", "macro_f1"):
        coins = np.array(list(itertools.product([True, False], repeat=7)))
        first, second = (np.where(side, a_says, b_says) for side in (coins, ~coins))
        by_hand = [
            by_scikit_learn(name, Predictions(y, one), np.arange(7))
            - by_scikit_learn(name, Predictions(y, other), np.arange(7))
            for one, other in zip(first, second, strict=True)
        ]
        found = comparison.exchange_test(
            METRICS[name], Predictions(y, a_says), Predictions(y, b_says), seed=0, draws=5_000
        )
        assert found == pytest.approx(np.mean(np.abs(by_hand) >= abs(by_hand[0]) - 1e-12), abs=0.02)
    few = said(right(11, (0, 9))), said(right(11, (0, 4)))
    assert comparison.exchange_test(METRICS["macro_f1"], *few, seed=0) > 0.05


def test_permuted_labels_have_few_false_winners_in_other_metrics():
    """At most 5 % of 200 runs with five equal heads, nearest neighbours each on their own random features; uneven labels."""
    wrong, naive = Counter[str](), Counter[str]()
    for run in range(200):
        rng = np.random.default_rng(run)
        y = rng.permutation(np.repeat([0, 1, 2], [144, 60, 36]))
        folds, heads = folds_of(y, 5, run), {}
        for head in "abcde":
            X = rng.normal(size=(240, 4))
            distances = (X**2).sum(axis=1) - 2 * X @ X.T
            distances[folds[:, None] == folds] = np.inf  # no row of the same fold was seen
            votes = np.eye(3)[y[np.argpartition(distances, 4, axis=1)[:, :5]]].sum(axis=1)
            guess, sure = votes.argmax(axis=1), rng.uniform(0.4, 0.8, (240, 1))
            heads[head] = Predictions(y, guess, np.where(np.eye(3)[guess] == 1, sure, (1 - sure) / 2))
        for name in ("macro_f1", "log_loss"):
            metric = METRICS[name]
            scores = {head: metric.score(said) for head, said in heads.items()}
            best = max(scores, key=lambda head: scores[head])
            wrong[name] += any(not row.no_evidence for row in metrics.compare(heads, best, seed=run, metric=metric))
            added = {head: metric.contributions(row) for head, row in heads.items()}
            gaps = [added[best] - other for head, other in added.items() if head != best]
            naive[name] += any(gap.mean() > 1.96 * gap.std() / np.sqrt(240) for gap in gaps)
    assert max(wrong.values()) <= 10
    assert min(naive.values()) > 20, "without the correction for picking the simulation would have no teeth"


def test_heads_are_compared_in_the_metric_and_not_in_accuracy():
    """One finds most rare images and pays with common ones: behind by accuracy, clearly ahead by macro F1."""
    y = np.repeat([0, 1], [300, 40])
    careful, blunt = y.copy(), np.zeros(340, dtype=np.int64)
    careful[:30], careful[300:306] = 1, 0
    rows = {"careful": Predictions(y, careful), "blunt": Predictions(y, blunt)}
    ahead = {name: metrics.compare(rows, "careful", rows, metric=METRICS[name])[1] for name in ("accuracy", "macro_f1")}
    assert ahead["accuracy"].no_evidence
    assert not ahead["macro_f1"].no_evidence
    assert ahead["accuracy"].difference == pytest.approx(4 / 340)
    assert ahead["macro_f1"].difference == pytest.approx(
        f1_score(y, careful, average="macro") - f1_score(y, blunt, average="macro", zero_division=0)
    )
    assert ahead["macro_f1"].test is not None
    assert ahead["macro_f1"].test.p_value < 0.01 < ahead["macro_f1"].test.interval[0]


@pytest.mark.parametrize(("groups", "effect", "metric"), [(12, 1.0, "accuracy"), (None, 0.0, "macro_f1")])
def test_equal_heads_have_few_false_winners_with_groups_and_rare_classes(groups, effect, metric):
    """A few runs of five heads; tests/proofs has up to 400. As images, the same answers would have found many."""
    found = false_winners(20 if groups else 10, 240, groups, effect, metric)
    assert found["out of fold"] <= 0.1
    assert found["test"] <= 0.15
    assert found["images"] >= 0.2 or metric != "accuracy"


def test_permuted_labels_of_groups_have_few_false_winners():
    assert false_winners_of_permuted_groups(60) <= 0.1


def test_any_function_of_scikit_learns_kind_is_a_metric(monkeypatch: pytest.MonkeyPatch):
    """Compared, corrected and given intervals by resampling alone."""
    monkeypatch.setattr(metrics.metric, "SLOW_RESAMPLES", 45)  # a function of scikit-learn's takes a millisecond
    kappa = Metric("kappa", "Cohen's kappa", "labels", cohen_kappa_score, low=-1.0)
    sharp, blunt = answers_of_heads(60, 0, (2.5, 0.5))
    assert kappa.score(sharp) == cohen_kappa_score(sharp.y_true, sharp.y_pred)
    rows = {"sharp": sharp, "same": sharp, "blunt": blunt}
    _, same, worse = metrics.compare(rows, "sharp", rows, metric=kappa)
    assert same.no_evidence
    assert not worse.no_evidence
    assert worse.test is not None
    assert worse.test.shown == 1
    gap = kappa.score(sharp) - kappa.score(blunt)
    assert worse.difference == pytest.approx(gap)
    assert worse.interval[0] < gap < worse.interval[1]
    assert abs(comparison.selection_optimism([sharp, blunt], seed=0, metric=kappa).bias) < 0.03


def test_roc_auc_is_that_of_the_classes_that_are_there():
    (head,) = answers_of_heads(200, 0, (1.0,))
    seen = head.rows(np.flatnonzero(head.y_true < 2))
    p = seen.probabilities
    assert METRICS["roc_auc"].score(seen) == pytest.approx(
        np.mean([roc_auc_score(seen.y_true == c, p[:, c]) for c in (0, 1)])
    )
    assert METRICS["roc_auc"].score(head.rows(np.flatnonzero(head.y_true == 0))) == 0.5
    with pytest.raises(ValueError, match="ROC AUC needs probabilities, and there are none"):
        METRICS["roc_auc"].score(replace(head, probabilities=None))


@pytest.mark.parametrize(
    ("best", "images", "allowed"),
    [(0.995, 20_000, 0.0025), (0.8, 1_000, 0.05), (0.94, 1_000, 0.03), (1.0, 150, 1 / 300)],
)
def test_the_margin_of_the_recommendation_is_half_of_the_errors_and_at_most_five_points(best, images, allowed):
    assert margin(METRICS["accuracy"], best, images) == pytest.approx(allowed)


def test_images_are_counted_with_their_groups():
    assert metrics.counted(1500, None) == "1,500 images"
    assert metrics.counted(72, np.repeat(np.arange(12), 6)) == "72 images of 12 groups"
    assert metrics.counted(3, np.arange(3) + 7) == "3 images"


def test_no_interval_leaves_what_a_score_can_be():
    rng = np.random.default_rng(0)
    rows = {name: said(rng.random(8) < share) for name, share in (("a", 0.9), ("b", 0.2), ("c", 0.4))}
    folds = {"a": [1.0, 0.0, 1.0], "b": [0.0, 0.5, 0.0], "c": [0.2, 0.2, 0.9]}
    for row in metrics.compare(rows, "a", rows, folds):
        for low, high in [row.interval, *(part.interval for part in (row.test, row.folds) if part)]:
            assert -1 <= low <= high <= 1
    assert METRICS["accuracy"].interval_text((-0.098, 1.32)) == "[0.0, 100.0]"
    assert METRICS["log_loss"].interval_text((-1.5, 0.2)) == "[0.000, 1.500]"


def test_a_metric_writes_its_scores_as_users_know_them():
    f1, loss = METRICS["macro_f1"], METRICS["log_loss"]
    assert (f1.title, f1.text(0.7831), f1.gap_text(0.21), f1.unit) == ("macro F1", "78.3", "+21.0", "points")
    assert (loss.title, loss.text(-1.26), loss.gap_text(0.21), loss.unit) == ("log loss", "1.260", "+0.210", "nats")
    assert (loss.text(0.0), loss.gap_text(-0.0)) == ("0.000", "+0.000")


# Optimism


def test_the_best_of_many_equal_candidates_is_corrected_to_the_truth():
    corrected, apparent = [], []
    for run in range(20):
        correct = np.random.default_rng(run).random((300, 30)) < 0.7
        found = comparison.selection_optimism([said(column) for column in correct.T], seed=run, resamples=100)
        corrected.append(found.corrected)
        apparent.append(found.apparent)
    assert np.mean(apparent) > 0.74
    assert abs(np.mean(corrected) - 0.7) < 0.01


def test_a_clear_winner_owes_nothing_to_luck():
    rng = np.random.default_rng(0)
    columns = [said(rng.random(500) < 0.95), said(rng.random(500) < 0.5)]
    assert abs(comparison.selection_optimism(columns, seed=0).bias) < 0.003
    assert comparison.trial_optimism(np.array([[0.9, 0.92], [0.5, 0.6]])) == 0.0


def test_the_picked_head_is_corrected_in_the_metric_it_was_picked_by():
    columns = answers_of_heads(300, 0, (1.5,) * 12)
    for name in ("macro_f1", "log_loss"):
        metric = METRICS[name]
        truth = metric.score(answers_of_heads(200_000, 99, (1.5,))[0])
        found = comparison.selection_optimism(columns, seed=0, resamples=200, metric=metric)
        assert found.apparent == max(metric.score(column) for column in columns)
        assert found.apparent > truth
        assert 0 < found.bias < 3 * (found.apparent - truth)


def test_trial_optimism_by_hand():
    # The first trial wins on average; the second would have won the second fold by 0.04.
    assert comparison.trial_optimism(np.array([[0.9, 0.8], [0.7, 0.84]])) == pytest.approx((0.0 + 0.04) / 2)


# Several data sets


def test_ranking_over_datasets_by_demsars_formulas():
    """The statistic is SciPy's, with the correction of Iman and Davenport; q = 2.569 is Demsar's table 5 for four heads."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.6, 0.9, (14, 4)) + np.array([0.0, 0.15, 0.02, 0.16])
    found = comparison.rank_over_datasets(scores)
    chi2 = friedmanchisquare(*scores.T).statistic
    assert found.p_value == pytest.approx(f.sf(13 * chi2 / (14 * 3 - chi2), 3, 39))
    assert found.critical_difference == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 14)), abs=0.001)
    ranks = found.average_ranks
    assert sum(ranks) == pytest.approx(10)
    for group in found.groups:
        members = [ranks[column] for column in group]
        assert max(members) - min(members) <= found.critical_difference
    assert any({1, 3} <= set(group) for group in found.groups)


def test_heads_that_always_tie_share_a_rank():
    found = comparison.rank_over_datasets(np.tile([0.9, 0.9, 0.5], (30, 1)))
    assert found.average_ranks == (1.5, 1.5, 3.0)
    assert found.groups == ((0, 1),)
    with pytest.raises(ValueError, match="at least 2 data sets"):
        comparison.rank_over_datasets(np.ones((1, 3)))


# Calibration


def logits(n: int = 4000, seed: int = 0):
    rng = np.random.default_rng(seed)
    clean = rng.normal(size=(n, 4)) * 2
    p = np.exp(clean) / np.exp(clean).sum(axis=1, keepdims=True)
    y = np.array([rng.choice(4, p=row) for row in p])
    return clean, p, y


def test_calibration_undoes_overconfidence():
    _, p, y = logits()
    # One score per class against the rest, five times too sure, as margins are.
    sure = 5 * np.log(p / (1 - p))
    raw = np.exp(sure - sure.max(axis=1, keepdims=True))
    raw /= raw.sum(axis=1, keepdims=True)
    fitted = calibration.fit_calibrator(sure[:2000], y[:2000]).probabilities(sure[2000:])
    before, after = metrics.measure_calibration(raw[2000:], y[2000:]), metrics.measure_calibration(fitted, y[2000:])
    assert before.ece > 0.15
    assert after.ece < 0.05
    assert after.log_loss < 0.6 * before.log_loss
    assert after.brier < before.brier
    assert fitted.sum(axis=1) == pytest.approx(np.ones(2000))


def test_temperature_finds_the_true_one_and_keeps_every_prediction():
    clean, _, y = logits()
    calibrator = calibration.fit_calibrator(5 * clean, y)
    assert calibrator.slopes[0] == pytest.approx(0.2, rel=0.06)
    assert np.array_equal(calibrator.probabilities(5 * clean).argmax(axis=1), clean.argmax(axis=1))


def test_margins_of_an_svc_make_better_probabilities_than_its_counts():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 3000)
    X = rng.normal(size=(5, 6))[y] * 1.2 + rng.normal(size=(3000, 6))
    svc = SVC(break_ties=True).fit(X[:1000], y[:1000])
    scores = svc.decision_function(X)
    found = {
        method: calibration.fit_calibrator(scores[1000:2000].astype(np.float32), y[1000:2000], method).probabilities(
            scores[2000:]
        )
        for method in ("temperature", "margins")
    }
    losses = {method: metrics.measure_calibration(p, y[2000:]) for method, p in found.items()}
    assert losses["margins"].ece < 0.5 * losses["temperature"].ece
    assert losses["margins"].log_loss < losses["temperature"].log_loss - 0.05
    assert np.array_equal(found["margins"].argmax(axis=1), svc.predict(X[2000:]))


def test_margins_are_the_sums_of_pairwise_decision_values():
    pairs = np.array([[2.0, 3.0, 1.0], [40.0, -0.5, 7.0], [-1.0, 0.2, 0.1]])  # 0 against 1, 0 against 2, 1 against 2
    sums = np.array([[5.0, -1.0, -4.0], [39.5, -33.0, -6.5], [-0.8, 1.1, -0.3]])
    found = margins(_ovr_decision_function(pairs < 0, -pairs, 3))
    found[[0, 1, 2], [0, 0, 1]] -= 1e-3  # the leading class; in the second row each wins once, and 0 most clearly
    assert found == pytest.approx(sums, abs=1e-6)


def test_true_probabilities_are_measured_as_calibrated():
    _, p, y = logits(20000)
    found = metrics.measure_calibration(p, y)
    assert found.ece < 0.015
    assert found.log_loss == pytest.approx(log_loss(y, p))
    assert sum(row.count for row in found.bins) == 20000
    assert np.mean([row.interval[0] <= row.confidence <= row.interval[1] for row in found.bins]) > 0.8


def test_images_that_are_equally_sure_share_a_bin_whatever_their_order():
    """A constant guess is right as often as it says; cut in the order of the paths it would be right in some bins only."""
    y = np.sort(np.arange(359) % 10)
    p = np.tile(np.bincount(y) / 359, (359, 1))
    orders = (np.arange(359), np.random.default_rng(0).permutation(359), np.arange(359)[::-1])
    found = [metrics.measure_calibration(p[order], y[order]) for order in orders]
    assert [len(one.bins) for one in found] == [1, 1, 1]
    assert found[0].bins[0].count == 359
    assert found[0].ece == pytest.approx(0, abs=1e-12)
    assert found[1].bins == found[2].bins == found[0].bins


def test_bins_are_cut_between_distinct_confidences_only_and_stay_about_equal():
    rng = np.random.default_rng(0)
    sure = rng.choice([0.6, 0.7, 0.8, 0.9, 1.0], 600, p=(0.1, 0.3, 0.1, 0.1, 0.4))
    y = (rng.random(600) > sure).astype(int)
    p = np.stack([sure, 1 - sure], axis=1)
    bins = metrics.measure_calibration(p, y).bins
    assert [(row.low, row.high) for row in bins] == [(value, value) for value in (0.6, 0.7, 0.8, 0.9, 1.0)]
    assert [row.count for row in bins] == np.unique(sure, return_counts=True)[1].tolist()
    few = np.append(np.linspace(0.55, 0.6, 5), np.full(595, 0.9))
    assert [row.count for row in metrics.measure_calibration(np.stack([few, 1 - few], axis=1), y).bins] == [600]
    distinct = np.stack([np.linspace(0.5, 1, 600), 1 - np.linspace(0.5, 1, 600)], axis=1)
    assert [row.count for row in metrics.measure_calibration(distinct, y).bins] == [40] * 15


def test_brier_score_equals_scikit_learn():
    _, p, y = logits(50)
    two = p[:, :2] / p[:, :2].sum(axis=1, keepdims=True)
    # For two classes the sum over both is twice the binary score.
    assert metrics.measure_calibration(two, y % 2).brier == pytest.approx(2 * brier_score_loss(y % 2, two[:, 1]))


def test_prior_correction_recovers_a_changed_class_balance():
    """Trained where classes are equal, used where they are 80:20: corrected probabilities equal the true ones."""
    rng = np.random.default_rng(0)
    y = (rng.random(8000) < 0.2).astype(int)
    x = rng.normal(size=8000) + 1.5 * y
    balanced = 1 / (1 + np.exp(-(1.5 * x - 1.125)))
    p = np.stack([1 - balanced, balanced], axis=1)
    even, wanted = np.array([0.5, 0.5]), np.array([0.8, 0.2])
    corrected = calibration.correct_priors(p, even, wanted)
    assert metrics.measure_calibration(corrected, y).ece < 0.015
    assert metrics.measure_calibration(corrected, y).log_loss < metrics.measure_calibration(p, y).log_loss - 0.05
    assert corrected[:, 1].mean() == pytest.approx(0.2, abs=0.01)
    assert (corrected.argmax(axis=1) == y).mean() > (p.argmax(axis=1) == y).mean()
    assert calibration.correct_priors(p, even, even) == pytest.approx(p)


def test_a_binary_score_becomes_two_columns():
    assert classes.scores_as_columns(np.array([1.5, -2.0])).tolist() == [[-1.5, 1.5], [2.0, -2.0]]
    assert classes.scores_as_columns(np.ones((2, 3))).shape == (2, 3)


# Learning curve and cost


def power_law(sizes, floor=0.05, scale=1.2, rate=0.5, noise=0.004, draws=5, seed=0):
    rng = np.random.default_rng(seed)
    return [1 - floor - scale * size**-rate + rng.normal(0, noise, draws) for size in sizes]


def test_extrapolation_is_tested_against_held_back_sizes_and_covers_them():
    sizes = (40, 80, 160, 320, 640, 1280, 2560)
    inside, far = [], []
    for seed in range(15):
        curve = learning_curve.curve_from_scores(sizes, power_law(sizes, seed=seed), seed)
        assert [held.size for held in curve.held_back] == [1280, 2560]
        inside += [held.inside for held in curve.held_back]
        far += [
            low <= 1 - 0.05 - 1.2 * ahead.size**-0.5 <= high
            for ahead in curve.forecast
            for low, high in [ahead.interval]
        ]
    assert np.mean(inside) >= 0.85
    assert np.mean(far) >= 0.85


def test_learning_curve_grows_on_nested_stratified_parts():
    from sklearn.neighbors import NearestCentroid

    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 900)
    X = (rng.normal(size=(900, 30)) + 1.2 * np.eye(4, 30)[y]).astype(np.float32)
    train, test = (X[:600], y[:600]), (X[600:], y[600:])
    sizes = learning_curve.curve_sizes(600, 4)

    def measured():
        draws = [
            learning_curve.curve_scores(lambda seed: NearestCentroid(), train, test, sizes, seed) for seed in range(3)
        ]
        return learning_curve.curve_from_scores(sizes, list(np.transpose(draws)), 0)

    curve = measured()
    assert sizes[-1] == 600
    assert [point.size for point in curve.points] == list(sizes)
    assert curve.points[-1].accuracy > curve.points[0].accuracy + 0.05
    # All rows are the same rows whatever the seed.
    assert len(set(curve.points[-1].scores)) == 1
    assert measured() == curve


def test_pareto_keeps_what_nothing_beats_on_both_sides():
    assert learning_curve.pareto([1, 2, 3, 2], [0.8, 0.9, 0.85, 0.9]) == [True, True, False, True]


# HeadPredictions beside a bundle


def prediction_set(n: int, with_probabilities: bool, folds: bool) -> Predictions:
    y, guess, probabilities = labelled(n)
    paths = np.array([f"ant/{row}.png" for row in range(n)])
    return Predictions.of(
        y,
        guess,
        CLASSES,
        probabilities=probabilities.astype(np.float32) if with_probabilities else None,
        paths=paths,
        folds=np.arange(n) % 5 if folds else None,
    )


@pytest.mark.parametrize("probabilities", [True, False])
def test_predictions_come_back_as_they_were(tmp_path: Path, probabilities):
    predictions = HeadPredictions(prediction_set(20, probabilities, False), prediction_set(30, probabilities, True))
    path = tmp_path / "predictions.npz"
    path.write_bytes(predictions.to_bytes())
    back = HeadPredictions.read(path)
    assert back.classes == CLASSES
    for mine, theirs in ((predictions.test, back.test), (predictions.out_of_fold, back.out_of_fold)):
        assert vars(mine).keys() == vars(theirs).keys()
        for name, value in vars(mine).items():
            assert (value is None) == (vars(theirs)[name] is None)
            assert value is None or np.array_equal(value, vars(theirs)[name])
    assert back.to_bytes() == predictions.to_bytes()


def test_damaged_or_foreign_predictions_are_refused_with_the_remedy(tmp_path: Path):
    path = tmp_path / "predictions.npz"
    with pytest.raises(BundleError, match="run `manyheads heads` again"):
        HeadPredictions.read(path)
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(BundleError, match="no readable predictions"):
        HeadPredictions.read(path)
    np.savez(path, format="manyheads predictions", version=99)
    with pytest.raises(
        BundleError, match="found 'manyheads predictions' version 99, expected 'manyheads predictions' version 2"
    ):
        HeadPredictions.read(path)


def test_parts_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one row per image"):
        Predictions(np.array([0]), np.array([0, 1]))
