"""The training loop: images and labels in, the weights that did best on the validation images out.

A run continued from its checkpoint gives on the CPU, bit for bit, the weights of a run that was never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipeline.errors import TrainingError
from pipeline.finetuning.batches import Data
from pipeline.finetuning.checkpoint import Run, State, load, save
from pipeline.finetuning.instruments import profiler, tensorboard
from pipeline.finetuning.steps import Task, evaluate, make_optimizer, make_schedule, train_step
from pipeline.finetuning.weights import copy_weights
from pipeline.io import progress

logger = logging.getLogger(__name__)

SAVE_SECONDS = 30.0
"""A checkpoint is written after this time at the latest, because an evaluation may be minutes away."""


def train(task: Task, data: Data, run: Run, on_evaluation: Callable[[int], None] | None = None) -> State:
    """Train a network in place, put the weights into it that did best on the validation images, and return how it went.

    A checkpoint of the same identity is continued; `on_evaluation` gets the step of each evaluation, once it is saved.

    Raises
    ------
    TrainingError
        When the loss is no number, the precision is not to be had on the device, or the folder holds another run.
    """
    _check(task, data)
    settings = task.settings
    state, parts = _begin(task, run)
    saved, clock = state.seconds, time.perf_counter()
    with (
        progress.bar(task.steps, "step", "training", initial=state.step) as bar,
        profiler(settings.profile_steps, run.folder / "profile.txt") as tick,
        tensorboard(run.folder / "tensorboard" if settings.tensorboard else None) as show,
    ):
        while state.step < task.steps and not (settings.patience is not None and state.stale >= settings.patience):
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
                bar.note(f"validation {state.history[-1]['validation_accuracy']:.1%}")
                if on_evaluation is not None:
                    on_evaluation(state.step)
    task.network.load_state_dict(state.weights)  # there are some: the last step is followed by an evaluation
    task.network.eval()
    return state


def _begin(task: Task, run: Run) -> tuple[State, dict[str, Any]]:
    """Return the state of a run and all that changes with it, as the checkpoint has them or before the first step."""
    found, parts = load(run), _parts(task)
    if found is None:
        return State(), parts
    for name, part in parts.items():
        part.load_state_dict(found[1][name])
    return found[0], parts


def _parts(task: Task) -> dict[str, Any]:
    """All that changes from step to step and is in the checkpoint: network, optimizer, schedule, scaler, moving average."""
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


def _step(task: Task, data: Data, state: State, parts: dict[str, Any]) -> float:
    """Do one step and return the head's rate in it."""
    rate = float(parts["schedule"].get_last_lr()[-1])
    state.losses.append(train_step(task, data, parts["optimizer"], parts["scaler"], state.step))
    parts["schedule"].step()
    if "average" in parts:
        parts["average"].update_parameters(task.network)
    state.step += 1
    return rate


def _evaluate(task: Task, data: Data, state: State, parts: dict[str, Any], rate: float) -> None:
    """Score the weights, and their moving average, on the validation images, keep the best of them, and write a record."""
    candidates = {"weights": task.network, **({"ema": parts["average"].module} if "average" in parts else {})}
    record: dict[str, Any] = {"step": state.step}
    state.stale += 1
    for source, network in candidates.items():
        score = evaluate(network, data.validation, data, task.device, task.precision)
        name = "validation" if source == "weights" else source
        record.update({f"{name}_accuracy": score[0], f"{name}_loss": -score[1]})
        if state.score is None or score > state.score:
            state.score, state.weights, state.source, state.stale = score, copy_weights(network), source, 0
    record.update(loss=float(np.mean(state.losses)), rate=rate, seconds=round(state.seconds, 1))
    state.history.append(record)
    state.losses = []
    logger.debug("%s", record)


def _check(task: Task, data: Data) -> None:
    problems = []
    if task.precision == "fp16" and task.device.type == "cpu":
        problems.append("precision: 'fp16' needs a GPU; use 'bf16' or 'fp32' on the CPU")
    if len(data.train) < 2:
        problems.append(f"{len(data.train)} images to train on; expected at least 2")
    if not len(data.validation):
        problems.append("no validation images; expected at least one to choose weights on")
    if problems:
        raise TrainingError("training: cannot start", problems)
    task.network.to(device=task.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
