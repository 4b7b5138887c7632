"""Refit: saved heads on more images at their stored parameters, the same test images before and after, and the evidence for a search."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from documents import rewrite
from photos import make_photos, small_config
from PIL import Image
from test_several_targets import SIZE, SPECIES, make_config

from pipeline.cli import cli
from pipeline.config import Config, HeadConfig
from pipeline.data import DatasetIndex
from pipeline.errors import HeadError, PipelineError
from pipeline.evaluation import HeadPredictions
from pipeline.evaluation.comparison import Paired
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import REFIT, Artifacts, read_document
from pipeline.export import bundle as bundles
from pipeline.heads import Head, held_at, resolve
from pipeline.heads.head import Categorical, Integer, Real
from pipeline.heads.tuning import growing, make_folds, neighbours
from pipeline.stages import extract, maintenance, predict, refit, train_heads
from pipeline.stages.refit import Refitted


def resolve_named(name: str) -> Head:
    return resolve(HeadConfig(name=name))


def head(**space: Any) -> Head:
    return dataclasses.replace(resolve_named("logistic_regression"), space=space, defaults={})


def test_neighbours_differ_in_one_parameter_by_a_step_inside_the_space() -> None:
    space = {
        "C": Real(1e-2, 10.0, "log-uniform"),
        "trees": Integer(100, 500),
        "kind": Categorical(("a", "b", "c", "d")),
        "power": Categorical(("auto", 1, 2, 3)),
    }
    assert neighbours(head(**space), {"C": 5.0, "trees": 500, "kind": "b", "power": 3}) == [
        {"C": pytest.approx(5 / 3), "trees": 500, "kind": "b", "power": 3},
        {"C": 10.0, "trees": 500, "kind": "b", "power": 3},
        {"C": 5.0, "trees": 450, "kind": "b", "power": 3},
        {"C": 5.0, "trees": 500, "kind": "a", "power": 3},
        {"C": 5.0, "trees": 500, "kind": "c", "power": 3},
        {"C": 5.0, "trees": 500, "kind": "d", "power": 3},
        {"C": 5.0, "trees": 500, "kind": "b", "power": 2},
    ]


def test_a_head_is_held_at_what_a_leaderboard_says_and_at_nothing_else() -> None:
    layered = head(layers=Categorical(((64,), (64, 64))))
    assert held_at(layered, {"layers": [64, 64]}).defaults == {"layers": (64, 64)}
    with pytest.raises(HeadError, match="its stored parameters are C, and it is searched over layers now"):
        held_at(layered, {"C": 1.0})


def test_a_growing_fold_keeps_its_images_and_the_shares_of_the_classes() -> None:
    y = np.repeat([0, 1], [20, 40])
    folds = make_folds(y, 3, 0)
    grown = growing(folds, y, [9, 30], 0)
    for (few, held), (many, also), (train, out) in zip(grown[:3], grown[3:], folds, strict=True):
        assert set(few) < set(many) < set(train)
        assert held.tolist() == also.tolist() == out.tolist()
        assert np.bincount(y[few]).tolist() == [3, 6]


def found(**changed: object) -> Refitted:
    even = Paired(0.0, (-0.02, 0.02), 1.0)
    given = dict.fromkeys((field.name for field in dataclasses.fields(Refitted)), 0) | {
        "train": (10, 20), "seconds": 0.0, "change": even, "new_classes": (), "expected": 0.01, "shown": False, "sound": True,
    }  # fmt: skip
    return Refitted(**{**given, **changed})


def test_a_new_search_is_worth_it_where_the_evidence_says_so() -> None:
    worse = Paired(-0.05, (-0.08, -0.02), 0.01)
    new = (refit.NewClass("x", 3, 1, 1),)
    assert found().reasons == []
    assert ["beyond chance" in reason for reason in found(shown=True).reasons] == [True]
    assert len(found(change=worse).reasons) == 2
    assert found(expected=0.03).reasons == ["the new images brought less than the learning curve predicts"]
    # With one class more the same images are a harder question, and a fall tells nothing of the parameters.
    assert found(change=worse, new_classes=new).reasons == []
    assert len(found(shown=True, new_classes=new).reasons) == 1


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, str, bytes]:
    """An experiment with more photos and a new class than its heads have seen, fitted again by the command; and its leaderboard before."""
    root = tmp_path_factory.mktemp("refit")
    config = small_config(make_photos(root / "photos"), root / "output")
    tuning = config.tuning.model_copy(update={"trials": 1})
    config = config.model_copy(update={"heads": config.heads[1:], "tuning": tuning})
    extract.run(config)
    train_heads.run(config)
    rng = np.random.default_rng(5)
    (root / "photos" / "coal").mkdir()
    for number in range(8):
        for label, light in (("coal", 15), ("leaf", 100)):
            pixels = np.clip(
                (40, light, 60) * np.array([1, 1, 1]) * (light > 50) + rng.normal(20, 15, (20, 24, 3)), 0, 255
            )
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / label / f"new-{number}.png")
    before = Artifacts(config.output).leaderboard.read_bytes()
    extract.run(config)
    return config, "\n".join(refit.run(config, "all").summary_lines()), before


def test_a_new_class_and_new_images_are_learned_at_the_stored_parameters(grown: tuple[Config, str, bytes]) -> None:
    config, said, before = grown
    files = Artifacts(config.output)
    assert files.leaderboard.read_bytes() == before
    board = read_leaderboard(files.root)
    heads = read_document(files.refit / "refit.json", REFIT)["heads"]
    single = [row for row in board.rows if not row.constant]
    assert sorted(each["key"] for each in heads) == sorted(row.key for row in single)
    assert heads[0]["key"] == board.recommendation.recommended
    index = DatasetIndex.read(files.dataset)
    for each in heads:
        row, folder = board.row(each["key"]), files.refit / each["bundle"]
        old, new = bundles.load(files.root / row.bundle), bundles.load(folder)
        assert (new.params, old.params) == (row.params, row.params)
        assert (old.classes, new.classes) == (("leaf", "sky, blue", "土"), ("coal", "leaf", "sky, blue", "土"))
        was, now = (HeadPredictions.read(place / FILE_NAME) for place in (files.root / row.bundle, folder))
        assert set(was.test.paths) <= set(now.test.paths)
        assert each["same"] == len(was.test)
        assert each["train"] == [len(was.out_of_fold), len(index.select("train"))]
        assert each["before"] == pytest.approx(np.mean(was.test.correct))
        kept = np.isin(now.test.paths, was.test.paths)
        assert each["now"] == pytest.approx(np.mean(now.test.correct[kept]))
        (added,) = each["new_classes"]
        assert (added["name"], added["images"], added["test"]) == ("coal", 8, int(np.sum(now.test.labels == "coal")))
        assert each["tried"] == len(neighbours(resolve_named(row.head), row.params))
    assert "new class         coal: 2 of its 8 images are test images, by the rule of the split; " in said
    assert "a new search      is" in said


def test_predict_takes_the_folder_of_refits(grown: tuple[Config, str, bytes], tmp_path: Path) -> None:
    config, said, _ = grown
    folder = Artifacts(config.output).refit
    assert f"manyheads predict {folder} IMAGES" in said
    predict.run(folder, [Path(config.dataset.path) / "coal"], output=tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        labels = [line["label"] for line in csv.DictReader(file)]
    assert labels.count("coal") >= 7
    ok, lines = maintenance.verify_files(config)
    assert ok, lines
    copy = shutil.copytree(folder, tmp_path / "refit")
    document = json.loads((copy / "refit.json").read_text(encoding="utf-8"))
    document["heads"][0]["bundle"] = "../heads"
    rewrite(copy / "refit.json", document)
    with pytest.raises(PipelineError, match="lies outside of its folder"):
        predict.find_bundle(copy)


def test_a_head_that_was_fitted_on_the_same_is_kept(
    grown: tuple[Config, str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = grown
    record = Artifacts(config.output).refit / "refit.json"
    before = json.loads(record.read_text(encoding="utf-8"))["heads"]
    monkeypatch.setattr(refit, "make_row", None)
    refit.run(config, "all")
    after = json.loads(record.read_text(encoding="utf-8"))["heads"]
    assert [{**each, "seconds": 0} for each in after] == [{**each, "seconds": 0} for each in before]
    with pytest.raises(HeadError, match=r"--row: unknown row 'resnet/x'"):
        refit.run(config, "resnet/x")


def test_several_targets_are_fitted_again_and_used_together(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    extract.run(config)
    for alone in refit.targets.experiments(config).values():
        train_heads.run(alone)
    rng = np.random.default_rng(0)
    with (tmp_path / "list.csv").open("a", encoding="utf-8") as file:
        for number in range(6):
            path = tmp_path / "photos" / "leaf" / f"new-{number}.png"
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path)
            file.write(f'\n"{path}","leaf",{0.5 + number / 100:.2f}')
    result = CliRunner().invoke(cli, ["refit", str(Artifacts(config.output).config)])
    assert result.exit_code == 0, result.output
    assert f"== {SPECIES} ==" in result.output
    assert "same test images" in result.output
    assert "MAE" in result.output
    folder = Artifacts(config.output).refit
    photos = make_photos(tmp_path / "more", per_class=2, seed=1)
    made = predict.run(folder, [photos], output=tmp_path / "all.csv")
    assert {name: sum(labels.values()) for name, labels in made.labels.items()} == {SPECIES: 6, SIZE: 6}
    assert all(folder in bundle.parents for bundle in made.bundles.values())
