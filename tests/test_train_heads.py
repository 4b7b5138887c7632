"""Stage two on a made-up store: what is chosen and by what, what is kept, and that torch is not needed."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import fingerprint_of_index, rewrite, write_index
from guard import QUICK_PAGES
from numpy.typing import NDArray

from pipeline import config as configuration
from pipeline.config import BackboneConfig, Config, HeadConfig, TuningConfig
from pipeline.data import DatasetIndex, Failure, lineage, record_failures
from pipeline.data.targets import Classification
from pipeline.embed.records import EmbeddingRecord, read_asked_records, read_records, write_records
from pipeline.embed.spec import EmbeddingSpec
from pipeline.errors import DatasetError, HeadError, PipelineError, StoreError
from pipeline.evaluation import METRICS, HeadPredictions
from pipeline.evaluation.leaderboard.recommendation import advice
from pipeline.evaluation.leaderboard.table import cross_validated
from pipeline.experiment import FEATURES, Artifacts, read_document, write_document
from pipeline.export import bundle as bundles
from pipeline.heads import HEADS
from pipeline.heads.table import constant_guess
from pipeline.heads.tuning import make_folds, tune
from pipeline.images import policy_key
from pipeline.io.digests import content_digest, digests_from_hex, digests_to_hex
from pipeline.stages import train_heads
from pipeline.stages.train_heads.row import reweighted
from pipeline.stages.train_heads.task import unseen_task
from pipeline.store import FeatureStore
from pipeline.store.writer import StoreWriter

CLASSES = ("boot, left", "凉鞋", "shirt")
N, DIM = 150, 8


def make_config(output: Path, **tuning: Any) -> Config:
    raw = {
        "output": str(output),
        "backbones": [{"name": "resnet18"}],
        "baselines": ["majority", "pixels"],
        "heads": ["logistic_regression", "nearest_centroid", "decision_tree"],
        "tuning": {"strategy": "random", "trials": 4, "folds": 3, **tuning},
    }
    return configuration.parse(raw, "test")


def quick(config: Config) -> Config:
    """The cheapest head on the backbone, and the guess: for what any row shows."""
    return config.model_copy(update={"heads": (HeadConfig(name="nearest_centroid"),), "baselines": ("majority",)})


def stage_one(output: Path, *, labels_seed: int = 0, alike: Sequence[tuple[int, int]] = ()) -> DatasetIndex:
    """Write what stage one leaves behind: an index, two stores, features.json; of rows that are `alike` one nearly is the other."""
    files = Artifacts(output)
    rng = np.random.default_rng(0)
    codes = np.arange(N) % 3
    splits = np.where(np.arange(N) % 5 == 0, "test", "train").astype(object)
    labels = np.array(CLASSES, dtype=object)[codes]
    if labels_seed:
        test = np.flatnonzero(splits == "test")
        labels[test] = labels[np.random.default_rng(labels_seed).permutation(test)]
    paths = np.array([f"{number:04d}.png" for number in range(N)], dtype=object)
    digests = digests_from_hex(content_digest(path.encode()).hex() for path in paths)
    index = DatasetIndex(output, paths, labels, splits, None, digests, np.full(N, 10))
    index.write(files.dataset)
    good = rng.normal(size=(N, DIM)) + 1.2 * np.eye(3, DIM)[codes]
    for first, second in alike:
        good[second] = good[first] + 0.01
    records = []
    for name, kind, X in (("net-random", "backbone", good), ("pixels", "baseline", rng.normal(size=(N, DIM)))):
        spec = EmbeddingSpec(
            name, kind, "test", name, {}, "w", "d", "", "none", DIM, {}, "fp32", "torch", kind == "backbone"
        )
        path = output / "features" / f"{name}.store"  # as release 0.1 laid it out
        with StoreWriter.open(path, spec.identity(), DIM) as writer:
            writer.append(digests, X.astype(np.float32))
        digest = FeatureStore.open(path).digest
        records.append(EmbeddingRecord(name, spec, path.relative_to(output).as_posix(), digest, None, 0))
    write_records(files.features, records, make_config(output), index.fingerprint())
    return index


def without_clocks(path: Path) -> dict[str, Any]:
    """A leaderboard without what differs between two equal runs."""
    document = json.loads(path.read_text(encoding="utf-8"))
    del (
        document["digest"],
        document["provenance"]["date"],
        document["provenance"]["config"]["output"],
        document["provenance"]["command"],
    )
    for row in document["rows"]:
        for key in ("fit_seconds", "predict_seconds", "search_seconds"):
            del row[key]
    return dict(document)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, train_heads.HeadsRun]:
    output = tmp_path_factory.mktemp("finished")
    stage_one(output)
    config = make_config(output)
    return config, train_heads.run(config)


def test_every_embedding_and_head_has_a_row_with_its_floors(
    finished: tuple[Config, train_heads.HeadsRun],
) -> None:
    rows = {row.key: row for row in finished[1].leaderboard.rows}
    assert set(rows) == {
        "net-random/logistic_regression",
        "net-random/nearest_centroid",
        "net-random/decision_tree",
        "pixels/logistic_regression",
        "majority/most_frequent",
    }
    assert rows["net-random/logistic_regression"].note == "untrained"
    assert rows["pixels/logistic_regression"].note == "baseline"
    majority = rows["majority/most_frequent"]
    assert majority.test is not None
    assert majority.test.accuracy == pytest.approx(1 / 3)
    assert majority.cv_mean == pytest.approx(1 / 3)
    informed, blind = rows["net-random/logistic_regression"], rows["pixels/logistic_regression"]
    assert informed.cv_mean > 0.6 > 0.5 > blind.cv_mean


def test_the_best_is_chosen_by_cross_validation(finished: tuple[Config, train_heads.HeadsRun]) -> None:
    leaderboard = finished[1].leaderboard
    assert leaderboard.best.cv_mean == max(row.cv_mean for row in leaderboard.rows)


def test_the_terminal_says_which_bundle_is_recommended_and_how_to_predict_with_it(
    finished: tuple[Config, train_heads.HeadsRun],
) -> None:
    result = finished[1]
    board, root = result.leaderboard, result.files.root
    assert board.recommendation is not None
    assert board.recommendation.recommended == board.best.key
    assert not any(line.startswith("recommended") for line in result.summary_lines())
    other = next(row for row in board.rows[1:] if row.embedding == "net-random")
    recommendation = replace(board.recommendation, recommended=other.key)
    lines = replace(result, leaderboard=replace(board, recommendation=recommendation)).summary_lines()
    assert f"best head    {root / str(board.best.bundle)}" in lines
    assert f"recommended  {root / str(other.bundle)}" in lines
    assert bundles.load(root / str(other.bundle)).head == other.head
    assert (
        "`manyheads predict` takes the best row when it is given the output folder; for the recommended one give it "
        f"{other.bundle} in there." in lines[0]
    )
    guess = board.row("majority/most_frequent")
    lines = replace(
        result, leaderboard=replace(board, recommendation=replace(recommendation, recommended=guess.key))
    ).summary_lines()
    assert not any(line.startswith("recommended") or "manyheads predict` takes" in line for line in lines)


def test_the_commands_it_prints_can_be_pasted_into_a_shell(
    finished: tuple[Config, train_heads.HeadsRun], tmp_path: Path
) -> None:
    output = tmp_path / "it's (my) photos"
    shutil.copytree(finished[1].files.root, output)
    result = train_heads.run(finished[0].model_copy(update={"output": str(output)}))
    told = next(line for line in result.summary_lines() if line.startswith("to predict   "))
    assert shlex.split(told.removeprefix("to predict   ")) == [
        "manyheads", "predict", str(output), "IMAGES", "--output", "labels.csv",
    ]  # fmt: skip
    commands = result.leaderboard.provenance["command"].splitlines()
    assert [shlex.split(line) for line in commands] == [
        ["manyheads", stage, str(output / "config.yaml")] for stage in ("features", "heads")
    ]
    bundle = output / str(result.leaderboard.best.bundle) / "bundle.json"
    rewrite(bundle, json.loads(bundle.read_text()) | {"runs_code_when_loaded": True})
    assert next(line for line in result.summary_lines() if line.startswith("to predict")) == f"{told} --trust"


@pytest.mark.parametrize("scoring", ["macro_f1", "log_loss", "roc_auc"])
def test_the_score_that_is_tuned_is_the_one_that_is_compared(tmp_path: Path, scoring: str) -> None:
    """What is kept out of fold gives the fold scores of the search again, and they the differences."""
    stage_one(tmp_path)
    raw = make_config(tmp_path, scoring=scoring, trials=2).model_dump(mode="json")
    raw.update(baselines=["pixels", "majority"], heads=["nearest_centroid" if scoring == "macro_f1" else "knn"])
    board = train_heads.run(configuration.parse(raw, "test")).leaderboard
    pooled, metric = {}, METRICS[scoring]
    for row in board.rows:
        held_out = HeadPredictions.read(tmp_path / str(row.bundle) / "predictions.npz").out_of_fold
        assert held_out is not None
        assert held_out.folds is not None
        answers = replace(held_out, probabilities=held_out.scores)
        folds = [metric.score(answers.rows(np.flatnonzero(held_out.folds == fold))) for fold in range(3)]
        assert folds == pytest.approx(row.cv_scores)
        pooled[row.key] = metric.score(answers)
        assert row.cv_mean == pytest.approx(pooled[row.key])  # of all held-out answers, not the mean over the folds
    assert board.recommendation is not None
    assert board.recommendation.optimism is not None
    assert board.recommendation.optimism.apparent == pytest.approx(max(pooled.values()))
    for item in board.recommendation.differences:
        assert item.difference == pytest.approx(pooled[board.best.key] - pooled[item.key])


@pytest.mark.parametrize("counts", [(60, 58, 2), (40, 41, 39), (7, 7, 7)])
def test_a_constant_guess_has_a_balanced_accuracy_of_one_in_so_many_classes(
    counts: tuple[int, ...], tmp_path: Path
) -> None:
    """Also where folds lack a class, and where the fold decides which class is the most frequent of the rest."""
    y, groups = np.repeat(np.arange(3), counts), None
    folds = make_folds(y, 5, 0, groups)
    tuning = TuningConfig(trials=1, scoring="balanced_accuracy")
    guess = constant_guess(y, len(CLASSES))
    run = tune(guess, np.zeros((len(y), 1), dtype=np.float32), y, folds, tuning, 0, tmp_path / "trials.jsonl")
    assert run.best.mean == pytest.approx(1 / 3, abs=1e-12)
    assert run.pipeline.predict(np.zeros((1, 1)))[0] == np.argmax(counts)


def test_very_uneven_classes_and_accuracy_say_what_to_set() -> None:
    (said,) = advice(np.repeat([0, 1], [320, 3]), Classification(("cat", "dog", "bee")), "accuracy")
    assert said == (
        "Classes are uneven: 320 training images of cat, 3 of dog, and accuracy hardly sees the small ones; where they matter, set "
        "tuning.scoring: balanced_accuracy (or macro_f1), and class_weight: balanced for the heads that take it."
    )
    assert advice(np.repeat([0, 1], [320, 3]), Classification(("cat", "dog", "bee")), "macro_f1") == []
    assert advice(np.repeat([0, 1], [320, 32]), Classification(("cat", "dog")), "accuracy") == []


def test_test_labels_choose_nothing(finished: tuple[Config, train_heads.HeadsRun], tmp_path: Path) -> None:
    stage_one(tmp_path, labels_seed=1)
    other = train_heads.run(make_config(tmp_path).model_copy(update={"baselines": ()})).leaderboard
    mine = finished[1].leaderboard
    assert [(row.key, row.cv_scores, row.params) for row in other.rows] == [
        (row.key, row.cv_scores, row.params) for row in mine.rows if row.embedding == "net-random"
    ]
    assert mine.best.test is not None
    assert other.best.test is not None
    assert other.best.test.accuracy < mine.best.test.accuracy


def test_near_duplicates_across_the_test_and_across_folds_are_said_with_the_scores_without_them(tmp_path: Path) -> None:
    """Two test images are nearly training images; of ten pairs of training images some are parted by the folds."""
    tested = [(3, 0), (18, 15)]
    pairs = [(row, row + 3) for row in (31, 46, 61, 76, 91, 106, 121, 136, 1, 16)]
    stage_one(tmp_path, alike=[*tested, *pairs])
    config = make_config(tmp_path).model_copy(update={"heads": (HeadConfig(name="nearest_centroid"),)})
    result = train_heads.run(config)
    board = result.leaderboard
    leaks = board.leaks
    assert leaks is not None
    assert (leaks.embedding, leaks.images, leaks.test_images, leaks.train_images) == ("net-random", 150, 30, 120)
    found = HeadPredictions.read(tmp_path / str(board.best.bundle) / "predictions.npz")
    assert found.out_of_fold is not None
    assert found.out_of_fold.folds is not None
    fold = dict(zip(found.out_of_fold.paths.tolist(), found.out_of_fold.folds.tolist(), strict=True))
    parted = {f"{row:04d}.png" for pair in pairs for row in pair if len({fold[f"{end:04d}.png"] for end in pair}) == 2}
    assert 0 < len(parted) < 20
    assert (leaks.test, leaks.folds) == (2, len(parted))
    others = ~np.isin(found.test.paths, ["0000.png", "0015.png"])
    assert leaks.without[board.best.key] == found.test.correct[others].mean()
    kept = ~np.isin(found.out_of_fold.paths, sorted(parted))
    expected = (found.out_of_fold.correct.mean(), found.out_of_fold.correct[kept].mean())
    assert leaks.held_out[board.best.key] == expected
    lines = result.summary_lines()[0].splitlines()
    assert lines[0].startswith(
        "Leak: 2 of 30 test images are nearly the same as a training image; on the other test images"
    )
    assert lines[1].startswith(
        f"Leak: {len(parted)} of 120 training images are nearly the same as one of another fold;"
    )
    assert f"{board.best.key} has accuracy {100 * expected[1]:.1f} % in place of {100 * expected[0]:.1f} %" in lines[1]
    assert "the same `group`" in lines[2]
    assert train_heads.run(config).leaderboard.leaks == leaks


def test_data_without_near_duplicates_have_nothing_said_of_them(finished: tuple[Config, train_heads.HeadsRun]) -> None:
    board = finished[1].leaderboard
    assert board.leaks is not None
    assert (board.leaks.test, board.leaks.folds) == (0, 0)
    assert "Leak" not in board.to_text()


def test_a_bundle_predicts_what_the_leaderboard_says(finished: tuple[Config, train_heads.HeadsRun]) -> None:
    config, result = finished
    files = Artifacts(config.output)
    row = result.leaderboard.best
    assert row.bundle is not None
    bundle = bundles.load(files.root / row.bundle)
    saved = HeadPredictions.read(files.root / row.bundle / "predictions.npz")
    index = DatasetIndex.read(files.dataset).select("test")
    stores = {record.name: record.store for record in read_records(files.features)}
    X = FeatureStore.open(files.root / stores[row.embedding]).read(index.digests)
    labels, probabilities = bundle.predict(X)
    assert row.test is not None
    assert np.mean(labels == index.labels) == row.test.accuracy
    assert probabilities is not None
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert list(saved.test.predicted) == list(labels)
    assert saved.out_of_fold is not None
    folds = [np.mean(saved.out_of_fold.correct[saved.out_of_fold.folds == fold]) for fold in range(3)]
    np.testing.assert_allclose(folds, row.cv_scores)


def test_an_svm_is_calibrated_on_its_margins_and_says_as_likeliest_what_it_predicts(tmp_path: Path) -> None:
    index = stage_one(tmp_path)
    heads = (HeadConfig(name="rbf_svm"), HeadConfig(name="ridge"))
    config = make_config(tmp_path, trials=2).model_copy(update={"heads": heads})
    rows = [row for row in train_heads.run(config).leaderboard.rows if row.embedding == "net-random"]
    made = {row.head: bundles.load(tmp_path / str(row.bundle)) for row in rows}
    methods = {head: bundle.calibrator.method for head, bundle in made.items() if bundle.calibrator is not None}
    assert methods == {"rbf_svm": "margins", "ridge": "temperature"}
    X = np.random.default_rng(1).normal(size=(len(index), DIM)).astype(np.float32)
    svm = made["rbf_svm"]
    labels, probabilities = svm.predict(X)
    assert probabilities is not None
    assert [svm.classes[column] for column in probabilities.argmax(axis=1)] == list(labels)


def test_features_of_another_config_are_refused(tmp_path: Path) -> None:
    """Their rows would be told to be of images and networks that they are not of."""
    stage_one(tmp_path)
    config = make_config(tmp_path)
    other = config.model_copy(
        update={
            "seed": 1,
            "dataset": config.dataset.model_copy(update={"source": "folder", "path": "/other", "max_failures": 0.5}),
            "backbones": (BackboneConfig(name="resnet50", pooling="max"),),
            "baselines": ("majority", "hog", "pixels"),
        }
    )
    with pytest.raises(PipelineError) as error:
        train_heads.run(other)
    assert str(error.value).splitlines() == [
        f"{Artifacts(tmp_path).features}: its features are of another config; run `manyheads features` with this config first, "
        "which embeds only what is new",
        "  dataset.path: the run of `manyheads features` has None, this config has '/other'",
        "  dataset.source: the run of `manyheads features` has 'digits', this config has 'folder'",
        "  seed: the run of `manyheads features` has 0, this config has 1",
        "  backbones: not name: resnet50, pooling: max",
        "  baselines: not hog",
    ]
    assert not Artifacts(tmp_path).config.exists(), "nor is the other config kept as the recipe"


def test_features_made_before_a_key_was_there_are_of_its_default(tmp_path: Path) -> None:
    stage_one(tmp_path)
    config, path = make_config(tmp_path), Artifacts(tmp_path).features
    document = read_document(path, FEATURES)
    for key in ("digest", "root", "label_columns"):
        (document if key == "digest" else document["shared"]["dataset"]).pop(key)
    write_document(path, FEATURES, document)
    assert read_asked_records(path, config)
    other = config.model_copy(update={"dataset": config.dataset.model_copy(update={"label_columns": ("age",)})})
    with pytest.raises(PipelineError, match=r"dataset\.label_columns: the run of `manyheads features` has \['label'\]"):
        read_asked_records(path, other)


@pytest.mark.parametrize(
    "changes",
    [
        {"tuning": {"trials": 2}},
        {"heads": ["ridge"]},
        {"extraction": {"workers": 1, "batch_size": 4, "device": "cpu"}},
        {"dataset": {"max_failures": 0.9}},
    ],
)
def test_what_changes_no_feature_needs_no_new_ones(tmp_path: Path, changes: dict[str, Any]) -> None:
    stage_one(tmp_path)
    config = make_config(tmp_path)
    changed = configuration.parse({**config.model_dump(mode="json"), **changes}, "test")
    assert [record.name for record in read_asked_records(Artifacts(tmp_path).features, changed)] == [
        "net-random",
        "pixels",
    ]


def test_of_several_embeddings_those_are_tuned_that_the_config_asks_for(tmp_path: Path) -> None:
    stage_one(tmp_path)
    path, config = Artifacts(tmp_path).features, make_config(tmp_path)
    other = BackboneConfig(name="resnet50", weights="random")
    both = config.model_copy(update={"backbones": (*config.backbones, other)})
    first, pixels = read_records(path)
    records = [
        replace(first, section=config.backbones[0]),
        replace(first, name="other", section=other),
        pixels,
    ]
    write_records(path, records, both, fingerprint_of_index(Artifacts(path.parent)))

    def names(config: Config) -> list[str]:
        return [record.name for record in read_asked_records(path, config)]

    assert names(both) == ["net-random", "other", "pixels"]
    assert names(config) == ["net-random", "pixels"]
    assert names(both.model_copy(update={"backbones": (other,), "baselines": ("majority",)})) == ["other"]
    write_records(path, records[:1], both, fingerprint_of_index(Artifacts(path.parent)))
    with pytest.raises(PipelineError, match="baselines: not pixels"):
        names(both)
    assert names(both.model_copy(update={"baselines": ()})) == ["net-random"], "two sections may name one embedding"


def test_a_head_that_cannot_be_fitted_is_left_out_with_its_reason(tmp_path: Path) -> None:
    stage_one(tmp_path)
    many = HeadConfig(name="knn", space={"n_neighbors": (200, 300)})
    config = make_config(tmp_path, trials=2).model_copy(update={"heads": (many, HeadConfig(name="ridge"))})
    board = train_heads.run(config).leaderboard
    assert [row.head for row in board.rows if row.embedding == "net-random"] == ["ridge"]
    (note,) = [note for note in board.notes() if "left out" in note]
    assert note.startswith("net-random / knn: left out: head knn: none of 2 trials could be fitted: 1 x ")
    assert "n_neighbors" in note

    alone = config.model_copy(update={"heads": (many,), "baselines": ("majority",)})
    with pytest.raises(HeadError, match="no head on images can be tuned") as error:
        train_heads.run(alone)
    assert error.value.problems == (note,)


def test_a_head_without_probabilities_is_left_out_of_log_loss(tmp_path: Path) -> None:
    stage_one(tmp_path)
    heads = tuple(HeadConfig(name=name) for name in ("ridge", "nearest_centroid"))
    config = make_config(tmp_path, trials=2, scoring="log_loss").model_copy(update={"heads": heads})
    board = train_heads.run(config).leaderboard
    assert [row.head for row in board.rows if row.embedding == "net-random"] == ["nearest_centroid"]
    (note,) = [note for note in board.notes() if "left out" in note]
    assert note.startswith("net-random / ridge: left out: head ridge: tuning.scoring 'log_loss' needs probabilities")


def test_a_rerun_keeps_finished_rows_and_gives_the_same_leaderboard(
    finished: tuple[Config, train_heads.HeadsRun],
) -> None:
    config, _ = finished
    files = Artifacts(config.output)
    before = without_clocks(files.leaderboard)
    written = {path: path.stat().st_mtime_ns for path in files.root.rglob("head.skops")}
    again = train_heads.run(config)
    assert again.reused == 5
    assert without_clocks(files.leaderboard) == before
    assert {path: path.stat().st_mtime_ns for path in files.root.rglob("head.skops")} == written


def test_a_changed_seed_makes_every_row_again(tmp_path: Path) -> None:
    stage_one(tmp_path)
    config = quick(make_config(tmp_path))
    train_heads.run(config)
    assert train_heads.run(config).reused == 2
    changed = config.model_copy(update={"seed": 7})
    features = Artifacts(tmp_path).features
    write_records(features, read_records(features), changed, fingerprint_of_index(Artifacts(tmp_path)))
    assert train_heads.run(changed).reused == 0


def test_images_that_failed_are_left_out_and_others_must_have_features(tmp_path: Path) -> None:
    index = stage_one(tmp_path)
    files, config = Artifacts(tmp_path), quick(make_config(tmp_path))
    paths = np.append(index.paths, "9999.png")
    digests = np.concatenate([index.digests, digests_from_hex([content_digest(b"new").hex()])])
    grown = DatasetIndex(
        tmp_path,
        paths,
        np.append(index.labels, CLASSES[0]),
        np.append(index.splits, "train"),
        None,
        digests,
        np.full(N + 1, 10),
    )
    write_index(files, grown)
    with pytest.raises(StoreError) as caught:
        train_heads.run(config)
    assert str(caught.value) == "1 of 151 images have no features yet; run `manyheads features` first"
    policy = policy_key(config.dataset.max_pixels)
    failed = Failure("9999.png", digests_to_hex(digests[-1:])[0], "truncated", "its end is missing")
    known = failed._replace(path=str(index.paths[0]), digest=digests_to_hex(digests[:1])[0])
    assert index.splits[0] == "test"
    record_failures(files.dataset, [failed, known], policy)  # one has a vector, which an earlier version made of it
    run = train_heads.run(config)
    assert run.leaderboard.provenance["images"] == {"train": 120, "test": 29, "classes": 3}


def test_without_stage_one_it_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(PipelineError) as caught:
        train_heads.run(make_config(tmp_path))
    assert str(caught.value) == f"{tmp_path}/features.json: missing; run `manyheads features` first"


KILLED_AND_AGAIN = f"""
import os, signal, sys

