"""Shared work changes no result: solvers and evaluators agree with the scikit-learn heads they stand in for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from pipeline.config import HeadConfig, TuningConfig
from pipeline.data.classes import Classification
from pipeline.heads import HEADS, configure, resolve
from pipeline.heads.fast.kernel import prepare_distances, rbf_svm
from pipeline.heads.fast.solvers import Path, ProblemFamily, softmax_loss, squared_hinge_loss, turn
from pipeline.heads.tuning import make_folds, racing, tune
from pipeline.heads.tuning.evaluation import GENERIC, Problem, evaluator_for, generic
from pipeline.heads.tuning.features import standardise

GRIDS = {
    "logistic_regression": [{"C": C} for C in (1e-5, 3e-3, 0.2, 5.0)],
    "linear_svm": [{"C": C} for C in (1e-5, 1e-3, 0.05)],
    "ridge": [{"alpha": alpha} for alpha in (0.1, 30.0, 1e5)],
    "lda": [{"shrinkage": shrinkage} for shrinkage in ("auto", 0.003, 0.1, 1.0)],
    "rbf_svm": [{"C": 1.0, "gamma": 0.01}, {"C": 50.0, "gamma": 0.002}],
}
EXACT = {"logistic_regression": {"tol": 1e-8, "max_iter": 5000}, "linear_svm": {"tol": 1e-7, "max_iter": 200_000}}


def network(rows: int, dim: int, classes: int, seed: int = 0):
    """Features as a network has them: correlated, not negative, some always zero."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, classes, rows)
    y[(y == 0) & (generator.random(rows) < 0.6)] = 1
    y[: 2 * classes] = np.repeat(np.arange(classes), 2)
    points = generator.normal(size=(classes, 12))[y] * 0.8 + generator.normal(size=(rows, 12))
    for width in (32, dim):
        points = np.maximum(points @ generator.normal(size=(points.shape[1], width)) / np.sqrt(points.shape[1]), 0)
    points[:, 0] = 0
    return points.astype(np.float32), y


def problem_of(name: str, rows: int, dim: int, classes: int, class_weight: str | None = None, exact: bool = True):
    X, y = network(rows, dim, classes)
    head = resolve(HeadConfig(name=name, class_weight=class_weight))
    if exact:
        head = replace(head, fixed=EXACT.get(name, {}))
    return Problem(head, X, y.astype(np.int64), Classification(tuple(map(str, range(classes)))), make_folds(y, 3, 0), 0)


@pytest.mark.parametrize(("rows", "dim"), [(210, 40), (90, 120)], ids=["tall", "wide"])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", GRIDS)
def test_evaluators_find_what_scikit_learn_finds(name, classes, rows, dim):
    problem = problem_of(name, rows, dim, classes)
    evaluator = HEADS[name].evaluator
    ours = evaluator.evaluate(problem, 1, evaluator.prepare(problem, 1), GRIDS[name])
    theirs = generic(problem, 1, None, GRIDS[name])
    for params, own, reference in zip(GRIDS[name], ours, theirs, strict=True):
        assert (own.kind, own.error) == (reference.kind, None)
        size = np.abs(reference.scores).max()
        np.testing.assert_allclose(own.scores, reference.scores, atol=0.02 * size, err_msg=str(params))
        assert np.mean(own.predictions != reference.predictions) <= 0.015, params


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", ["logistic_regression", "linear_svm"])
def test_class_weights_reach_the_solver(name, classes):
    problem = problem_of(name, 210, 40, classes, class_weight="balanced")
    evaluator = evaluator_for(problem)
    own = evaluator.evaluate(problem, 0, evaluator.prepare(problem, 0), GRIDS[name][1:2])[0]
    reference = generic(problem, 0, None, GRIDS[name][1:2])[0]
    np.testing.assert_allclose(own.scores, reference.scores, atol=0.01 * np.abs(reference.scores).max())
    plain = problem_of(name, 210, 40, classes)
    other = evaluator.evaluate(plain, 0, evaluator.prepare(plain, 0), GRIDS[name][1:2])[0]
    assert np.abs(own.scores - other.scores).max() > 0.01 * np.abs(reference.scores).max()


