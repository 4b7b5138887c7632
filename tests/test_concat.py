"""Concat: embeddings side by side are one more, made of vectors that are there, and predicted by one pass of each network."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from photos import make_photos, small_config

from pipeline import config as configuration
from pipeline.config import BackboneConfig, Config
from pipeline.data import DatasetIndex
from pipeline.data.lineage import Lineage
from pipeline.embed import backbone
from pipeline.embed.concat import by_name, concatenated, find_parts, open_features
from pipeline.embed.licenses import NO_WEIGHTS
from pipeline.embed.records import EmbeddingRecord, read_records
from pipeline.errors import ConfigError, PipelineError, StoreError
from pipeline.evaluation import HeadPredictions
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.heads.tuning.features import Standardised
from pipeline.report.material import gather
from pipeline.stages import check, extract, predict, train_heads
from pipeline.store import FeatureStore, StoredRows

NETWORK = "resnet18-random-penultimate"
GROUPS = ((NETWORK, "resnet18-random-stage2"), ("pixels", NETWORK))
NAMES = ("resnet18-random-penultimate+stage2", "pixels+resnet18-random-penultimate")


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
    assert [record.name for record in records] == [NETWORK, "resnet18-random-stage2", "pixels"]
    stores = [path.name.rsplit("-", 1)[0] for path in files.stores.glob("*.store")]
    assert sorted(stores) == sorted([*(record.name for record in records), "hashes"])
    row = board.row(f"{NAMES[0]}/nearest_centroid")
    assert row.dim == 512 + 128
    assert row.untrained
    assert row.layer == "flatten+layer2.1.relu_1"
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
    blocks = [open_features(by_name(records)[name], files).read(digests) for name in GROUPS[1]]
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
    assert loaded == ["resnet18", "resnet18"]


def test_a_bundle_names_its_parts_and_one_that_leads_out_is_refused(finished: Config) -> None:
    described = bundles.describe(Artifacts(finished.output).bundle(NAMES[1], "nearest_centroid"))["embedding"]
    record = EmbeddingRecord.from_dict(described)
    assert [part.name for part in record.parts] == list(GROUPS[1])
    assert record.to_dict() == described
    described["parts"][0]["store"] = "../elsewhere.store"
    with pytest.raises(StoreError, match="lies outside of its experiment"):
        EmbeddingRecord.from_dict(described)


def test_unknown_names_are_told_together_before_anything_is_embedded(finished: Config) -> None:
    config = asking(finished, (NETWORK, "pixel"), ("resnet18-random-stage3", "pixels"))
    for run in (check.run, extract.run, train_heads.run):
        with pytest.raises(PipelineError) as caught:
            run(config)
        told = [line for line in caught.value.problems if line.startswith("concat")]
        there = {NETWORK, "resnet18-random-stage2", "pixels"}
        assert [line.partition(";")[0] for line in told] == [
            "concat: no embedding 'pixel', did you mean 'pixels'?",
            "concat: no embedding 'resnet18-random-stage3', did you mean 'resnet18-random-stage2'?",
        ]
        assert set(told[0].partition("there are ")[2].split(", ")) == there
    assert check.run(asking(finished, *GROUPS))[-1] == "the config is valid and the data can be used"


@pytest.mark.parametrize(
    ("concat", "told"),
    [
        ([["a"]], "concat: expected lists of two or more different embeddings, got ['a']"),
        ([["a", "a"]], "concat: expected lists of two or more different embeddings, got ['a', 'a']"),
        ([["a", "b"], ["a", "b"]], "concat: the same list is given twice"),
    ],
)
def test_lists_that_are_none_are_refused(concat: list[list[str]], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configuration.parse({"backbones": [{"name": "resnet18"}], "heads": ["knn"], "concat": concat}, "test")
    assert caught.value.problems == (told,)


def test_names_do_not_collide_and_a_stand_in_answers_to_both(records: tuple[EmbeddingRecord, ...]) -> None:
    network, stage, pixels = records
    odd = replace(pixels, name="resnet18-random-penultimate+stage2")
    first, second = concatenated([GROUPS[0], ("pixels", NETWORK)], [network, stage, pixels, odd])
    assert first.name == f"{NETWORK}+resnet18-random-stage2"
    assert second.name == NAMES[1]
    asked = BackboneConfig(name="efficientnet_lite0", weights="imagenet")
    standing = replace(network, instead_of=asked)
    (parts,) = find_parts([["efficientnet_lite0-imagenet-penultimate", "pixels"]], by_name([standing, pixels]))
    assert [part.name for part in parts] == [NETWORK, "pixels"]


def test_images_that_one_of_the_networks_has_met_are_unseen_by_none() -> None:
    one, other = Lineage(frozenset("a"), frozenset("b")), Lineage(frozenset("c"), None)
    assert one.with_other(other) == Lineage(frozenset("ac"), None)
    assert one.with_other(one) == one


def test_a_store_is_read_without_its_neighbours(finished: Config, records: tuple[EmbeddingRecord, ...]) -> None:
    assert isinstance(open_features(records[0], Artifacts(finished.output)), FeatureStore)
