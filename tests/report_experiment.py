"""One small real experiment: coloured squares of three classes through `features` and `heads`, with faults planted in the photos."""

from __future__ import annotations

import csv
import dataclasses
import html
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from pipeline import config as configuration
from pipeline import report
from pipeline.config import Config
from pipeline.evaluation import Predictions, scores
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow
from pipeline.report import drawing, page
from pipeline.report.material import Material
from pipeline.report.page import filled
from pipeline.report.sections import SECTIONS
from pipeline.stages import extract, train_heads

CLASSES = ("ant", "猫 $5", "<b>bee</b> & 'co'")
EMBEDDING = "squeezenet1_1-random-penultimate"
COLOURS = ((140, 90, 90), (95, 125, 100), (100, 105, 140))
PER_CLASS = {"train": 40, "test": 20}
FLIPPED, COPY, ORIGINAL, OUTLIER = "train/0/006.png", "test/0/000.png", "train/0/000.png", "test/0/001.png"


def row(head: str, cv: float, correct: int = 90, embedding: str = "resnet18-penultimate", **changes) -> LeaderboardRow:
    """Return a row without any artifact; of its 100 test images `correct` are right."""
    y = np.array(["a", "b"] * 50)
    guess = np.where(np.arange(100) < correct, y, "c")
    made = LeaderboardRow(
        embedding=embedding,
        backbone="resnet18",
        layer="penultimate",
        head=head,
        untrained=False,
        baseline=False,
        cv_mean=cv,
        cv_std=0.01,
        cv_scores=(cv - 0.01, cv, cv + 0.01),
        test=scores(Predictions.of(y, guess, ("a", "b", "c"))),
        fit_seconds=1.25,
        predict_seconds=0.01,
        trials=16,
        params={"C": np.float64(0.5), "k": np.int64(3)},
    )
    return dataclasses.replace(made, **changes)


def material(rows, trials=None, provenance=None, predictions=None, recommendation=None) -> Material:
    """Return what a page is made of where there are rows and nothing on disk; `predictions` are those of the best row."""
    board = Leaderboard(tuple(rows), provenance or {}, recommendation)
    said = {} if predictions is None else {board.best.key: predictions}
    return Material(Path("out"), board, said, trials or {})


def section(name: str, material: Material) -> Markup:
    """Return a section of the page as HTML, nothing where it has nothing to show."""
    found = next(part for part in SECTIONS if part.name == name)
    part = found.show(material)
    return Markup("") if part is None else filled(found, material, part)


def words(page: str) -> str:
    """Return what a reader sees, in one line."""
    seen = re.sub(r"<(style|script).*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", seen)).split())


def write_images(folder: Path) -> Path:
    """Write a square per image and their manifest: one label is wrong, a test image is a training image with other noise, one is odd."""
    rng, lines, drawn = np.random.default_rng(0), [], {}
    for split, count in PER_CLASS.items():
        for number, colour in enumerate(COLOURS):
            for image in range(count):
                name = f"{split}/{number}/{image:03d}.png"
                drawn[name] = np.array(colour) + rng.normal(0, 11, 3) + rng.normal(0, 20, (12, 12, 3))
                wrong = name == FLIPPED
                lines.append((name, CLASSES[(number + wrong) % 3], split))
    drawn[COPY] = drawn[ORIGINAL] + rng.normal(0, 1, (12, 12, 3))
    drawn[OUTLIER] = np.indices((12, 12)).sum(axis=0)[:, :, None] % 2 * 255.0 + np.zeros(3)
    for name, pixels in drawn.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / name)
    with (folder / "squares.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *lines])
    return folder / "squares.csv"


def squares(folder: Path, scoring: str = "accuracy") -> Config:
    """Return the config of the experiment on the squares in a folder; each score has an output of its own."""
    raw = {
        "output": str(folder / scoring),
        "dataset": {"source": "manifest", "path": str(folder / "squares.csv")},
        "backbones": [{"name": "squeezenet1_1", "weights": "random", "preprocessing": {"resize": 32, "crop": 32}}],
        "baselines": ["majority"],
        "extraction": {"device": "cpu", "precision": "fp32", "workers": 1},
        "heads": ["logistic_regression", "nearest_centroid"],
        "tuning": {"strategy": "random", "trials": 3, "folds": 4, "scoring": scoring},
    }
    return configuration.parse(raw, "test")


@lru_cache(maxsize=1)
def built_experiment(folder: Path) -> Path:
    """Return the experiment with its report; made once however many files ask."""
    write_images(folder)
    config = squares(folder)
    extract.run(config)
    train_heads.run(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "to_png", drawing.to_png)
        report.build(config.output)
    return Path(config.output)
