"""Images per second of the bundled network: forward, and training, by number format.

    python tests/benchmarks/bench_training.py [--seconds 5] [--size 32] [--threads 2]

Each row is run for some seconds after a warm-up; rows are repeated in turn and the best of three is printed, because other
work on the machine only ever makes a row slower.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from pipeline.config import FinetuneConfig, read_yaml
from pipeline.embed.weights import build
from pipeline.finetuning.batches import Data, LabelledImages
from pipeline.finetuning.plan import check_plan, stages_of
from pipeline.finetuning.trainer import TrainingTask, predict_logits, train

RECIPE = Path(__file__).parents[2] / "configs" / "pretraining" / "bundled.yaml"
CPU = torch.device("cpu")
BATCH, STEPS = 128, 6


def make_data(size: int, count: int = 2048) -> Data:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    few = LabelledImages(pixels[:16], np.zeros(16, np.int64))
    return Data(LabelledImages(pixels, rng.integers(0, 200, count)), few, 200, (0.5,) * 3, (0.25,) * 3)


def make_task(size: int, precision: str, steps: int) -> TrainingTask:
    recipe = read_yaml(RECIPE)
    network = build(recipe["architecture"], {**recipe["arguments"], "num_classes": 200})
    stages = stages_of(network, (size, size))
    settings = FinetuneConfig(rate=0.01, batch_size=BATCH)
    return TrainingTask(
        network, stages, check_plan([(0.0, "all")], stages), settings, steps, precision, 0, CPU, evaluations=1
    )


def forward(data: Data, precision: str, seconds: float) -> float:
    network = make_task(data.train.pixels.shape[1], precision, 1).network.to(memory_format=torch.channels_last)
    predict_logits(network, data.train.pixels[:256], data.mean, data.std, CPU, precision)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        predict_logits(network, data.train.pixels[:512], data.mean, data.std, CPU, precision)
        done += 512
    return done / (time.perf_counter() - start)


def training(data: Data, precision: str, seconds: float) -> float:
    """Images per second of the fastest of some short runs, their checkpoints and one evaluation of 16 images included."""
    rate, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        with tempfile.TemporaryDirectory() as folder:
            task = make_task(data.train.pixels.shape[1], precision, STEPS)
            trained = train(task, data, Path(folder), "bench")
        rate = max(rate, STEPS * BATCH / trained.seconds)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    data = make_data(asked.size)
    rows: dict[str, Callable[[], float]] = {}
    for precision in ("fp32", "bf16"):
        rows[f"forward, {precision}"] = lambda p=precision: forward(data, p, asked.seconds)  # type: ignore[misc]
        rows[f"training, {precision}"] = lambda p=precision: training(data, p, asked.seconds)  # type: ignore[misc]
    best = dict.fromkeys(rows, 0.0)
    for _ in range(3):
        for name, measure in rows.items():
            best[name] = max(best[name], measure())
    print(f"{asked.threads} threads, {asked.size} x {asked.size} pixels, images per second (best of 3)")
    for name, rate in best.items():
        print(f"  {name:<32} {rate:8.0f}")


if __name__ == "__main__":
    main()
