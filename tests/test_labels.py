"""Several labels for each image: cells become columns, folds keep every label, heads learn all at once, thresholds are found out of fold."""

from __future__ import annotations

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import average_precision_score, f1_score, hamming_loss
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from statistics_cases import label_coverage, labelled, permuted_labels
from test_targets import index_of

from pipeline import config as configuration
from pipeline.config import Config, HeadConfig, TuningConfig
from pipeline.data.classes import MultiLabel, best_threshold
from pipeline.data.index import SplitPlan
from pipeline.data.splits import make_test_split
from pipeline.data.targets import record_of, target_of
from pipeline.errors import DatasetError, PipelineError
from pipeline.evaluation import METRICS, HeadPredictions, Predictions, compare, metrics_for, per_class, scores
from pipeline.evaluation.calibration import fit_sigmoids
from pipeline.evaluation.comparison import exchange_test
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard
from pipeline.evaluation.metric import influence, label_precision, weighted_mean_precision
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.heads import Head, resolve
from pipeline.heads.table import OF_LABELS, constant_guess
from pipeline.heads.tuning import TuningRun, make_folds, tune
from pipeline.report.material import gather
from pipeline.report.page import render
from pipeline.stages import check, extract, predict, refit, train_heads
from pipeline.stages.estimators import Classifier

Flags = NDArray[np.bool_]
ABC = MultiLabel(("a", "b", "c"))


def test_cells_become_columns_and_come_back() -> None:
    index = index_of(["b|a", "", "c", "a"])
    target = MultiLabel.of(index)
    assert target == ABC
    y = target.encode(index)
    assert y.astype(int).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert target.decode(y).tolist() == ["a|b", "", "c", "a"]
    np.testing.assert_array_equal(target.restored(target.decode(y)), y)
    settled = dataclasses.replace(target, thresholds=(0.1, 0.5, 1.0))
    assert target_of(record_of(settled)) == settled
    assert MultiLabel.in_words(index) == "with any of 3 labels, 1.0 on average"
    assert sorted(MultiLabel.as_classes(index).labels.tolist()) == ["(no label)", "a", "a", "b", "c"]


def test_columns_of_0_and_1_are_the_labels_and_other_cells_are_named() -> None:
    cells = np.array([["0", "1"], ["True", "no"], ["1.0", "0.0"]], dtype=object)
    index = dataclasses.replace(index_of(["", "", ""]), labels=cells, names=("cat", "dog"))
    target = MultiLabel.of(index)
    assert target.classes == ("cat", "dog")
    assert target.decode(target.encode(index)).tolist() == ["dog", "cat", "cat"]
    wrong = dataclasses.replace(index, labels=np.array([["0", "1"], ["", "1"], ["2", "0"]], dtype=object))
    with pytest.raises(DatasetError, match="2 of 3 images have a cell that is neither 0 nor 1") as caught:
        MultiLabel.of(wrong)
    assert caught.value.problems == ("1.png: cat is ''", "2.png: cat is '2'")


def test_what_nothing_can_be_learned_of_is_said() -> None:
    assert "set dataset.target: classification" in str(MultiLabel(("a",)).problem(np.array([[True], [False]])))
    assert "on all training images or on none" in str(ABC.problem(np.array([[True, False, True]] * 4)))
    assert ABC.problem(np.eye(3, dtype=bool)) is None


def drawn(n: int, seed: int = 0) -> Flags:
    return np.random.default_rng(seed).random((n, 6)) < [0.02, 0.05, 0.1, 0.3, 0.5, 0.9]


@pytest.mark.parametrize("grouped", [False, True])
def test_folds_keep_the_share_of_every_label_and_groups_whole(grouped: bool) -> None:
    y, target = drawn(500), MultiLabel(tuple("abcdef"))
    groups = np.random.default_rng(1).integers(0, 200, 500) if grouped else None
    folds = make_folds(target.strata(y), 5, 0, groups)
    assert sorted(np.concatenate([held for _, held in folds]).tolist()) == list(range(500))
    for train, held in folds:
        expected = y.sum(axis=0) / 5
        assert (np.abs(y[held].sum(axis=0) - expected) <= (4 if grouped else 1) + 0.02 * expected).all()
        assert abs(len(held) - 100) <= (6 if grouped else 2)
        assert groups is None or not set(groups[train]) & set(groups[held])
    again = make_folds(target.strata(y), 5, 0, groups)
    assert all((one[1] == other[1]).all() for one, other in zip(folds, again, strict=True))


