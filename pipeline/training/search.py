"""Looking before and after training: the rate's range test, and the line from hand-over to result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.errors import TrainingError
from pipeline.training.averages import Weights, copy_weights, interpolate, load_weights
from pipeline.training.checkpoint import Score
from pipeline.training.loop import evaluate, make_optimizer, train_step
from pipeline.training.norms import recompute_statistics
from pipeline.training.task import Data, Task

ALPHAS = tuple(round(0.1 * tenth, 1) for tenth in range(11))
BLOW_UP = 4.0
"""A range test ends when the loss is this many times its lowest."""


@dataclass(frozen=True)
class RangeTest:
    """Rates tried with the smoothed loss at each, and the rate suggested: where the loss falls fastest."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float


@dataclass(frozen=True)
class ReturnPath:
    """Validation scores between hand-over (alpha 0) and result (alpha 1), and the alpha that was chosen."""

    alphas: tuple[float, ...]
    scores: tuple[Score, ...]
    alpha: float
    weights: Weights


def range_test(task: Task, data: Data, steps: int = 100, low: float = 1e-6, high: float = 1.0) -> RangeTest:
    """Train with a rate that grows each step and suggest one; the network is put back bit for bit.

    Smith 2017, "Cyclical learning rates". The suggestion is the rate of the steepest fall of the smoothed loss.
    """
    before = copy_weights(task.network)
    frozen = {name: parameter.requires_grad for name, parameter in task.network.named_parameters()}
    trial = replace(task, settings=replace(task.settings, rate=1.0))
    optimizer = make_optimizer(trial)
    rates, losses, smooth = [], [], 0.0
    try:
        for step in range(steps):
            rate = low * (high / low) ** (step / max(1, steps - 1))
            try:
                loss = train_step(trial, data, optimizer, step, rate)
            except TrainingError:
                break  # no number: the rate is far too high, which is what the test looks for
            smooth = 0.9 * smooth + 0.1 * loss
            rates.append(rate)
            losses.append(smooth / (1 - 0.9 ** (step + 1)))
            if losses[-1] > BLOW_UP * min(losses):
                break
    finally:
        load_weights(task.network, before)
        for name, parameter in task.network.named_parameters():
            parameter.requires_grad_(frozen[name])
            parameter.grad = None
    return RangeTest(tuple(rates), tuple(losses), _steepest(rates, losses))


def return_path(task: Task, data: Data, start: Weights, end: Weights, alphas: Sequence[float] = ALPHAS) -> ReturnPath:
    """Score the weights between two on the validation images and put the best into the network.

    The smallest alpha wins a tie, so training has to earn every step away from the hand-over, and what is chosen is never
    below the hand-over on these images. Wortsman et al. 2022, "Robust fine-tuning" (WiSE-FT), there for CLIP.
    """
    scores: list[Score] = []
    for alpha in alphas:
        weights = interpolate(start, end, alpha)
        load_weights(task.network, weights)
        if task.settings.batch_norm == "train" and 0 < alpha < 1:
            recompute_statistics(task, data)
        scores.append(evaluate(task.network, data.validation, data, task.device, task.settings.precision))
    best = max(range(len(alphas)), key=lambda place: (scores[place], -alphas[place]))
    load_weights(task.network, interpolate(start, end, alphas[best]))
    if task.settings.batch_norm == "train" and 0 < alphas[best] < 1:
        recompute_statistics(task, data)
    return ReturnPath(tuple(alphas), tuple(scores), alphas[best], copy_weights(task.network))


def _steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate at which the smoothed loss falls fastest per decade, before its lowest point."""
    if len(rates) < 3:
        raise TrainingError(
            "range test: the loss is no number from the start; use precision fp32 or set the rate by hand"
        )
    lowest = max(2, int(np.argmin(losses)) + 1)
    slope = np.gradient(np.asarray(losses[:lowest]), np.log10(rates[:lowest]))
    return float(rates[int(np.argmin(slope))])
