"""`check` finds the mistakes of every part at once and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline import config as configuration
from pipeline.config import Config
from pipeline.embed import backbone, engines
from pipeline.embed.engines import choice_inputs
from pipeline.errors import BackboneError, PipelineError
from pipeline.stages import check


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
    assert lines[0] == "1 head: logistic_regression"
    assert lines[1] == "1 backbone: resnet18 (random)"
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


def test_heads_without_probabilities_are_left_out_of_log_loss(tmp_path: Path) -> None:
    make_photos(tmp_path)
    reason = (
        "head ridge: tuning.scoring 'log_loss' needs probabilities, which this head lacks; scores that do not: accuracy, "
        "balanced_accuracy, macro_f1"
    )
    both = make_config(tmp_path, heads=["ridge", "knn"], tuning={"scoring": "log_loss"})
    assert check.run(both)[:2] == ["1 head: knn", f"left out: {reason}"]
    assert problems_of(make_config(tmp_path, heads=["ridge"], tuning={"scoring": "log_loss"})) == (reason,)


def problems_of(config: Config) -> tuple[str, ...]:
    with pytest.raises(PipelineError) as caught:
        check.run(config)
    return caught.value.problems


def without_a_gpu() -> bool:
    return not choice_inputs()["cuda"][0]


@pytest.mark.skipif(not without_a_gpu(), reason="there is a GPU")
def test_what_this_machine_does_not_have_is_found(tmp_path: Path) -> None:
    make_photos(tmp_path)
    config = make_config(tmp_path, extraction={"device": "cuda:9"})
    assert problems_of(config) == ("device 'cuda:9' is not available; there are cpu and 0 GPUs",)


def test_an_engine_that_cannot_be_used_is_found_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path)
    monkeypatch.setattr(engines, "openvino_is_installed", lambda: False)
    assert problems_of(make_config(tmp_path, extraction={"engine": "openvino", "device": "cpu"})) == (
        "extraction.engine is openvino, but it cannot be used: it is not installed; pip install 'manyheads[openvino]'",
    )


@pytest.mark.parametrize("weights", ["random", "bundled"])
def test_a_pooling_that_a_layer_cannot_have_is_found_in_the_words_of_the_run(tmp_path: Path, weights: str) -> None:
    make_photos(tmp_path)
    layer = {"random": "layer4", "bundled": "trunk_output"}[weights]
    name = {"random": "resnet18", "bundled": "regnet_small"}[weights]
    config = make_config(
        tmp_path, backbones=[{"name": name, "weights": weights, "layers": [layer], "pooling": "cls"}], baselines=[]
    )
    found = problems_of(config)
    with pytest.raises(BackboneError) as caught:
        backbone.load(config.backbones[0], config.extraction, 0)
    assert found == caught.value.problems
    assert "no pooling 'cls': it has no class token" in found[0]


def test_images_too_small_for_a_network_are_found(tmp_path: Path) -> None:
    make_photos(tmp_path)
    found = problems_of(
        make_config(tmp_path, backbones=[{"name": "inception_v3", "preprocessing": {"resize": 20, "crop": 20}}])
    )
    assert len(found) == 1
    assert found[0].startswith("inception_v3 cannot take images of 20 x 20 pixels (")


def test_weights_that_are_to_be_fetched_are_told_with_what_needs_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    make_photos(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    config = make_config(tmp_path, backbones=[{"name": "resnet50", "weights": "IMAGENET1K_V2"}])
    (note,) = [line for line in check.run(config) if line.startswith("note: ")]
    assert note == (
        "note: resnet50 (IMAGENET1K_V2) is not here yet: `features` fetches "
        "https://download.pytorch.org/models/resnet50-11ad3fa6.pth (98 MB) to "
        f"{tmp_path}/hub/checkpoints; name: efficientnet_lite0, weights: imagenet, as in configs/folder.yaml, needs no download"
    )
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth").write_bytes(b"")
    assert not [line for line in check.run(config) if line.startswith("note: ")]


def test_data_without_a_test_image_are_refused_with_the_cause(tmp_path: Path) -> None:
    make_photos(tmp_path)
    rows = [f"{label}/{number}.png,{label},{label}" for label in ("day", "night") for number in range(6)]
    path = tmp_path / "photos" / "list.csv"
    path.write_text("\n".join(["path,label,group", *rows]), encoding="utf-8")
    (problem,) = problems_of(make_config(tmp_path, dataset={"source": "manifest", "path": str(path)}))
    assert problem.startswith(
        "no image is left for the test, and every leaderboard needs some: no class has more than "
    )


def test_classes_with_few_images_are_named_unless_all_have_too_few_for_the_folds(tmp_path: Path) -> None:
    make_photos(tmp_path)
    (tmp_path / "photos" / "day" / "0.png").unlink()
    (tmp_path / "photos" / "day" / "1.png").unlink()

    def warnings(folds: int) -> list[str]:
        lines = check.run(make_config(tmp_path, tuning={"folds": folds}))
        return [line for line in lines if line.startswith("warning: ")]

    (named,) = warnings(5)
    assert "fewer training images, groups or distinct contents than the 5 folds in class 'day'" in named
    (lowered,) = warnings(1000)
    assert lowered.startswith("warning: tuning.folds is 1000, but the training images allow 5")
