"""The long run of the fuzz: every file of a finished experiment, a fine-tuned network's included, 20 changes each: `make fuzz`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from fuzz import Found, fuzz
from photos import make_photos, small_config

from pipeline import report
from pipeline.config import Config
from pipeline.experiment import FINETUNING, Artifacts, to_lines, with_digest, write_document
from pipeline.finetuning.result import write_weights
from pipeline.io.digests import file_digest
from pipeline.io.files import write_atomic
from pipeline.stages import extract as extract_features
from pipeline.stages import train_heads

PER_FILE = int(os.environ.get("MANYHEADS_FUZZ", "20"))


def finished(root: Path) -> Config:
    """An experiment with heads, a report, and the files that a fine-tuning leaves."""
    config = small_config(make_photos(root / "photos"), root / "output")
    extract_features.run(config)
    train_heads.run(config)
    report.build(root / "output")
    folder = Artifacts(config.output).finetuned / "resnet18"
    weights = folder / "finetuned.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(8, 4, generator=generator) for name in ("fc.weight", "conv.weight")}
    write_weights(
        weights, tensors, name="x", architecture="resnet18", arguments={}, preprocessing={}, classes=("a", "b")
    )
    write_document(folder / "result.json", FINETUNING, {"key": "k", "weights_digest": file_digest(weights)})
    write_atomic(folder / "checkpoint.pt", with_digest(np.arange(99).tobytes()))
    write_atomic(folder / "log.jsonl", to_lines([{"step": step, "accuracy": 0.5} for step in range(9)], "")[0])
    return config


def test_no_change_to_any_file_gives_a_wrong_result_in_silence(tmp_path: Path) -> None:
    found: Found = fuzz(finished(tmp_path), tmp_path, PER_FILE, seed=0)
    print("\n".join(["", *found.lines()]))
    assert found.wrong == []
    assert found.changes >= 25 * PER_FILE