def test_the_test_split_keeps_the_share_of_every_label() -> None:
    y, target = drawn(500), MultiLabel(tuple("abcdef"))
    index = index_of(target.decode(y).tolist())
    splits = make_test_split(index, SplitPlan(0, 0.2), np.full(500, -1, dtype=np.int8), ("multilabel",))
    found = y[splits == "test"].sum(axis=0)
    assert (np.abs(found - 0.2 * y.sum(axis=0)) <= 1 + 0.03 * y.sum(axis=0)).all(), (found, y.sum(axis=0))


def test_average_precision_is_scikit_learns_also_under_weights() -> None:
    y, rng = drawn(200), np.random.default_rng(0)
    said = np.round(rng.normal(size=y.shape) + y, 1)  # many are equal
    given = Predictions(y, y, said)
    assert METRICS["mean_average_precision"].score(given) == pytest.approx(
        average_precision_score(y, said, average="macro")
    )
    counts = rng.integers(0, 3, (5, 200))
    repeated = [(np.repeat(y, row, axis=0), np.repeat(said, row, axis=0)) for row in counts]
    expected = [average_precision_score(*pair, average="macro") for pair in repeated]
    assert weighted_mean_precision(given)(counts) == pytest.approx(np.array(expected))
    nudged = 1 + 1e-5 * np.concatenate([np.eye(200), -np.eye(200)])
    up, down = np.split(weighted_mean_precision(given)(nudged), 2)
    np.testing.assert_allclose(influence(given).sum(axis=1), (up - down) / 2e-5, atol=1e-7)
    assert np.isnan(label_precision(np.zeros(200, dtype=bool), said[:, 0])(counts)).all()


def test_scores_are_scikit_learns() -> None:
    y, rng = drawn(300), np.random.default_rng(0)
    p = np.clip(0.3 * rng.normal(size=y.shape) + y, 0, 1)
    said = Predictions(y, p > 0.5, p, target=MultiLabel(tuple("abcdef")))
    found = scores(said)
    assert [metric.name for metric in metrics_for(said.target)] == list(found.values)
    assert found["mean_average_precision"] == pytest.approx(average_precision_score(y, p, average="macro"))
    assert found["macro_f1"] == pytest.approx(f1_score(y, p > 0.5, average="macro"))
    assert found["micro_f1"] == pytest.approx(f1_score(y, p > 0.5, average="micro"))
    assert found["hamming_loss"] == pytest.approx(hamming_loss(y, p > 0.5))
    assert found["subset_accuracy"] == np.mean((y == (p > 0.5)).all(axis=1))
    assert all(found.intervals[name][0] < value < found.intervals[name][1] for name, value in found.values.items())
    assert METRICS["hamming_loss"].text(-0.05) == "5.0"
    low, high = scores(dataclasses.replace(said, probabilities=y.astype(float))).intervals["mean_average_precision"]
    assert 0.7 < low < 0.95 < high == 1


@pytest.mark.parametrize("name", ["mean_average_precision", "micro_f1"])
def test_what_images_add_varies_as_the_score_does(name: str) -> None:
    metric, rng = METRICS[name], np.random.default_rng(0)
    samples = [labelled(rng, 400) for _ in range(200)]
    errors = [metric.contributions(sample).std() / 20 for sample in samples]
    assert np.mean(errors) == pytest.approx(np.std([metric.score(sample) for sample in samples]), rel=0.15)


def test_an_exchange_of_answers_is_seen_where_it_matters() -> None:
    y, rng = drawn(200), np.random.default_rng(0)
    good, bad = (y + spread * rng.normal(size=y.shape) for spread in (0.6, 1.2))
    a, b = (Predictions(y, part > 0.5, part, target=MultiLabel(tuple("abcdef"))) for part in (good, bad))
    metric = METRICS["mean_average_precision"]
    assert exchange_test(metric, a, b, 0) <= 0.01
    assert exchange_test(metric, a, a, 0) == 1
    units = np.repeat(np.arange(100), 2)
    heads = {"a": dataclasses.replace(a, units=units), "b": dataclasses.replace(b, units=units)}
    assert [row.no_evidence for row in compare(heads, "a", metric=metric)] == [True, False]


