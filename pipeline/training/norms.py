"""BatchNorm's statistics after weights were averaged."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.training.batches import augmented, rows_at
from pipeline.training.task import Data, Task


def recompute_statistics(task: Task, data: Data, batches: int = 20) -> None:
    """Measure BatchNorm's statistics anew: those of averaged weights are not the average of the statistics."""
    norms = [norm for norm in task.network.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    task.network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    settings = task.settings
    torch.manual_seed(task.seed)
    with torch.no_grad():
        for batch in range(min(batches, math.ceil(len(data.train) / settings.batch_size))):
            rows = rows_at(batch * settings.batch_size, settings.batch_size, len(data.train), task.seed)
            pixels = data.train.pixels[rows]
            task.network(augmented(pixels, settings, pixels.shape[1], task.device, data.mean, data.std))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    task.network.eval()
