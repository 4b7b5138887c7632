"""Recipes: what a training run does at which step, as pure functions of the settings.

Nothing here holds state, so a run that was killed and resumed does at step n what an uninterrupted run does at step n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.config import TrainingConfig

Precision = Literal["fp32", "bf16", "fp16"]
BatchNormMode = Literal["frozen", "affine", "train"]

EVALUATIONS = 10
"""How often a run is evaluated when the config leaves it open."""


@dataclass(frozen=True)
class Settings:
    """`config.TrainingConfig`, where each key is explained, with everything left open decided."""

    steps: int
    batch_size: int = 32
    accumulate: int = 1
    replicas: int = 1
    optimizer: Literal["sgd", "adamw"] = "adamw"
    rate: float = 1e-3
    rate_decay: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 1e-2
    warmup: float = 0.1
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    cooldown: float = 0.4
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    dropout: float = 0.0
    augment: Literal["none", "flip", "crop", "trivial"] = "crop"
    smallest_crop: float = 0.5
    class_weight: Literal["balanced"] | None = None
    clip_norm: float | None = None
    precision: Precision = "fp32"
    batch_norm: BatchNormMode = "frozen"
    ema: float = 0.0
    average_top: int = 0
    evaluate_every: int = 50
    patience: int | None = None
    sizes: tuple[tuple[float, int], ...] = ()
    profile_steps: int = 0
    tensorboard: bool = False

    @property
    def images_per_step(self) -> int:
        """Images behind one optimizer step."""
        return self.batch_size * self.accumulate


def decide(config: TrainingConfig, images: int, precision: Precision) -> Settings:
    """Fill in what a config leaves open, by the number of training images; `precision` is already decided."""
    values = config.model_dump(exclude={"range_test"})
    steps = steps_for(images) if config.steps == "auto" else config.steps
    every = max(1, steps // EVALUATIONS) if config.evaluate_every == "auto" else config.evaluate_every
    return Settings(**{**values, "steps": steps, "evaluate_every": every, "precision": precision})


def rate_factor(settings: Settings, step: int) -> float:
    """Return the share of the full rate at a step: linear warm-up, then the schedule down to zero at the last step."""
    warmup = settings.warmup * settings.steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    done = step / settings.steps
    if settings.schedule == "trapezoid":
        return min(1.0, (1.0 - done) / settings.cooldown)
    share = (step - warmup) / max(1.0, settings.steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * share))


def size_at(settings: Settings, step: int, native: int) -> int:
    """Return the image size in pixels at a step."""
    size = native
    for start, pixels in settings.sizes:
        if step >= round(start * settings.steps):
            size = pixels
    return size


def stage_rates(settings: Settings, stages: int) -> list[float]:
    """Return the full rate of each of `stages` stages from the stem to the head, geometric with a floor of 1/100."""
    return [max(settings.rate * settings.rate_decay**depth, settings.rate / 100) for depth in range(stages - 1, -1, -1)]


def steps_for(images: int) -> int:
    """Return the number of steps by the size of the data, after BiT's rule: 500 below 20,000 images, then 10,000, 20,000.

    Kolesnikov et al. 2020, "Big Transfer", section 3.3; their batches are 512.
    """
    bounds: Mapping[int, int] = {20_000: 500, 500_000: 10_000}
    return next((steps for bound, steps in bounds.items() if images < bound), 20_000)
