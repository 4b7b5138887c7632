"""Images per second of the bundled network: forward, and training by number format and by copies.

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

from pipeline.backbone.architectures import build
from pipeline.config import load_pretraining
from pipeline.training import (
    Data,
    Labelled,
    PlanStep,
    Run,
    Settings,
    Task,
    check_plan,
    predict_logits,
    stages_of,
    train,
)

RECIPE = Path(__file__).parents[2] / "configs" / "pretraining" / "bundled.yaml"
CPU = torch.device("cpu")


def make_data(size: int, count: int = 2048) -> Data:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    few = Labelled(pixels[:16], np.zeros(16, np.int64))
    return Data(Labelled(pixels, rng.integers(0, 200, count)), few, 200, (0.5,) * 3, (0.25,) * 3)


def make_task(settings: Settings, size: int) -> Task:
    recipe = load_pretraining(RECIPE)
    network = build(recipe.architecture, {**recipe.arguments, "num_classes": 200})
    stages = stages_of(network, size)
    return Task(network, stages, check_plan([PlanStep(0, "all")], stages), settings, 0, CPU)


def forward(data: Data, precision: str, seconds: float) -> float:
    network = make_task(Settings(steps=1), data.train.pixels.shape[1]).network.to(memory_format=torch.channels_last)
    predict_logits(network, data.train.pixels[:256], data.mean, data.std, CPU, precision)
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        predict_logits(network, data.train.pixels[:512], data.mean, data.std, CPU, precision)
        done += 512
    return done / (time.perf_counter() - start)


def training(data: Data, settings: Settings, seconds: float) -> float:
    """Images per second of the fastest stretch between two evaluations, as the log of a run says it."""
    size = data.train.pixels.shape[1]
    rate = 0.0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        with tempfile.TemporaryDirectory() as folder:
            trained = train(make_task(settings, size), data, Run(Path(folder), "bench"))
        rate = max([rate, *(record["images_per_second"] for record in trained.history)])
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    data = make_data(asked.size)
    base = Settings(steps=6, evaluate_every=3, optimizer="sgd", rate=0.01, batch_norm="train", batch_size=128)
    shared = {"batch_size": 64, "accumulate": 2, "replicas": 2}
    rows: dict[str, Callable[[], float]] = {}
    for precision in ("fp32", "bf16"):
        rows[f"forward, {precision}"] = lambda p=precision: forward(data, p, asked.seconds)  # type: ignore[misc]
        one = Settings(**{**vars(base), "precision": precision})
        two = Settings(**{**vars(one), **shared})
        rows[f"training, {precision}, one network"] = lambda s=one: training(data, s, asked.seconds)  # type: ignore[misc]
        rows[f"training, {precision}, two copies"] = lambda s=two: training(data, s, asked.seconds)  # type: ignore[misc]
    best = dict.fromkeys(rows, 0.0)
    for _ in range(3):
        for name, measure in rows.items():
            best[name] = max(best[name], measure())
    print(f"{asked.threads} threads, {asked.size} x {asked.size} pixels, images per second (best of 3)")
    for name, rate in best.items():
        print(f"  {name:<32} {rate:8.0f}")


if __name__ == "__main__":
    main()
