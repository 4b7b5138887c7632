"""Stages of a network from the stem to the head: which are trained when, and which really stay as they are.

The rule for any classification network: modules are opened until what is inside ends in one resolution, and neighbours with
the same are one stage. What has no resolution (a transformer's layers) is one stage each. The last linear layer is the head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.errors import TrainingError

BatchNorm = Literal["frozen", "affine", "train"]
Plan = tuple[tuple[float, int], ...]
"""From which share of the steps on, which stage is the lowest that is trained."""


@dataclass(frozen=True)
class Stage:
    """A part of a network that is frozen or trained as one.

    name : "stem", "stage1" ... "stageN" or "head"
    modules : the modules' names in the network, in the order of definition
    """

    name: str
    modules: tuple[str, ...]


def stages_of(network: nn.Module, size: tuple[int, int]) -> tuple[Stage, ...]:
    """Return the stages of a classification network for images of `size`, height and width in pixels, the stem first.

    Raises
    ------
    TrainingError
        When the network has no linear layer at its end.
    """
    head = last_linear(network)
    resolutions = _resolutions(network, size)
    runs: list[list[str]] = []
    for name in _pieces(network, "", head, resolutions):
        same = runs and resolutions.get(name) is not None and resolutions[name] == resolutions.get(runs[-1][-1])
        opens_body = len(runs) == 1 and _convolutions(network.get_submodule(name)) > 1
        if same and not opens_body:
            runs[-1].append(name)
        else:
            runs.append([name])
    names = ["stem", *(f"stage{number}" for number in range(1, len(runs)))]
    return (*(Stage(name, tuple(run)) for name, run in zip(names, runs, strict=True)), Stage("head", (head,)))


def last_linear(network: nn.Module) -> str:
    """Return the name of the linear layer that gives what a network says: the one it names itself, as timm's do, or the last."""
    named = getattr(network, "get_classifier", None)
    own = None if named is None else named()
    found: list[str] = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and (named is None or module is own)
    ]
    if not found:
        raise TrainingError(
            "the network has no linear layer to give one score per class; expected a classification network"
        )
    return found[-1]


def stage_of_parameters(network: nn.Module, stages: Sequence[Stage]) -> dict[str, str]:
    """Return the stage of every parameter; what stands outside all modules (a class token) belongs to the stem."""
    owners = {name: stages[0].name for name, _ in network.named_parameters()}
    for stage in stages:
        for module in stage.modules:
            owners |= {name: stage.name for name in owners if name.startswith(f"{module}.")}
    return owners


def check_plan(plan: Sequence[tuple[float, str]], stages: Sequence[Stage]) -> Plan:
    """Return a plan of (share of the steps, scope) with the lowest stage that each scope trains.

    Raises
    ------
    TrainingError
        When a step closes a stage that one before opened, or names one the network does not have.
    """
    top = len(stages) - 1
    known = {"head": top, "last_stage": top - 1, "all": 0, **{stage.name: place for place, stage in enumerate(stages)}}
    problems = [
        f"step {number}: the network has no stage {scope!r}; allowed: {', '.join(known)}"
        for number, (_, scope) in enumerate(plan, 1)
        if scope not in known
    ]
    resolved = tuple((start, known[scope]) for start, scope in plan if scope in known)
    problems += [
        f"freezes {stages[lowest].name} again at {start:g}; expected each step to open the same stages or more"
        for (_, lowest), (start, below) in pairwise(resolved)
        if below > lowest
    ]
    if problems:
        raise TrainingError("unfreeze: the plan cannot be followed", problems)
    return resolved


def describe_plan(plan: Plan, stages: Sequence[Stage], network: nn.Module, steps: int) -> list[str]:
    """Return one line for each step of a plan: when, what is trained, how many parameters."""
    owners = stage_of_parameters(network, stages)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    lines = []
    for start, lowest in plan:
        trained = [stage.name for stage in stages[lowest:]]
        count = sum(size for name, size in sizes.items() if owners[name] in trained)
        lines.append(
            f"from step {round(start * steps)}: {', '.join(trained)} ({count:,} of {sum(sizes.values()):,} parameters)"
        )
    return lines


def set_trainable(network: nn.Module, stages: Sequence[Stage], lowest: int, batch_norm: BatchNorm) -> None:
    """Put the network into training with everything below stage `lowest` as still as in evaluation.

    Frozen stages get no gradient, keep their BatchNorm statistics and drop nothing out. In trained stages BatchNorm's
    statistics move only with `batch_norm="train"`, and its scale and shift stay with `"frozen"`.
    """
    owners = stage_of_parameters(network, stages)
    trained = {stage.name for stage in stages[lowest:]}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(owners[name] in trained)
    network.train()
    for stage in stages[:lowest]:
        for module in stage.modules:
            network.get_submodule(module).eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        if batch_norm != "train":
            norm.eval()
        if batch_norm == "frozen":
            norm.requires_grad_(False)


def _pieces(network: nn.Module, name: str, head: str, resolutions: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the modules that lie within one stage each, in the order of definition, without the head.

    A module is opened when the head is in it, when its children end in more than two resolutions (the first block of a stage
    has two), and, if it holds most of the network, also when they end in two or, as in a transformer, in none.
    """
    module = network.get_submodule(name)
    if name == head or not _count(module):
        return []
    inside = [f"{name}.{child}".lstrip(".") for child, part in module.named_children() if _count(part)]
    ends = {resolutions.get(child) for child in inside}
    most = 2 * _count(module) > _count(network) - _count(network.get_submodule(head))
    several = len(ends) > 1 or (ends == {None} and len(inside) > 1)
    if head.startswith(f"{name}.".lstrip(".")) or len(ends) > 2 or (most and several):
        return [piece for child in inside for piece in _pieces(network, child, head, resolutions)]
    return [name]


def _resolutions(network: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return height and width of what comes out of each module that gives maps, for images of `size`, height and width in pixels."""
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


def _convolutions(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d) for part in module.modules())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
