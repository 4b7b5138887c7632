"""Looking before and after training: the rate's range test, and the line from hand-over to result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import update_bn

from pipeline.errors import TrainingError
from pipeline.finetuning.batches import Data, augmented, rows_at
from pipeline.finetuning.steps import Task, evaluate, make_optimizer, train_step
from pipeline.finetuning.weights import Score, Weights, copy_weights, interpolate

ALPHAS = tuple(round(0.1 * tenth, 1) for tenth in range(11))
BLOW_UP = 4.0
"""A range test ends when the loss is this many times its lowest."""
STATISTICS_BATCHES = 20


@dataclass(frozen=True)
class ReturnPath:
    """Validation scores between hand-over (alpha 0) and result (alpha 1), and the alpha that was chosen."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...]
    alpha: float
    weights: Weights


def range_test(task: Task, data: Data, steps: int = 100, low: float = 1e-6, high: float = 1.0) -> float:
    """Train with a rate that grows each step and return the one where the loss falls fastest; the network is put back bit for bit.

    Smith 2017, "Cyclical learning rates". The suggestion is the rate of the steepest fall of the smoothed loss per decade.

    Raises
    ------
    TrainingError
        When the loss is no number from the start.
    """
    before = copy_weights(task.network)
    frozen = {name: parameter.requires_grad for name, parameter in task.network.named_parameters()}
    optimizer = make_optimizer(task, low)
    growth = ExponentialLR(optimizer, (high / low) ** (1 / (steps - 1)))
    scaler = torch.amp.GradScaler(task.device.type, enabled=False)
    losses: list[float] = []
    smooth = 0.0
    try:
        for step in range(steps):
            smooth = 0.9 * smooth + 0.1 * train_step(task, data, optimizer, scaler, step)
            losses.append(smooth / (1 - 0.9 ** (step + 1)))
            if losses[-1] > BLOW_UP * min(losses):
                break
            growth.step()
    except TrainingError:
        pass  # no number: the rate is far too high, which is what the test looks for
    finally:
        task.network.load_state_dict(before)
        for name, parameter in task.network.named_parameters():
            parameter.requires_grad_(frozen[name])
            parameter.grad = None
    if len(losses) < 3:
        raise TrainingError(
            "range test: the loss is no number from the start; set extraction.precision to fp32, or finetune.rate by hand"
        )
    slopes = np.gradient(np.asarray(losses[: max(2, int(np.argmin(losses)) + 1)]))
    return float(low * (high / low) ** (np.argmin(slopes) / (steps - 1)))


def return_path(task: Task, data: Data, start: Weights, end: Weights, alphas: Sequence[float] = ALPHAS) -> ReturnPath:
    """Score the weights between two on the validation images and put the best into the network.

    The smallest alpha wins a tie, so training has to earn every step away from the hand-over, and what is chosen is never
    below the hand-over on these images. Wortsman et al. 2022, "Robust fine-tuning" (WiSE-FT), there for CLIP.
    """
    scores: list[Score] = []
    for alpha in alphas:
        _go_to(task, data, start, end, alpha)
        scores.append(evaluate(task.network, data.validation, data, task.device, task.precision))
    best = max(range(len(alphas)), key=lambda place: (scores[place], -alphas[place]))
    _go_to(task, data, start, end, alphas[best])
    return ReturnPath(tuple(alphas), tuple(scores), alphas[best], copy_weights(task.network))


def _go_to(task: Task, data: Data, start: Weights, end: Weights, alpha: float) -> None:
    task.network.load_state_dict(interpolate(start, end, alpha))
    if task.settings.batch_norm == "train" and 0 < alpha < 1:
        recompute_statistics(task, data)


def recompute_statistics(task: Task, data: Data) -> None:
    """Measure BatchNorm's statistics anew: those of weights between two others are not between their statistics."""
    size = task.settings.batch_size
    torch.manual_seed(task.seed)
    rows = (
        rows_at(batch * size, size, len(data.train), task.seed)
        for batch in range(min(STATISTICS_BATCHES, math.ceil(len(data.train) / size)))
    )
    update_bn((augmented(data.train.pixels[part], task.settings, task.device, data) for part in rows), task.network)
    task.network.eval()
