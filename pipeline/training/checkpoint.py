"""The checkpoint of a run: everything a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import TrainingError
from pipeline.files import make_folder, write_atomic
from pipeline.training.averages import Weights, copy_weights, load_weights

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "manyheads checkpoint"
CHECKPOINT_VERSION = 1

Score = tuple[float, float]
"""Accuracy and minus the mean log-loss: the second decides between equal accuracies."""


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


@dataclass
class State:
    """What a checkpoint holds beside the network and the optimizer."""

    step: int = 0
    seconds: float = 0.0
    stale: int = 0
    start_score: Score = (0.0, 0.0)
    ema: Weights | None = None
    pool: list[tuple[Score, Weights]] = field(default_factory=list)
    ema_best: tuple[Score, Weights] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def save(
    run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: State
) -> None:
    """Write the checkpoint and the log, each whole and in one move: a killed run finds the last ones intact."""
    content = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "identity": run.identity,
        "network": copy_weights(network),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "state": vars(state),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    make_folder(run.folder)
    write_atomic(run.checkpoint, buffer.getvalue())
    write_atomic(run.log, "".join(f"{json.dumps(record)}\n" for record in state.history).encode())


def restore(
    run: Run, network: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> State | None:
    """Put the checkpoint's content back where it came from, or return None when there is no checkpoint.

    Raises
    ------
    TrainingError
        When it cannot be read or belongs to another run.
    """
    if not run.checkpoint.exists():
        return None
    try:
        content = torch.load(run.checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        raise TrainingError(f"{run.checkpoint}: cannot be read ({error}); delete it to train from the start") from None
    if content.get("format") != CHECKPOINT_FORMAT or content.get("version") != CHECKPOINT_VERSION:
        raise TrainingError(
            f"{run.checkpoint}: is no checkpoint of version {CHECKPOINT_VERSION}; delete it to train from the start"
        )
    if content["identity"] != run.identity:
        raise TrainingError(
            f"{run.checkpoint}: belongs to a run with other settings, data or seed; delete it or give another folder"
        )
    load_weights(network, content["network"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    state = State(**content["state"])
    logger.info("continuing after step %d", state.step)
    return state
