"""Views of images: pixels that are told by image and seed, stores of their own, folds that no picture straddles, rows that choose nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from photos import make_photos, small_config

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.embed.records import read_records
from pipeline.errors import BundleError, ConfigError
from pipeline.evaluation import HeadPredictions
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.images.preparing import Preprocessing, viewed
from pipeline.stages import export, extract, maintenance, predict, train_heads
from pipeline.stages.load import load
from pipeline.stages.train_heads import apart
from pipeline.stages.train_heads import views as stage

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def test_a_flip_is_a_mirror_a_crop_half_or_more_and_a_colour_leaves_the_place():
    np.testing.assert_array_equal(viewed(PIXELS, "flip"), PIXELS[:, ::-1])
    for seed in range(20):
        height, width = viewed(PIXELS, f"crop {seed}").shape[:2]
        assert 0.45 * 40 * 60 <= height * width <= 40 * 60
        assert 3 / 4 - 0.1 <= (width / height) / (60 / 40) <= 4 / 3 + 0.1
    grey = np.full((8, 8, 3), 100, np.uint8)
    assert 65 <= viewed(grey, "colour 0").min() == viewed(grey, "colour 0").max() <= 135


@pytest.mark.parametrize("name", ["flip", "crop", "colour"])
def test_a_view_is_told_by_the_image_and_the_seed(name: str):
    np.testing.assert_array_equal(viewed(PIXELS, f"{name} 3"), viewed(PIXELS.copy(), f"{name} 3"))
    if name != "flip":
        others = [viewed(PIXELS, f"{name} 4"), viewed(PIXELS + np.uint8(1), f"{name} 3")]
        assert all(not np.array_equal(viewed(PIXELS, f"{name} 3"), other) for other in others)


def test_an_identity_without_a_view_is_the_one_of_before():
    plain = Preprocessing(resize=256, crop=224)
    assert "view" not in plain.identity()
    assert Preprocessing(resize=256, crop=224, view="crop 0").identity()["view"] == "crop 0"
    section = configuration.parse({"backbones": [{"name": "resnet18"}]}, "test").backbones[0]
    assert not {"view", "views"} & {*section.model_dump(mode="json")}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "resnet18", "views": ["flipp"]}, "did you mean 'flip'"),
        ({"name": "resnet18", "views": ["flip", "flip"]}, "the same view is given twice"),
        ({"name": "mine.npy", "views": ["flip"]}, "mine.npy is a file of vectors, and views need images"),
    ],
)
def test_views_that_cannot_be_are_told(section: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        configuration.parse({"backbones": [section]}, "test")


# In an experiment


def with_views(config: Config, *views: str) -> Config:
    return config.model_copy(update={"backbones": (config.backbones[0].model_copy(update={"views": views}),)})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("views")
    config = small_config(make_photos(root / "photos"), root / "output")
    config = config.model_copy(update={"heads": config.heads[:1], "baselines": ("majority",)})  # type: ignore[index]
    extract.run(with_views(config, "flip"))
    work = extract.run(with_views(config, "flip", "crop")).work
    assert work is not None
    assert dict(work.vectors) == {"squeezenet1_1-random-penultimate-crop": 36}
    train_heads.run(with_views(config, "flip", "crop"))
    return with_views(config, "flip", "crop")


def test_each_view_is_a_store_of_its_own_and_nothing_is_embedded_twice(done: Config):
    records = read_records(Artifacts(done.output).features)
    assert [(record.name, record.kind) for record in records] == [
        ("squeezenet1_1-random-penultimate", "backbone"),
        ("squeezenet1_1-random-penultimate-flip", "view"),
        ("squeezenet1_1-random-penultimate-crop", "view"),
    ]
    assert len({record.fingerprint for record in records}) == 3
    assert extract.run(done).work is None
    plain, flip = (load(done.output, embedding=record.name).X[:] for record in records[:2])
    assert not np.allclose(plain, flip)


def test_a_sample_of_each_view_is_embedded_anew_as_it_is_stored(done: Config):
    checks = maintenance.verify(done, sample=3)
    assert [check.sampled for check in checks] == [3, 3, 3]
    assert all(check.ok for check in checks)


def test_rows_with_views_stand_apart_and_say_what_they_brought_and_cost(done: Config):
    board = read_leaderboard(Path(done.output))
    assert [row.head for row in board.ranked] == ["logistic_regression", "most_frequent"]
    ((*rows,),) = board.apart
    assert sorted(row.head.partition("+")[2] for row in rows) == sorted(stage.WAYS)
    plain = board.ranked[0].embed_seconds or 0.0
    assert sorted((row.embed_seconds or 0.0) > 2 * plain for row in rows) == [False, True, True]
    assert all((row.embed_seconds or 0.0) >= plain > 0 for row in rows)
    assert all(len(row.cv_scores) == 3 and row.test is not None and row.test.n == rows[0].test.n for row in rows)  # type: ignore[union-attr]
    text = board.to_text()
    assert "With views of the images: the best head of a network" in text
    assert "out of fold and " in text
    assert "6.1 kB of vectors per image instead of 2.0" in text
    assert "that it helps is not shown" in text
    assert "ms to embed an image instead of" in text


def test_no_view_of_an_image_that_is_judged_was_learned_from(done: Config, monkeypatch: pytest.MonkeyPatch):
    fits, asked = list[NDArray[np.float32]](), train_heads.ask(done)

    class Watched:
        def fit(self, X: NDArray[np.float32], y: NDArray[np.int64]) -> Watched:
            fits.append(X)
            return self

    def stop(*given: object) -> None:
        raise StopIteration

    monkeypatch.setattr(apart, "_found_before", lambda *given: None)
    monkeypatch.setattr(stage, "clone", lambda estimator: Watched())
    monkeypatch.setattr(stage, "_mean", stop)
    with pytest.raises(StopIteration):
        stage.with_views(read_leaderboard(Path(done.output)), asked)
    train, held_out = asked.task.folds[0]
    names = [record.name for record in asked.records if record.kind != "baseline"]

    def rows(part: NDArray[np.intp], *of: str) -> set[bytes]:
        found = [asked.stores[name].read(asked.task.train.digests[part]) for name in of]
        return {vector.tobytes() for vector in np.concatenate(found)}

    plain, views = ({vector.tobytes() for vector in X} for X in fits)
    assert plain == rows(train, names[0])
    assert views == rows(train, *names)
    assert not views & rows(held_out, *names)


def test_a_second_run_measures_nothing_again(done: Config, monkeypatch: pytest.MonkeyPatch):
    before = read_leaderboard(Path(done.output))
    monkeypatch.setattr(stage, "_find", None)
    train_heads.run(done)
    assert read_leaderboard(Path(done.output)).rows == before.rows


def test_predict_averages_over_the_views_as_the_leaderboard_did(done: Config, tmp_path: Path):
    row = next(row for row in read_leaderboard(Path(done.output)).rows if row.head.endswith("regression+averaged"))
    folder = Artifacts(done.output).bundle(row.embedding, row.head)
    said = HeadPredictions.read(folder / FILE_NAME).test
    assert len(bundles.load(folder).members) == 3
    assert said.paths is not None
    images = [Path(done.dataset.path or "") / path for path in said.paths]
    predict.run(folder, images, output=tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    found = [rows[str(image)] for image in images]
    assert [each["label"] for each in found] == said.predicted.tolist()
    np.testing.assert_allclose(
        [float(each["probability"]) for each in found],
        said.probabilities.max(axis=1),
        atol=2e-3,  # type: ignore[union-attr]
    )
    with pytest.raises(BundleError, match="averaged over views of an image"):
        export.opened({"": bundles.load(folder)}, False)
