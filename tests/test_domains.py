"""Domains: distances that say alike and not alike rightly, alignment that makes covariances equal, labels that touch nothing."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from report_experiment import section, words

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.errors import ConfigError, DatasetError
from pipeline.evaluation import Predictions
from pipeline.evaluation.domains import LEAST, align, apart, suffering, weights
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import Artifacts
from pipeline.export.bundle import load
from pipeline.report import material
from pipeline.stages import extract, predict, train_heads
from pipeline.stages.train_heads import domains as stage

RNG = np.random.default_rng(0)


def drawn(n: int, dim: int = 12, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, 7])
    mixed = rng.normal(size=(dim, dim)) * scale
    return (np.random.default_rng([seed, n]).normal(size=(n, dim)) @ mixed + shift).astype(np.float32)


def test_alignment_makes_mean_and_covariance_those_of_the_source():
    source, target = drawn(4000, seed=1, scale=9), drawn(3000, seed=2, scale=5, shift=3)
    moved = align(source, target, ridge=1e-4)(target)
    np.testing.assert_allclose(moved.mean(axis=0), source.mean(axis=0), atol=1e-2)
    expected = np.cov(source.T)
    assert np.linalg.norm(np.cov(target.T) - expected) > 0.5 * np.linalg.norm(expected)
    assert np.linalg.norm(np.cov(moved.T) - expected) < 0.01 * np.linalg.norm(expected)


def test_a_domain_is_aligned_with_itself_by_leaving_it_as_it_is():
    X = drawn(500)
    np.testing.assert_allclose(align(X, X)(X), X, atol=1e-3)


def test_too_few_images_are_not_aligned():
    with pytest.raises(ValueError, match="49 images, expected 50 at least"):
        align(drawn(300), drawn(LEAST - 1))


def test_a_domain_divided_at_random_is_one_domain():
    found = [apart(*np.split(drawn(240, seed=seed), 2), seed) for seed in range(8)]
    assert sum(one.interval[0] <= 0.5 <= one.interval[1] for one in found) >= 7
    assert sum(one.p_value < 0.05 for one in found) <= 1
    assert not any(one.shown for one in found)


def test_what_is_shifted_is_told_apart_by_as_much_as_it_is_shifted():
    X = RNG.normal(size=(400, 8)).astype(np.float32)
    Y = RNG.normal(size=(300, 8)).astype(np.float32) + np.float32(1.5)
    one, turned = apart(X, Y, 0), apart(Y, X, 0)
    assert one.shown
    assert one.interval[0] > 0.95
    assert one.p_value == pytest.approx(1 / 201)
    assert one.mean == pytest.approx(1.5, abs=0.1)  # of sqrt(8 * 1.5^2) in a spread of sqrt(8)
    assert (turned.auc, turned.mmd) == pytest.approx((one.auc, one.mmd), abs=1e-3)
    wider = apart(X, 3 * (Y - np.float32(1.5)), 0)
    assert wider.covariance > 1 > 0.3 > wider.mean


def test_copies_of_an_image_are_not_more_images():
    X, Y = drawn(60), drawn(61)
    units = np.concatenate([np.arange(60), 60 + np.arange(61)])
    once = apart(X, Y, 0, units)
    many = apart(np.repeat(X, 4, axis=0), np.repeat(Y, 4, axis=0), 0, np.repeat(units, 4))
    width = [one.interval[1] - one.interval[0] for one in (once, many)]
    assert width[1] > 0.8 * width[0]
    assert not many.shown


def test_weights_are_those_of_the_images_that_are_like_the_domain():
    source = drawn(600)
    first = source[:, 0] > np.median(source[:, 0])
    found = weights(source, drawn(601)[drawn(601)[:, 0] > np.median(source[:, 0])], 0)
    assert found.mean() == pytest.approx(1)
    assert found[first].mean() > 3 * found[~first].mean()
    assert found.std() > 0.5
    assert weights(source, drawn(602), 0).std() < 0.34


def test_classes_that_suffer_are_named_and_one_that_a_domain_lacks_is_not():
    y = np.tile([0, 1, 2], 60)
    guess, where = y.copy(), np.repeat(["old", "new"], 90).astype(object)
    new = where == "new"
    guess[new & (y == 1)] = 0
    kept = ~(new & (y == 2))
    said = Predictions.of(y[kept].astype(str), guess[kept].astype(str), ["0", "1", "2"])
    old, found = suffering(said, where[kept], ["old"])
    assert (old.name, old.new, old.accuracy, found.name, found.new, found.accuracy) == (
        "old",
        False,
        1,
        "new",
        True,
        0.5,
    )
    assert [one.label for one in found.classes if one.suffers] == ["1"]
    assert (found.classes[2].images, found.classes[2].recall, found.classes[2].suffers) == (0, None, False)
    assert not any(one.suffers for one in old.classes)


# In an experiment


def write(folder: Path, images: dict[str, int], seed: int = 0, permuted: bool = False, **keys: str) -> Config:
    """Images of three classes whose features are given: those of the domain `far` are stretched and shifted, all of them test images."""
    rng, rows, X = np.random.default_rng(seed), list[list[str]](), list[NDArray[np.float32]]()
    centres = np.random.default_rng(9).normal(size=(3, 16)) * 1.6
    step = 1.2 * (centres[1] - centres[0])  # so that one class looks like another
    folder.mkdir(parents=True, exist_ok=True)
    for domain, count in images.items():
        for number in range(count):
            label = number % 3
            vector = centres[label] + rng.normal(size=16)
            name = f"{domain}{number:03d}.png"
            Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(folder / name)
            told = (label + 1) % 3 if permuted and domain == "far" else label
            split = "test" if domain == "far" or number % 4 == 0 else "train"
            rows.append([name, "abc"[told], split, domain])
            X.append((1.5 * vector + step if domain == "far" else vector).astype(np.float32))
    np.save(folder / "mine.npy", np.stack(X))
    with (folder / "photos.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "label", "split", "place"], *rows])
    dataset = {"source": "manifest", "path": str(folder / "photos.csv"), "domain": "place", **keys}
    return configuration.parse(
        {
            "output": str(folder / "output"),
            "dataset": dataset,
            "backbones": [{"name": str(folder / "mine.npy")}],
            "baselines": ["majority"],
            "heads": ["ridge"],
            "tuning": {"trials": 2, "folds": 3},
        },
        "test",
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = write(tmp_path_factory.mktemp("domains"), {"near": 160, "far": 150})
    extract.run(config)
    train_heads.run(config)
    return config


def test_the_index_says_where_an_image_is_from(done: Config):
    index = DatasetIndex.read(Artifacts(done.output).dataset)
    assert index.domains is not None
    assert {path[:-7] == domain for path, domain in zip(index.paths, index.domains, strict=True)} == {True}


def test_rows_stand_apart_choose_nothing_and_the_page_says_what_they_brought(done: Config):
    board = read_leaderboard(Path(done.output))
    assert [row.head for row in board.ranked] == ["ridge", "most_frequent"]
    ((first, second),) = board.apart
    assert {first.head, second.head} == {"ridge+coral", "ridge+reweight"}
    plain = board.row(f"{first.embedding}/ridge")
    assert first.test is not None
    assert plain.test is not None
    assert first.test.n == second.test.n == plain.test.n  # type: ignore[union-attr]
    told = board.provenance["domains"]["more"]
    coral = next(one for one in told["adapted"] if one["way"] == "coral")
    assert coral["gain"]["interval"][0] > 0.05
    assert coral["gain"]["difference"] == pytest.approx(coral["score"] - coral["plain"])
    (pair,) = told["pairs"]
    assert (pair["one"], pair["other"], pair["images"]) == ("near", "far", [160, 150])
    text = board.to_text()
    assert "Adapted to new domains, without their labels: " in text
    assert "coral on 'far': " in text
    assert "points [" in text
    assert "it helps" in text
    page = words(section("domains", material.gather(Path(done.output))))
    assert "2 domains, 1 of them not in training" in page
    assert "far not in training" in page


def test_a_second_run_measures_nothing_again(done: Config, monkeypatch: pytest.MonkeyPatch):
    before = read_leaderboard(Path(done.output))
    monkeypatch.setattr(stage, "_find", None)
    train_heads.run(done)
    after = read_leaderboard(Path(done.output))
    assert after.rows == before.rows
    assert after.provenance["domains"] == before.provenance["domains"]
    assert after.provenance["notes"] == before.provenance["notes"]


def test_labels_of_the_new_domain_touch_no_head_and_no_answer(done: Config, tmp_path: Path):
    other = write(tmp_path, {"near": 160, "far": 150}, permuted=True)
    extract.run(other)
    train_heads.run(other)
    boards = [read_leaderboard(Path(config.output)) for config in (done, other)]
    told = [board.provenance["domains"]["more"] for board in boards]
    assert told[0]["pairs"] == told[1]["pairs"]
    assert told[0]["adapted"][0]["score"] != told[1]["adapted"][0]["score"]
    heads = [
        Path(config.output) / board.provenance["domains"]["bundles"][0]
        for config, board in zip((done, other), boards, strict=True)
    ]
    X = np.load(tmp_path / "mine.npy")
    said = [load(folder).said(X) for folder in heads]
    np.testing.assert_array_equal(said[0][0], said[1][0])
    np.testing.assert_array_equal(said[0][1], said[1][1])


def test_predict_aligns_a_folder_with_its_own_statistics_on_request(done: Config, tmp_path: Path):
    X = np.load(Path(done.output).parent / "mine.npy")[160:]
    truth = np.array(list("abc"))[np.arange(150) % 3]
    np.save(tmp_path / "far.npy", X)

    def right(**options: bool) -> tuple[float, str]:
        result = predict.run(Path(done.output), [tmp_path / "far.npy"], output=tmp_path / "far.csv", **options)  # type: ignore[arg-type]
        with (tmp_path / "far.csv").open(newline="") as file:
            labels = np.array([row["label"] for row in csv.DictReader(file)])
        return float((labels == truth).mean()), "\n".join(result.summary_lines())

    plain, _ = right()
    aligned, text = right(align=True)
    assert aligned > plain + 0.1
    assert "aligned: features moved to the mean and covariance of the training images" in text
    assert re.search(r"told these images with AUC 0\.\d\d \[", text)
    assert "drift: " in text
    np.save(tmp_path / "far.npy", X[:20])
    with pytest.raises(ConfigError, match="--align: 20 images; a covariance needs at least 50"):
        right(align=True)


def test_a_head_that_keeps_no_training_images_cannot_align(done: Config, tmp_path: Path):
    (row,) = [row for row in read_leaderboard(Path(done.output)).rows if row.head == "ridge+reweight"]
    np.save(tmp_path / "far.npy", np.zeros((60, 16)))
    folder = Artifacts(done.output).bundle(row.embedding, row.head)
    with pytest.raises(ConfigError, match="keeps no training images to align with"):
        predict.run(folder, [tmp_path / "far.npy"], output=tmp_path / "far.csv", align=True)


def test_few_images_known_domains_and_a_missing_class_are_said(tmp_path: Path):
    config = write(tmp_path / "few", {"near": 160, "far": 60})
    extract.run(config)
    text = train_heads.run(config).leaderboard.to_text()
    assert "coral: too few test images to align by, expected 100 of a domain: 60 of 'far'." in text
    assert "reweight: 60 test images of new domains are too few, expected 100." in text
    known = write(tmp_path / "known", {"near": 80, "next": 80})
    extract.run(known)
    board = train_heads.run(known).leaderboard
    assert board.apart == ()
    assert "Every domain of the test also has training images" in board.to_text()


@pytest.mark.parametrize(
    ("images", "keys", "message"),
    [
        ({"near": 12}, {}, "all images are of one domain, 'near'; expected at least 2"),
        ({"near": 12, " ": 12}, {}, "the domain is empty"),
        ({"near": 12, "far": 12}, {"domain": "plcae"}, "no column 'plcae', did you mean 'place'"),
    ],
)
def test_a_column_that_is_no_domain_is_told(tmp_path: Path, images: dict[str, int], keys: dict[str, str], message: str):
    config = write(tmp_path, images, **keys)
    with pytest.raises(DatasetError) as error:
        extract.run(config)
    assert message in str(error.value)


def test_the_splits_are_the_domains_where_the_config_says_so(tmp_path: Path):
    config = write(tmp_path, {"near": 100, "far": 40}, domain="split")
    extract.run(config.model_copy(update={"adapt": ()}))
    board = train_heads.run(config.model_copy(update={"adapt": ()})).leaderboard
    (pair,) = board.provenance["domains"]["more"]["pairs"]
    assert (pair["one"], pair["other"]) == ("training", "test")
    assert board.apart == ()


def test_a_domain_of_a_folder_is_its_split_alone(tmp_path: Path):
    raw = {
        "dataset": {"source": "folder", "path": str(tmp_path), "domain": "camera"},
        "backbones": [{"name": "resnet18"}],
    }
    with pytest.raises(ConfigError, match="domain: only for source 'manifest'"):
        configuration.parse(raw, "test")
    raw["dataset"] |= {"domain": "split"}  # type: ignore[operator]
    assert configuration.parse(raw, "test").dataset.domain_column == ""
    with pytest.raises(ConfigError, match="did you mean 'coral'"):
        configuration.parse({**raw, "adapt": ["corall"]}, "test")
