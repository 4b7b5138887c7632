"""Forests are judged from a few trees first: what is reported is scikit-learn's forest, and the choice is no worse than noise."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from test_tuning import summary
from test_tuning_solvers import network

from pipeline.config import HeadConfig, TuningConfig
from pipeline.data.classes import Classification
from pipeline.heads import HEADS, Integer, configure, resolve
from pipeline.heads.fast import screened as module
from pipeline.heads.fast.screened import BUDGET, FEW, FEWEST, MOST, cost, extrapolated, few, forest
from pipeline.heads.tuning import make_folds, racing, tune
from pipeline.heads.tuning.evaluation import GENERIC, Problem, derived_seed, evaluator_for
from pipeline.heads.tuning.journal import Journal

FOREST = replace(HEADS["random_forest"], fixed={"n_estimators": 64})


@pytest.fixture(scope="module")
def whole_search(tmp_path_factory):
    """A search of small forests: its arguments, what it found, and its fits."""
    X, y = network(90, 12, 3)
    arguments = (FOREST, X, y, make_folds(y, 3, 0), TuningConfig(strategy="random", trials=4, jobs=1), 0)
    journal = tmp_path_factory.mktemp("whole") / "trials.jsonl"
    run = tune(*arguments, journal)
    events = map(json.loads, journal.read_text().splitlines())
    return arguments, run, [event for event in events if event.get("event") == "fit"]


def problem_of(head=FOREST, rows=150, dim=12, classes=3):
    X, y = network(rows, dim, classes)
    return Problem(head, X, y.astype(np.int64), Classification(tuple("abcdefghij"[:classes])), make_folds(y, 3, 0), 7)


def build_scaled(seed: int) -> Pipeline:
    return Pipeline([("scaler", StandardScaler()), ("head", RandomForestClassifier(64, random_state=seed))])


@pytest.mark.parametrize(
    ("head", "params"),
    [
        (FOREST, {"max_features": 0.3, "min_samples_leaf": 1}),
        (FOREST, {"max_features": 0.1, "min_samples_leaf": 4}),
        (replace(FOREST, fixed={"n_estimators": 64, "class_weight": "balanced"}), {"min_samples_leaf": 2}),
        (replace(FOREST, fixed={"n_estimators": 64, "max_samples": 0.5}), {}),
        (replace(FOREST, build=build_scaled, fixed={}), {"max_features": 0.3}),
    ],
    ids=["pure leaves", "mixed leaves", "class weight", "max samples", "scaled"],
)
def test_a_forest_is_scikit_learns_to_the_last_digit(head, params):
    problem = problem_of(head)
    train, held_out = problem.folds[1]
    (outcome,) = forest(problem, 1, {}, [{**head.fixed, **params}])
    whole = configure(head, params, problem.fold_seed(1)).fit(problem.X[train], problem.y[train])
    assert np.array_equal(outcome.predictions, whole.predict(problem.X[held_out]))
    assert np.array_equal(outcome.scores, whole.predict_proba(problem.X[held_out]).astype(np.float32))
    assert outcome.fit_seconds > 0


# Few trees speak for many ---------------------------------------------------------------------------------------------


def moved_to(draws, y, trees):
    """What votes of shape (trees, rows, classes) would be of more trees."""
    return extrapolated(draws.sum(axis=0), (draws**2).sum(axis=(0, 2)), y, len(draws), trees)


def test_extrapolated_votes_err_as_often_as_more_trees_would():
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 400)
    gaps = []
    for strength in (0.3, 0.8):
        chances = generator.dirichlet(np.ones(10), len(y)) + strength * np.eye(10)[y]
        chances /= chances.sum(axis=1, keepdims=True)
        draws = generator.multinomial(1, chances, size=(200, len(y))).astype(float)
        right = [float((draws[:trees].sum(axis=0).argmax(axis=1) == y).mean()) for trees in (12, 200)]
        moved = moved_to(draws[:12], y, 200)
        np.testing.assert_allclose(moved.sum(axis=1), 1)
        assert moved.min() >= 0
        far = float((moved.argmax(axis=1) == y).mean()) - right[1]
        gaps.append((abs(far), right[1] - right[0]))
    for ours, plain in gaps:
        assert plain > 0.1
        assert ours < 0.2 * plain


def test_extrapolating_to_as_many_trees_changes_nothing():
    votes = np.random.default_rng(1).dirichlet(np.ones(3), size=(12, 30))
    np.testing.assert_allclose(moved_to(votes, np.arange(30) % 3, 12), votes.mean(axis=0), atol=1e-12)


def test_a_row_alone_in_its_class_and_trees_that_agree_are_left_as_they_are():
    generator = np.random.default_rng(2)
    votes = generator.dirichlet(np.ones(3), size=(12, 21))
    y = np.array([0, 1] * 10 + [2])
    moved, shares = moved_to(votes, y, 200), votes.sum(axis=0) / 12
    np.testing.assert_array_equal(moved[-1], shares[-1])
    assert not np.allclose(moved[0], shares[0])
    alike = np.repeat(generator.dirichlet(np.ones(3), size=(1, 21)), 12, axis=0)
    np.testing.assert_allclose(moved_to(alike, y, 200), alike[0], atol=1e-7)


def test_a_class_that_no_tree_has_seen_stays_wrong():
    X, y = network(90, 12, 3)
    y[:] = np.where(y == 2, 1, y)
    y[0] = 2
    problem = Problem(FOREST, X, y.astype(np.int64), Classification(tuple("abc")), make_folds(y, 3, 0), 0)
    fold = next(fold for fold, (_, held_out) in enumerate(problem.folds) if 0 in held_out)
    outcome = forest(problem, fold, {}, [{"n_estimators": 12}])[0]
    assert set(outcome.predictions) <= {0, 1}
    assert (outcome.scores[:, 2] == 0).all()


def test_a_group_does_not_vouch_for_itself(tmp_path):
    """Labels drawn per group cannot be learned from other groups; rows out of bag would be recognised by their twins."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5)
    X = (generator.normal(size=(60, 10))[groups] + 0.01 * generator.normal(size=(300, 10))).astype(np.float32)
    y = generator.integers(0, 2, 60)[groups]
    folds = make_folds(y, 3, 0, groups)
    run = tune(FOREST, X, y, folds, TuningConfig(trials=2), 0, tmp_path / "trials.jsonl")
    estimates = [trial.estimate for trial in run.trials]
    assert max(estimates) < 0.7


