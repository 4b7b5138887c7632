"""The checkpoint of a run: everything a killed run needs to go on as if nothing had happened."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError
from pipeline.experiment import to_lines, with_digest, without_digest
from pipeline.finetuning.batches import Score
from pipeline.io.files import make_folder, read_file, write_atomic

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "manyheads checkpoint"
CHECKPOINT_VERSION = 3

Weights = dict[str, Tensor]
"""A network's state by name, detached copies on the CPU."""


@dataclass(frozen=True)
class TrainingRun:
    """Where a run keeps its checkpoint and log, and the identity a checkpoint must have to be continued."""

    folder: Path
    identity: str

    @property
    def checkpoint(self) -> Path:
        """The latest state; removed by nobody, so a finished run is not trained again."""
        return self.folder / "checkpoint.pt"


@dataclass
class State:
    """Where a run stands, and at its end what it gave: what a checkpoint holds beside the states of network, optimizer and the like.

    step : steps done
    seconds : time spent in training, over all its pieces
    losses : of every step since the last evaluation
    score : the best so far on the validation images
    weights : the state of the network that had it
    source : "weights", or "ema" for their moving average
    history : one record per evaluation
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    score: Score | None = None
    weights: Weights = field(default_factory=dict)
    source: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of a network's whole state, buffers included; shapes and dtypes are the network's."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def save(run: TrainingRun, state: State, parts: Mapping[str, Any]) -> None:
    """Write the checkpoint and the log, each whole and in one move: a killed run finds the last ones intact.

    parts : network, optimizer and whatever else has a `state_dict`, by name
    """
    content = {
        "format": CHECKPOINT_FORMAT,
        "version": CHECKPOINT_VERSION,
        "identity": run.identity,
        "state": vars(state),
        "parts": {name: part.state_dict() for name, part in parts.items()},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    make_folder(run.folder)
    write_atomic(run.checkpoint, with_digest(buffer.getvalue()))
    write_atomic(run.folder / "log.jsonl", to_lines(state.history, "")[0])


def load(run: TrainingRun, parts: Mapping[str, Any]) -> State:
    """Return the state of a run, having put its parts into theirs; the beginning when there is no checkpoint.

    Raises
    ------
    TrainingError
        When it cannot be read or belongs to another run.
    """
    if not run.checkpoint.exists():
        return State()
    try:
        data = without_digest(read_file(run.checkpoint))
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises many types for damaged files
        raise TrainingError(f"{run.checkpoint}: cannot be read ({error}); delete it to train from the start") from None
    if (content.get("format"), content.get("version")) != (CHECKPOINT_FORMAT, CHECKPOINT_VERSION):
        raise TrainingError(
            f"{run.checkpoint}: is no checkpoint of version {CHECKPOINT_VERSION}; delete it to train from the start"
        )
    if content["identity"] != run.identity:
        raise TrainingError(
            f"{run.checkpoint}: belongs to a run with other settings, data or seed; delete it or give another folder"
        )
    for name, part in parts.items():
        part.load_state_dict(content["parts"][name])
    state = State(**content["state"])
    logger.info("continuing after step %d", state.step)
    return state
