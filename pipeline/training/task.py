"""What a training run is given: a network with its plan, and images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from pipeline.training.batches import Labelled
from pipeline.training.settings import Settings
from pipeline.training.stages import Stage


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
