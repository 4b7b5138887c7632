"""Weights as points: copies, moving averages, greedy soups, and the line between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
"""A network's state by name, detached copies on the CPU."""


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of a network's whole state, buffers included."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a network; names and shapes have to fit."""
    network.load_state_dict(dict(weights))


def interpolate(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> Weights:
    """Return `(1 - alpha) * start + alpha * end`; counters are the end's unless alpha is 0 (Wortsman et al. 2022, "WiSE-FT")."""
    return {
        name: torch.lerp(tensor, end[name], alpha)
        if tensor.is_floating_point()
        else (end[name] if alpha > 0 else tensor).clone()
        for name, tensor in start.items()
    }


def mean_weights(members: Sequence[Mapping[str, Tensor]]) -> Weights:
    """Return the mean of several weights; counters are the first member's. Equal values stay bit-equal."""
    average = {name: tensor.clone() for name, tensor in members[0].items()}
    for count, member in enumerate(members[1:], start=2):
        for name, tensor in average.items():
            if tensor.is_floating_point():
                tensor.lerp_(member[name], 1 / count)
    return average


def greedy_soup(members: Sequence[Weights], score: Callable[[Weights], tuple[float, float]]) -> tuple[Weights, int]:
    """Average members, best first, each kept only when the average's score does not fall.

    Wortsman et al. 2022, "Model soups", recipe 1. Returns the average and the number of members in it.
    """
    kept = [members[0]]
    best = score(members[0])
    for member in members[1:]:
        tried = score(mean_weights([*kept, member]))
        if tried >= best:
            kept.append(member)
            best = tried
    return mean_weights(kept), len(kept)


def move_average(average: Weights, network: nn.Module, decay: float, step: int) -> None:
    """Move an average towards the network's weights in place; early steps count more, so the start is soon forgotten."""
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                average[name].lerp_(tensor.to(average[name].device), weight)
            else:
                average[name].copy_(tensor)
