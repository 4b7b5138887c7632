"""Principal components within the folds: scikit-learn's own scores, nothing learned from held-out rows, found once for all."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import board_of
from report_experiment import section
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from test_leaks import held_out_rows_reach_the_fit
from test_on_disk import stage_one, stored
from test_tuning_solvers import network

from pipeline import config as configuration
from pipeline.config import TuningConfig
from pipeline.data.classes import Classification
from pipeline.errors import ConfigError
from pipeline.export import bundle as bundles
from pipeline.heads import HEADS, Head, as_layer, configure
from pipeline.heads.tuning import Projections, make_folds, memory_needed, tune
from pipeline.heads.tuning.evaluation import derived_seed
from pipeline.heads.tuning.features import Projection
from pipeline.report.material import gather
from pipeline.stages import train_heads
from pipeline.stages.train_heads.task import objections

REDUCED = TuningConfig(trials=1, jobs=1, pca=6)


def plain(name: str, pca: Any, seed: int = 0) -> Pipeline:
    """What a scikit-learn user would write."""
    classifier = configure(HEADS[name], HEADS[name].defaults, seed)[-1]
    steps = PCA(pca, svd_solver="covariance_eigh")
    return Pipeline([("scaler", StandardScaler()), ("pca", steps), ("head", classifier)])


@pytest.mark.parametrize("pca", [6, 0.8])
@pytest.mark.parametrize("name", ["logistic_regression", "linear_svm", "ridge", "rbf_svm", "knn", "decision_tree"])
def test_scores_are_those_of_a_plain_pipeline_on_the_same_folds(name: str, pca: Any, tmp_path: Path) -> None:
    X, y = network(240, 30, 3)
    folds = make_folds(y, 3, 0)
    run = tune(HEADS[name], X, y, folds, REDUCED.model_copy(update={"pca": pca}), 0, tmp_path / "j")
    reference = plain(name, pca)
    expected = np.array(
        [
            plain(name, pca, derived_seed(0, 0, fold)).fit(X[train], y[train]).score(X[held_out], y[held_out])
            for fold, (train, held_out) in enumerate(folds)
        ]
    )
    np.testing.assert_allclose(run.best.fold_scores, expected, atol=1.01 / 80)  # a row of 80 may lie on the border
    assert float(run.best.mean or 0) == pytest.approx(expected.mean(), abs=0.006)
    assert [step for step, _ in run.pipeline.steps] == ["scaler", "pca", "head"]
    fitted = reference.fit(X, y)
    np.testing.assert_allclose(run.pipeline["pca"].components_, fitted["pca"].components_, atol=1e-5)
    assert np.mean(run.pipeline.predict(X) != fitted.predict(X)) <= 0.01


def test_forests_are_grown_on_the_components(tmp_path: Path) -> None:
    X, y = network(240, 30, 3)
    folds, few = make_folds(y, 3, 0), {"n_estimators": 64}
    run = tune(replace(HEADS["random_forest"], fixed=few), X, y, folds, REDUCED, 0, tmp_path / "j")
    for fold, (train, held_out) in enumerate(folds):
        own = plain("random_forest", 6, seed=derived_seed(0, 0, fold)).set_params(head__n_estimators=64)
        score = own.fit(X[train], y[train]).score(X[held_out], y[held_out])
        assert run.best.fold_scores[fold] == pytest.approx(score, abs=2.01 / 80)  # another digit, another split
    assert run.pipeline["head"].n_features_in_ == 6


def test_probabilities_out_of_fold_are_those_of_a_plain_pipeline(tmp_path: Path) -> None:
    X, y = network(240, 30, 3)
    folds = make_folds(y, 3, 0)
    run = tune(HEADS["logistic_regression"], X, y, folds, REDUCED, 0, tmp_path / "j")
    expected = cross_val_predict(plain("logistic_regression", 6), X, y, cv=list(folds), method="predict_proba")
    np.testing.assert_allclose(run.out_of_fold.scores, expected, atol=2e-3)


@pytest.mark.parametrize("name", ["logistic_regression", "rbf_svm", "knn", "nearest_centroid"])
def test_components_learn_nothing_from_the_rows_they_are_judged_on(name: str, tmp_path: Path) -> None:
    tuning = TuningConfig(trials=1, jobs=1, pca=3)
    assert not held_out_rows_reach_the_fit(lambda X: HEADS[name], tmp_path, tuning)


def test_components_found_outside_the_folds_are_seen(tmp_path: Path) -> None:
    def leaky(X: np.ndarray) -> Head:
        found = Pipeline([("scaler", StandardScaler()), ("pca", PCA(3))]).fit(X)  # the fault

        def build(seed: int) -> Pipeline:
            return Pipeline([("all", Fixed(found)), ("head", clone(HEADS["logistic_regression"].build(0)[-1]))])

        return Head("leaky", build, {}, {})

    assert held_out_rows_reach_the_fit(leaky, tmp_path)


class Fixed(StandardScaler):
    """A step that was fitted before and is not fitted again."""

    def __init__(self, found: Any = None) -> None:
        super().__init__()
        self.found = found

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Fixed:
        super().fit(X)
        return self

    def transform(self, X: Any, copy: Any = None) -> Any:
        return self.found.transform(X)


def test_heads_and_trials_share_one_projection_per_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = network(150, 20, 3)
    made = []
    fit = Projection.of

    def counted(X: Any, rows: Any, *rest: Any) -> Projection:
        made.append(len(rows))
        return fit(X, rows, *rest)

    monkeypatch.setattr(Projection, "of", staticmethod(counted))
    shared, tuning = Projections(X, 5), TuningConfig(trials=4, jobs=2, pca=5)
    for name in ("ridge", "knn"):
        tune(HEADS[name], X, y, make_folds(y, 3, 0), tuning, 0, tmp_path / name, shared)
    assert sorted(made) == [100, 100, 100, 150]


def test_no_more_components_than_rows_and_dimensions(tmp_path: Path) -> None:
    X, y = network(60, 8, 2)
    wide = np.random.default_rng(0).normal(size=(60, 100)).astype(np.float32)
    for features, expected in ((X[:, 1:], 7), (wide, 60)):
        tuning = REDUCED.model_copy(update={"pca": 1000})
        run = tune(HEADS["ridge"], features, y, make_folds(y, 3, 0), tuning, 0, tmp_path / str(expected))
        assert run.pipeline["pca"].n_components_ == expected


@pytest.mark.parametrize(("name", "pca"), [("knn", 0.8), ("logistic_regression", 6), ("decision_tree", 0.8)])
def test_every_head_can_work_on_components_of_features_on_disk(name: str, pca: Any, tmp_path: Path) -> None:
    X, y = network(240, 30, 3)
    folds, tuning = make_folds(y, 3, 0), TuningConfig(trials=2, jobs=1, pca=pca)
    here = tune(HEADS[name], X, y, folds, tuning, 0, tmp_path / "here")
    disk = tune(HEADS[name], stored(tmp_path / "store", X), y, folds, tuning, 0, tmp_path / "disk")
    assert disk.best.params == here.best.params
    np.testing.assert_allclose(disk.best.fold_scores, here.best.fold_scores, atol=1.01 / 80)
    ours, theirs = disk.pipeline["pca"], here.pipeline["pca"]
    signs = np.sign((ours.components_ * theirs.components_).sum(axis=1))
    np.testing.assert_allclose(ours.components_ * signs[:, None], theirs.components_, atol=2e-3)
    for attribute in ("explained_variance_", "explained_variance_ratio_", "singular_values_", "noise_variance_"):
        np.testing.assert_allclose(getattr(ours, attribute), getattr(theirs, attribute), rtol=1e-3)
    assert (ours.n_components_, ours.n_samples_) == (theirs.n_components_, theirs.n_samples_)
    assert np.mean(disk.pipeline.predict(X) == here.pipeline.predict(X)) >= 0.99
    again = clone(disk.pipeline).fit(X, y)
    assert np.mean(again.predict(X) == here.pipeline.predict(X)) >= 0.99


@pytest.mark.parametrize("on_disk", [False, True])
def test_bundles_and_the_hand_over_take_the_components_along(on_disk: bool, tmp_path: Path) -> None:
    X, y = network(200, 20, 3)
    features = stored(tmp_path / "store", X) if on_disk else X
    run = tune(HEADS["logistic_regression"], features, y, make_folds(y, 3, 0), REDUCED, 0, tmp_path / "j")
    bundles.save(
        bundles.ModelBundle("lr", {}, Classification(("a", "b", "c")), {}, run.pipeline, {}), tmp_path / "bundle"
    )
    assert (tmp_path / "bundle" / "head.skops").is_file()
    loaded = bundles.load(tmp_path / "bundle")
    np.testing.assert_array_equal(loaded.predict(X)[1], run.pipeline.predict_proba(X))
    weights, bias = as_layer(loaded.estimator)
    np.testing.assert_allclose(X @ weights.T + bias, run.pipeline.decision_function(X), atol=1e-4)


def test_stage_two_records_the_components(tmp_path: Path) -> None:
    config = stage_one(tmp_path)
    tuning = TuningConfig(trials=1, folds=3, jobs=1, pca=4, nested=True)
    ridge = tuple(head for head in config.heads if head.name == "ridge")
    board = train_heads.run(config.model_copy(update={"tuning": tuning, "heads": ridge})).leaderboard
    assert {row.key: row.components for row in board.rows} == {
        "net/ridge": 4,
        "majority/most_frequent": None,
    }
    note = "Heads work on principal components, found within each fold's training images: up to 4 of net; fewer where a fold has fewer training images."
    assert note in board.notes()
    shown = gather(tmp_path)
    assert note in html.unescape(section("leaderboard", shown))
    assert '"pca": 4' in html.unescape(section("reproduce", shown))
    assert board_of(board.to_json()) == board


def test_components_make_room_for_every_head() -> None:
    shape = (1_000_000, 2048)
    needed, tuning = memory_needed(shape), TuningConfig(memory="8GB", pca=128)
    assert not any(objections(head, shape, 10, needed, tuning, folds=5) for head in HEADS.values())
    share = tuning.model_copy(update={"pca": 0.95})
    assert objections(HEADS["knn"], shape, 10, needed, share, folds=5)[0].endswith(
        "even with its features on disk it needs about 90.3 GB, and 8.0 GB are allowed; raise tuning.memory, set tuning.pca "
        "to a smaller number of components, or choose a layer or pooling with fewer dimensions"
    )


def test_what_is_no_number_of_components_is_told() -> None:
    for value in (0, 1.0, 1.5, -3, True, "many"):
        with pytest.raises(ConfigError) as caught:
            parse({"pca": value})
        expected = f"tuning.pca: expected a number of components such as 64, a share of the variance below 1 such as 0.95, or null, got {value!r}"
        assert caught.value.problems == (expected,)
    assert [parse({"pca": value}).pca for value in (0.95, 64)] == [0.95, 64]


def parse(tuning: dict[str, Any]) -> TuningConfig:
    raw = {"output": "o", "backbones": [{"name": "resnet18"}], "heads": ["knn"], "tuning": tuning}
    return configuration.parse(raw, "test").tuning
