"""The trainer: images and what is to be said of them in, the weights that did best on the validation images out.

Everything random in a step comes from (seed, step), so that a step is the same whatever was done before in this process: a run
continued from its checkpoint gives on the CPU, bit for bit, the weights of a run that was never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.config import FinetuneConfig
from pipeline.embed.graph import Stage
from pipeline.errors import TrainingError
from pipeline.evaluation import ACCURACY
from pipeline.finetuning.batches import Data, LabelledImages, Score, augmented, loss_of, rows_at, score_of, to_float
from pipeline.finetuning.checkpoint import State, TrainingRun, copy_weights, load, save
from pipeline.finetuning.plan import Plan, fold_norms, modules_below, passing, set_trainable, stage_of_parameters
from pipeline.io import process
from pipeline.io.files import make_folder, write_text_atomic

logger = logging.getLogger(__name__)

EVALUATIONS = 10
"""How often a run is evaluated."""
KEPT = 2 << 30
"""Bytes of what enters the lowest trained stage that are kept of the training images."""
BLOCK = 32
"""Images that are scored at a time."""
SAVE_SECONDS = 30.0
"""A checkpoint is written after this time at the latest, because an evaluation may be minutes away."""
WEIGHT_DECAY = 0.01
"""Of AdamW; norms and biases have none."""
PROFILE_ROWS = 40


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


def steps_for(images: int) -> int:
    """Return the number of steps by the size of the data, after BiT's rule: 500 below 20,000 images, then 10,000, 20,000.

    Kolesnikov et al. 2020, "Big Transfer", section 3.3; their batches are 512.
    """
    return 500 if images < 20_000 else 10_000 if images < 500_000 else 20_000


def steps_asked(settings: FinetuneConfig, images: int) -> int:
    """Return the number of steps of a run: what the settings say, or for `auto` by the number of images that it learns from."""
    return steps_for(images) if settings.steps == "auto" else settings.steps


def train(
    task: TrainingTask, data: Data, run: TrainingRun, on_evaluation: Callable[[int], None] | None = None
) -> State:
    """Train a network in place, put the weights into it that did best on the validation images, and return how it went.

    A checkpoint of the same identity is continued; `on_evaluation` gets the step of each evaluation, once it is saved.

    Raises
    ------
    TrainingError
        When the loss is no number, the precision is not to be had on the device, or the folder holds another run.
    """
    _check(task, data)
    prepare(task, data)
    settings, parts = task.settings, _parts(task)
    state = load(run, parts)
    saved, clock = state.seconds, time.perf_counter()
    with (
        process.bar(task.steps, "step", "training", initial=state.step) as bar,
        _profiler(settings.profile_steps, run.folder / "profile.txt") as tick,
        _tensorboard(run.folder / "tensorboard" if settings.tensorboard else None) as show,
    ):
        while state.step < task.steps:
            rate = _step(task, data, state, parts)
            state.seconds, clock = state.seconds + time.perf_counter() - clock, time.perf_counter()
            tick()
            bar.update()
            due = state.step % task.evaluate_every == 0 or state.step == task.steps
            if due:
                _evaluate(task, data, state, parts, rate)
            if due or state.seconds - saved >= SAVE_SECONDS:
                save(run, state, parts)
                saved = state.seconds
            if due:
                show(state.history[-1])
                bar.note(f"validation {state.history[-1][f'validation_{ACCURACY.name}']:.1%}")
                if on_evaluation is not None:
                    on_evaluation(state.step)
    task.network.load_state_dict(state.weights)  # there are some: the last step is followed by an evaluation
    task.network.eval()
    return state


def _check(task: TrainingTask, data: Data) -> None:
    problems = []
    if task.precision == "fp16" and task.device.type == "cpu":
        problems.append("precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU")
    if len(data.train) < 2:
        problems.append(f"{len(data.train)} images to train on; expected at least 2")
    if not len(data.validation):
        problems.append("no validation images; expected at least one to choose weights on")
    side = min(data.train.pixels.shape[1:3])
    if task.settings.size is not None and task.settings.size > side:
        problems.append(
            f"finetune.size: {task.settings.size} is more than the {side} pixels that images are prepared to have"
        )
    if problems:
        raise TrainingError("training: cannot start", problems)


def prepare(task: TrainingTask, data: Data) -> None:
    """Put the network on its device, as the fastest steps need it: channels last, norms that stay frozen folded, memory kept."""
    process.keep_freed_memory()
    task.network.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if task.settings.batch_norm == "frozen":
        some = torch.from_numpy(data.validation.pixels[:2]).to(task.device)
        logger.debug("%d norms are folded", fold_norms(task.network, to_float(some, data.mean, data.std)))


def keep_below(task: TrainingTask, data: Data) -> Data:
    """Return data that hold what enters the lowest stage ever trained: what lies below stays, and is run once for each image.

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


def _parts(task: TrainingTask) -> dict[str, Any]:
    """All that is in the checkpoint: network, optimizer, schedule, scaler, moving average."""
    optimizer = make_optimizer(task)
    parts = {
        "network": task.network,
        "optimizer": optimizer,
        "schedule": make_schedule(task, optimizer),
        "scaler": torch.amp.GradScaler(task.device.type, enabled=task.precision == "fp16"),
    }
    if task.settings.ema > 0:
        follow = get_ema_multi_avg_fn(task.settings.ema)  # type: ignore[no-untyped-call]
        parts["average"] = AveragedModel(task.network, multi_avg_fn=follow, use_buffers=True)
    return parts