# Who goes on ----------------------------------------------------------------------------------------------------------


def test_of_equal_estimates_the_cheaper_is_worth_more_and_price_cannot_save_one_far_behind():
    estimates, leader = np.array([0.80, 0.80, 0.79, 0.60, 0.0]), np.full(5, 0.8)
    value = racing.worth(estimates, np.array([10.0, 5.0, 1.0, 1.0, 0.001]), leader, 200, bounded=True)
    assert np.argsort(-value).tolist() == [2, 1, 0, 3, 4]
    assert np.isfinite(value).all()
    dear = racing.worth(estimates[:3], np.ones(3), leader, 200, bounded=True)
    assert dear[0] == dear[1] > dear[2]


def test_expected_improvement_is_the_mean_of_what_is_gained():
    estimates, costs = np.array([-0.5, -0.52, -0.6]), np.array([1.0, 2.0, 4.0])
    leader = np.array([-0.45, -0.5, -0.55])
    error = leader.std(ddof=1) / np.sqrt(3)
    draws = np.random.default_rng(0).normal(size=400_000)
    gains = [
        np.maximum((e - estimates[0]) / error + draws, 0).mean() / cost
        for e, cost in zip(estimates, costs, strict=True)
    ]
    value = racing.worth(estimates, costs, leader, 100, bounded=False)
    np.testing.assert_allclose(np.exp(value), gains, rtol=0.05)


def test_a_fit_costs_as_much_as_its_splits_look_at():
    problem = problem_of(dim=16)
    for wanted, features in (("sqrt", 4), ("log2", 4), (None, 16), (3, 3), (0.5, 8), (0.01, 1)):
        assert cost(problem, {"max_features": wanted}) == features


