"""Objective: what a network learns, is chosen by and judged in; a row for each kind of target that fine-tuning serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.config import FinetuneConfig
from pipeline.data.targets import Classification
from pipeline.errors import TrainingError
from pipeline.evaluation import ACCURACY, Metric
from pipeline.finetuning.batches import Data

Score = tuple[float, float]
"""Of validation images, higher is better: the metric, and minus the loss, which decides between equal ones."""


@dataclass(frozen=True)
class Objective:
    """What it takes to train a network for one kind of target; its outputs are of shape (n, `Data.width`), float32."""

    loss: Callable[[Tensor, Tensor, FinetuneConfig, Data], Tensor]
    """The mean loss of outputs for y, as the target encodes it."""
    score: Callable[[Tensor, Tensor], Score]
    """How good outputs are for y, as the target encodes it."""
    decide: Callable[[Tensor], NDArray[Any]]
    """What outputs say of each image, as the target encodes it, of shape (n,)."""
    metric: Metric
    """The verdict's, and the first number of a score."""


def objective_for(kind: str) -> Objective:
    """Return the objective of a kind of target; TrainingError where fine-tuning does not serve it."""
    if kind not in OBJECTIVES:
        raise TrainingError(refusal(kind))
    return OBJECTIVES[kind]


def refusal(kind: str) -> str:
    """Return what is said of a kind of target that is not served."""
    return f"finetune serves {' and '.join(OBJECTIVES)}, and the target is {kind}"


def _cross_entropy(logits: Tensor, y: Tensor, settings: FinetuneConfig, data: Data) -> Tensor:
    """Return the mean cross-entropy; balanced, a class weighs n / (n_classes * n_class), as in scikit-learn."""
    weights = None
    if settings.class_weight is not None:
        counts = np.maximum(np.bincount(data.train.y, minlength=data.width), 1)
        weights = torch.tensor(len(data.train) / (data.width * counts), dtype=torch.float32, device=logits.device)
    return functional.cross_entropy(logits, y, weights)


def _score_classes(logits: Tensor, y: Tensor) -> Score:
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return accuracy, -functional.cross_entropy(logits.double(), y).item()


def _likeliest(logits: Tensor) -> NDArray[np.int64]:
    return logits.argmax(1).numpy().astype(np.int64)


CLASSES = Objective(_cross_entropy, _score_classes, _likeliest, ACCURACY)

OBJECTIVES: Mapping[str, Objective] = {Classification.kind: CLASSES}
"""By kind of target."""
