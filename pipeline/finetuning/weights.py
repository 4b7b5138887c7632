"""Weights as points: copies of a network's state, and the line between two of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
"""A network's state by name, detached copies on the CPU."""

Score = tuple[float, float]
"""Accuracy and minus the mean log-loss: the second decides between equal accuracies."""


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of a network's whole state, buffers included."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Weights:
    """Return `(1 - alpha) * start + alpha * end`; counters are the end's unless alpha is 0 (Wortsman et al. 2022, "WiSE-FT")."""
    return {
        name: torch.lerp(tensor, end[name], alpha)
        if tensor.is_floating_point()
        else (end[name] if alpha > 0 else tensor).clone()
        for name, tensor in start.items()
    }
