"""The trainer: labelled images in, the weights that did best on the validation images out.

Everything random in a step comes from (seed, step), so that a step is the same whatever was done before in this process: a run
continued from its checkpoint gives on the CPU, bit for bit, the weights of a run that was never stopped.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from pipeline.config import FinetuneConfig
from pipeline.embed.graph import Stage
from pipeline.errors import TrainingError
from pipeline.evaluation import ACCURACY
from pipeline.experiment import to_lines, with_digest, without_digest
from pipeline.finetuning.batches import Data, LabelledImages, Score, augmented, loss_of, rows_at, score_of, to_float
from pipeline.finetuning.plan import Plan, fold_norms, modules_below, passing, set_trainable, stage_of_parameters
from pipeline.io import process
from pipeline.io.files import make_folder, read_file, write_atomic, write_text_atomic

logger = logging.getLogger(__name__)

FORMAT, VERSION = "manyheads checkpoint", 4

EVALUATIONS = 10
"""How often a run is evaluated."""
KEPT = 2 << 30
"""Bytes of what enters the lowest trained stage that are kept of the training images."""
BLOCK = 32
"""Images that are scored at a time."""
SAVE_SECONDS = 30.0
"""A checkpoint is written after this time at the latest, because an evaluation may be minutes away."""
RATE_DECAY, RATE_SPREAD = 0.5, 100
"""What each stage has of the rate of the one above it, and how much larger than any the head's may be."""
WARMUP = 0.1
"""Share of the steps in which the rate rises; then it falls along a cosine."""
WEIGHT_DECAY = 0.01
"""Of AdamW; norms and biases have none."""
PROFILED_STEPS, PROFILE_ROWS = 5, 40

Weights = dict[str, Tensor]
"""A network's state by name, detached copies on the CPU."""


@dataclass(frozen=True)
class TrainingTask:
    """A network to train in place, and how; `settings` are the user's."""

    network: nn.Module
    stages: tuple[Stage, ...]
    plan: Plan
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


@dataclass
class State:
    """How far a run is, and at its end what it gave: all of a checkpoint but the states of network, optimizer and the like."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Spent in training, over all pieces of a run that was stopped."""
    losses: list[float] = field(default_factory=list)
    """Of every step since the last evaluation."""
    score: Score | None = None
    """The best so far on the validation images."""
    weights: Weights = field(default_factory=dict)
    """Those that had it."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A record for each evaluation."""


