"""One step of training, one evaluation, and the optimizer with a rate for each stage.

Everything random in a step comes from (seed, step), so that a step is the same whatever was done before in this process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pipeline.config import FinetuneConfig
from pipeline.embed.stages import Stage
from pipeline.errors import TrainingError
from pipeline.finetuning.batches import Data, Labelled, augmented, mixed, rows_at, to_float
from pipeline.finetuning.plan import set_trainable, stage_of_parameters
from pipeline.finetuning.weights import Score

EVALUATIONS = 10
"""How often a run is evaluated."""
BLOCK = 256
"""Images that are scored at a time."""


@dataclass(frozen=True)
class Task:
    """A network to train in place, and how; `plan` is what `check_plan` returned, `settings` the user's."""

    network: nn.Module
    stages: tuple[Stage, ...]
    plan: tuple[tuple[float, int], ...]
    settings: FinetuneConfig
    steps: int
    precision: str
    """`fp32`, `bf16` or `fp16`."""
    seed: int
    device: torch.device
    evaluations: int = EVALUATIONS

    @property
    def evaluate_every(self) -> int:
        """Steps between two evaluations."""
        return max(1, self.steps // self.evaluations)

    @property
    def images_per_step(self) -> int:
        """Images behind one optimizer step."""
        return self.settings.batch_size * self.settings.accumulate


def steps_for(images: int) -> int:
    """Return the number of steps by the size of the data, after BiT's rule: 500 below 20,000 images, then 10,000, 20,000.

    Kolesnikov et al. 2020, "Big Transfer", section 3.3; their batches are 512.
    """
    return 500 if images < 20_000 else 10_000 if images < 500_000 else 20_000


def stage_rates(rate: float, decay: float, stages: int) -> list[float]:
    """Return the full rate of each of `stages` stages from the stem to the head, geometric with a floor of 1/100."""
    return [max(rate * decay**depth, rate / 100) for depth in range(stages - 1, -1, -1)]


def make_optimizer(task: Task) -> torch.optim.Optimizer:
    """Return the optimizer with one group per stage and decay, at their full rates."""
    settings, groups = task.settings, list[dict[str, Any]]()
    owners = stage_of_parameters(task.network, task.stages)
    rates = stage_rates(settings.rate, settings.rate_decay, len(task.stages))
    for stage, own in zip(task.stages, rates, strict=True):
        for decays in (True, False):  # norms and biases, which are vectors, do not
            inside = [p for name, p in task.network.named_parameters() if owners[name] == stage.name]
            members = [parameter for parameter in inside if (parameter.ndim > 1) == decays]
            decay = settings.weight_decay if decays else 0.0
            if members:
                groups.append({"params": members, "weight_decay": decay, "lr": own, "stage": stage.name})
    return torch.optim.AdamW(groups)


def make_schedule(task: Task, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule of a run: linear warm-up to the full rate, then a cosine down to zero."""
    warmup = round(task.settings.warmup * task.steps)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, task.steps - warmup))
    if not warmup:
        return fall
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def train_step(
    task: Task, data: Data, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int
) -> float:
    """Do one step at the optimizer's rates and return its loss.

    Raises
    ------
    TrainingError
        When the loss is no number.
    """
    settings = task.settings
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    _follow_plan(task, step)
    optimizer.zero_grad(set_to_none=True)
    weights = _class_weights(data, settings, task.device)
    rows = rows_at(step * task.images_per_step, task.images_per_step, len(data.train), task.seed)
    total = 0.0
    for part in np.split(rows, settings.accumulate):
        images = augmented(data.train.pixels[part], settings, task.device, data)
        labels = torch.from_numpy(data.train.labels[part]).to(task.device)
        images, target = mixed(images, labels, settings, data.classes)
        with _autocast(task.device, task.precision):
            logits = task.network(images).float()
        loss = functional.cross_entropy(logits, target, weights, label_smoothing=settings.label_smoothing)
        scaler.scale(loss / settings.accumulate).backward()  # type: ignore[no-untyped-call]
        total += loss.item() / settings.accumulate
    if not np.isfinite(total):
        raise TrainingError(
            f"training: the loss at step {step} is {total}; lower finetune.rate ({settings.rate:g}) or set extraction.precision to fp32"
        )
    scaler.step(optimizer)
    scaler.update()
    return total


def evaluate(
    network: nn.Module, labelled: Labelled, data: Data, device: torch.device, precision: str = "fp32"
) -> Score:
    """Return accuracy and minus the mean log-loss of a network on images, in evaluation mode, which it leaves it in."""
    logits = predict_logits(network, labelled.pixels, data.mean, data.std, device, precision)
    target = torch.from_numpy(labelled.labels)
    accuracy = (logits.argmax(1) == target).double().mean().item()
    return accuracy, -functional.cross_entropy(logits.double(), target).item()


def predict_logits(
    network: nn.Module,
    pixels: NDArray[np.uint8],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    precision: str = "fp32",
) -> Tensor:
    """Return a network's float32 scores (n, classes) on the CPU for uint8 images (n, h, w, 3), in evaluation mode."""
    network.eval()
    parts = []
    with torch.inference_mode(), _autocast(device, precision):
        for start in range(0, len(pixels), BLOCK):
            block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + BLOCK])).to(device)
            parts.append(network(to_float(block, mean, std)).float().cpu())
    return torch.cat(parts)


def _follow_plan(task: Task, step: int) -> None:
    """Open the stages of the plan for this step; also after an evaluation, which left the network in evaluation mode."""
    lowest = next(low for start, low in reversed(task.plan) if step >= round(start * task.steps))
    set_trainable(task.network, task.stages, lowest, task.settings.batch_norm)


def _class_weights(data: Data, settings: FinetuneConfig, device: torch.device) -> Tensor | None:
    """Weights n / (classes * n_class), as scikit-learn's "balanced"."""
    if settings.class_weight is None:
        return None
    counts = np.bincount(data.train.labels, minlength=data.classes)
    return torch.tensor(len(data.train) / (data.classes * np.maximum(counts, 1)), dtype=torch.float32, device=device)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=precision != "fp32")
