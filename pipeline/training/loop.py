"""The training loop: images and labels in, the weights that did best on the validation images out.

Everything random in a step comes from (seed, step), so a run continued from its checkpoint gives on the CPU, bit for bit,
the weights of a run that was never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline import progress
from pipeline.errors import TrainingError
from pipeline.training.averages import Weights, copy_weights, greedy_soup, load_weights, move_average
from pipeline.training.batches import Labelled, augmented, mixed, rows_at, to_float
from pipeline.training.checkpoint import Run, Score, State, restore, save
from pipeline.training.instruments import dropout, profiler, tensorboard
from pipeline.training.norms import recompute_statistics
from pipeline.training.replicas import Replicas, replicas
from pipeline.training.settings import Settings, rate_factor, size_at, stage_rates
from pipeline.training.stages import groups_of, set_trainable
from pipeline.training.task import Data, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The chosen weights and how they came about.

    weights : the state of the network that did best on the validation images
    source : "weights", "ema" or "soup of n"
    score : its accuracy and minus its log-loss on the validation images
    start_score : the same before the first step
    history : one record per evaluation
    steps : steps done, fewer than planned after an early stop
    seconds : time spent in training, over all its pieces
    """

    weights: Weights
    source: str
    score: Score
    start_score: Score
    history: tuple[dict[str, Any], ...]
    steps: int
    seconds: float


def train(task: Task, data: Data, run: Run, on_evaluation: Callable[[int, Weights], None] | None = None) -> Trained:
    """Train a network in place and return the weights that did best on the validation images.

    A checkpoint of the same identity is continued; `on_evaluation` gets the step and the weights to be shipped if
    the run ended there.

    Raises
    ------
    TrainingError
        When the loss is no number, the precision is not to be had on the device, or the folder holds another run.
    """
    _check(task, data)
    settings = task.settings
    optimizer = make_optimizer(task)
    scaler = torch.amp.GradScaler(task.device.type, enabled=settings.precision == "fp16")
    state = restore(run, task.network, optimizer, scaler) or _begin(task, data)
    weights = _class_weights(data, settings, task.device)
    losses: list[float] = []
    mark, mark_step = time.perf_counter(), state.step
    with (
        progress.bar(settings.steps, "step", "training", initial=state.step) as bar,
        tools(task, run) as (tick, copies),
        tensorboard(run.folder / "tensorboard" if settings.tensorboard else None) as show,
    ):
        while state.step < settings.steps and not _is_stale(state, settings):
            losses.append(_step(task, data, copies, optimizer, scaler, weights, state.step))
            state.step += 1
            tick()
            if state.ema is not None:
                move_average(state.ema, task.network, settings.ema, state.step)
            bar.update()
            if state.step % settings.evaluate_every and state.step < settings.steps:
                continue
            spent = time.perf_counter() - mark
            images = (state.step - mark_step) * settings.images_per_step
            record = _evaluate(task, data, state)
            record.update(
                loss=float(np.mean(losses)), rate=optimizer.param_groups[-1]["lr"], images_per_second=images / spent
            )
            state.seconds += time.perf_counter() - mark
            state.history.append({**record, "seconds": round(state.seconds, 1)})
            save(run, task.network, optimizer, scaler, state)
            logger.debug("%s", state.history[-1])
            show(state.history[-1])
            bar.note(f"validation {record['validation_accuracy']:.1%}")
            if on_evaluation is not None:
                on_evaluation(state.step, state.ema if state.ema is not None else copy_weights(task.network))
            losses, mark, mark_step = [], time.perf_counter(), state.step
    return _choose(task, data, state)


@contextmanager
def tools(task: Task, run: Run) -> Iterator[tuple[Callable[[], None], Replicas]]:
    """What a run needs around its steps: dropout on the network, the profiler's tick, and the network's copies."""
    settings = task.settings
    watched = profiler(settings.profile_steps, run.folder / "profile.txt")
    with dropout(task.network, settings.dropout), watched as tick, replicas(task.network, settings.replicas) as copies:
        yield tick, copies


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
        for start in range(0, len(pixels), 256):
            block = torch.from_numpy(np.ascontiguousarray(pixels[start : start + 256])).to(device)
            parts.append(network(to_float(block, mean, std)).float().cpu())
    return torch.cat(parts)


def make_optimizer(task: Task) -> torch.optim.Optimizer:
    """Return the optimizer with one group per stage and decay; `full_rate` in each is the rate before the schedule."""
    settings = task.settings
    rates = dict(zip((stage.name for stage in task.stages), stage_rates(settings, len(task.stages)), strict=True))
    parameters = dict(task.network.named_parameters())
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": settings.weight_decay if group.decays else 0.0,
            "lr": rates[group.stage],
            "full_rate": rates[group.stage],
            "stage": group.stage,
        }
        for group in groups_of(task.network, task.stages)
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.rate, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return torch.optim.AdamW(groups, lr=settings.rate)


def train_step(task: Task, data: Data, optimizer: torch.optim.Optimizer, step: int, factor: float) -> float:
    """Do one step at `factor` times the full rates and return its loss; for the range test."""
    scaler = torch.amp.GradScaler(task.device.type, enabled=False)
    return _step(
        task,
        data,
        Replicas(task.network, 1, None),
        optimizer,
        scaler,
        _class_weights(data, task.settings, task.device),
        step,
        factor,
    )