def steps_of(settings: FinetuneConfig, images: int) -> int:
    """Return the number of steps of a run: what is asked for, or by the number of images after BiT's rule.

    500 below 20,000 images, then 10,000, from 500,000 on 20,000: Kolesnikov et al. 2020, "Big Transfer", section 3.3.
    """
    if settings.steps != "auto":
        return settings.steps
    return 500 if images < 20_000 else 10_000 if images < 500_000 else 20_000


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of a network's whole state, buffers included; shapes and dtypes are the network's."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def train(task: TrainingTask, data: Data, folder: Path, identity: str) -> State:
    """Train a network in place, put the weights into it that did best on the validation images, and return how it went.

    `folder` gets the checkpoint and the log; a checkpoint in it of the same `identity` is continued.
    TrainingError where the loss is no number, the precision is not to be had on the device, or the folder holds another run.
    """
    _check(task, data)
    prepare(task, data)
    optimizer = make_optimizer(task)
    schedule = make_schedule(task, optimizer)
    scaler = torch.amp.GradScaler(task.device.type, enabled=task.precision == "fp16")
    parts = {"network": task.network, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    state = _load(folder, identity, parts)
    saved, clock = state.seconds, time.perf_counter()
    with ExitStack() as stack:
        bar = stack.enter_context(process.bar(task.steps, "step", "training", initial=state.step))
        watch = task.settings.watch
        profiler = stack.enter_context(_profiler(folder / "profile.txt")) if "profiler" in watch else None
        board = stack.enter_context(_board(folder / "tensorboard")) if "tensorboard" in watch else None
        while state.step < task.steps:
            rate = float(schedule.get_last_lr()[-1])
            state.losses.append(train_step(task, data, optimizer, scaler, state.step))
            schedule.step()
            state.step += 1
            state.seconds, clock = state.seconds + time.perf_counter() - clock, time.perf_counter()
            bar.update()
            if profiler is not None:
                profiler.step()
            due = state.step % task.evaluate_every == 0 or state.step == task.steps
            if due:
                record = _evaluate(task, data, state, rate)
                bar.note(f"validation {record[f'validation_{ACCURACY.name}']:.1%}")
                if board is not None:
                    for name in record.keys() - {"step"}:
                        board.add_scalar(name, record[name], state.step)
            if due or state.seconds - saved >= SAVE_SECONDS:
                _save(folder, identity, state, parts)
                saved = state.seconds
    task.network.load_state_dict(state.weights)  # there are some: the last step is followed by an evaluation
    task.network.eval()
    return state


def _check(task: TrainingTask, data: Data) -> None:
    problems = []
    if task.precision == "fp16" and task.device.type == "cpu":
        problems.append("precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU")
    side = min(data.train.pixels.shape[1:3])
    if task.settings.size is not None and task.settings.size > side:
        problems.append(
            f"finetune.size: {task.settings.size} is more than the {side} pixels that images are prepared to have"
        )
    if problems:
        raise TrainingError("training: cannot start", problems)


def prepare(task: TrainingTask, data: Data) -> None:
    """Put the network on its device, as the fastest steps need it: channels last, norms folded, freed memory kept."""
    process.keep_freed_memory()
    task.network.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    some = torch.from_numpy(data.validation.pixels[:2]).to(task.device)
    logger.debug("%d norms are folded", fold_norms(task.network, to_float(some, data.mean, data.std)))


def keep_below(task: TrainingTask, data: Data) -> Data:
    """Run what lies below the lowest trained stage once for each image, and return data that hold what it gives.

    Of training images only where they are shown as they are. Nothing is kept of a network whose lower part cannot be left out.
    """
    prepare(task, data)
    lowest = task.stages[task.plan[-1][1]]
    some = torch.from_numpy(data.validation.pixels[:2]).to(task.device)
    below = modules_below(task.network, lowest, to_float(some, data.mean, data.std)) if task.plan[-1][1] else ()
    if not below:
        return data
    shown_as_they_are = task.settings.augment == "none" and task.settings.size is None
    entering = list[Tensor]()
    entry = task.network.get_submodule(lowest.modules[0])
    hook = entry.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0].cpu()))
    parts = dict[str, Any]()
    for name in ("validation", "train") if shown_as_they_are else ("validation",):
        images: LabelledImages = getattr(data, name)
        if entering and entering[0][0].nbytes * len(images) > KEPT:
            continue
        entering.clear()
        predict_logits(task.network, images.pixels, data.mean, data.std, task.device, task.precision)
        parts[name] = replace(images, entering=torch.cat(entering))
    hook.remove()
    return replace(data, below=below, **parts)


# ---- what changes from step to step


def make_optimizer(task: TrainingTask) -> torch.optim.Optimizer:
    """Return the optimizer with one group per stage and decay, at their full rates."""
    rate, groups = task.settings.rate, list[dict[str, Any]]()
    owners = stage_of_parameters(task.network, task.stages)
    for depth, stage in zip(reversed(range(len(task.stages))), task.stages, strict=True):
        own = max(rate * RATE_DECAY**depth, rate / RATE_SPREAD)
        inside = [parameter for name, parameter in task.network.named_parameters() if owners[name] == stage.name]
        for decays in (True, False):  # norms and biases, which are vectors, do not
            members = [parameter for parameter in inside if (parameter.ndim > 1) == decays]
            decay = WEIGHT_DECAY if decays else 0.0
            if members:
                groups.append({"params": members, "weight_decay": decay, "lr": own, "stage": stage.name})
    return torch.optim.AdamW(groups)


