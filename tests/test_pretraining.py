"""The script that makes the bundled weights, on a few images: it writes a backbone, goes on where it stopped, and its recipe is whole."""

from __future__ import annotations

import io
import json
import runpy
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.config import BackboneConfig
from pipeline.embed.weights import build, load_network

FOLDER = Path(__file__).parents[1] / "configs" / "pretraining"
SCRIPT = runpy.run_path(str(FOLDER / "pretrain.py"))
BLOCKS = {"depths": [1], "widths": [8], "group_widths": [8], "bottleneck_multipliers": [1.0], "strides": [1]}


def recipe(folder: Path, *overrides: str) -> Any:
    """The bundled weights' own recipe, with a small network and few steps."""
    small = [
        f"output={folder / 'out'}",
        f"data={folder / 'set.tar'}",
        f"arguments={json.dumps({'stem_width': 8, 'block_params': BLOCKS})}",
        "steps=6",
        "batch_size=4",
        "warmup=2",
        "cooldown=2",
        "evaluate_every=2",
        "precision=fp32",
        "sizes=[[0, 12], [3, 16]]",
    ]
    return SCRIPT["read_recipe"](FOLDER / "bundled.yaml", [*small, *overrides])


def write_archive(path: Path) -> None:
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        add("set/classes.tsv", b"n1\tboot\nn2\that\n")
        for split, count in (("train", 12), ("val", 6)):
            for number in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)).save(buffer, "PNG")
                add(f"set/{split}/n{1 + number % 2}/{number:02d}.png", buffer.getvalue())


def test_it_writes_a_backbone_that_describes_itself_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_archive(tmp_path / "set.tar")
    whole = recipe(tmp_path, f"output={tmp_path / 'whole'}")
    source = SCRIPT["read_images"](whole)
    assert (source.classes, len(source.data.train), len(source.data.validation)) == (("boot", "hat"), 12, 6)
    outcome = SCRIPT["train"](whole, source)
    path = tmp_path / "whole" / "weights.safetensors"
    described = json.loads(path.with_suffix(".json").read_text())
    assert described["outcome"] == outcome
    assert described["training"]["steps"] == outcome["steps"] == 6
    network = load_network(BackboneConfig(name="regnet_small", weights=str(path)), 0)
    assert described["classes"] == ["boot", "hat"]
    assert network.preprocessing.size == (32, 32)

    cut, real = recipe(tmp_path), SCRIPT["train"].__globals__["gradients"]

    def stop(network: Any, data: Any, recipe: Any, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return float(real(network, data, recipe, step))

    monkeypatch.setitem(SCRIPT["train"].__globals__, "gradients", stop)
    with pytest.raises(KeyboardInterrupt):
        SCRIPT["train"](cut, source)
    monkeypatch.undo()
    again = SCRIPT["train"](cut, source)
    assert {**again, "seconds": 0} == {**outcome, "seconds": 0}
    first, second = load_file(path), load_file(tmp_path / "out" / "weights.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(SystemExit, match="belongs to another recipe or other images"):
        SCRIPT["train"](recipe(tmp_path, "rate=0.1"), source)


def test_its_rate_is_a_trapezoid_and_images_without_classes_are_refused(tmp_path: Path) -> None:
    own = recipe(tmp_path, "rate=1.0", "steps=10", "warmup=3", "cooldown=4")
    optimizer = SCRIPT["optimizer_of"](torch.nn.Linear(2, 2), own)
    schedule = SCRIPT["schedule_of"](optimizer, own)
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    (tmp_path / "set.tar").mkdir()
    with pytest.raises(SystemExit, match=r"set\.tar: expected images in train/CLASS/ and val/CLASS/"):
        SCRIPT["read_images"](own)


def test_the_recipe_is_that_of_the_bundled_network() -> None:
    own = SCRIPT["read_recipe"](FOLDER / "bundled.yaml", [])
    bundled = json.loads(
        (Path(__file__).parents[1] / "pipeline" / "embed" / "bundled" / "bundled.json").read_text("utf-8")
    )
    made = bundled["training"]
    network = build(own.architecture, {**own.arguments, "num_classes": 200})
    assert sum(p.numel() for p in network.parameters()) == 2_205_480
    assert own.architecture == bundled["architecture"]
    assert {**own.arguments, "num_classes": 200} == bundled["arguments"]
    alike = (
        "steps",
        "batch_size",
        "accumulate",
        "rate",
        "momentum",
        "weight_decay",
        "label_smoothing",
        "ema",
        "precision",
    )
    assert {key: getattr(own, key) for key in alike} == {key: made[key] for key in alike}
    assert own.warmup == round(made["warmup"] * made["steps"])
    assert own.cooldown == round(made["cooldown"] * made["steps"])
    assert own.sizes == [[round(start * made["steps"]), size] for start, size in made["sizes"]]
