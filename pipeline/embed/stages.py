"""Stages of a network: stem, stage1 ... stageN, head, found in the same way for every family.

Modules are opened until what is inside ends in one resolution, and neighbours with the same are one stage. What has no
resolution (a transformer's blocks) is one stage each, but for norms, which belong to the stage before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """A part of a network.

    name : "stem", "stage1" ... "stageN" or "head"
    modules : the modules' names in the network, in the order of definition
    end : the module whose output is the stage's: the last one that keeps the resolution of the first
    """

    name: str
    modules: tuple[str, ...]
    end: str


def find_stages(network: nn.Module, size: tuple[int, int], head: str) -> tuple[Stage, ...]:
    """Return the stages of a network for images of `size` (height, width) pixels, the stem first, by one forward pass.

    `head` names the layer that gives a score per class, the last stage; a network without one has ''.
    """
    resolutions = _resolutions(network, size)
    runs: list[list[str]] = []
    for name in _pieces(network, "", head, resolutions):
        same = runs and resolutions.get(name) is not None and resolutions[name] == resolutions.get(runs[-1][-1])
        part = network.get_submodule(name)
        opens_body = len(runs) == 1 and _layers(part) > 1
        norm = len(runs) > 1 and all(parameter.ndim < 2 for parameter in part.parameters())
        if (same and not opens_body) or norm:
            runs[-1].append(name)
        else:
            runs.append([name])
    names = ["stem", *(f"stage{number}" for number in range(1, len(runs)))]
    ends = [[part for part in run if resolutions.get(part) == resolutions.get(run[0])][-1] for run in runs]
    stages = [Stage(name, tuple(run), end) for name, run, end in zip(names, runs, ends, strict=True)]
    return (*stages, Stage("head", (head,), head)) if head else tuple(stages)


def _pieces(network: nn.Module, name: str, head: str, resolutions: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the modules that lie within one stage each, in the order of definition, without the head.

    A module is opened when the head is in it, when its children end in more than two resolutions (the first block of a stage
    has two), and, if it holds most of the network, also when they end in two or, as in a transformer, in none.
    """
    module = network.get_submodule(name)
    if name == (head or None) or not _count(module):
        return []
    inside = [f"{name}.{child}".lstrip(".") for child, part in module.named_children() if _count(part)]
    ends = {resolutions.get(child) for child in inside}
    body = _count(network) - (_count(network.get_submodule(head)) if head else 0)
    most = 2 * _count(module) > body
    several = len(ends) > 1 or (ends == {None} and len(inside) > 1)
    if not name or head.startswith(f"{name}.") or len(ends) > 2 or (most and several):
        return [piece for child in inside for piece in _pieces(network, child, head, resolutions)]
    return [name]


def _resolutions(network: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return height and width of what comes out of each module that gives maps, for images of `size` pixels."""
    found: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found[name] = tuple(output.shape[-2:])

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in network.named_modules()]
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, 3, *size, device=next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layers(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
