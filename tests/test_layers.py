"""Several layers: side by side as one more embedding (concat), and the profile of which of them hold the signal."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from documents import rewrite
from photos import make_photos, small_config
from report_experiment import section

from pipeline import config as configuration
from pipeline.config import BackboneConfig, Config
from pipeline.data import DatasetIndex
from pipeline.data.lineage import Lineage
from pipeline.data.targets import Classification
from pipeline.embed import backbone
from pipeline.embed.published import NO_WEIGHTS
from pipeline.embed.records import EmbeddingRecord, concatenated, open_features, read_records
from pipeline.errors import ConfigError, PipelineError, StoreError
from pipeline.evaluation import HeadPredictions, Predictions
from pipeline.experiment import Artifacts, from_plain, plain
from pipeline.export import bundle as bundles
from pipeline.heads import layer_profile
from pipeline.heads.layer_profile import LayerProfile, profile, read_profiles
from pipeline.heads.tuning import make_folds
from pipeline.heads.tuning.features import Standardised
from pipeline.report.material import gather
from pipeline.stages import check, extract, maintenance, predict, train_heads
from pipeline.stages.estimators import Classifier, best_estimator
from pipeline.stages.train_heads import layers
from pipeline.store import FeatureStore, StoredRows

NETWORK = "squeezenet1_1-random-penultimate"
GROUPS = ((NETWORK, "squeezenet1_1-random-stage2"), ("pixels", NETWORK))
NAMES = ("squeezenet1_1-random-penultimate+stage2", "pixels+squeezenet1_1-random-penultimate")


def asking(config: Config, *groups: tuple[str, ...]) -> Config:
    return config.model_copy(update={"concat": groups})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("concat")
    config = small_config(make_photos(root / "photos"), root / "output")
    section = config.backbones[0].model_copy(update={"layers": ("penultimate", "stage2")})
    heads = tuple(head for head in config.heads if head.name == "nearest_centroid")
    config = asking(config.model_copy(update={"backbones": (section,), "heads": heads}), *GROUPS)
    extract.run(config)
    train_heads.run(config)
    return config


@pytest.fixture(scope="module")
def records(finished: Config) -> tuple[EmbeddingRecord, ...]:
    return read_records(Artifacts(finished.output).features)


def test_every_head_is_compared_on_them_and_no_vector_is_stored_twice(
    finished: Config, records: tuple[EmbeddingRecord, ...]
) -> None:
    files = Artifacts(finished.output)
    board = gather(files.root).leaderboard
    keys = {row.key for row in board.rows}
    assert keys >= {f"{name}/nearest_centroid" for name in NAMES}
    assert [record.name for record in records] == [NETWORK, "squeezenet1_1-random-stage2", "pixels"]
    stores = [path.name.rsplit("-", 1)[0] for path in files.stores.glob("*.store")]
    assert sorted(stores) == sorted([*(record.name for record in records), "hashes"])
    row = board.row(f"{NAMES[0]}/nearest_centroid")
    assert row.dim == 512 + 256
    assert row.untrained
    assert row.layer == "classifier.0+features.7.cat"
    licenses = [
        concatenated(GROUPS, [replace(each, spec=replace(each.spec, license=license)) for each in records])
        for license in ("", NO_WEIGHTS, "mit")
    ]
    assert [one.spec.license for one, _ in licenses] == ["", NO_WEIGHTS, "mit"]


def test_its_vectors_are_those_of_its_parts_in_memory_and_on_disk(
    finished: Config, records: tuple[EmbeddingRecord, ...]
) -> None:
    files = Artifacts(finished.output)
    digests = DatasetIndex.read(files.dataset).digests[::-1]
    joined = open_features(concatenated(GROUPS, records)[1], files)
    named = {record.name: record for record in records}
    blocks = [open_features(named[name], files).read(digests) for name in GROUPS[1]]
    expected = np.concatenate(blocks, axis=1)
    np.testing.assert_array_equal(joined.read(digests), expected)
    rows = StoredRows.of(joined, digests)
    assert rows.shape == expected.shape
    np.testing.assert_array_equal(rows.part(np.array([5, 2, 9]))[np.array([2, 0])], expected[[9, 5]])
    picked = np.array([7, 1, 30, 4])
    on_disk, in_memory = (Standardised.of(X, picked) for X in (rows, expected))
    np.testing.assert_allclose(on_disk.products(), in_memory.products(), rtol=1e-4, atol=1e-4)
    unknown = digests[:1] + np.uint64(1)
    assert joined.missing(np.concatenate([digests[:1], unknown])).tolist() == [False, True]
    with pytest.raises(StoreError, match="has no features for 1 of 1 images"):
        joined.read(unknown)


def test_predict_says_what_the_saved_predictions_say_with_one_pass_of_each_network(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Artifacts(finished.output)
    loaded, load = [], backbone.load

    def noted(section: BackboneConfig, *rest: object) -> backbone.Backbone:
        loaded.append(section.name)
        return load(section, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "load", noted)
    for name in NAMES:
        folder = files.bundle(name, "nearest_centroid")
        said = HeadPredictions.read(folder / "predictions.npz").test
        photos = [Path(str(finished.dataset.path)) / path for path in said.paths]
        predict.run(folder, photos, output=tmp_path / "out.csv", top=1)
        with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
            assert [row["label"] for row in csv.DictReader(file)] == list(said.predicted)
    assert Classifier.load(folder).predict(photos).tolist() == list(said.predicted)
    assert best_estimator(folder, store=files.stores).predict(photos).tolist() == list(said.predicted)
    assert loaded.count("squeezenet1_1") == len(loaded)


def test_a_bundle_names_its_parts_and_one_that_leads_out_is_refused(finished: Config) -> None:
    described = bundles.describe(Artifacts(finished.output).bundle(NAMES[1], "nearest_centroid"))["embedding"]
    record = from_plain(EmbeddingRecord, described)
    assert [part.name for part in record.parts] == list(GROUPS[1])
    assert plain(record) == described
    described["parts"][0]["store"] = "../elsewhere.store"
    with pytest.raises(StoreError, match="lies outside of its experiment"):
        from_plain(EmbeddingRecord, described)


def test_unknown_names_are_told_together_before_anything_is_embedded(finished: Config) -> None:
    config = asking(finished, (NETWORK, "pixel"), ("squeezenet1_1-random-stage3", "pixels"))
    for run in (check.run, extract.run, train_heads.run):
        with pytest.raises(PipelineError) as caught:
            run(config)
        told = [line for line in caught.value.problems if line.startswith("concat")]
        there = {NETWORK, "squeezenet1_1-random-stage2", "pixels"}
        assert [line.partition(";")[0] for line in told] == [
            "concat: no embedding 'pixel', did you mean 'pixels'?",
            "concat: no embedding 'squeezenet1_1-random-stage3', did you mean 'squeezenet1_1-random-stage2'?",
        ]
        assert set(told[0].partition("there are ")[2].split(", ")) == there
    assert check.run(asking(finished, *GROUPS))[-1] == "the config is valid and the data can be used"


@pytest.mark.parametrize(
    ("concat", "told"),
    [
        ([["a"]], "concat: expected lists of two or more different embeddings, got ['a']"),
        ([["a", "a"]], "concat: expected lists of two or more different embeddings, got ['a', 'a']"),
        (
            [["a"], ["a", "b"], ["b", "b"]],
            "concat: expected lists of two or more different embeddings, got ['a'] and ['b', 'b']",
        ),
        ([["a", "b"], ["a", "b"]], "concat: the same list is given twice"),
    ],
)
def test_lists_that_are_none_are_refused(concat: list[list[str]], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.parse({"backbones": [{"name": "resnet18"}], "heads": ["knn"], "concat": concat}, "test")
    assert caught.value.problems == (told,)


def test_images_that_one_of_the_networks_has_met_are_unseen_by_none() -> None:
    one, other = Lineage(frozenset("a"), frozenset("b")), Lineage(frozenset("c"), None)
    assert one.with_other(other) == Lineage(frozenset("ac"), None)
    assert one.with_other(one) == one


def test_a_store_is_read_without_its_neighbours(finished: Config, records: tuple[EmbeddingRecord, ...]) -> None:
    assert isinstance(open_features(records[0], Artifacts(finished.output)), FeatureStore)


# ---- the profile


def judged(blocks: dict[str, np.ndarray], y: np.ndarray, folds: int = 5) -> LayerProfile:
    names = {layer: f"net-{layer}" for layer in blocks}
    about = {"network": "net", "task": "t", "labelled": len(y)}
    return profile(
        blocks,
        names,
        "penultimate",
        Predictions(y, y, target=Classification(("a", "b", "c"))),
        make_folds(y, folds, 0),
        0,
        about,
    )


def signal(y: np.ndarray, seed: int, classes: tuple[int, ...], strength: float = 2.0) -> np.ndarray:
    """Features that tell some of the classes from the rest, and no others."""
    told = np.where(np.isin(y, classes), y + 1, 0)
    noise = np.random.default_rng(seed).normal(size=(len(y), 6))
    return (noise + strength * np.eye(4, 6)[told]).astype(np.float32)


Y = np.arange(300) % 3


def test_layers_that_know_different_things_are_taken_together_and_the_choice_is_scored_by_itself() -> None:
    blocks = {"stage1": signal(Y, 0, ()), "stage2": signal(Y, 1, (0,)), "penultimate": signal(Y, 2, (2,))}
    found = judged(blocks, Y)
    assert [row.name for row in found.rows] == [
        "stage1", "stage2", "penultimate", "penultimate+stage1", "penultimate+stage2", "stage1+stage2+penultimate",
    ]  # fmt: skip
    assert found.chosen == "penultimate+stage2"
    row = found.row(found.chosen)
    assert (row.embeddings, row.dim, row.tied) == (("net-penultimate", "net-stage2"), 12, True)
    assert row.gain is not None
    assert row.gain.interval[0] > 0.05
    assert found.row("penultimate").gain is None
    assert not found.row("stage1").tied
    assert found.nested == pytest.approx(row.score, abs=0.03)
    assert found.nested_gain is not None
    assert found.nested_gain.interval[0] > 0
    assert layer_profile.what_to_take(found)[0] == (
        'take penultimate+stage2, which is shown to be better than penultimate: concat: [["net-penultimate", "net-stage2"]]'
    )


def test_without_a_clear_gain_the_penultimate_layer_stays_and_scores_what_it_scored() -> None:
    blocks = {f"stage{number}": signal(Y, number, ()) for number in range(1, 5)} | {"penultimate": signal(Y, 9, (2,))}
    found = judged(blocks, Y)
    assert max(found.rows, key=lambda row: row.score).name != "penultimate"
    assert found.chosen == "penultimate"
    assert found.nested == pytest.approx(found.row("penultimate").score)
    assert layer_profile.what_to_take(found)[0] == "take penultimate: nothing else is shown to be better"
    two = judged({name: blocks[name] for name in ("stage1", "penultimate")}, Y, folds=2)
    assert (two.nested, two.nested_gain) == (None, None)


def test_a_layer_alone_may_be_better() -> None:
    found = judged({"stage1": signal(Y, 0, (0, 1, 2), 4.0), "penultimate": signal(Y, 1, ())}, Y)
    assert found.chosen == "stage1"
    assert layer_profile.what_to_take(found)[0] == (
        "take stage1, which is shown to be better than penultimate: layers: [stage1]"
    )


def test_the_command_reads_the_profile_that_heads_has_written(
    finished: Config, caplog: pytest.LogCaptureFixture
) -> None:
    assert finished.tuning.scoring == "auto", "which `heads` writes down by its name"
    written = Artifacts(finished.output).layers.read_bytes()
    with caplog.at_level("INFO"):
        assert layers.run(finished)
    assert Artifacts(finished.output).layers.read_bytes() == written
    assert not [record for record in caplog.records if "layers hold the signal" in record.getMessage()]


def test_what_does_not_fit_into_memory_takes_no_part(finished: Config, caplog: pytest.LogCaptureFixture) -> None:
    files = Artifacts(finished.output)
    small = finished.model_copy(update={"tuning": finished.tuning.model_copy(update={"memory": "0.1MB"})})
    profiles = read_profiles(files.layers)
    files.layers.unlink()
    with pytest.raises(PipelineError, match="no network of this config has several layers"):
        layers.run(small)
    told = f"{NETWORK} is left out of the layer profile: tuning.memory is too small for it"
    assert told in [record.getMessage() for record in caplog.records]
    files.layers.unlink()
    assert layers.run(finished)
    assert read_profiles(files.layers) == profiles


def test_a_fold_of_one_class_says_that_class() -> None:
    y = np.array([0, 0, 0, 0, 1, 1])
    X = {layer: np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32) for layer in ("stage1", "penultimate")}
    rows = [np.array([4, 5]), np.array([0, 1]), np.array([2, 3])]
    folds = tuple((np.setdiff1d(np.arange(6), out), out) for out in rows)
    about = {"network": "net", "task": "t", "labelled": 6}
    found = profile(X, {"stage1": "a", "penultimate": "b"}, "penultimate", Predictions(y, y), folds, 0, about)
    assert found.chosen == "penultimate"
    assert all(row.score <= 4 / 6 for row in found.rows)


def test_no_image_is_labelled_by_a_fit_that_saw_it_or_its_outer_fold() -> None:
    held_out = [rows for _, rows in make_folds(Y, 5, 0)]
    fits = []

    def fit(layers: tuple[str, ...], train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        assert not np.isin(rows, train).any()
        fits.append(layers)
        left_out = [number for number, fold in enumerate(held_out) if not np.isin(fold, train).any()]
        return np.full(len(rows), sum(10**number for number in left_out))

    outer, inner = layer_profile.answers({"one": ("one",)}, fit, held_out, len(Y))
    assert len(fits) == 5 + 10
    for k, fold in enumerate(held_out):
        assert set(outer["one"][fold]) == {10**k}
        assert set(inner["one"][k][fold]) == {-1}
        for j, other in enumerate(held_out):
            assert j == k or set(inner["one"][k][other]) == {10**j + 10**k}


def test_heads_writes_it_the_report_draws_it_and_the_command_prints_it(finished: Config) -> None:
    files = Artifacts(finished.output)
    profiles = read_profiles(files.layers)
    assert profiles is not None
    (found,) = profiles
    assert [row.name for row in found.rows] == ["stage2", "penultimate", "penultimate+stage2"]
    assert (found.images, found.folds) == (30, 3)
    shown = section("layers", gather(files.root))
    assert "Which layers hold the signal?" in shown
    assert 'data-chart="layers"' in shown
    assert maintenance.verify_files(finished)[0]
    document = json.loads(files.layers.read_text(encoding="utf-8"))
    document["profiles"][0]["chosen"] = "stage9"
    rewrite(files.layers, document)
    assert read_profiles(files.layers) is None
    assert section("layers", gather(files.root)) == ""
    files.layers.write_text("damaged", encoding="utf-8")
    assert not maintenance.verify_files(finished)[0]
    lines = layers.run(finished)
    assert lines[0] == ("squeezenet1_1-random: ridge on each layer, 30 training images, 3 folds, accuracy out of fold")
    assert read_profiles(files.layers) == (found,)
    board = gather(files.root)
    other = replace(board.leaderboard, rows=tuple(replace(row, task="another") for row in board.leaderboard.rows))
    assert section("layers", replace(board, leaderboard=other)) == ""


def test_one_layer_alone_has_no_profile(experiment: Config) -> None:
    with pytest.raises(PipelineError, match=r"no network of this config has several layers or poolings to compare"):
        layers.run(experiment)
    assert not Artifacts(experiment.output).layers.exists()


def test_layers_are_shown_from_the_image_to_the_answer() -> None:
    names = ["penultimate", "penultimate-cls", "stage10", "stage9-max", "blocks.3", "stem"]
    assert sorted(names, key=layers._depth) == [
        "stem",
        "stage9-max",
        "stage10",
        "blocks.3",
        "penultimate-cls",
        "penultimate",
    ]