def test_a_first_look_takes_as_long_as_the_defaults_whatever_a_split_costs():
    head = replace(HEADS["random_forest"], fixed={})
    problem = problem_of(head, dim=100)
    trees = {wanted: few(problem, {"max_features": wanted})["n_estimators"] for wanted in (0.01, 0.04, 0.05, 0.1, 0.5)}
    assert trees == {0.01: MOST, 0.04: FEW * 5 // 4, 0.05: FEW, 0.1: FEW // 2, 0.5: FEWEST}


def test_a_first_look_is_at_few_trees(whole_search):
    (_, X, y, folds, *_), _, fits = whole_search
    problem = Problem(FOREST, X, y.astype(np.int64), Classification(tuple("abc")), folds, 0)
    for event in [event for event in fits if event["rung"] == 0][::4]:
        params = {**event["params"], **few(problem, event["params"])}
        outcome = forest(problem, event["fold"], {}, [params])[0]
        assert event["score"] == np.mean(outcome.predictions == y[folds[event["fold"]][1]])


def test_the_better_half_goes_on_and_never_fewer_than_two():
    scores = np.array([[0.5, 0.7], [0.9, 0.1], [0.8, 0.8], [0.6, 0.6], [0.2, 0.9]])
    assert sorted(racing.better_half(scores)) == [0, 2, 3]
    assert sorted(racing.better_half(scores[[1, 3, 4]])) == [1, 2]
    assert sorted(racing.better_half(scores[[0, 3]])) == [0, 1]
    assert sorted(racing.better_half(scores[[4]])) == [0]


def test_of_those_that_go_on_the_better_half_is_fitted_further(whole_search):
    _, run, all_fits = whole_search
    fits = [event for event in all_fits if event["rung"] == 1]
    fitted = [{event["trial"] for event in fits if event["fold"] == fold} for fold in range(3)]
    assert len(fitted[0]) > len(fitted[1]) >= 2
    scores = {(event["trial"], event["fold"]): event["score"] for event in fits}
    for after in range(1, 3):
        mean = {number: np.mean([scores[number, fold] for fold in range(after)]) for number in fitted[after - 1]}
        assert fitted[after] <= set(mean)
        assert len(fitted[after]) <= max(2, (len(mean) + 1) // 2)
        assert min(mean[number] for number in fitted[after]) >= max(
            (mean[number] for number in mean if number not in fitted[after]), default=0
        )
    stopped = fitted[0] - fitted[1]
    assert all(run.trials[number].reason.endswith("behind the best after 1 of 3 folds") for number in stopped)
    assert {trial.number for trial in run.trials if trial.mean is not None} == fitted[2]


# The search -----------------------------------------------------------------------------------------------------------


def test_those_worth_it_go_on_and_are_judged_in_full(tmp_path):
    X, y = network(160, 12, 3)
    folds = make_folds(y, 2, 0)
    run = tune(FOREST, X, y, folds, TuningConfig(trials=12, strategy="random"), 0, tmp_path / "trials.jsonl")
    events = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    fits = [event for event in events if event.get("event") == "fit"]
    first = {number: [] for number in range(12)}
    for event in fits:
        if event["rung"] == 0:
            first[event["trial"]].append(event["score"])
    assert all(len(scores) == 2 for scores in first.values())
    leader = max(first, key=lambda number: (np.mean(first[number]), -number))
    costs = {number: max(1.0, 12 * run.trials[number].params["max_features"]) for number in first}
    value = {
        number: racing.worth(
            np.array([np.mean(first[leader]), np.mean(first[number])]),
            np.array([1.0, costs[number]]),
            np.array(first[leader]),
            80,
            bounded=True,
        )[1]
        for number in first
    }
    chosen, left = {0}, BUDGET  # the defaults cost 1
    for number in sorted(first, key=lambda number: (-value[number], number)):
        if costs[number] <= left:
            chosen.add(number)
            left -= costs[number]
    assert 2 < len(chosen) < 12
    assert max(costs.values()) > BUDGET / 2, "a dear candidate must have been weighed"
    assert {event["trial"] for event in fits if event["rung"] == 1} == chosen
    full = [trial for trial in run.trials if trial.status == "ok"]
    assert {trial.number for trial in full} < chosen
    reasons = {trial.number: trial.reason for trial in run.trials if trial not in full}
    assert {number for number, reason in reasons.items() if reason == "screened only"} == set(first) - chosen
    assert all(reasons[number].endswith("after 1 of 2 folds") for number in chosen & set(reasons))
    assert run.best.mean == max(trial.mean for trial in full)
    seeds = [derived_seed(0, 0, fold) for fold in range(2)]
    grown = [
        configure(FOREST, run.best.params, seed).fit(X[t], y[t]) for seed, (t, _) in zip(seeds, folds, strict=True)
    ]
    own = [forest.score(X[h], y[h]) for forest, (_, h) in zip(grown, folds, strict=True)]
    assert run.best.fold_scores == tuple(own)
    assert len(run.pipeline[-1].estimators_) == 64
    assert run.pipeline[-1].n_jobs is None
    seed = derived_seed(0, 1, 0)
    assert run.pipeline[-1].random_state == seed
    assert np.array_equal(run.pipeline.predict(X), configure(FOREST, run.best.params, seed).fit(X, y).predict(X))


def test_the_choice_is_that_of_full_fits_within_noise(tmp_path):
    gaps = []
    for seed, scoring in enumerate(("accuracy", "log_loss")):
        X, y = network(120, 16, 4, seed)
        arguments = (make_folds(y, 2, seed), TuningConfig(trials=3, strategy="random", scoring=scoring, jobs=1), seed)
        climbed = tune(FOREST, X, y, *arguments, tmp_path / f"climbed{seed}.jsonl")
        whole = tune(replace(FOREST, evaluator=None), X, y, *arguments, tmp_path / f"whole{seed}.jsonl")
        assert [trial.params for trial in whole.trials] == [trial.params for trial in climbed.trials]
        same = whole.trials[climbed.best.number]
        if same.mean is not None:
            assert same.fold_scores == climbed.best.fold_scores
        share = climbed.best.mean if scoring == "accuracy" else np.nan
        noise = (
            np.sqrt(share * (1 - share) / len(y))
            if scoring == "accuracy"
            else np.std(whole.best.fold_scores, ddof=1) / np.sqrt(2)
        )
        gaps.append((whole.best.mean - climbed.best.mean) / noise)
    assert max(gaps) <= 1
    assert np.mean(gaps) <= 0.5


def test_a_search_of_forests_that_is_interrupted_among_those_that_go_on_ends_the_same(
    whole_search, tmp_path, monkeypatch
):
    (arguments, whole, _), stop_after = whole_search, 14
    append, seen = Journal.append, []

    def dying(self, events):
        append(self, events)
        seen.extend(event for event in events if event.get("event") == "fit")
        if len(seen) >= stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            tune(*arguments, tmp_path / "trials.jsonl")
    resumed = tune(*arguments, tmp_path / "trials.jsonl")
    assert resumed.replayed == stop_after
    assert summary(resumed) == summary(whole)
    assert np.array_equal(resumed.out_of_fold.scores, whole.out_of_fold.scores)


def test_the_number_of_jobs_does_not_change_forests(whole_search, tmp_path):
    (head, X, y, folds, _, seed), whole, _ = whole_search
    tuning = TuningConfig(strategy="random", trials=4, jobs=3)
    run = tune(head, X, y, folds, tuning, seed, tmp_path / "trials.jsonl")
    assert summary(run) == summary(whole)
    assert np.array_equal(run.out_of_fold.scores, whole.out_of_fold.scores)


def test_a_forest_that_fails_is_a_failed_trial(tmp_path):
    X, y = network(90, 12, 3)
    head = replace(FOREST, fixed={"n_estimators": 100, "criterion": "none such"})
    problem = Problem(head, X, y.astype(np.int64), Classification(tuple("abc")), make_folds(y, 3, 0), 0)
    outcome = forest(problem, 0, {}, [{**head.fixed, "n_estimators": 12}])[0]
    assert outcome.error.startswith("InvalidParameterError: The 'criterion' parameter")


def test_forests_whose_first_trees_say_nothing_are_fitted_plainly():
    assert evaluator_for(problem_of()) is module.FOREST
    for fixed in ({"n_estimators": 63}, {"warm_start": True}):
        assert evaluator_for(problem_of(replace(FOREST, fixed={**FOREST.fixed, **fixed}))) is GENERIC
    searched = replace(FOREST, space={"n_estimators": Integer(10, 200)}, defaults={"n_estimators": 100}, fixed={})
    assert evaluator_for(problem_of(searched)) is GENERIC
    assert evaluator_for(problem_of(resolve(HeadConfig(name="random_forest", class_weight="balanced")))) is not GENERIC
