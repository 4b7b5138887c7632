"""The training loop: images and labels in, the weights that did best on the validation images out.

Everything random in a step comes from (seed, step), so a run continued from its checkpoint gives on the CPU, bit for bit,
the weights of a run that was never stopped.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipeline import progress
from pipeline.errors import TrainingError
from pipeline.files import write_atomic
from pipeline.training.averages import Weights, copy_weights, greedy_soup, load_weights, move_average
from pipeline.training.batches import Labelled, augmented, mixed, rows_at, to_float
from pipeline.training.replicas import Replicas, replicas
from pipeline.training.settings import Settings, rate_factor, size_at, stage_rates
from pipeline.training.stages import Stage, groups_of, last_linear, set_trainable

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "manyheads checkpoint"
CHECKPOINT_VERSION = 1

Score = tuple[float, float]
"""Accuracy and minus the mean log-loss: the second decides between equal accuracies."""


@dataclass(frozen=True)
class Data:
    """What is learned from, what weights are chosen on, and how pixels become numbers."""

    train: Labelled
    validation: Labelled
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """A network to train in place and the plan it is trained by; `plan` is what `check_plan` returned."""

    network: nn.Module
    stages: tuple[Stage, ...]
    plan: tuple[tuple[float, int], ...]
    settings: Settings
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Run:
    """Where a run keeps its checkpoint and log, and the identity a checkpoint must have to be continued."""

    folder: Path
    identity: str

    @property
    def checkpoint(self) -> Path:
        """The state after the last evaluation; removed by nobody, so a finished run is not trained again."""
        return self.folder / "checkpoint.pt"

    @property
    def log(self) -> Path:
        """One JSON record per evaluation."""
        return self.folder / "log.jsonl"


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


@dataclass
class _State:
    """What a checkpoint holds beside the network and the optimizer."""

    step: int = 0
    seconds: float = 0.0
    stale: int = 0
    start_score: Score = (0.0, 0.0)
    ema: Weights | None = None
    pool: list[tuple[Score, Weights]] = field(default_factory=list)
    ema_best: tuple[Score, Weights] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


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
    state = _restore(task, optimizer, scaler, run) or _begin(task, data)
    weights = _class_weights(data, settings, task.device)
    board = _board(run) if settings.tensorboard else None
    losses: list[float] = []
    mark, mark_step = time.perf_counter(), state.step
    with progress.bar(settings.steps, "step", "training", initial=state.step) as bar, _dropout(task), _profiler(task, run) as tick, replicas(task.network, settings.replicas) as copies:
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
            images = (state.step - mark_step) * settings.batch_size * settings.accumulate
            record = _evaluate(task, data, state)
            record.update(loss=float(np.mean(losses)), rate=optimizer.param_groups[-1]["lr"], images_per_second=images / spent)
            state.seconds += time.perf_counter() - mark
            state.history.append({**record, "seconds": round(state.seconds, 1)})
            _save(task, optimizer, scaler, run, state)
            _show(state.history[-1], board)
            bar.note(f"validation {record['validation_accuracy']:.1%}")
            if on_evaluation is not None:
                on_evaluation(state.step, state.ema if state.ema is not None else copy_weights(task.network))
            losses, mark, mark_step = [], time.perf_counter(), state.step
    return _choose(task, data, state)


def evaluate(network: nn.Module, labelled: Labelled, data: Data, device: torch.device, precision: str = "fp32") -> Score:
    """Return accuracy and minus the mean log-loss of a network on images, in evaluation mode, which it leaves it in."""
    logits = predict_logits(network, labelled.pixels, data.mean, data.std, device, precision)
    target = torch.from_numpy(labelled.labels)
    accuracy = (logits.argmax(1) == target).double().mean().item()
    return accuracy, -functional.cross_entropy(logits.double(), target).item()


def predict_logits(network: nn.Module, pixels: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, precision: str = "fp32") -> Tensor:
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
    return _step(task, data, Replicas(task.network, 1, None), optimizer, scaler, _class_weights(data, task.settings, task.device), step, factor)


def _step(task: Task, data: Data, copies: Replicas, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, weights: Tensor | None, step: int, factor: float | None = None) -> float:
    settings = task.settings
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    _follow_plan(task, step)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * (rate_factor(settings, step) if factor is None else factor)
    optimizer.zero_grad(set_to_none=True)
    per_step = settings.batch_size * settings.accumulate
    rows = rows_at(step * per_step, per_step, len(data.train), task.seed)
    size = size_at(settings, step, data.train.pixels.shape[1])
    batches = [_batch(task, data, chosen, size) for chosen in np.split(rows, settings.accumulate)]

    def loss(network: nn.Module, part: int) -> Tensor:
        images, target = batches[part]
        with _autocast(task.device, settings.precision):
            logits = network(images)
        value = functional.cross_entropy(logits.float(), target, weight=weights, label_smoothing=settings.label_smoothing)
        return scaler.scale(value)

    total = copies.gradients(loss, settings.accumulate) / scaler.get_scale()
    if not np.isfinite(total):
        raise TrainingError(f"training: the loss at step {step} is {total}; lower the rate ({settings.rate:g}) or use precision fp32")
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


def _begin(task: Task, data: Data) -> _State:
    """Return the state before the first step, in which the weights as handed over are the first candidate."""
    state = _State(start_score=evaluate(task.network, data.validation, data, task.device, task.settings.precision))
    if task.settings.ema > 0:
        state.ema = copy_weights(task.network)
    return state


def _evaluate(task: Task, data: Data, state: _State) -> dict[str, Any]:
    """Score the weights, and their moving average, on the validation images and keep the best of them."""
    settings = task.settings
    current = copy_weights(task.network)
    score = evaluate(task.network, data.validation, data, task.device, settings.precision)
    best = max((entry[0] for entry in state.pool), default=None)
    ema_best = state.ema_best[0] if state.ema_best else None
    state.pool = sorted([*state.pool, (score, current)], key=lambda entry: entry[0], reverse=True)[: max(1, settings.average_top)]
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


def _choose(task: Task, data: Data, state: _State) -> Trained:
    """Take the best evaluation; the moving average and the soup only where they do better on the validation images."""
    score, weights = state.pool[0]
    source = "weights"
    if state.ema_best is not None and state.ema_best[0] > score:
        (score, weights), source = state.ema_best, "ema"
    if len(state.pool) > 1:
        def judge(candidate: Weights) -> Score:
            load_weights(task.network, candidate)
            return evaluate(task.network, data.validation, data, task.device, task.settings.precision)

        soup, members = greedy_soup([entry[1] for entry in state.pool], judge)
        soup_score = judge(soup)
        if members > 1 and soup_score > score:
            score, weights, source = soup_score, soup, f"soup of {members}"
    load_weights(task.network, weights)
    task.network.eval()
    return Trained(weights, source, score, state.start_score, tuple(state.history), state.step, state.seconds)


def _is_stale(state: _State, settings: Settings) -> bool:
    return settings.patience is not None and state.stale >= settings.patience


def _save(task: Task, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: Run, state: _State) -> None:
    """Write the checkpoint and the log, each whole and in one move: a killed run finds the last ones intact."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "identity": run.identity,
        "network": copy_weights(task.network),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "state": vars(state),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(run.checkpoint, buffer.getvalue())
    write_atomic(run.log, "".join(f"{json.dumps(record)}\n" for record in state.history).encode())