def test_balanced_ridge_is_left_to_scikit_learn():
    assert evaluator_for(problem_of("ridge", 60, 10, 2, class_weight="balanced")) is GENERIC
    assert evaluator_for(problem_of("ridge", 60, 10, 2)) is HEADS["ridge"].evaluator


@pytest.mark.parametrize("C", [1e-3, 0.1, 3.0])
def test_coefficients_are_those_of_scikit_learn(C):
    X, y = network(150, 30, 3)
    X = StandardScaler().fit_transform(X)
    # Turning the unit vectors along makes the scores of the held-out rows the coefficients themselves.
    axes = turn(X, np.eye(X.shape[1], dtype=np.float32))
    weights = np.ones(len(y), dtype=np.float32)
    soft = ProblemFamily(lambda problems: softmax_loss(y, weights), 1, 3, penalise_intercept=False, tolerance=1e-6)
    found = Path(axes, soft).solve(np.array([1 / C]))[:, 0]
    reference = LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(X.astype(np.float64), y)
    coefficients = axes.held_out[:, :-1] @ found[:-1]
    np.testing.assert_allclose(coefficients.T, reference.coef_, atol=0.005 * np.abs(reference.coef_).max())
    intercept = found[-1] - found[-1].mean()
    np.testing.assert_allclose(intercept, reference.intercept_ - reference.intercept_.mean(), atol=0.01)

    targets = np.where(y[:, None] == np.arange(3), 1, -1).astype(np.float32)
    hinge = ProblemFamily(
        lambda problems: squared_hinge_loss(targets[:, problems % 3], np.ones_like(targets[:, problems % 3])),
        3,
        1,
        True,
        1e-6,
    )
    found = Path(axes, hinge).solve(np.array([1 / C]))[:, :, 0]
    svm = LinearSVC(C=C, tol=1e-8, max_iter=500_000).fit(X.astype(np.float64), y)
    coefficients = axes.held_out[:, :-1] @ found[:-1]
    np.testing.assert_allclose(coefficients.T, svm.coef_, atol=0.005 * np.abs(svm.coef_).max())
    np.testing.assert_allclose(found[-1], svm.intercept_, atol=0.01)


@pytest.mark.parametrize("name", ["logistic_regression", "linear_svm", "ridge"])
def test_a_solution_does_not_depend_on_what_was_asked_before(name):
    problem = problem_of(name, 150, 30, 3)
    evaluator = HEADS[name].evaluator
    alone = evaluator.evaluate(problem, 0, evaluator.prepare(problem, 0), GRIDS[name][1:2])[0]
    prepared = evaluator.prepare(problem, 0)
    evaluator.evaluate(problem, 0, prepared, GRIDS[name][::-1])
    later = evaluator.evaluate(problem, 0, prepared, GRIDS[name])[1]
    np.testing.assert_allclose(later.scores, alone.scores, rtol=1e-4, atol=1e-5)
    assert np.array_equal(later.predictions, alone.predictions)


@pytest.mark.parametrize("C", [3e-3, 0.05, 2.0])
def test_logistic_regression_ends_no_farther_from_its_optimum_than_scikit_learn(C):
    problem = problem_of("logistic_regression", 300, 60, 4)
    exact = generic(problem, 0, None, [{"C": C}])[0].scores
    theirs = generic(replace(problem, head=HEADS["logistic_regression"]), 0, None, [{"C": C}])[0].scores
    evaluator = HEADS["logistic_regression"].evaluator
    ours = evaluator.evaluate(problem, 0, evaluator.prepare(problem, 0), [{"C": C}])[0].scores
    assert np.abs(ours - exact).max() <= np.abs(theirs - exact).max() + 1e-4