class NoTorch:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(name)

sys.meta_path.insert(0, NoTorch)
{QUICK_PAGES}
from pipeline.cli import cli
from pipeline.heads.tuning.journal import Journal
from pipeline.stages import train_heads

words, leaderboard = ["heads", sys.argv[1]], sys.argv[2]
child = os.fork()
if child == 0:
    append, count = Journal.append, [0]
    def dying(self, events):
        append(self, events)
        count[0] += 1
        if count[0] == 5:  # right after the fifth fit is on disk
            os.kill(os.getpid(), signal.SIGKILL)
    Journal.append = dying
    cli.main(words)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.exists(leaderboard))
cli.main(words)
"""


def test_a_killed_run_goes_on_where_torch_cannot_be_imported_and_ends_with_the_same_results(
    finished: tuple[Config, train_heads.HeadsRun], tmp_path: Path
) -> None:
    stage_one(tmp_path)
    path, leaderboard = tmp_path / "test.yaml", Artifacts(tmp_path).leaderboard
    path.write_text(configuration.dump_yaml(make_config(tmp_path), tmp_path), encoding="utf-8")
    command = [sys.executable, "-c", KILLED_AND_AGAIN, str(path), str(leaderboard)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith(f"{-signal.SIGKILL} False\n")
    assert "Best by cross-validation: net-random/" in found
    assert without_clocks(leaderboard) == without_clocks(Artifacts(finished[0].output).leaderboard)


def test_rows_survive_a_round_trip(finished: tuple[Config, train_heads.HeadsRun]) -> None:
    row = finished[1].leaderboard.best
    assert type(row).from_record(json.loads(json.dumps(row.to_record()))) == row


def test_nested_scores_and_seeds_on_request_are_resumed_and_unbiased(tmp_path: Path) -> None:
    """On labels that are chance the nested score stays near chance; each repeat has a journal that a second run reads."""
    stage_one(tmp_path)
    raw = make_config(tmp_path, nested=True, seeds=2, trials=2).model_dump(mode="json")
    raw.update(baselines=["pixels"], heads=["nearest_centroid"])
    config = configuration.parse(raw, "test")
    board = train_heads.run(config).leaderboard
    row, blind = board.row("net-random/nearest_centroid"), board.row("pixels/logistic_regression")
    for item in (row, blind):
        assert item.nested is not None
        assert item.seeds is not None
        assert len(item.nested.outer) == len(item.nested.inner) == 3
        assert item.seeds.seeds == (0, 1)
        assert item.test is not None
        assert (item.seeds.cv_means[0], item.seeds.test_scores[0]) == (item.cv_mean, item.test.accuracy)
        assert item.seeds.cv_means[1] != item.cv_mean
    assert row.nested is not None
    assert blind.nested is not None
    assert row.nested.mean > 0.55
    assert blind.nested.mean < 0.45
    journals = sorted(path.name for path in (tmp_path / "trials" / "pixels" / "logistic_regression").iterdir())
    assert journals == ["nested-0.jsonl", "nested-1.jsonl", "nested-2.jsonl", "seed-1.jsonl"]
    before = {path: path.read_bytes() for path in (tmp_path / "trials").rglob("*-*.jsonl")}
    (tmp_path / "heads" / "pixels" / "logistic_regression" / "bundle.json").unlink()
    again = train_heads.run(config)
    assert again.reused == 1
    assert again.leaderboard.row(blind.key).nested == blind.nested
    fits = {path: data.count(b'"event":"fit"') + data.count(b'"event": "fit"') for path, data in before.items()}
    for path, count in fits.items():
        data = path.read_bytes()
        assert data.count(b'"event":"fit"') + data.count(b'"event": "fit"') == count > 0


def test_class_weights_are_switched_where_classes_are_uneven(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [180, 20])
    X = (rng.normal(size=(200, 4)) + 1.2 * y[:, None]).astype(np.float32)
    folds = make_folds(y, 4, 0)
    index: Any = None  # not looked at
    task = train_heads.Task(Classification(("common", "rare")), index, index, y, y, folds, None, "key")
    head, tuning = HEADS["logistic_regression"], TuningConfig(trials=1, folds=4, jobs=1)
    tuned = tune(head, X, y, folds, tuning, 0, tmp_path / "head.jsonl")
    plain = np.mean([np.mean(tuned.out_of_fold.y_pred[y == label] == label) for label in (0, 1)])
    found = reweighted(head, X, task, tuning, 0, tuned, tmp_path / "head.jsonl")
    assert found is not None
    assert found["balanced_accuracy"] > plain + 0.02
    assert (tmp_path / "head" / "class-weights.jsonl").exists()
    even = dataclasses.replace(task, y_train=np.arange(200) % 2)
    assert reweighted(head, X, even, tuning, 0, tuned, tmp_path / "head.jsonl") is None
    unweighted = HEADS["knn"]
    assert reweighted(unweighted, X, task, tuning, 0, tuned, tmp_path / "head.jsonl") is None


def fine_tuned(output: Path, learned: NDArray[np.uint64], chose: NDArray[np.uint64] | None = None) -> Config:
    """An experiment whose backbone is a weights file that has learned from, and was chosen by, the given contents."""
    stage_one(output)
    files = Artifacts(output)
    weights = output / "tuned.safetensors"
    known = lineage.Lineage(
        frozenset(digests_to_hex(learned)), None if chose is None else frozenset(digests_to_hex(chose))
    )
    header = json.dumps({"__metadata__": known.header()}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    section = BackboneConfig(name="resnet18", weights=str(weights))
    records = [
        replace(record, section=section, spec=replace(record.spec, trained_on=known.digest))
        if record.kind == "backbone"
        else record
        for record in read_records(files.features)
    ]
    write_records(files.features, records, make_config(output), fingerprint_of_index(files))
    return make_config(output)


@pytest.mark.parametrize(
    ("learned", "chose", "used", "choosers"),
    [
        (slice(0, 60), slice(60, 80), slice(80, 120), 0),  # as many as chose, and more, have done neither
        (slice(0, 60), slice(60, 100), slice(60, 120), 40),  # 20 are too few to do without the 40 that chose
        (slice(0, 80), slice(80, 120), slice(80, 120), 40),  # as finetune leaves it
        (slice(0, 80), None, slice(80, 120), 40),  # weights of an earlier version do not say which images chose
    ],
)
def test_only_images_that_neither_taught_nor_chose_the_weights_judge_a_fine_tuned_row(
    tmp_path: Path, learned: slice, chose: slice | None, used: slice, choosers: int
) -> None:
    train = stage_one(tmp_path).select("train")
    config = fine_tuned(tmp_path, train.digests[learned], None if chose is None else train.digests[chose])
    files = Artifacts(tmp_path)
    task = train_heads.make_task(config, files, DatasetIndex.read(files.dataset), [])
    backbone, floor = (
        next(r for r in read_records(files.features) if r.kind == kind) for kind in ("backbone", "baseline")
    )
    own = unseen_task(task, backbone, config)
    assert list(own.train.paths) == list(train.paths[used])
    assert sorted(row for _, held_out in own.folds for row in held_out.tolist()) == list(range(len(own.train)))
    assert own.chose == choosers
    assert unseen_task(task, floor, config) is task


def test_rows_on_a_fine_tuned_network_stand_apart_from_those_on_all_images(tmp_path: Path) -> None:
    train = stage_one(tmp_path).select("train")
    result = train_heads.run(fine_tuned(tmp_path, train.digests[:80], train.digests[80:]))
    board = result.leaderboard
    for row in board.rows:
        held_out = HeadPredictions.read(result.files.root / str(row.bundle) / "predictions.npz").out_of_fold
        assert held_out is not None
        tuned = row.embedding == "net-random"
        assert list(held_out.paths) == list(train.paths[80:] if tuned else train.paths)
        assert (row.unseen_rows, row.chose_rows) == ((40, 40) if tuned else (None, 0))
        assert (cross_validated(row, "accuracy") == "–") == tuned
    # No other backbone is there: the best is the network's own, and the floors stand apart.
    assert board.best.embedding == "net-random"
    assert [{row.embedding for row in rows} for rows in board.apart] == [{"majority", "pixels"}]
    assert any(
        line.startswith("All of them: heads on a fine-tuned network, fitted on the 40") for line in board.notes()
    )


def test_images_of_a_group_that_was_learned_from_are_not_unseen(tmp_path: Path) -> None:
    train = stage_one(tmp_path).select("train")
    config = fine_tuned(tmp_path, train.digests[:40], train.digests[40:50])
    files = Artifacts(tmp_path)
    record = next(record for record in read_records(files.features) if record.kind == "backbone")
    task = train_heads.make_task(config, files, DatasetIndex.read(files.dataset), [])
    assert len(unseen_task(task, record, config).train) == 70
    grouped = replace(task, groups=np.arange(120) // 8 * 8)  # the sixth group of eight holds what chose
    assert list(unseen_task(grouped, record, config).train.paths) == list(train.paths[56:])
    film = replace(task, groups=np.arange(120) // 60)  # half of them were learned from, the others have done nothing
    assert list(unseen_task(film, record, config).train.paths) == list(train.paths[60:])
    assert unseen_task(film, record, config).chose == 0


def test_a_backbone_that_has_learned_from_all_training_images_is_refused(tmp_path: Path) -> None:
    train = stage_one(tmp_path).select("train")
    with pytest.raises(DatasetError) as caught:
        train_heads.run(fine_tuned(tmp_path, train.digests))
    assert str(caught.value) == (
        "net-random: its network has learned from 120 of the 120 training images, and the other 0 are too few to fit and "
        "compare heads on; give more training images, or leave it out of backbones"
    )


def test_a_backbone_that_has_learned_from_test_images_is_refused(tmp_path: Path) -> None:
    test = stage_one(tmp_path).select("test")
    with pytest.raises(
        DatasetError, match="net-random: its network has learned from, or was chosen by, 3 of the 30 test images"
    ):
        train_heads.run(fine_tuned(tmp_path, test.digests[:2], test.digests[1:3]))
