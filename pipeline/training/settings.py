"""Recipes: what a training run does at which step, as pure functions of the settings.

Nothing here holds state, so a run that was killed and resumed does at step n what an uninterrupted run does at step n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
BatchNormMode = Literal["frozen", "affine", "train"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run beside the network, the data and the seed.

    Rates are for the head; a stage `d` steps below it is trained at `rate * rate_decay ** d`, at least `rate / 100`.
    """

    steps: int
    """Optimizer steps."""
    batch_size: int = 64
    """Images per forward pass; a step sees `batch_size * accumulate`."""
    accumulate: int = 1
    """Batches per step; their gradients are averaged."""
    replicas: int = 1
    """Copies of the network that share a step's batches on the CPU, one thread each; at most `accumulate`."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    rate: float = 1e-3
    rate_decay: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 1e-2
    """Not applied to norms and biases. AdamW's is decoupled from the gradient; SGD's is the usual L2 term."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises from zero."""
    schedule: Literal["cosine", "trapezoid", "constant"] = "cosine"
    cooldown: float = 0.4
    """Share of the steps in which a trapezoid falls to zero."""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    """Alpha of the Beta distribution; zero is off. With both mixup and cutmix each batch gets one of them."""
    cutmix: float = 0.0
    dropout: float = 0.0
    """Dropout before the last layer."""
    augment: Literal["none", "flip", "crop", "trivial"] = "flip"
    smallest_crop: float = 0.5
    """The smallest share of an image's area that `crop` and `trivial` keep."""
    class_weight: Literal["balanced"] | None = None
    clip_norm: float | None = None
    precision: Precision = "fp32"
    batch_norm: BatchNormMode = "frozen"
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; zero is off."""
    average_top: int = 0
    """Weights of the best k evaluations that are offered to the greedy soup; zero is off."""
    evaluate_every: int = 50
    """Steps between two evaluations on the validation images, each followed by a checkpoint."""
    patience: int | None = None
    """Evaluations without improvement after which the run stops; None is never."""
    sizes: tuple[tuple[float, int], ...] = ()
    """Image sizes in pixels by share of the steps, such as `((0, 24), (0.5, 32))`; empty is the images' own."""
    profile_steps: int = 0
    """Steps the profiler watches before its table is written beside the log; zero is off."""
    tensorboard: bool = False


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
        if step >= start * settings.steps:
            size = pixels
    return size


def stage_rates(settings: Settings, stages: int) -> list[float]:
    """Return the full rate of each of `stages` stages from the stem to the head, geometric with a floor of 1/100."""
    return [max(settings.rate * settings.rate_decay**depth, settings.rate / 100) for depth in range(stages - 1, -1, -1)]


def steps_for(images: int) -> int:
    """Return the number of steps by the size of the data, after BiT's rule: 500 below 20,000 images, then 10,000, 20,000.

    Kolesnikov et al. 2020, "Big Transfer", section 3.3. Batches here are 64 where theirs are 512, so small data sets are
    still seen some ten times.
    """
    bounds: Mapping[int, int] = {20_000: 500, 500_000: 10_000}
    return next((steps for bound, steps in bounds.items() if images < bound), 20_000)
