"""The trainer: takes labelled images and returns the weights with the best validation score.

All randomness of a step is derived from (seed, step), so a step does not depend on what was done before in this process: a run
continued from its checkpoint yields, on the CPU, bit for bit the weights of an uninterrupted run.
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
"""Evaluations per run."""
KEPT = 2 << 30
"""Limit of the cached inputs of the lowest trained stage, in bytes."""
BLOCK = 32
"""Images evaluated at a time."""
SAVE_SECONDS = 30.0
"""Longest time between checkpoints, because evaluations may be minutes apart."""
RATE_DECAY, RATE_SPREAD = 0.5, 100
"""Ratio of each stage's rate to that of the stage above, and the largest ratio of the head's rate to any other."""
WARMUP = 0.1
"""Fraction of the steps in which the rate rises; then it falls along a cosine."""
WEIGHT_DECAY = 0.01
"""Weight decay of AdamW; norms and biases have none."""
PROFILED_STEPS, PROFILE_ROWS = 5, 40

Weights = dict[str, Tensor]
"""A network's state by name, as detached copies on the CPU."""


@dataclass(frozen=True)
class TrainingTask:
    """A network to train in place, with all parameters of the training; `settings` are the user's."""

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
        """Steps between evaluations."""
        return max(1, self.steps // self.evaluations)


@dataclass
class State:
    """The progress of a run and its result so far: a checkpoint's content except the states of network, optimizer and the like."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Time spent in training, over all parts of an interrupted run."""
    losses: list[float] = field(default_factory=list)
    """The loss of every step since the last evaluation."""
    score: Score | None = None
    """The best validation score so far."""
    weights: Weights = field(default_factory=dict)
    """The weights with that score."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """A record of each evaluation."""


def steps_of(settings: FinetuneConfig, images: int) -> int:
    """Return the number of steps of a run: the setting, or BiT's rule based on the number of images.

    500 below 20,000 images, then 10,000, from 500,000 on 20,000: Kolesnikov et al. 2020, "Big Transfer", section 3.3.
    """
    if settings.steps != "auto":
        return settings.steps
    return 500 if images < 20_000 else 10_000 if images < 500_000 else 20_000


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of a network's whole state, buffers included; shapes and dtypes are the network's."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def train(task: TrainingTask, data: Data, folder: Path, identity: str) -> State:
    """Train a network in place, load the weights with the best validation score into it, and return the run's final state.

    The checkpoint and the log are written to `folder`; a checkpoint there with the same `identity` is continued.
    TrainingError if the loss is not finite, the device does not support the precision, or the folder holds another run.
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
    task.network.load_state_dict(state.weights)  # set by the evaluation after the last step
    task.network.eval()
    return state


def _check(task: TrainingTask, data: Data) -> None:
    problems = []
    if task.precision == "fp16" and task.device.type == "cpu":
        problems.append("precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU")
    side = min(data.train.pixels.shape[1:3])
    if task.settings.size is not None and task.settings.size > side:
        problems.append(f"finetune.size: {task.settings.size} is larger than the {side} pixels of the prepared images")
    if problems:
        raise TrainingError("training: cannot start", problems)


def prepare(task: TrainingTask, data: Data) -> None:
    """Move the network to its device and make its steps fast: channels last, folded norms, freed memory kept."""
    process.keep_freed_memory()
    task.network.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    some = torch.from_numpy(data.validation.pixels[:2]).to(task.device)
    logger.debug("%d norms are folded", fold_norms(task.network, to_float(some, data.mean, data.std)))


def keep_below(task: TrainingTask, data: Data) -> Data:
    """Run the modules below the lowest trained stage once for each image, and return data with their outputs.

    Training images are included only without augmentation. If the modules cannot be skipped, the data are returned unchanged.
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


# ---- optimizer and schedule


def make_optimizer(task: TrainingTask) -> torch.optim.Optimizer:
    """Return the optimizer with a parameter group per stage and decay, at their full rates."""
    rate, groups = task.settings.rate, list[dict[str, Any]]()
    owners = stage_of_parameters(task.network, task.stages)
    for depth, stage in zip(reversed(range(len(task.stages))), task.stages, strict=True):
        own = max(rate * RATE_DECAY**depth, rate / RATE_SPREAD)
        inside = [parameter for name, parameter in task.network.named_parameters() if owners[name] == stage.name]
        for decays in (True, False):  # norms and biases, which are vectors, have no decay
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
    """Do one step at the optimizer's rates and return its loss; TrainingError if the loss is not finite."""
    settings = task.settings
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    # At each step, because an evaluation leaves the network in evaluation mode.
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
    """Evaluate the weights on the validation images, keep them if they are the best so far, and return a record."""
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
    """Return the score of a network on images; the network is left in evaluation mode."""
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

    A tensor is passed to the network unchanged.
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


# ---- the checkpoint, profiler and TensorBoard


def _save(folder: Path, identity: str, state: State, parts: Mapping[str, Any]) -> None:
    """Write the checkpoint and the log, each atomically: after a kill the previous ones are intact."""
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"format": FORMAT, "version": VERSION, "identity": identity, "state": vars(state), "parts": states}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    make_folder(folder)
    write_atomic(folder / "checkpoint.pt", with_digest(buffer.getvalue()))
    write_atomic(folder / "log.jsonl", to_lines(state.history, "")[0])


def _load(folder: Path, identity: str, parts: Mapping[str, Any]) -> State:
    """Load a run's checkpoint into its parts and return its state; the initial state if there is no checkpoint.

    TrainingError if it cannot be read or belongs to another run.
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
    """Return torch's profiler, which writes a table of some steps after the first."""

    def write(profile: torch.profiler.profile) -> None:
        make_folder(path.parent)
        write_text_atomic(path, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS))

    steps = torch.profiler.schedule(wait=0, warmup=1, active=PROFILED_STEPS, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write)


def _board(folder: Path) -> Any:
    """Return a writer of TensorBoard files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "finetune.watch: tensorboard is not installed; run `pip install tensorboard` or remove it"
        ) from None
    return SummaryWriter(str(folder))