def test_ties_of_votes_are_broken_by_the_scores_in_the_search_and_in_the_head():
    problem = problem_of("rbf_svm", 300, 40, 6)
    noise = np.random.default_rng(1).normal(size=problem.X.shape).astype(np.float32)
    problem = replace(problem, X=problem.X + 3 * noise)
    params, (train, held_out) = GRIDS["rbf_svm"][0], problem.folds[0]
    own = rbf_svm(problem, 0, prepare_distances(problem, 0), [params])[0]
    head = configure(problem.head, params, 0).fit(problem.X[train], problem.y[train])
    scores = head.decision_function(problem.X[held_out])
    assert np.array_equal(head.predict(problem.X[held_out]), scores.argmax(axis=1))
    assert np.array_equal(own.predictions, own.scores.argmax(axis=1))
    first_of_equals = head.set_params(head__break_ties=False).predict(problem.X[held_out])
    assert (first_of_equals != scores.argmax(axis=1)).any(), "no tie in these rows, so they test nothing"


def test_standardising_is_what_the_scaler_does():
    X, _ = network(80, 12, 2)
    X[:, 3] += 1000
    scaler = StandardScaler().fit(X[:60])
    train, held_out = standardise(X[:60], X[60:])
    np.testing.assert_allclose(train, scaler.transform(X[:60]), atol=2e-3)
    np.testing.assert_allclose(held_out, scaler.transform(X[60:]), atol=2e-3)


@pytest.mark.parametrize("name", ["logistic_regression", "linear_svm", "ridge", "lda", "rbf_svm"])
def test_the_chosen_score_is_scikit_learns_own(name, tmp_path):
    X, y = network(300, 30, 4)
    folds = make_folds(y, 3, 0)
    run = tune(HEADS[name], X, y, folds, TuningConfig(trials=6, strategy="random"), 0, tmp_path / "trials.jsonl")
    own = [
        configure(HEADS[name], run.best.params, 0).fit(X[train], y[train]).score(X[held_out], y[held_out])
        for train, held_out in folds
    ]
    assert run.best.mean == pytest.approx(np.mean(own), abs=0.002)


def test_hopeless_penalties_leave_the_race_and_the_choice_stays(tmp_path, monkeypatch):
    X, y = network(400, 20, 3)
    arguments = (
        HEADS["logistic_regression"],
        X,
        y,
        make_folds(y, 5, 0),
        TuningConfig(trials=12, strategy="grid", jobs=1),
        0,
    )
    raced = tune(*arguments, tmp_path / "raced.jsonl")
    monkeypatch.setattr(racing, "behind", lambda *pair: False)
    whole = tune(*arguments, tmp_path / "whole.jsonl")
    assert "stopped" in {trial.status for trial in raced.trials}
    assert {trial.status for trial in whole.trials} == {"ok"}
    assert raced.best.params == whole.best.params
    assert raced.best.fold_scores == whole.best.fold_scores


@pytest.mark.parametrize("classes", [2, 4])
def test_the_last_fit_of_a_linear_svm_is_at_liblinears_optimum(classes, tmp_path):
    problem = problem_of("linear_svm", 210, 40, classes, class_weight="balanced")
    tuned = tune(
        problem.head, problem.X, problem.y, problem.folds, TuningConfig(trials=2, jobs=1), 0, tmp_path / "trials.jsonl"
    ).pipeline
    assert isinstance(tuned[-1], LinearSVC)
    theirs = clone(tuned).fit(problem.X, problem.y)
    weights, expected = tuned[-1].coef_, theirs[-1].coef_
    assert weights.shape == expected.shape
    assert np.linalg.norm(weights - expected) < 0.01 * np.linalg.norm(expected)
    np.testing.assert_allclose(tuned[-1].intercept_, theirs[-1].intercept_, atol=0.01)
    np.testing.assert_array_equal(tuned.predict(problem.X), theirs.predict(problem.X))
