"""The way back: the line from hand-over to result, of which the validation images choose a point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from pipeline.finetuning.batches import Data, augmented, rows_at
from pipeline.finetuning.steps import Task, evaluate
from pipeline.finetuning.weights import Score, Weights, copy_weights

ALPHAS = tuple(round(0.1 * tenth, 1) for tenth in range(11))
STATISTICS_BATCHES = 20


@dataclass(frozen=True)
class ReturnPath:
    """Validation scores between hand-over (alpha 0) and result (alpha 1), and the alpha that was chosen."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...]
    alpha: float
    weights: Weights


def return_path(task: Task, data: Data, start: Weights, end: Weights, alphas: Sequence[float] = ALPHAS) -> ReturnPath:
    """Score the weights between two states of a network on the validation images and put the best into it.

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


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Weights:
    """Return `(1 - alpha) * start + alpha * end` of each tensor, in its shape and dtype; counters are the end's unless alpha is 0."""
    return {
        name: torch.lerp(tensor, end[name], alpha)
        if tensor.is_floating_point()
        else (end[name] if alpha > 0 else tensor).clone()
        for name, tensor in start.items()
    }


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