def test_a_threshold_has_the_highest_f1_and_a_label_of_none_is_never_said() -> None:
    y = np.array([1, 1, 0, 1, 0, 0], dtype=bool)
    p = np.array([0.9, 0.8, 0.6, 0.4, 0.2, 0.1])
    assert best_threshold(y, p) == pytest.approx(0.3)
    assert best_threshold(np.zeros(6, dtype=bool), p) == 1.0
    rng = np.random.default_rng(0)
    p, y = rng.random(300).round(2), rng.random(300) < 0.3
    best = max(f1_score(y, p >= cut) for cut in np.unique(p))
    assert f1_score(y, p >= best_threshold(y, p)) == pytest.approx(best)


def test_labels_of_a_fold_are_said_by_thresholds_that_other_folds_tell() -> None:
    rng, target = np.random.default_rng(1), MultiLabel(("a", "b"))
    y, scores_of, folds = rng.random((90, 2)) < 0.3, rng.normal(size=(90, 2)) - 5, np.arange(90) % 3
    said = target.decided(y, ~y, scores_of, "each", folds)
    together = target.decided(y, ~y, scores_of, "all", folds)
    for fold in range(3):
        own, others = folds == fold, folds != fold
        for label in range(2):
            cut = best_threshold(y[others, label], scores_of[others, label])
            np.testing.assert_array_equal(said[own, label], scores_of[own, label] >= cut)
        cut = best_threshold(y[others].ravel(), scores_of[others].ravel())
        np.testing.assert_array_equal(together[own], scores_of[own] >= cut)
    whole = target.decided(y, ~y, scores_of, "each")
    assert f1_score(y[:, 0], whole[:, 0]) == max(f1_score(y[:, 0], scores_of[:, 0] >= cut) for cut in scores_of[:, 0])
    assert target.decided(y, y, None, "each", folds) is y  # of a head without scores


def test_a_search_by_macro_f1_is_judged_by_thresholds_as_its_row_is(tmp_path: Path) -> None:
    X, y = data()
    run = tuned(OF_LABELS["ridge"], X, y, tmp_path, "macro_f1")
    found, metric = run.out_of_fold, METRICS["macro_f1"]
    assert found.scores is not None
    assert found.folds is not None
    said = found.target.decided(y, y, found.scores, "each", found.folds)
    assert run.best.mean == pytest.approx(f1_score(y, said, average="macro"), abs=1e-12)
    assert run.best.mean > f1_score(y, found.scores > 0, average="macro") + 0.05
    for fold, score in enumerate(run.best.fold_scores):
        own = found.folds == fold
        most = metric.score(found.rows(own)) if score is None else score
        assert most >= metric.score(dataclasses.replace(found.rows(own), y_pred=said[own]))
    assert run.last_fit.sound
    again = tuned(OF_LABELS["ridge"], X, y, tmp_path, "macro_f1")
    assert (again.best.mean, again.best.fold_scores) == (run.best.mean, run.best.fold_scores)
    assert again.replayed == 6


def test_sigmoids_find_the_probabilities_and_keep_the_order() -> None:
    rng = np.random.default_rng(0)
    scores_of = rng.normal(size=(4000, 3)) * [1, 5, 1] - [1, 0, 0]
    true = 1 / (1 + np.exp(-(scores_of * [2, 0.2, -1] + [1, 0, 0])))
    made = fit_sigmoids(scores_of, rng.random((4000, 3)) < true)
    found = made.probabilities(scores_of)
    assert np.abs(found - true)[:, :2].mean() < 0.02
    assert found[:, 2].std() < 0.01  # what goes the wrong way tells nothing
    for column in range(3):
        assert (np.diff(found[np.argsort(scores_of[:, column]), column]) >= 0).all()


def data(rows: int = 200, seed: int = 0) -> tuple[NDArray[np.float32], Flags]:
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 12)).astype(np.float32)
    return X, (X @ rng.normal(size=(12, 4)) + rng.normal(size=(rows, 4))) > [6, 2, 0, -2]


