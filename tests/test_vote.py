"""Soft voting: chosen without the images it is judged by, saved with its members, and used like any other head."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from documents import rewrite
from photos import small_config
from PIL import Image

from pipeline.config import Config
from pipeline.errors import BundleError
from pipeline.evaluation import METRICS, HeadPredictions, Predictions
from pipeline.evaluation.leaderboard import LeaderboardRow
from pipeline.export import bundle as bundles
from pipeline.stages import extract, predict, train_heads
from pipeline.stages.estimators import Classifier
from pipeline.stages.train_heads.apart import Voter, _chosen, _mean

ACCURACY = METRICS["accuracy"]


def voter(embedding: str, y: np.ndarray, probabilities: np.ndarray) -> Voter:
    row = LeaderboardRow(embedding, embedding, "", "h", False, False, 0.0, 0.0, (), None, 0.0, 0.0, 1)
    said = Predictions(y, probabilities.argmax(axis=1), probabilities)
    return Voter(row, said, said, probabilities, probabilities)


def test_those_who_help_vote_one_of_each_embedding_and_the_best_first():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 600)
    noise = [rng.normal(0, 1.4, (600, 3)) for _ in range(3)]

    def sure(noise: np.ndarray, by: float) -> np.ndarray:
        scores = np.exp(by * np.eye(3)[y] + noise)
        return scores / scores.sum(axis=1, keepdims=True)

    voters = {
        "a/good": voter("a", y, sure(noise[0], 2.0)),
        "a/nearly": voter("a", y, sure(noise[0], 1.9)),
        "b/other": voter("b", y, sure(noise[1], 1.8)),
        "c/none": voter("c", y, sure(noise[2], -2.0)),
    }
    assert _chosen(voters, ACCURACY, np.arange(600)) == ["a/good", "b/other"]


def test_a_choice_is_not_judged_by_the_images_it_had_a_part_in():
    """Of many voters that say nothing of random labels the choice looks better than chance where it was made, and only there."""
    flattered, honest = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        y = rng.integers(0, 2, 100)
        voters = {f"{n}/h": voter(f"{n}", y, rng.dirichlet((1, 1), 100)) for n in range(12)}
        folds = [
            (np.flatnonzero(part != fold), np.flatnonzero(part == fold))
            for part in [np.arange(100) % 5]
            for fold in range(5)
        ]
        every = np.arange(100)
        flattered.append(np.mean(_mean(voters, _chosen(voters, ACCURACY, every), every).argmax(axis=1) == y))
        said = np.concatenate(
            [_mean(voters, _chosen(voters, ACCURACY, train), held).argmax(axis=1) for train, held in folds]
        )
        honest.append(np.mean(said == np.concatenate([y[held] for _, held in folds])))
    assert np.mean(flattered) > 0.6
    assert np.mean(honest) == pytest.approx(0.5, abs=0.06)


def draw(folder: Path, per_class: int = 40) -> Path:
    """Write images of two classes: one tells them by brightness, the other by the direction of stripes, each most of the time."""
    rng = np.random.default_rng(0)
    across, down = np.indices((24, 24))
    for label in (0, 1):
        (folder / str(label)).mkdir(parents=True)
        for number in range(per_class):
            lines, light = (label if rng.random() < 0.8 else 1 - label for _ in range(2))
            stripes = 40 * np.sin((across if lines else down) * 1.3 + rng.uniform(0, 6))
            pixels = 110 + 40 * light + stripes[:, :, None] + rng.normal(0, 15, (24, 24, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / str(label) / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def voted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, train_heads.HeadsRun, Path]:
    """An experiment with two embeddings that know different things."""
    root = tmp_path_factory.mktemp("vote")
    photos = draw(root / "photos")
    config = small_config(photos, root / "output")
    tuning = config.tuning.model_copy(update={"scoring": "log_loss"})
    more = {"vote": True, "baselines": ("pixels", "hog"), "heads": config.heads[1:], "tuning": tuning}
    config = config.model_copy(update=more)
    extract.run(config)
    return config, train_heads.run(config), photos


def test_the_vote_is_a_row_with_the_score_of_the_choice_made_without_each_fold(voted):
    config, run, _ = voted
    row = run.leaderboard.row("vote/soft_vote")
    folder = run.files.root / row.bundle
    said = HeadPredictions.read(folder / "predictions.npz")
    metric = METRICS["log_loss"]
    own = Predictions(said.out_of_fold.y_true, said.out_of_fold.y_pred, said.out_of_fold.scores)
    assert row.cv_mean == pytest.approx(metric.score(own), abs=1e-5)
    assert len(row.params["members"]) == 2
    assert row.cv_mean > max(run.leaderboard.row(key).cv_mean for key in row.params["members"])
    again = train_heads.run(config)
    assert again.reused == len(again.leaderboard.rows) - 1  # the vote is none that was tuned
    assert again.leaderboard.row("vote/soft_vote") == row


def test_predict_embeds_with_every_network_and_says_the_mean(voted, tmp_path):
    _, run, photos = voted
    folder = run.files.root / "heads" / "vote" / "soft_vote"
    vote = bundles.load(folder)
    said = {}
    for name, where in {"vote": folder, **{str(n): folder / "members" / str(n) for n in range(2)}}.items():
        predict.run(where, [photos / "0"], output=tmp_path / f"{name}.csv", top=3)
        with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))[1:]
        said[name] = np.array(
            [[float(dict(zip(row[2::2], row[3::2], strict=True))[label]) for label in vote.classes] for row in rows]
        )
    marked = predict.run(
        folder, [photos / "0"], output=tmp_path / "marked.csv", unknown=0.2
    )  # by the distance of the first member
    assert marked.models[""].strangers.counts["images"] == len(said["vote"])
    mean = (said["0"] + said["1"]) / 2
    np.testing.assert_allclose(said["vote"], vote.calibrated(mean, "probability"), atol=2e-5)
    paths = sorted(photos.rglob("*.png"))
    loaded = Classifier.load(folder)
    np.testing.assert_allclose(loaded.predict_proba(paths[: len(paths) // 2]), said["vote"], atol=2e-6)
    assert (
        loaded.fit(paths, [path.parent.name for path in paths]).score(paths, [path.parent.name for path in paths]) > 0.5
    )


def test_a_member_that_was_exchanged_is_told(voted, tmp_path):
    _, run, _ = voted
    folder = Path(shutil.copytree(run.files.root / "heads" / "vote" / "soft_vote", tmp_path / "vote"))
    document = json.loads((folder / "members" / "1" / "bundle.json").read_text(encoding="utf-8"))
    rewrite(folder / "members" / "1" / "bundle.json", document | {"head": "another"})
    with pytest.raises(BundleError, match="its members are not those that bundle"):
        bundles.load(folder)


def test_without_a_second_embedding_that_helps_the_leaderboard_says_so(voted):
    config, _, _ = voted
    accuracy = config.tuning.model_copy(update={"scoring": "accuracy"})
    alone = config.model_copy(update={"baselines": (), "tuning": accuracy})
    notes = train_heads.run(alone).leaderboard.provenance["notes"]
    assert "No soft vote: it needs rows with probabilities on at least two embeddings of the same images." in notes
