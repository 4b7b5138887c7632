"""The parts of a search by themselves: folds, strategies, scores, racing."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pytest

from pipeline.data.classes import expand_scores
from pipeline.errors import HeadError
from pipeline.heads import HEADS, Categorical, Integer, Real
from pipeline.heads.tuning import evaluation, make_folds, racing, strategies
from pipeline.heads.tuning.strategies import cardinality


def test_folds_hold_every_row_out_once_and_keep_the_shares():
    y = np.repeat(["a", "b", "c"], [50, 30, 20])
    folds = make_folds(y, 5, seed=3)
    assert sorted(np.concatenate([held_out for _, held_out in folds]).tolist()) == list(range(100))
    for train, held_out in folds:
        assert sorted([*train, *held_out]) == list(range(100))
        assert [np.sum(y[held_out] == label) for label in "abc"] == [10, 6, 4]
    again, other = make_folds(y, 5, seed=3), make_folds(y, 5, seed=4)
    assert all(np.array_equal(a[1], b[1]) for a, b in zip(folds, again, strict=True))
    assert not all(np.array_equal(a[1], b[1]) for a, b in zip(folds, other, strict=True))


def test_a_group_stays_in_one_fold():
    generator = np.random.default_rng(0)
    groups = np.array([f"g{place}" for place in generator.integers(0, 25, 120)], dtype=object)
    y = np.array([f"c{int(group[1:]) % 3}" for group in groups], dtype=object)
    folds = make_folds(y, 4, seed=1, groups=groups)
    assert sorted(np.concatenate([held_out for _, held_out in folds]).tolist()) == list(range(120))
    for train, held_out in folds:
        assert not set(groups[train]) & set(groups[held_out])
        assert set(y[train]) == {"c0", "c1", "c2"}


def test_rare_classes_and_few_rows_are_told_and_survived(caplog):
    folds = make_folds(["a"] * 20 + ["b"] * 3 + ["c"], 5, seed=0)
    assert len(folds) == 5
    assert len(make_folds(["a"] * 3 + ["b"] * 2, 5, seed=0)) == 3
    assert "3 folds instead of 5: the training rows do not allow more" in caplog.text
    assert len(make_folds(["a", "b"] * 10, 5, seed=0, groups=["x"] * 6 + ["y"] * 14)) == 2


@pytest.mark.parametrize(
    ("y", "groups", "text"),
    [
        (["a", "b", "c"], None, "cross-validation needs two images of a class, and two groups"),
        (["a", "a", "a"], None, "the training rows have 1 class; a classifier needs at least 2"),
        (["a", "a", "b"], ["g", "g", "g"], "cross-validation needs two images of a class, and two groups"),
    ],
)
def test_folds_that_cannot_be_made(y, groups, text):
    with pytest.raises(HeadError, match=text):
        make_folds(y, 5, seed=0, groups=groups)


SPACE = {"C": Real(1e-3, 1e3, prior="log-uniform"), "gamma": Real(1e-4, 1, prior="log-uniform")}


DEFAULTS = {"C": 1.0, "gamma": 0.01}


def drive(strategy, space, defaults, trials, seed, objective):
    points, values = [], []
    asked = strategies.rounds(strategy, space, defaults, trials, seed)
    batch = next(asked)
    while batch and len(points) < trials:
        scores = [objective(point) for point in batch]
        points, values = points + batch, values + scores
        try:
            batch = asked.send(scores)
        except StopIteration:
            break
    return points[:trials], values[:trials]


def bowl(point):
    return -((np.log10(point["C"]) - 1.7) ** 2) - (np.log10(point["gamma"]) + 2.6) ** 2


@pytest.mark.parametrize("strategy", ["bayes", "random", "grid"])
def test_every_strategy_starts_with_the_defaults_and_repeats_with_its_seed(strategy):
    points, _ = drive(strategy, SPACE, DEFAULTS, 6, 0, bowl)
    again, _ = drive(strategy, SPACE, DEFAULTS, 6, 0, bowl)
    assert points[0] == DEFAULTS
    assert points == again
    assert len({str(point) for point in points}) == len(points)
    assert all(point[key] in SPACE[key] for point in points for key in SPACE)
    assert 5 <= len(points) <= 6
    json.dumps(points)
    if strategy != "grid":
        assert points != drive(strategy, SPACE, DEFAULTS, 6, 1, bowl)[0]


def test_random_draws_are_those_of_scikit_optimize():
    """So that the journals of searches whose points it drew are continued."""
    import skopt.space

    space = {
        "a": Real(1e-3, 1e3, prior="log-uniform"),
        "b": Real(-2, 5),
        "c": Integer(1, 64, prior="log-uniform"),
        "d": Integer(-3, 9),
        "e": Categorical([None, "x", 0.5, 7]),
    }
    theirs = skopt.space.Space([strategies._of_skopt(row) for row in space.values()])
    theirs.set_transformer("normalize")
    generator = np.random.RandomState(3)
    asked = strategies.rounds("random", space, {"a": 1.0, "b": 0.0, "c": 1, "d": 0, "e": None}, 400, 3)
    for point in [point for _ in range(20) for point in next(asked)][1:]:
        a, b, c, d, e = theirs.rvs(1, random_state=generator)[0]
        assert (point["c"], point["d"], point["e"]) == (c, d, (None, "x", 0.5, 7)[int(e)])
        np.testing.assert_allclose([point["a"], point["b"]], [a, b], rtol=1e-5)


def test_random_and_grid_search_work_without_scikit_optimize(monkeypatch):
    class Blocked:
        @staticmethod
        def find_spec(name, *_):
            if name == "skopt":
                raise ImportError("cannot import name 'x' from 'sklearn.utils'")

    for name in [name for name in sys.modules if name.partition(".")[0] == "skopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocked, *sys.meta_path])
    for strategy in ("random", "grid"):
        strategies.require(strategy)
        assert {len(next(strategies.rounds(strategy, head.space, head.defaults, 8, 0))) for head in HEADS.values()} == {
            2
        }
    with pytest.raises(HeadError) as caught:
        strategies.require("bayes")
    assert str(caught.value) == (
        "tuning.strategy: bayes needs scikit-optimize, which cannot be imported (cannot import name 'x' from "
        "'sklearn.utils'); install it, or set tuning.strategy to random or grid"
    )


def test_bayes_finds_what_random_and_grid_only_come_near_to():
    best = {
        name: [max(drive(name, SPACE, DEFAULTS, 20, seed, bowl)[1]) for seed in range(2)]
        for name in strategies.STRATEGIES
    }
    assert np.mean(best["bayes"]) > -0.05
    assert np.mean(best["bayes"]) > np.mean(best["random"])
    assert np.mean(best["bayes"]) > np.mean(best["grid"])


def test_the_grid_is_even_on_each_own_scale():
    points, _ = drive("grid", SPACE, DEFAULTS, 17, 0, bowl)
    assert sorted({point["C"] for point in points[1:]}) == [0.001, 0.1, 10.0, 1000.0]
    assert len({point["gamma"] for point in points[1:]}) == 4
    assert len(points) == 17


@pytest.mark.parametrize("strategy", ["bayes", "random", "grid"])
def test_a_small_space_is_tried_completely(strategy):
    space = {"k": Integer(1, 3), "kind": Categorical([None, "a", 0.5])}
    points, _ = drive(strategy, space, {"k": 2, "kind": "a"}, 16, 0, lambda point: 0.0)
    assert len(points) == 9
    assert points[0] == {"k": 2, "kind": "a"}
    assert {(point["k"], point["kind"]) for point in points} == {
        (k, kind) for k in (1, 2, 3) for kind in (None, "a", 0.5)
    }


@pytest.mark.parametrize("strategy", ["bayes", "random"])
def test_mixed_spaces_give_plain_values_and_no_point_twice(strategy):
    space = {"k": Integer(1, 9, prior="log-uniform"), "kind": Categorical([None, "a", 0.5]), "x": Real(0, 1)}
    points, _ = drive(strategy, space, {"k": 2, "kind": None, "x": 0.5}, 20, 0, lambda point: point["x"])
    assert len(points) == 20
    assert {type(point["k"]) for point in points} == {int}
    assert {type(point["x"]) for point in points} == {float}
    assert cardinality(space) == np.inf


def test_points_without_a_score_do_not_stop_the_strategy():
    points, _ = drive("bayes", SPACE, DEFAULTS, 12, 0, lambda point: None)
    assert len(points) == 12


def test_absent_classes_never_win():
    decision = expand_scores(np.array([[-1.0, -3.0]]), np.array([0, 2]), 4, "decision")
    assert decision.tolist() == [[-1.0, -4.0, -3.0, -4.0]]
    assert expand_scores(np.array([2.0]), np.array([1, 2]), 3, "decision").tolist() == [[-3.0, -2.0, 2.0]]
    probability = expand_scores(np.array([[0.25, 0.75]]), np.array([0, 2]), 3, "probability")
    assert probability.tolist() == [[0.25, 0.0, 0.75]]


def test_racing_hardly_ever_drops_the_winner():
    """400 searches of 24 candidates, whose answers on 5 x 200 rows are simulated and correlated as related heads' are."""
    generator = np.random.default_rng(0)
    lost, fits, dropped = [], 0, 0
    rows, candidates, folds = 200, 24, 5
    for _ in range(400):
        quality = 0.85 - generator.exponential(0.03, candidates)
        difficulty = generator.random((folds, rows))
        own = generator.random((candidates, folds, rows))
        share = generator.random((candidates, folds, rows)) < 0.6
        scores = (np.where(share, difficulty, own) < quality[:, None, None]).mean(axis=2)
        alive = list(range(candidates))
        for done in (2, 4):
            fits += 2 * len(alive)
            leader = max(alive, key=lambda place: scores[place, :done].mean())
            alive = [p for p in alive if not racing.behind(scores[p, :done], scores[leader, :done], rows, True)]
        fits += len(alive)
        means = scores.mean(axis=1)
        found = max(alive, key=lambda place: means[place])
        lost.append(quality[means.argmax()] - quality[found])
        dropped += found != means.argmax()
    assert dropped / 400 < 0.03
    assert np.mean(lost) < 0.0005
    assert fits < 0.8 * 400 * candidates * folds


def test_a_vague_warning_is_counted_by_its_first_sentence():
    with evaluation.counting_warnings(), evaluation.counted() as counts:
        warnings.warn("self.width_ is 0 in a class. Inputs are identical.", stacklevel=1)
        warnings.warn("self.width_ is 0 in a class. More of it", stacklevel=1)
        warnings.warn("no full stop\nsecond line", RuntimeWarning, stacklevel=1)
        warnings.warn("soon gone", FutureWarning, stacklevel=1)
    assert counts == {"UserWarning: self.width_ is 0 in a class": 2, "RuntimeWarning: no full stop": 1}
