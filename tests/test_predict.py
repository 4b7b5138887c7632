"""Predict: labels and probabilities for new images, a row for every image, and no surprises."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from photos import PHOTO_CLASSES, make_photos

from pipeline import predict
from pipeline.config import Artifacts, Config
from pipeline.errors import BackboneError, BundleError, DatasetError
from pipeline.report import Leaderboard


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_best_head_labels_new_photos(experiment: Config, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "new", per_class=4, seed=1)
    (photos / "leaf" / "broken.jpg").write_bytes(b"not an image")
    (photos / "leaf" / "notes.txt").write_text("no image by name")
    result = predict.run(Path(experiment.output), [photos], output=tmp_path / "out.csv", top=2)
    rows = read(tmp_path / "out.csv")
    assert list(rows[0]) == ["path", "status", "label", "probability", "label_2", "probability_2"]
    assert [row["path"] for row in rows] == sorted(str(path) for path in photos.rglob("*.*") if path.suffix != ".txt")
    broken = next(row for row in rows if row["path"].endswith("broken.jpg"))
    assert broken["status"].startswith("unreadable: it is not an image of a known format")
    assert broken["label"] == broken["probability"] == ""
    good = [row for row in rows if row["status"] == "ok"]
    assert np.mean([row["label"] == Path(row["path"]).parent.name for row in good]) > 0.8
    for row in good:
        assert row["label"] in PHOTO_CLASSES
        assert 1 / 3 <= float(row["probability"]) <= 1
        assert float(row["probability_2"]) <= float(row["probability"])
    assert result.unreadable == 1
    assert sum(result.labels.values()) == 12


def test_training_images_get_the_label_the_saved_predictions_say(experiment: Config, tmp_path: Path) -> None:
    files = Artifacts(experiment.output)
    board = Leaderboard.from_json(files.leaderboard.read_text(encoding="utf-8"))
    row = board.row("pixels/logistic_regression")
    assert row.bundle is not None
    from pipeline.metrics import Predictions

    saved = Predictions.read(files.root / row.bundle / "predictions.npz").test
    photos = Path(str(experiment.dataset.path))
    predict.run(files.root / row.bundle, [photos / path for path in saved.paths], output=tmp_path / "out.csv", top=1)
    assert [found["label"] for found in read(tmp_path / "out.csv")] == list(saved.y_pred)


def test_all_missing_paths_are_named(experiment: Config, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        predict.run(Path(experiment.output), [tmp_path / "a.jpg", tmp_path / "b"], output=tmp_path / "out.csv")
    assert caught.value.problems == (str(tmp_path / "a.jpg"), str(tmp_path / "b"))


def test_a_folder_without_images_is_an_error(experiment: Config, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no image files in"):
        predict.run(Path(experiment.output), [tmp_path], output=tmp_path / "out.csv")


def test_no_bundle_is_an_error(tmp_path: Path) -> None:
    make_photos(tmp_path / "new", per_class=1)
    with pytest.raises(BundleError, match=r"no bundle here \(bundle\.json is missing\)"):
        predict.run(tmp_path, [tmp_path / "new"], output=tmp_path / "out.csv")


def test_an_embedding_this_machine_makes_otherwise_is_refused(experiment: Config, tmp_path: Path) -> None:
    files = Artifacts(experiment.output)
    source = files.bundle("resnet18-random-penultimate", "logistic_regression")
    bundle = shutil.copytree(source, tmp_path / "bundle")
    document = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    document["embedding"]["spec"]["weights_digest"] = "0" * 64
    (bundle / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BackboneError) as caught:
        predict.run(bundle, [make_photos(tmp_path / "new", per_class=1)], output=tmp_path / "out.csv")
    assert "makes another embedding than the one that was stored" in caught.value.message
    assert any(problem.startswith("weights") for problem in caught.value.problems)


def test_the_heads_own_label_comes_first_when_two_are_as_likely() -> None:
    row = predict.Row("a.jpg", "b", np.array([0.4, 0.4, 0.2]), "ok")
    text = predict.to_csv([row], ("a", "b", "c"), top=3)
    assert text.splitlines()[1] == "a.jpg,ok,b,0.400000,a,0.400000,c,0.200000"