def tuned(head: Head, X: NDArray[np.float32], y: Flags, folder: Path, scoring: str = "auto") -> TuningRun:
    target = MultiLabel(("a", "b", "c", "d"))
    folds, tuning = make_folds(target.strata(y), 3, 0), TuningConfig(trials=2, jobs=1, scoring=scoring)
    return tune(head, X, y, folds, tuning, 0, folder / "journal.jsonl", target=target)


@pytest.mark.parametrize("name", OF_LABELS)
def test_every_head_learns_labels_and_survives_its_bundle(name: str, tmp_path: Path) -> None:
    X, y = data()
    y[:, 0] &= np.arange(200) < 3  # a label so rare that folds are without it
    fewer = {"random_forest": {"n_estimators": 8}, "mlp": {"max_iter": 20}}.get(name, {})
    run = tuned(dataclasses.replace(OF_LABELS[name], fixed=fewer), X, y, tmp_path)
    found = run.out_of_fold
    assert found.scores is not None
    guess = average_precision_score(y[:, 1:], np.zeros((200, 3)) + y[:, 1:].mean(axis=0))
    assert average_precision_score(y[:, 1:], found.scores[:, 1:]) > guess + (0.05 if name == "decision_tree" else 0.2)
    assert (run.scoring, run.last_fit.sound) == ("mean_average_precision", True)
    calibrator = fit_sigmoids(found.scores, y)
    target = found.target.settled(y, found.y_pred, calibrator.probabilities(found.scores))
    bundle = ModelBundle(name, run.best.params, target, {}, run.pipeline, {}, calibrator)
    bundles.save(bundle, tmp_path / "bundle")
    loaded = bundles.load(tmp_path / "bundle")
    assert (loaded.target, loaded.calibrator) == (target, calibrator)
    labels, probabilities = loaded.predict(X)
    assert labels.tolist() == bundle.predict(X)[0].tolist()
    np.testing.assert_array_equal(target.restored(labels), probabilities >= np.array(target.thresholds))


def test_shared_work_finds_what_scikit_learn_does(tmp_path: Path) -> None:
    X, y = data()
    models = {
        "ridge": RidgeClassifier(),
        "logistic_regression": OneVsRestClassifier(LogisticRegression(tol=1e-8, max_iter=1000)),
        "linear_svm": OneVsRestClassifier(LinearSVC(tol=1e-8, max_iter=100_000)),
    }
    for name, model in models.items():
        run = tuned(OF_LABELS[name], X, y, tmp_path / name)
        inner = getattr(model, "estimator", model)
        inner.set_params(**run.best.params)
        assert run.out_of_fold.scores is not None
        for fold in range(3):
            held = run.out_of_fold.folds == fold
            expected = (
                make_pipeline(StandardScaler(), model).fit(X[~held], y[~held].astype(int)).decision_function(X[held])
            )
            np.testing.assert_allclose(run.out_of_fold.scores[held], expected, atol=5e-3 * np.abs(expected).max())
        whole = make_pipeline(StandardScaler(), model).fit(X, y.astype(int)).decision_function(X)
        np.testing.assert_allclose(run.pipeline.decision_function(X), whole, atol=5e-3 * np.abs(whole).max())


def test_the_guess_says_the_share_of_each_label_in_every_fold(tmp_path: Path) -> None:
    X, y = data()
    run = tuned(constant_guess(y, 4), X[:, :1], y, tmp_path)
    assert run.best.mean == pytest.approx(y.mean(axis=0).mean())
    assert run.out_of_fold.scores is not None
    assert (np.ptp(run.out_of_fold.scores, axis=0) == 0).all()


def test_heads_of_labels_go_by_the_names_of_those_of_classes(tmp_path: Path) -> None:
    assert resolve(HeadConfig(name="linear_svm"), "multilabel").targets == ("multilabel",)
    with pytest.raises(PipelineError, match="unknown head for multilabel 'lda'"):
        resolve(HeadConfig(name="lda"), "multilabel")
    X, y = data(60)
    with pytest.raises(PipelineError, match="unknown score of multilabel 'accuracy'"):
        tuned(OF_LABELS["ridge"], X, y, tmp_path, "accuracy")
    assert tuned(OF_LABELS["ridge"], X, y, tmp_path, "micro_f1").scoring == "micro_f1"