def stage_rates(rate: float, decay: float, stages: int) -> list[float]:
    """Return the full rate of each of `stages` stages from the stem to the head, geometric with a floor of 1/100."""
    return [max(rate * decay**depth, rate / 100) for depth in range(stages - 1, -1, -1)]


def make_optimizer(task: TrainingTask) -> torch.optim.Optimizer:
    """Return the optimizer with one group per stage and decay, at their full rates."""
    settings, groups = task.settings, list[dict[str, Any]]()
    owners = stage_of_parameters(task.network, task.stages)
    rates = stage_rates(settings.rate, settings.rate_decay, len(task.stages))
    for stage, own in zip(task.stages, rates, strict=True):
        inside = [parameter for name, parameter in task.network.named_parameters() if owners[name] == stage.name]
        for decays in (True, False):  # norms and biases, which are vectors, do not
            members = [parameter for parameter in inside if (parameter.ndim > 1) == decays]
            decay = WEIGHT_DECAY if decays else 0.0
            if members:
                groups.append({"params": members, "weight_decay": decay, "lr": own, "stage": stage.name})
    return torch.optim.AdamW(groups)


def make_schedule(task: TrainingTask, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule of a run: linear warm-up to the full rate, then a cosine down to zero."""
    warmup = round(task.settings.warmup * task.steps)
    fall = CosineAnnealingLR(optimizer, T_max=max(1, task.steps - warmup))
    if not warmup:
        return fall
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


# ---- one step, one evaluation


def _step(task: TrainingTask, data: Data, state: State, parts: dict[str, Any]) -> float:
    """Do one step and return the head's rate in it."""
    rate = float(parts["schedule"].get_last_lr()[-1])
    state.losses.append(train_step(task, data, parts["optimizer"], parts["scaler"], state.step))
    parts["schedule"].step()
    if "average" in parts:
        parts["average"].update_parameters(task.network)
    state.step += 1
    return rate


def train_step(
    task: TrainingTask, data: Data, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int
) -> float:
    """Do one step at the optimizer's rates and return its loss.

    Raises
    ------
    TrainingError
        When the loss is no number.
    """
    settings = task.settings
    torch.manual_seed(int(np.random.SeedSequence([task.seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    # Also after an evaluation, which left the network in evaluation mode.
    lowest = next(low for start, low in reversed(task.plan) if step >= round(start * task.steps))
    set_trainable(task.network, task.stages, lowest, settings.batch_norm)
    optimizer.zero_grad(set_to_none=True)
    rows, kept = (
        rows_at(step * settings.batch_size, settings.batch_size, len(data.train), task.seed),
        data.train.entering,
    )
    if kept is None:
        images = augmented(data.train.pixels[rows], settings, task.device, data)
    else:
        images = kept[rows].to(task.device)
    with _autocast(task.device, task.precision), passing(() if kept is None else data.below):
        outputs = task.network(images).float()
    loss = loss_of(outputs, torch.from_numpy(data.train.y[rows]).to(task.device), settings, data)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    if not np.isfinite(found := loss.item()):
        raise TrainingError(
            f"training: the loss at step {step} is {found}; lower finetune.rate ({settings.rate:g}) or set extraction.precision to fp32"
        )
    scaler.step(optimizer)
    scaler.update()
    return found


def _evaluate(task: TrainingTask, data: Data, state: State, parts: dict[str, Any], rate: float) -> None:
    """Score the weights, and their moving average, on the validation images, keep the best of them, and write a record."""
    candidates = {"weights": task.network, **({"ema": parts["average"].module} if "average" in parts else {})}
    record: dict[str, Any] = {"step": state.step}
    for source, network in candidates.items():
        # What is left out is of the network itself, and not of a copy.
        images = data.validation if network is task.network else replace(data.validation, entering=None)
        score = evaluate(network, images, data, task.device, task.precision)
        name = "validation" if source == "weights" else source
        record |= {f"{name}_{ACCURACY.name}": score[0], f"{name}_loss": -score[1]}
        if state.score is None or score > state.score:
            state.score, state.weights, state.source = score, copy_weights(network), source
    record |= {"loss": float(np.mean(state.losses)), "rate": rate, "seconds": round(state.seconds, 1)}
    state.history.append(record)
    state.losses = []
    logger.debug("%s", record)


def evaluate(
    network: nn.Module,
    labelled: LabelledImages,
    data: Data,
    device: torch.device,
    precision: str = "fp32",
) -> Score:
    """Return the score of a network on images, in evaluation mode, which it leaves it in."""
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


# ---- what watches a run while it lasts


@contextmanager
def _profiler(steps: int, path: Path) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; torch's profiler watches `steps` of them after the first and writes its table."""
    if steps == 0:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        make_folder(path.parent)
        write_text_atomic(path, profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=PROFILE_ROWS))

    plan = torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=plan, on_trace_ready=write) as profile:
        yield profile.step


@contextmanager
def _tensorboard(folder: Path | None) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that sends an evaluation's numbers, with its step, to TensorBoard; without a folder to nowhere."""
    if folder is None:
        yield lambda record: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TrainingError(
            "finetune.tensorboard: the package is not installed; run `pip install tensorboard` or set it to false"
        ) from None
    with SummaryWriter(str(folder)) as board:

        def show(record: Mapping[str, float]) -> None:
            for name in record.keys() - {"step"}:
                board.add_scalar(name, record[name], record["step"])
            board.flush()

        yield show
