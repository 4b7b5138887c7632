"""Numbers as a target: labels become numbers, heads learn them in any unit, and intervals around predictions hold what they say."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from statistics_cases import interval_coverage, permuted_numbers, regressed
from test_targets import index_of

from pipeline import config as configuration
from pipeline.config import Config, HeadConfig, TuningConfig
from pipeline.data import DatasetIndex
from pipeline.data.targets import Regression, record_of, target_of
from pipeline.errors import DatasetError, HeadError, PipelineError
from pipeline.evaluation import METRICS, HeadPredictions, Predictions, metrics_for, scores
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard
from pipeline.evaluation.leaderboard.recommendation import margin
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.heads import Head, resolve
from pipeline.heads.table import OF_NUMBERS
from pipeline.heads.tuning import TuningRun, make_folds, tune
from pipeline.heads.tuning.evaluation import Problem
from pipeline.report.material import gather
from pipeline.report.page import render
from pipeline.stages import check, extract, predict, train_heads
from pipeline.stages.estimators import Regressor
from pipeline.stages.train_heads.task import make_task

Numbers = NDArray[np.float64]


def numbered(labels: list[str]) -> DatasetIndex:
    index = index_of(labels)
    return dataclasses.replace(index, splits=np.array(["train"] * (len(labels) - 1) + ["test"], dtype=object))


def test_labels_become_numbers_and_the_training_images_tell_their_range() -> None:
    index = numbered(["1.5", "-2", "4e1", "1000"])
    target = Regression.of(index)
    assert target.encode(index).tolist() == [1.5, -2.0, 40.0, 1000.0]
    assert (target.low, target.high, target.width) == ((-2.0,), (40.0,), 1)
    assert target.told(target.learned(np.array([7.0, 8.5]))).tolist() == pytest.approx([7.0, 8.5])
    assert target_of(record_of(target)) == target


def test_a_label_that_is_no_finite_number_is_named() -> None:
    with pytest.raises(DatasetError) as caught:
        Regression.of(index_of(["1", "two", "nan", "4"]))
    assert caught.value.message.startswith("2 of 4 images have a label that is no finite number")
    assert caught.value.problems == ("1.png: two", "2.png: nan")


def test_folds_keep_the_quantiles_in_proportion() -> None:
    y = np.random.default_rng(0).exponential(size=400)
    target = Regression().fitted(y)
    for _, held_out in make_folds(target.strata(y), 5, 0):
        shares = np.histogram(y[held_out], np.quantile(y, np.linspace(0, 1, 11)))[0] / 80
        assert np.abs(shares - 0.1).max() <= 0.0126
    assert (
        target.problem(np.full(5, 3.0)) == "all training images have the same number in label; nothing can be learned"
    )


def test_a_prediction_has_its_interval_and_is_marked_outside_of_the_range() -> None:
    target = dataclasses.replace(Regression().fitted(np.array([0.0, 10.0])), half=(2.5,))
    assert target.csv_columns(3) == ["prediction", "prediction_low", "prediction_high", "prediction_note"]
    assert target.csv_cells(4.0, None, 3) == ["4", "1.5", "6.5", ""]
    assert target.csv_cells(-1.0, None, 3)[3] == "below the training images' 0 to 10"
    assert target.csv_cells(None, None, 3) == [""] * 4
    several = Regression(("age", "height"))
    assert several.csv_columns(3)[4:] == ["height", "height_low", "height_high", "height_note"]


def data(rows: int = 150, columns: int = 1, seed: int = 0) -> tuple[NDArray[np.float32], Numbers]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 12)).astype(np.float32)
    y = (X @ rng.normal(size=(12, 2)) + rng.normal(size=(rows, 2))) * [1e4, 1e-3] + [1e6, 0]
    return X, y[:, 0] if columns == 1 else y


def tuned(head: Head, X: NDArray[np.float32], y: Numbers, folder: Path, scoring: str = "auto") -> TuningRun:
    target = Regression(("a", "b")[: 1 if y.ndim == 1 else 2]).fitted(y)
    folds, tuning = make_folds(target.strata(y), 3, 0), TuningConfig(trials=2, jobs=1, scoring=scoring)
    return tune(head, X, y, folds, tuning, 0, folder / "journal.jsonl", target=target)


@pytest.mark.parametrize(
    ("name", "columns"), [("ridge", 1), ("knn", 1), ("rbf_svm", 1), *((name, 2) for name in OF_NUMBERS)]
)
def test_every_head_learns_numbers_of_any_unit_and_survives_its_bundle(name: str, columns: int, tmp_path: Path) -> None:
    X, y = data(columns=columns)
    fewer = {"random_forest": {"n_estimators": 12}, "mlp": {"max_iter": 30}}.get(name, {})
    run = tuned(dataclasses.replace(OF_NUMBERS[name], fixed=fewer), X, y, tmp_path)
    said, target = run.out_of_fold, run.out_of_fold.target
    assert said.y_pred.shape == y.shape
    assert scores(said).values["r2"] > 0.2
    assert (run.scoring, run.last_fit.sound) == ("mae" if columns == 1 else "r2", True)
    bundle = ModelBundle(name, run.best.params, target.settled(y, said.y_pred), {}, run.pipeline, {})
    bundles.save(bundle, tmp_path / "bundle")
    loaded = bundles.load(tmp_path / "bundle")
    assert loaded.target == bundle.target
    np.testing.assert_array_equal(loaded.predict(X)[0], bundle.predict(X)[0])
    assert loaded.predict(X[:1])[1] is None


@pytest.mark.parametrize("columns", [1, 2])
def test_shared_work_finds_what_scikit_learn_does(columns: int, tmp_path: Path) -> None:
    X, y = data(columns=columns)
    for name, close in (("ridge", 1e-4), ("rbf_svm", 5e-3)):  # libsvm stops at 1e-3 of a standard deviation
        run = tuned(OF_NUMBERS[name], X, y, tmp_path / name)
        model = Ridge() if name == "ridge" else SVR()
        pipeline = make_pipeline(StandardScaler(), model.set_params(**run.best.params))
        if columns == 2 and name == "rbf_svm":
            pipeline = make_pipeline(StandardScaler(), MultiOutputRegressor(pipeline[-1]))
        learned = run.out_of_fold.target.learned(y)
        for fold in range(3):
            held = run.out_of_fold.folds == fold
            expected = run.out_of_fold.target.told(pipeline.fit(X[~held], learned[~held]).predict(X[held]))
            np.testing.assert_allclose(run.out_of_fold.y_pred[held], expected, rtol=0, atol=close * y.std(axis=0).max())


@pytest.mark.parametrize("columns", [1, 2])
def test_ridge_is_fitted_from_blocks_of_rows_too(columns: int) -> None:
    X, y = data(columns=columns)
    target = Regression(("a", "b")[:columns]).fitted(y)
    evaluator = OF_NUMBERS["ridge"].evaluator
    assert evaluator is not None
    assert evaluator.fit_in_blocks is not None
    problem = Problem(OF_NUMBERS["ridge"], X, y, target, (), 0)
    found = evaluator.fit_in_blocks(problem, {"alpha": 3.0}, target.learned(y))
    expected = make_pipeline(StandardScaler(), Ridge(3.0)).fit(X, target.learned(y))
    assert found[-1].coef_.shape == expected[-1].coef_.shape
    np.testing.assert_allclose(found.predict(X), expected.predict(X), atol=1e-4)


def test_scores_are_scikit_learns(tmp_path: Path) -> None:
    _, y = data(columns=2)
    said = Predictions(y, y[::-1], target=Regression(("a", "b")))
    found = scores(said).values
    assert found["mae"] == pytest.approx(mean_absolute_error(y, y[::-1]))
    assert found["rmse"] == pytest.approx(root_mean_squared_error(y, y[::-1]))
    assert found["r2"] == pytest.approx(r2_score(y, y[::-1]))
    assert METRICS["spearman"].score(Predictions(y, np.exp(y / y.std(axis=0)), target=said.target)) == pytest.approx(1)
    assert METRICS["spearman"].score(Predictions(y, 0 * y, target=said.target)) == 0
    assert [metric.name for metric in metrics_for(said.target)] == ["r2", "spearman", "mae", "rmse"]
    assert metrics_for(Regression())[0].name == "mae"
    assert METRICS["mae"].text(-12.0) == "12.0"
    assert METRICS["mae"].text(-0.00123456) == "0.00123"
    assert METRICS["mae"].text(-123456.7) == "123,457"
    assert margin(METRICS["mae"], -200.0, 50) == pytest.approx(10.0)


def test_predictions_come_back_from_their_file(tmp_path: Path) -> None:
    y = np.array([1.5, 2.5, -1.0])
    target = dataclasses.replace(Regression(("age",)).fitted(y), half=(0.5,))
    said = HeadPredictions(Predictions(y, y + 0.25, paths=np.array(["a", "b", "c"]), target=target))
    (tmp_path / "predictions.npz").write_bytes(said.to_bytes())
    back = HeadPredictions.read(tmp_path / "predictions.npz").test
    assert back.target == target
    assert (back.y_true.tolist(), back.y_pred.tolist()) == (y.tolist(), (y + 0.25).tolist())
    assert said.to_bytes() == HeadPredictions(back).to_bytes()


def test_a_head_or_score_of_classes_is_refused_with_those_that_serve() -> None:
    with pytest.raises(HeadError, match=r"unknown head for regression 'logistic_regression'.*; allowed: ridge, knn"):
        resolve(HeadConfig(name="logistic_regression"), "regression")
    X, y = data(30)
    with pytest.raises(
        HeadError, match=r"unknown score of regression 'accuracy'; allowed: auto, mae, rmse, r2, spearman"
    ):
        tuned(OF_NUMBERS["ridge"], X, y, Path(), "accuracy")


def test_intervals_of_scores_cover_the_truth() -> None:
    for share in interval_coverage(30, 100).values():
        assert share >= 0.85  # 0.95 less two and a half standard errors of 30 runs; the proofs have more


def test_intervals_of_predictions_hold_nine_in_ten() -> None:
    rng, inside = np.random.default_rng(0), []
    for _ in range(40):
        y, said = regressed(rng, 300, 0.8)
        target = Regression().settled(y[:200], said[:200])
        inside.append(target.inside(y[200:], said[200:]).mean())
    assert 0.87 <= np.mean(inside) <= 0.93


def test_permuted_numbers_have_few_false_winners() -> None:
    assert permuted_numbers(40) <= 4  # of 200 runs at most 10, in the proofs


def make_config(root: Path) -> Config:
    rng, lines = np.random.default_rng(0), ["path,grey,other"]
    for number in range(90):
        grey = rng.uniform(40, 200)
        pixels = np.clip(rng.normal(grey, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        lines.append(f"{number:02d}.png,{grey:.2f},{-grey:.1f}")
    (root / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    raw = {
        "output": str(root / "output"),
        "dataset": {"source": "manifest", "path": str(root / "list.csv"), "label_columns": "grey", "target": "regression"},
        "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["mean", "pixels"], "heads": ["ridge", "knn"], "tuning": {"trials": 2, "folds": 3},
    }  # fmt: skip
    return configuration.parse(raw, "test")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Leaderboard]:
    """A finished experiment; tests must not change its files."""
    config = make_config(tmp_path_factory.mktemp("numbers"))
    extract.run(config)
    return config, train_heads.run(config).leaderboard


def test_check_says_what_the_labels_are(experiment: tuple[Config, Leaderboard]) -> None:
    lines = check.run(experiment[0])
    assert "90 images with a number from 46.3 to 199.2: 72 train, 18 test" in lines
    assert "2 heads: ridge, knn" in lines
    assert next(line for line in lines if "quarter" in line).startswith("  quarter 1: 46.3 to 84.52: ")


def test_a_leaderboard_of_numbers_has_its_scores_and_the_mean_to_beat(experiment: tuple[Config, Leaderboard]) -> None:
    config, board = experiment
    assert board == read_leaderboard(Path(config.output))
    assert board.rows[-1].key == "mean/constant"
    assert (board.scoring, board.test_metric.name, board.target.kind) == ("mae", "mae", "regression")
    text = board.to_text()
    assert "CV MAE" in text
    assert "test MAE [95 %]" in text
    assert all(name in text for name in ("RMSE", "R2", "Spearman"))
    best, mean = board.best.test, board.rows[-1].test
    assert best is not None
    assert mean is not None
    assert best.values["mae"] < mean.intervals["mae"][0]
    said = HeadPredictions.read(Path(config.output) / str(board.best.bundle) / "predictions.npz")
    assert best.values["mae"] == pytest.approx(mean_absolute_error(said.test.y_true, said.test.y_pred))
    task = make_task(
        config, train_heads.Artifacts(config.output), DatasetIndex.read(Path(config.output) / "dataset"), []
    )
    assert said.test.y_true.tolist() == task.y_test.tolist()


def test_predict_writes_numbers_with_intervals_and_tells_what_is_out_of_range(
    experiment: tuple[Config, Leaderboard], tmp_path: Path
) -> None:
    for name, grey in (("dark", 0), ("mid", 120)):
        Image.fromarray(np.full((16, 16, 3), grey, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    run = predict.run(Path(experiment[0].output), [tmp_path], output=tmp_path / "said.csv")
    dark, mid = csv.DictReader((tmp_path / "said.csv").read_text(encoding="utf-8").splitlines())
    assert float(mid["prediction_low"]) < float(mid["prediction"]) < float(mid["prediction_high"])
    assert float(dark["prediction"]) < float(mid["prediction"])
    loaded = Regressor.load(experiment[0].output)
    said = loaded.predict([tmp_path / "dark.png", tmp_path / "mid.png"])
    np.testing.assert_allclose(said, [float(dark["prediction"]), float(mid["prediction"])], rtol=1e-6)
    assert not hasattr(loaded, "predict_proba")
    marked = {row["prediction_note"] for row in (dark, mid)} - {""}
    assert all(f"  {note}: 1" in run.summary_lines() for note in marked)


def test_several_columns_are_one_target_repeats_included(
    experiment: tuple[Config, Leaderboard], tmp_path: Path
) -> None:
    config = experiment[0]
    dataset = config.dataset.model_copy(update={"label_columns": ("grey", "other")})
    assert dataset.kinds == ("regression",)
    config = config.model_copy(
        update={
            "dataset": dataset,
            "heads": (HeadConfig(name="ridge"),),
            "tuning": config.tuning.model_copy(update={"nested": True, "seeds": 2, "trials": 1}),
            "output": str(tmp_path / "two"),
            "store": str(Path(config.output).parent / "features"),
        }
    )
    extract.run(config)
    board = train_heads.run(config).leaderboard
    assert board.target.columns == ("grey", "other")
    assert board.scoring == "r2"
    assert board.best.cv_mean > 0.5
    nested, seeds, test = board.best.nested, board.best.seeds, board.best.test
    assert nested is not None
    assert seeds is not None
    assert test is not None
    assert nested.mean > 0.5
    assert seeds.test_scores[0] == test.values["r2"]
    assert seeds.test_scores[1] == pytest.approx(test.values["r2"], abs=0.05)


def test_numbers_that_nobody_called_so_are_asked_about(experiment: tuple[Config, Leaderboard]) -> None:
    config = experiment[0]
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"target": "auto"})})
    with pytest.raises(PipelineError) as caught:
        check.run(config)
    assert "is this a number to predict? Then set dataset.target: regression." in " ".join(caught.value.problems)


def test_the_report_shows_predicted_beside_true_and_the_furthest_off(experiment: tuple[Config, Leaderboard]) -> None:
    config, board = experiment
    output = Path(config.output)
    page = render(gather(output))
    said = HeadPredictions.read(output / str(board.best.bundle) / "predictions.npz").test
    off = np.abs(said.y_pred - said.y_true)
    assert page.index(f"is {said.y_true[off.argmax()]:.4g}") > page.index("Furthest off")
    inside = said.target.inside(said.y_true, said.y_pred)
    assert f"{100 * inside.mean():.1f}" in page[page.index("Half width") :]
    assert 'data-chart="predicted-0"' in page
    assert 'data-chart="residuals-0"' in page
    text = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", page)
    assert not re.search(r"accuracy|Confusion|\bclasses\b|F1", text), re.findall(
        r".{40}(?:accuracy|Confusion|\bclasses\b|F1).{40}", text
    )