def test_intervals_of_scores_cover_the_truth() -> None:
    for name, share in label_coverage(60).items():
        assert share >= 0.88, name  # 0.95 less two and a half standard errors of 60 runs; the proofs have more


@pytest.mark.parametrize("metric", ["mean_average_precision", "macro_f1"])
def test_permuted_labels_have_few_false_winners(metric: str) -> None:
    assert permuted_labels(30, metric=metric) <= 3  # of 200 runs at most 10, in the proofs


def test_predictions_are_columns_and_come_back_from_their_file(tmp_path: Path) -> None:
    y = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], dtype=bool)
    target = dataclasses.replace(ABC, thresholds=(0.5, 0.25, 0.5))
    assert target.csv_columns(3) == ["labels", "probability_a", "probability_b", "probability_c"]
    assert target.csv_cells("a|c", np.array([0.75, 0.125, 0.5]), 3) == ["a|c", "0.750000", "0.125000", "0.500000"]
    assert target.csv_cells(None, None, 3) == ["", "", "", ""]
    assert [target.counted_as(text) for text in ("", "a", "a|c")] == ["no label", "1 label", "2 labels"]
    said = HeadPredictions(Predictions(y, ~y, paths=np.array(["a", "b", "c"]), target=target))
    (tmp_path / "predictions.npz").write_bytes(said.to_bytes())
    back = HeadPredictions.read(tmp_path / "predictions.npz").test
    assert back.target == target
    np.testing.assert_array_equal(back.y_true, y)
    np.testing.assert_array_equal(back.y_pred, ~y)
    assert said.to_bytes() == HeadPredictions(back).to_bytes()


