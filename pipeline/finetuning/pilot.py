"""Pilot: a few fine-tuning steps from the handed-over head, on two small parts of the training images.

It measures cheaply whether fine-tuning can help: how much the loss on the same held-out images falls, whether more images
help, and how long a step takes. A pilot costs at most `SHARE` of the whole run, counted in passes of an image through the network.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config import Config
from pipeline.embed.weights import Network
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.finetuning.batches import Data, LabelledImages, to_float
from pipeline.finetuning.handover import Layer, make_task
from pipeline.finetuning.material import Choice, Parts
from pipeline.finetuning.plan import check_plan
from pipeline.finetuning.result import RETURN_EVALUATIONS
from pipeline.finetuning.trainer import (
    EVALUATIONS,
    TrainingTask,
    copy_weights,
    evaluate,
    make_optimizer,
    prepare,
    steps_of,
    train_step,
)

SHARE = 0.045
"""Of the passes of a whole run; overhead may bring this to 0.05."""
PASSES = 3
"""Cost of a training step per image, in passes: one forward, and about two backward."""
MOST_HELD_OUT = 128
"""Largest number of held-out images to evaluate a pilot on."""
GENTLER = 0.1
"""Fraction of the run's rate: a pilot stands for the run's first steps, which are within the warm-up."""
PART = 4
"""Ratio of the larger to the smaller part."""
STATISTICS = 64
"""Number of images whose statistics are compared with the network's stored BatchNorm statistics."""


@dataclass(frozen=True)
class Pilot:
    """Results of some steps on two parts of the training images, evaluated on the same held-out images."""

    sizes: tuple[int, int]
    steps: int
    held_out: int
    start: float
    """Loss of the handed-over head."""
    losses: tuple[float, float]
    """Loss after the steps on each part."""
    shift: float | None
    """Distance of the images' statistics from the stored BatchNorm statistics, in stored standard deviations; None without BatchNorm."""
    step_seconds: tuple[float, float]
    """Duration of a step that trains the last stage, and of one that trains everything."""
    image_seconds: float
    """Duration of evaluating an image."""
    seconds: float

    def share(self, config: Config, parts: Parts) -> float:
        """Return the pilot's number of passes as a fraction of a whole run's."""
        trained, judged = config.finetune.batch_size * (2 * self.steps + 2), 3 * self.held_out
        return (PASSES * trained + judged) / full_passes(config, parts)

    def minutes(self, config: Config, parts: Parts) -> tuple[float, float]:
        """Return the expected minutes of a whole run: training the last stage, and training everything."""
        steps = steps_of(config.finetune, len(parts.train))
        judged = _judged(parts) * self.image_seconds
        last, everything = ((steps * each + judged) / 60 for each in self.step_seconds)
        return last, everything


def full_passes(config: Config, parts: Parts) -> int:
    """Return the number of passes of an image through the network in a run that trains everything."""
    settings = config.finetune
    trained = steps_of(settings, len(parts.train)) * settings.batch_size
    return trained * PASSES + _judged(parts) + len(parts.test)


def _judged(parts: Parts) -> int:
    """Return the number of passes for validation images in a whole run."""
    return (EVALUATIONS + RETURN_EVALUATIONS) * len(parts.validation)


def pilot(config: Config, choice: Choice, network: Network, layer: Layer, parts: Parts) -> Pilot:
    """Train for a few steps on each of two parts of the training images, starting from the handed-over head; changes `network`.

    TrainingError if an image cannot be read, or the loss is not finite.
    """
    began, target, settings = time.perf_counter(), parts.target, config.finetune
    held_out = parts.validation.rows(stratified_order(target.encode(parts.validation), config.seed)[:MOST_HELD_OUT])
    each = settings.batch_size
    budget = SHARE * full_passes(config, parts) - 3 * len(held_out) - STATISTICS
    steps = max(2, int(budget / (PASSES * each * 2)) - 1)  # the remaining step times the last stage
    learned = parts.train.rows(stratified_order(target.encode(parts.train), config.seed)[: steps * each])
    gentle = {"rate": GENTLER * settings.rate, "steps": steps, "unfreeze": ((0.0, "all"),)}
    config = config.model_copy(update={"finetune": settings.model_copy(update=gentle)})
    small = replace(parts, train=learned, validation=held_out)
    task, whole = make_task(config, choice, network, layer, small)
    network.module.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    handed_over = copy_weights(network.module)

    def loss() -> float:
        return -evaluate(network.module, whole.validation, whole, task.device, task.precision)[1]

    clock = time.perf_counter()
    start = loss()
    image_seconds = (time.perf_counter() - clock) / len(held_out)
    some = torch.from_numpy(whole.train.pixels[:STATISTICS])
    shift = statistics_shift(network.module, to_float(some, whole.mean, whole.std))
    prepare(task, whole)  # after the shift was measured, as this folds the norms
    sizes = (max(2, len(learned) // PART), len(learned))
    losses, spent = list[float](), list[float]()
    for size in sizes:
        network.module.load_state_dict(handed_over)
        part = LabelledImages(whole.train.pixels[:size], whole.train.y[:size])
        spent += _steps(task, replace(whole, train=part), steps)
        losses.append(loss())
    network.module.load_state_dict(handed_over)
    everything = float(np.median(spent))
    last = _steps(replace(task, plan=check_plan([(0.0, "last_stage")], task.stages)), whole, 2)[-1]
    return Pilot(
        sizes=sizes,
        steps=steps,
        held_out=len(held_out),
        start=start,
        losses=(losses[0], losses[1]),
        shift=shift,
        step_seconds=(min(last, everything), everything),  # it does less work: a longer time is noise
        image_seconds=image_seconds,
        seconds=time.perf_counter() - began,
    )


def _steps(task: TrainingTask, data: Data, count: int) -> list[float]:
    """Do some steps at the full rates and return their durations in seconds."""
    optimizer, scaler = make_optimizer(task), torch.amp.GradScaler(task.device.type, enabled=task.precision == "fp16")
    spent = []
    for step in range(count):
        clock = time.perf_counter()
        train_step(task, data, optimizer, scaler, step)
        spent.append(time.perf_counter() - clock)
    return spent


def statistics_shift(network: nn.Module, images: torch.Tensor) -> float | None:
    """Return the distance of images from the stored statistics of a network's BatchNorm layers; None if it has none.

    The distance of a layer is the root mean square, over its channels, of the difference of the means in stored standard
    deviations; the result is the mean over layers. After Maharana et al. 2021 (arXiv 2107.00191).

    images : float32 (n, 3, h, w), as the network takes them
    """
    found = list[float]()

    def look(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if norm.running_mean is not None and norm.running_var is not None:
            mean = inputs[0].float().transpose(0, 1).flatten(1).mean(dim=1)
            apart = (mean - norm.running_mean) ** 2 / (norm.running_var + norm.eps)
            found.append(float(apart.mean().sqrt()))

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    device = next(network.parameters()).device
    network.eval()
    with torch.inference_mode():
        network(images.to(device))
    for hook in hooks:
        hook.remove()
    return float(np.mean(found)) if found else None