def _step(
    task: Task,
    data: Data,
    copies: Replicas,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    weights: Tensor | None,
    step: int,
    factor: float | None = None,
) -> float:
    settings = task.settings
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    _follow_plan(task, step)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * (rate_factor(settings, step) if factor is None else factor)
    optimizer.zero_grad(set_to_none=True)
    per_step = settings.images_per_step
    rows = rows_at(step * per_step, per_step, len(data.train), task.seed)
    size = size_at(settings, step, data.train.pixels.shape[1])
    batches = [_batch(task, data, chosen, size) for chosen in np.split(rows, settings.accumulate)]

    def loss(network: nn.Module, part: int) -> Tensor:
        images, target = batches[part]
        with _autocast(task.device, settings.precision):
            logits = network(images)
        value = functional.cross_entropy(
            logits.float(), target, weight=weights, label_smoothing=settings.label_smoothing
        )
        return scaler.scale(value)

    total = copies.gradients(loss, settings.accumulate) / scaler.get_scale()
    if not np.isfinite(total):
        raise TrainingError(
            f"training: the loss at step {step} is {total}; lower the rate ({settings.rate:g}) or use precision fp32"
        )
    if settings.clip_norm is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(task.network.parameters(), settings.clip_norm)
    scaler.step(optimizer)
    scaler.update()
    return total


def _batch(task: Task, data: Data, rows: NDArray[np.int64], size: int) -> tuple[Tensor, Tensor]:
    images = augmented(data.train.pixels[rows], task.settings, size, task.device, data.mean, data.std)
    labels = torch.from_numpy(data.train.labels[rows]).to(task.device)
    return mixed(images, labels, task.settings, data.classes)


def _follow_plan(task: Task, step: int) -> None:
    """Open the stages of the plan for this step; also after an evaluation, which left the network in evaluation mode."""
    lowest = next(low for start, low in reversed(task.plan) if step >= round(start * task.settings.steps))
    set_trainable(task.network, task.stages, lowest, task.settings.batch_norm)


def _begin(task: Task, data: Data) -> State:
    """Return the state before the first step, in which the weights as handed over are the first candidate."""
    state = State(start_score=evaluate(task.network, data.validation, data, task.device, task.settings.precision))
    if task.settings.ema > 0:
        state.ema = copy_weights(task.network)
    return state


def _evaluate(task: Task, data: Data, state: State) -> dict[str, Any]:
    """Score the weights, and their moving average, on the validation images and keep the best of them."""
    settings = task.settings
    current = copy_weights(task.network)
    score = evaluate(task.network, data.validation, data, task.device, settings.precision)
    best = max((entry[0] for entry in state.pool), default=None)
    ema_best = state.ema_best[0] if state.ema_best else None
    state.pool = sorted([*state.pool, (score, current)], key=lambda entry: entry[0], reverse=True)[
        : max(1, settings.average_top)
    ]
    record: dict[str, Any] = {"step": state.step, "validation_accuracy": score[0], "validation_loss": -score[1]}
    improved = best is None or score > best
    if state.ema is not None:
        load_weights(task.network, state.ema)
        averaged = evaluate(task.network, data.validation, data, task.device, settings.precision)
        load_weights(task.network, current)
        record.update(ema_accuracy=averaged[0], ema_loss=-averaged[1])
        if ema_best is None or averaged > ema_best:
            state.ema_best = (averaged, {name: tensor.clone() for name, tensor in state.ema.items()})
            improved = True
    state.stale = 0 if improved else state.stale + 1
    return record


def _choose(task: Task, data: Data, state: State) -> Trained:
    """Take the best evaluation; the moving average and the soup only where they do better on the validation images."""
    score, weights = state.pool[0]
    source = "weights"
    if state.ema_best is not None and state.ema_best[0] > score:
        (score, weights), source = state.ema_best, "ema"
    if len(state.pool) > 1:

        def judge(candidate: Weights) -> Score:
            load_weights(task.network, candidate)
            if task.settings.batch_norm == "train":
                recompute_statistics(task, data)
            return evaluate(task.network, data.validation, data, task.device, task.settings.precision)

        soup, members = greedy_soup([entry[1] for entry in state.pool], judge)
        soup_score = judge(soup)
        if members > 1 and soup_score > score:
            score, weights, source = soup_score, copy_weights(task.network), f"soup of {members}"
    load_weights(task.network, weights)
    task.network.eval()
    return Trained(weights, source, score, state.start_score, tuple(state.history), state.step, state.seconds)


def _is_stale(state: State, settings: Settings) -> bool:
    return settings.patience is not None and state.stale >= settings.patience


def _check(task: Task, data: Data) -> None:
    settings = task.settings
    problems = []
    if settings.precision == "fp16" and task.device.type == "cpu":
        problems.append("precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU")
    if len(data.train) < 2:
        problems.append(f"{len(data.train)} images to train on; expected at least 2")
    if not len(data.validation):
        problems.append("no validation images; expected at least one to choose weights on")
    if settings.replicas > 1 and task.device.type != "cpu":
        problems.append(
            f"replicas: {settings.replicas} copies are for the CPU; set replicas to 1 on {task.device.type}"
        )
    if settings.replicas > 1 and (settings.dropout > 0 or _drops(task.network)):
        problems.append(
            "replicas: copies side by side drop out at random in no fixed order; set replicas to 1 with dropout"
        )
    if problems:
        raise TrainingError("training: cannot start", problems)
    task.network.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _drops(network: nn.Module) -> bool:
    """Whether the network itself has dropout or stochastic depth."""
    return any(
        getattr(module, "p", 0)
        for module in network.modules()
        if "Drop" in type(module).__name__ or "Stochastic" in type(module).__name__
    )


def _class_weights(data: Data, settings: Settings, device: torch.device) -> Tensor | None:
    """Weights n / (classes * n_class), as scikit-learn's "balanced"."""
    if settings.class_weight is None:
        return None
    counts = np.bincount(data.train.labels, minlength=data.classes)
    return torch.tensor(len(data.train) / (data.classes * np.maximum(counts, 1)), dtype=torch.float32, device=device)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