def make_config(root: Path) -> Config:
    """Images that are red, bright or neither, or both; in the list as cells of labels, and as columns."""
    rng, lines = np.random.default_rng(0), ["path,tags,red,bright,words"]
    for number in range(90):
        red, bright = rng.random(2) < 0.4
        colour = np.array([60, 60, 60]) + 50 * bright + [70 * red, 0, 0]
        pixels = np.clip(rng.normal(colour, 30, (16, 16, 3)) + rng.normal(0, 25, 3), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        tags = "|".join(name for name, there in (("red", red), ("bright", bright)) if there)
        lines.append(f"{number:02d}.png,{tags},{int(red)},{int(bright)},{tags or 'plain'}")
    (root / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    raw = {
        "output": str(root / "output"),
        "dataset": {"source": "manifest", "path": str(root / "list.csv"), "label_columns": "tags", "target": "multilabel"},
        "backbones": [{"name": "squeezenet1_1", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["shares", "pixels"], "heads": ["logistic_regression", "knn"], "tuning": {"trials": 2, "folds": 3},
    }  # fmt: skip
    return configuration.parse(raw, "test")


def asked(config: Config, **keys: object) -> Config:
    data = {"source": "manifest", "path": config.dataset.path, **keys}
    return config.model_copy(update={"dataset": type(config.dataset).model_validate(data)})


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Leaderboard]:
    """A finished experiment; tests must not change its files."""
    config = make_config(tmp_path_factory.mktemp("labels"))
    extract.run(config)
    return config, train_heads.run(config).leaderboard


def test_check_says_what_the_labels_are_and_asks_where_nobody_said_so(experiment: tuple[Config, Leaderboard]) -> None:
    config = experiment[0]
    lines = check.run(config)
    said = next(line for line in lines if "labels" in line)
    assert said.startswith("90 images with any of 2 labels, 0.8 on average: 7")
    assert any(line.startswith("  (no label): ") for line in lines)
    assert any(line.startswith("  red: ") for line in lines)
    with pytest.raises(PipelineError) as caught:
        check.run(asked(config, label_columns="words"))
    assert "are these several labels per image? Then set dataset.target: multilabel" in " ".join(caught.value.problems)
    assert said in check.run(asked(config, label_columns="tags", label_separator="|"))
    assert said in check.run(asked(config, label_columns=["red", "bright"], target="multilabel"))


def test_a_leaderboard_of_labels_has_its_scores_and_the_shares_to_beat(
    experiment: tuple[Config, Leaderboard],
) -> None:
    config, board = experiment
    assert board == read_leaderboard(Path(config.output))
    assert board.rows[-1].key == "shares/constant"
    assert (board.scoring, board.test_metric.name) == ("mean_average_precision", "mean_average_precision")
    assert all(name in board.to_text() for name in ("CV mAP", "F1", "micro", "subset", "Hamming"))
    best, shares = board.best.test, board.rows[-1].test
    assert best is not None
    assert shares is not None
    assert best.values["mean_average_precision"] > shares.values["mean_average_precision"] + 0.2
    said = HeadPredictions.read(Path(config.output) / str(board.best.bundle) / "predictions.npz")
    assert said.out_of_fold is not None
    probabilities = said.out_of_fold.probabilities
    assert probabilities is not None
    assert said.test.target == said.out_of_fold.target
    y, cut = said.out_of_fold.y_true, np.array(said.test.target.thresholds)
    chosen, plain = (f1_score(y, probabilities >= at, average="macro") for at in (cut, 0.5))
    assert chosen >= plain
    held_out = said.out_of_fold.target.decided(y, y, probabilities, "each", said.out_of_fold.folds)
    np.testing.assert_array_equal(said.out_of_fold.y_pred, held_out)
    np.testing.assert_array_equal(said.test.y_pred, said.test.probabilities >= cut)


def test_the_report_tells_label_by_label_and_shows_the_worst_misses(experiment: tuple[Config, Leaderboard]) -> None:
    config, board = experiment
    output = Path(config.output)
    page = render(gather(output))
    test = HeadPredictions.read(output / str(board.best.bundle) / "predictions.npz").test
    rows = per_class(test)
    assert [row.label for row in rows] == ["bright", "red"]
    assert test.probabilities is not None
    assert [row.average_precision for row in rows] == average_precision_score(
        test.y_true, test.probabilities, average=None
    ).tolist()
    assert [row.support for row in rows] == test.y_true.sum(axis=0).tolist()
    assert [row.threshold for row in rows] == list(test.target.thresholds)
    part = page[page.index("Label by label</h2>") :]
    assert f"{rows[1].threshold:.2f}" in part
    assert not test.correct.all()
    off = np.where(test.y_true != test.y_pred, np.abs(test.probabilities - test.y_true), 0).sum(axis=1).argmax()
    worst = part[part.index("Worst misses") :]
    assert worst.index(str(np.asarray(test.paths)[off])) == min(
        worst.index(f"{n:02d}.png") for n in range(90) if f"{n:02d}.png" in worst
    )
    text = " ".join(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", page).split())
    assert not re.search(r"(?<![Ss]ubset.)accuracy|Confusion|\bclasses\b", text), re.findall(
        r".{40}(?:accuracy|Confusion|\bclasses\b).{40}", text
    )


def test_predict_writes_labels_and_a_probability_of_each(
    experiment: tuple[Config, Leaderboard], tmp_path: Path
) -> None:
    Image.fromarray(np.full((16, 16, 3), (180, 110, 110), dtype=np.uint8)).save(tmp_path / "one.png")
    run = predict.run(Path(experiment[0].output), [tmp_path], output=tmp_path / "said.csv")
    (row,) = csv.DictReader((tmp_path / "said.csv").read_text(encoding="utf-8").splitlines())
    bundle = bundles.load(run.bundles[""])
    shares = [float(row[f"probability_{name}"]) for name in ("bright", "red")]
    expected = [name for name, share, cut in zip(("bright", "red"), shares, bundle.target.thresholds, strict=True) if share >= cut]  # fmt: skip
    assert row["labels"] == "|".join(expected)
    loaded = Classifier.load(experiment[0].output)
    assert loaded.predict(tmp_path / "one.png").tolist() == [[int(name in expected) for name in loaded.classes_]]
    np.testing.assert_allclose(loaded.predict_proba(tmp_path / "one.png"), [shares], atol=1e-6)
    assert any("label" in line and line.endswith(": 1") for line in run.summary_lines())


def test_refit_learns_labels_again_and_judges_them_by_thresholds(experiment: tuple[Config, Leaderboard]) -> None:
    by_f1 = experiment[0].tuning.model_copy(update={"scoring": "macro_f1"})
    (head,) = refit.run(experiment[0].model_copy(update={"tuning": by_f1})).heads[""]
    assert (head.scoring, head.new_classes) == ("macro_f1", ())
    assert head.held_out > 0.5
    assert head.same == head.test