def make_schedule(task: TrainingTask, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule of a run: linear warm-up to the full rate, then a cosine down to zero."""
    warmup = round(WARMUP * task.steps)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, task.steps - warmup))
    if not warmup:
        return fall
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


# ---- one step, one evaluation


def train_step(
    task: TrainingTask, data: Data, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int
) -> float:
    """Do one step at the optimizer's rates and return its loss; TrainingError where the loss is no number."""
    settings = task.settings
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    # Also after an evaluation, which left the network in evaluation mode.
    lowest = next(low for start, low in reversed(task.plan) if step >= round(start * task.steps))
    set_trainable(task.network, task.stages, lowest)
    optimizer.zero_grad(set_to_none=True)
    rows = rows_at(step * settings.batch_size, settings.batch_size, len(data.train), task.seed)
    kept = data.train.entering
    if kept is None:
        images = augmented(data.train.pixels[rows], settings, task.device, data)
    else:
        images = kept[rows].to(task.device)
    with _autocast(task.device, task.precision), passing(() if kept is None else data.below):
        outputs = task.network(images).float()
    loss = loss_of(outputs, torch.from_numpy(data.train.y[rows]).to(task.device), data)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if not np.isfinite(found := loss.item()):
        raise TrainingError(
            f"training: the loss at step {step} is {found}; lower finetune.rate ({settings.rate:g}) or set extraction.precision to fp32"
        )
    scaler.step(optimizer)
    scaler.update()
    return found


def _evaluate(task: TrainingTask, data: Data, state: State, rate: float) -> dict[str, Any]:
    """Score the weights on the validation images, keep them where they are the best so far, and return the record of it."""
    accuracy, minus_loss = score = evaluate(task.network, data.validation, data, task.device, task.precision)
    if state.score is None or score > state.score:
        state.score, state.weights = score, copy_weights(task.network)
    record = {
        "step": state.step,
        f"validation_{ACCURACY.name}": accuracy,
        "validation_loss": -minus_loss,
        "loss": float(np.mean(state.losses)),
        "rate": rate,
        "seconds": round(state.seconds, 1),
    }
    state.history.append(record)
    state.losses = []
    return record


def evaluate(
    network: nn.Module,
    labelled: LabelledImages,
    data: Data,
    device: torch.device,
    precision: str = "fp32",
) -> Score:
    """Return the score of a network on images, and leave it in evaluation mode."""
    kept = labelled.entering
    with passing(() if kept is None else data.below):
        images = labelled.pixels if kept is None else kept
        outputs = predict_logits(network, images, data.mean, data.std, device, precision)
    return score_of(outputs, torch.from_numpy(labelled.y))


def predict_logits(
    network: nn.Module,
    pixels: NDArray[np.uint8] | Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
    precision: str = "fp32",
) -> Tensor:
    """Return a network's outputs, float32 (n, width) on the CPU, for uint8 images (n, h, w, 3), in evaluation mode.

    A tensor is given to the network as it is.
    """
    network.eval()
    parts = []
    with torch.inference_mode(), _autocast(device, precision):
        for start in range(0, len(pixels), BLOCK):
            block = pixels[start : start + BLOCK]
            if not isinstance(block, Tensor):
                block = to_float(torch.from_numpy(np.ascontiguousarray(block)).to(device), mean, std)
            parts.append(network(block.to(device)).float().cpu())
    return torch.cat(parts)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    kind = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=precision != "fp32")


# ---- the checkpoint, and what watches a run


def _save(folder: Path, identity: str, state: State, parts: Mapping[str, Any]) -> None:
    """Write the checkpoint and the log, each whole and in one move: a killed run finds the last ones intact."""
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"format": FORMAT, "version": VERSION, "identity": identity, "state": vars(state), "parts": states}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    make_folder(folder)
    write_atomic(folder / "checkpoint.pt", with_digest(buffer.getvalue()))
    write_atomic(folder / "log.jsonl", to_lines(state.history, "")[0])


def _load(folder: Path, identity: str, parts: Mapping[str, Any]) -> State:
    """Return how far a run is, having put its parts into their states; the beginning where there is no checkpoint.

    TrainingError where it cannot be read or belongs to another run.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return State()
    data = read_file(path)
    try:
        content = torch.load(io.BytesIO(without_digest(data)), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise TrainingError(f"{path}: cannot be read ({error}); delete it to train from the start") from None
    if [content.get(key) for key in ("format", "version", "identity")] != [FORMAT, VERSION, identity]:
        raise TrainingError(f"{path}: belongs to another run or version; delete it to train from the start")
    for name, part in parts.items():
        part.load_state_dict(content["parts"][name])
    state = State(**content["state"])
    logger.info("continuing after step %d", state.step)
    return state


def _profiler(path: Path) -> torch.profiler.profile:
    """Return torch's profiler, which writes a table on some steps after the first."""

    def write(profile: torch.profiler.profile) -> None:
        make_folder(path.parent)
        write_text_atomic(path, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS))

    steps = torch.profiler.schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write)


def _board(folder: Path) -> Any:
    """Return a writer of TensorBoard's files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "finetune.watch: tensorboard is not installed; run `pip install tensorboard` or leave it out"
        ) from None
    return SummaryWriter(str(folder))
