"""Predict: labels and probabilities for new images, a row for every image, and no surprises."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import rewrite
from photos import PHOTO_CLASSES, make_photos

from pipeline.config import Config
from pipeline.data.targets import Classification
from pipeline.errors import BackboneError, BundleError, ConfigError, DatasetError
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard
from pipeline.experiment import Artifacts, from_cell
from pipeline.images import NO_IMAGE
from pipeline.stages import predict


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
    assert sum(result.labels[""].values()) == 12


def test_training_images_get_the_label_the_saved_predictions_say(experiment: Config, tmp_path: Path) -> None:
    files = Artifacts(experiment.output)
    board = read_leaderboard(files.root)
    row = board.row("pixels/logistic_regression")
    assert row.bundle is not None
    from pipeline.evaluation import HeadPredictions

    saved = HeadPredictions.read(files.root / row.bundle / "predictions.npz").test
    photos = Path(str(experiment.dataset.path))
    predict.run(files.root / row.bundle, [photos / path for path in saved.paths], output=tmp_path / "out.csv", top=1)
    assert [found["label"] for found in read(tmp_path / "out.csv")] == list(saved.predicted)


def test_all_missing_paths_are_named(experiment: Config, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        predict.run(Path(experiment.output), [tmp_path / "a.jpg", tmp_path / "b"], output=tmp_path / "out.csv")
    assert caught.value.problems == (str(tmp_path / "a.jpg"), str(tmp_path / "b"))


def test_a_folder_without_images_is_an_error_before_the_network_is_loaded(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "open_networks", None)
    with pytest.raises(DatasetError, match="no image files in"):
        predict.run(Path(experiment.output), [tmp_path], output=tmp_path / "out.csv")


def test_no_bundle_is_an_error(tmp_path: Path) -> None:
    make_photos(tmp_path / "new", per_class=1)
    with pytest.raises(BundleError, match=r"bundle\.json: missing; expected an experiment"):
        predict.run(tmp_path, [tmp_path / "new"], output=tmp_path / "out.csv")


def test_a_place_that_is_not_there_names_the_one_that_was_meant(experiment: Config, tmp_path: Path) -> None:
    place = Path(experiment.output)
    with pytest.raises(ConfigError) as caught:
        predict.run(place.with_name(place.name + "s"), [tmp_path], output=tmp_path / "out.csv")
    assert str(caught.value) == (
        f"{place}s: there is no such file or folder, did you mean {place.name!r}?; expected an experiment's output folder, or a "
        "bundle's folder in it"
    )


def test_the_constant_guess_labels_nothing_and_is_passed_over_in_words(
    experiment: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Artifacts(experiment.output)
    guess = files.bundle("majority", "most_frequent")
    with pytest.raises(BundleError) as error:
        predict.run(guess, [make_photos(tmp_path / "new", per_class=1)], output=tmp_path / "out.csv")
    assert str(error.value) == f"{guess}: is the constant guess, which looks at no image; name another bundle's folder"

    copy = Path(shutil.copytree(experiment.output, tmp_path / "copy"))
    board = read_leaderboard(files.root)
    rows = tuple(replace(row, cv_mean=2.0) if row.embedding == "majority" else row for row in board.rows)
    Artifacts(copy).leaderboard.write_text(Leaderboard(rows, board.provenance).to_json(), encoding="utf-8")
    second = board.best
    assert predict.find_bundle(copy) == copy / str(second.bundle)
    assert caplog.messages == [
        f"the best row is the constant guess, which looks at no image; labelling with the best head, {second.key}"
    ]


def test_an_embedding_this_machine_makes_otherwise_is_refused(experiment: Config, tmp_path: Path) -> None:
    files = Artifacts(experiment.output)
    source = files.bundle("squeezenet1_1-random-penultimate", "logistic_regression")
    bundle = shutil.copytree(source, tmp_path / "bundle")
    document = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    document["embedding"]["spec"]["weights_digest"] = "0" * 64
    rewrite(bundle / "bundle.json", document)
    with pytest.raises(BackboneError) as caught:
        predict.run(bundle, [make_photos(tmp_path / "new", per_class=1)], output=tmp_path / "out.csv")
    assert "computes another embedding than the stored one" in caught.value.message
    assert any(problem.startswith("weights") for problem in caught.value.problems)


def test_the_heads_own_label_comes_first_when_two_are_as_likely() -> None:
    cells = Classification(("a", "b", "c")).csv_cells("b", np.array([0.4, 0.4, 0.2]), 3)
    assert list(cells) == ["b", "0.400000", "a", "0.400000", "c", "0.200000"]


def test_a_cell_that_a_spreadsheet_would_run_is_text_and_reads_back() -> None:
    said = Classification(("+1-1", "-1")).csv_cells("+1-1", np.array([0.6, 0.4]), 2)
    text = predict.to_lines([["=HYPERLINK(1)/@a.jpg", "ok", *said]])
    assert text == "'=HYPERLINK(1)/@a.jpg,ok,'+1-1,0.600000,-1,0.400000\n"
    cells = next(csv.reader([text]))
    assert [from_cell(cell) for cell in cells[:3]] == ["=HYPERLINK(1)/@a.jpg", "ok", "+1-1"]


def pixels_bundle(experiment: Config) -> Path:
    """A head on thumbnails, which loads no network."""
    return Artifacts(experiment.output).bundle("pixels", "logistic_regression")


@pytest.mark.parametrize("wrong", ["folder", "file/x.csv"])
def test_an_output_that_cannot_be_written_is_found_before_any_image_is_read(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(predict, "embed", None)
    with pytest.raises(OSError, match=r"Is a directory|Not a directory"):
        predict.run(pixels_bundle(experiment), [Path(str(experiment.dataset.path))], output=tmp_path / wrong)


def test_the_folder_of_the_output_is_made(experiment: Config, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "new", per_class=1)
    predict.run(pixels_bundle(experiment), [photos], output=tmp_path / "a" / "b" / "out.csv")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out.csv"]
    assert len(read(tmp_path / "a" / "b" / "out.csv")) == 3


def test_a_name_that_is_not_utf_8_is_labelled_and_written_with_its_bytes_escaped(
    experiment: Config, tmp_path: Path
) -> None:
    photos = make_photos(tmp_path / "new", per_class=1)
    (photos / "leaf" / "00.png").rename(photos / "leaf" / os.fsdecode(b"bad\xff.png"))
    predict.run(pixels_bundle(experiment), [photos], output=tmp_path / "out.csv")
    first = read(tmp_path / "out.csv")[0]
    assert (first["path"], first["status"]) == (f"{photos}/leaf/bad\\xff.png", "ok")


def test_a_name_with_signs_that_csv_uses_is_written_as_it_is(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path, per_class=1)
    name = 'a,"b"\n\u202fc.png'
    (tmp_path / "leaf" / "00.png").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    predict.run(pixels_bundle(experiment), [Path(name), Path("leaf"), Path(name)], output=Path("out.csv"))
    assert [(row["path"], row["status"]) for row in read(tmp_path / "out.csv")] == [(name, "ok")]


def test_a_device_that_there_is_not_is_refused_as_the_config_does(experiment: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        predict.run(pixels_bundle(experiment), [tmp_path], output=tmp_path / "out.csv", device="gpu")
    assert str(caught.value) == (
        "--device: should be 'auto', 'cpu', 'mps', 'cuda' or a GPU by number, such as 'cuda:1', got 'gpu'"
    )


def test_a_folder_is_walked_as_a_data_set_is_and_nothing_goes_without_a_row_or_a_count(
    experiment: Config, tmp_path: Path
) -> None:
    photos = make_photos(tmp_path / "new", per_class=1)
    first, *_ = sorted(photos.rglob("*.png"))
    contents = {
        "a/photo": first.read_bytes(),
        "a/raw.nef": b"II*\0\x10\0\0\0CR\x02\0",
        "notes.txt": b"x",
        ".hidden": b"",
    }
    for name, content in contents.items():
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(content)
    (photos / "link").symlink_to(tmp_path)
    (photos / "link.png").symlink_to(first)
    (photos / "a" / "loop").symlink_to(photos)
    (photos / "gone.png").symlink_to("nothing.png")
    os.mkfifo(photos / "pipe.png")
    result = predict.run(pixels_bundle(experiment), [photos], output=tmp_path / "out.csv")
    rows = {row["path"]: row["status"] for row in read(tmp_path / "out.csv")}
    linked = "it is a symbolic link to no file, and is not followed"
    assert {path: status for path, status in rows.items() if status != "ok"} == {
        f"{photos}/a/raw.nef": "unsupported_format: it is a camera's raw file; save it as JPEG or PNG",
        **{f"{photos}/{name}": f"unreadable: {linked}" for name in ("a/loop", "gone.png", "link")},
        f"{photos}/pipe.png": "unreadable: it is not a regular file",
    }
    good = [path.removeprefix(f"{photos}/") for path, status in rows.items() if status == "ok"]
    inside = [str(path.relative_to(photos)) for path in photos.rglob("*/00.png")]
    assert good == ["link.png", "a/photo", *sorted(inside)]
    assert result.unreadable == 5
    assert result.summary_lines()[-5:-1] == [
        "5 images could not be read; their `status` says why",
        "not an image: 1 file",
        f"  {photos}/notes.txt: {NO_IMAGE}",
        "ignored hidden files and folders: 1",
    ]


def test_a_folder_of_photos_that_cannot_be_read_has_a_row_for_each(experiment: Config, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a.cr3").write_bytes(b"\0\0\0\x18ftypcrx ")
    with pytest.raises(DatasetError, match="none of the 1 image could be read"):
        predict.run(pixels_bundle(experiment), [tmp_path / "new"], output=tmp_path / "out.csv")
    assert [row["status"] for row in read(tmp_path / "out.csv")] == [
        "unsupported_format: it is a camera's raw file; save it as JPEG or PNG"
    ]


def test_where_no_image_can_be_read_the_rows_are_written_and_the_run_fails(experiment: Config, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(
        DatasetError, match=r"none of the 2 images could be read; .*out\.csv gives the reason for each"
    ) as caught:
        predict.run(pixels_bundle(experiment), [tmp_path], output=tmp_path / "out.csv")
    rows = read(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")]
    assert caught.value.problems == tuple(f"{row['path']}: {row['status']}" for row in rows)


def test_images_are_as_large_as_the_experiment_allows_unless_told_otherwise(experiment: Config, tmp_path: Path) -> None:
    bundle = shutil.copytree(pixels_bundle(experiment), tmp_path / "bundle")
    document = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    assert document["embedding"]["max_pixels"] == experiment.dataset.max_pixels
    document["embedding"]["max_pixels"] = 20 * 24 - 1
    rewrite(bundle / "bundle.json", document)
    photos = make_photos(tmp_path / "new", per_class=1)
    with pytest.raises(DatasetError, match="none of the 3 images"):
        predict.run(bundle, [photos], output=tmp_path / "out.csv")
    assert read(tmp_path / "out.csv")[0]["status"].startswith("too_many_pixels")
    assert predict.run(bundle, [photos], output=tmp_path / "out.csv", max_pixels=20 * 24).unreadable == 0


def test_a_stopped_run_leaves_the_rows_of_finished_batches_and_the_old_output(
    experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    photos = make_photos(tmp_path / "new", per_class=4)
    output = tmp_path / "out.csv"
    predict.run(pixels_bundle(experiment), [photos], output=output)
    whole = output.read_text(encoding="utf-8")
    monkeypatch.setattr(predict, "BATCH_SIZE", 5)
    rows_of, calls = predict._rows, iter(range(3))

    def stop_at_the_third(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return rows_of(*arguments)

    monkeypatch.setattr(predict, "_rows", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        predict.run(pixels_bundle(experiment), [photos], output=output)
    (partial,) = tmp_path.glob("out.csv.*.partial")
    assert partial.read_text(encoding="utf-8") == "".join(whole.splitlines(keepends=True)[:11])
    assert output.read_text(encoding="utf-8") == whole
    assert caplog.messages == [
        f"stopped after 10 of 12 images: their rows are in {partial}, and a new run begins with the first image"
    ]


def test_rows_are_not_kept_in_memory(experiment: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each batch only its own rows are alive."""
    photos = make_photos(tmp_path / "new", per_class=8)
    monkeypatch.setattr(predict, "BATCH_SIZE", 4)
    alive: list[int] = []
    to_lines = predict.to_lines

    def count(rows: Any) -> str:
        alive.append(sum(type(found) is predict.PredictionRow for found in gc.get_objects()))
        return to_lines(rows)

    monkeypatch.setattr(predict, "to_lines", count)
    predict.run(pixels_bundle(experiment), [photos], output=tmp_path / "out.csv")
    assert len(alive) == 6
    assert max(alive) <= 8  # this batch's, and the one before until its name is taken
