"""`check` finds the mistakes of every part at once and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import check
from pipeline import config as configuration
from pipeline.config import Config
from pipeline.errors import PipelineError


def make_config(tmp_path: Path, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "output": str(tmp_path / "output"),
        "dataset": {"source": "folder", "path": str(tmp_path / "photos")},
        "backbones": [{"name": "resnet18"}],
        "heads": ["logistic_regression"],
    }
    return configuration.parse(raw | changes, "test")


def make_photos(tmp_path: Path) -> None:
    for label, colour in (("day", 250), ("night", 5)):
        for number in range(6):
            path = tmp_path / "photos" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (colour, number, 0)).save(path)


def test_a_good_config_is_described_and_nothing_is_written(tmp_path: Path) -> None:
    make_photos(tmp_path)
    lines = check.run(make_config(tmp_path))
    assert lines[0] == "1 heads: logistic_regression"
    assert lines[1] == "1 backbones: resnet18 (random)"
    assert "12 images in 2 classes: 10 train, 2 test" in lines
    assert lines[-1] == "the config is valid and the data can be used"
    assert not (tmp_path / "output").exists()


def test_problems_of_every_part_are_told_together(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        backbones=[{"name": "resnet81"}],
        heads=[{"name": "knn", "class_weight": "balanced", "space": {"neighbours": [1, 5]}}, "linear_svm"],
        tuning={"scoring": "log_loss"},
    )
    with pytest.raises(PipelineError) as caught:
        check.run(config)
    problems = caught.value.problems
    assert any(problem.startswith("knn: space.neighbours: unknown parameter") for problem in problems)
    assert any(problem.startswith("knn: class_weight: 'balanced' is not possible") for problem in problems)
    assert any("resnet81" in problem and "resnet" in problem for problem in problems)
    assert any("photos" in problem for problem in problems)
    assert caught.value.message == f"{len(problems)} problems; nothing was embedded or trained"


def test_a_class_with_few_images_is_named(tmp_path: Path) -> None:
    make_photos(tmp_path)
    lines = check.run(make_config(tmp_path, tuning={"folds": 8}))
    assert any(line.startswith("warning: class day has") for line in lines)