def _restore(task: Task, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: Run) -> _State | None:
    if not run.checkpoint.exists():
        return None
    try:
        content = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise TrainingError(f"{run.checkpoint}: cannot be read ({error}); delete it to train from the start") from None
    if content.get("format") != CHECKPOINT_FORMAT or content.get("version") != CHECKPOINT_VERSION:
        raise TrainingError(f"{run.checkpoint}: is no checkpoint of version {CHECKPOINT_VERSION}; delete it to train from the start")
    if content["identity"] != run.identity:
        raise TrainingError(f"{run.checkpoint}: belongs to a run with other settings, data or seed; delete it or give another folder")
    load_weights(task.network, content["network"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    state = _State(**content["state"])
    logger.info("continuing after step %d of %d", state.step, task.settings.steps)
    return state


def _check(task: Task, data: Data) -> None:
    settings = task.settings
    problems = []
    if settings.precision == "fp16" and task.device.type == "cpu":
        problems.append("precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU")
    if len(data.train) < 2:
        problems.append(f"{len(data.train)} images to train on; expected at least 2")
    if not len(data.validation):
        problems.append("no validation images; expected at least one to choose weights on")
    if settings.mixup and settings.mixup < 0 or settings.cutmix < 0:
        problems.append("mixup and cutmix: expected zero or more")
    if problems:
        raise TrainingError("training: cannot start", problems)
    task.network.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


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


class _dropout:
    """Dropout on what enters the last layer, while inside; a hook, so the network's state keeps its names."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.handle: Any = None

    def __enter__(self) -> None:
        share = self.task.settings.dropout
        if share > 0:
            layer = self.task.network.get_submodule(last_linear(self.task.network))
            self.handle = layer.register_forward_pre_hook(lambda module, inputs: (functional.dropout(inputs[0], share, module.training),))

    def __exit__(self, *problem: object) -> None:
        if self.handle is not None:
            self.handle.remove()


class _profiler:
    """torch's profiler over the first steps, its table written beside the log; calling it marks a step."""

    def __init__(self, task: Task, run: Run) -> None:
        self.left = task.settings.profile_steps
        self.path = run.folder / "profile.txt"
        self.profile = torch.profiler.profile() if self.left else None

    def __enter__(self) -> Callable[[], None]:
        if self.profile is not None:
            self.profile.__enter__()
        return self.tick

    def tick(self) -> None:
        self.left -= 1
        if self.profile is not None and self.left == 0:
            self.stop()

    def stop(self) -> None:
        if self.profile is not None:
            self.profile.__exit__(None, None, None)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, self.profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=40).encode())
            self.profile = None

    def __exit__(self, *problem: object) -> None:
        self.stop()


def _board(run: Run) -> Any:
    """TensorBoard's writer; a step written twice by a continued run is shown once, at its later time."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError("tensorboard: the package is not installed; run `pip install tensorboard` or set tensorboard: false") from None
    return SummaryWriter(str(run.folder / "tensorboard"))  # type: ignore[no-untyped-call]


def _show(record: dict[str, Any], board: Any) -> None:
    logger.debug("%s", record)
    if board is not None:
        for name, value in record.items():
            if name != "step":
                board.add_scalar(name, value, record["step"])
        board.flush()


def describe_stages(stages: Sequence[Stage]) -> list[str]:
    """Return one line per stage with the modules in it."""
    return [f"{stage.name}: {', '.join(stage.modules)}" for stage in stages]
