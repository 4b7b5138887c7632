"""Which stages of a network are trained when, and which really stay as they are; the last linear layer is the head."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import nn

from pipeline.embed.stages import Stage, find_stages
from pipeline.errors import TrainingError

BatchNorm = Literal["frozen", "affine", "train"]
SCOPE_WORDS = ("head", "last_stage", "all")


def stages_of(network: nn.Module, size: int) -> tuple[Stage, ...]:
    """Return the stages of a classification network for square images of `size` pixels, the stem first.

    Raises
    ------
    TrainingError
        When the network has no linear layer at its end.
    """
    return find_stages(network, (size, size), last_linear(network))


def last_linear(network: nn.Module) -> str:
    """Return the name of the last linear layer, the one that gives a score per class."""
    own = network.get_classifier() if hasattr(network, "get_classifier") else None  # type: ignore[operator]  # timm's say which
    names: list[str] = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and (own is None or module is own)
    ]
    if not names:
        raise TrainingError(
            "the network has no linear layer to give one score per class; expected a classification network"
        )
    return names[-1]


def stage_of_parameters(network: nn.Module, stages: Sequence[Stage]) -> dict[str, str]:
    """Return the stage of every parameter; what stands outside all modules (a class token) belongs to the stem."""
    owners = {name: stages[0].name for name, _ in network.named_parameters()}
    for stage in stages:
        for module in stage.modules:
            for name in owners:
                if name.startswith(f"{module}."):
                    owners[name] = stage.name
    return owners


def resolve_scope(scope: str, stages: Sequence[Stage]) -> int:
    """Return the position of the lowest stage a scope trains.

    Raises
    ------
    TrainingError
        When the network has no stage of that name.
    """
    names = [stage.name for stage in stages]
    if scope == "all":
        return 0
    if scope == "last_stage":
        return len(stages) - 2
    if scope in names:
        return names.index(scope)
    raise TrainingError(
        f"unfreeze: the network has no stage {scope!r}; allowed: {', '.join([*SCOPE_WORDS, *names[:-1]])}"
    )


def check_plan(plan: Sequence[tuple[float, str]], stages: Sequence[Stage]) -> tuple[tuple[float, int], ...]:
    """Return a plan of (share of the steps, scope) as (share of the steps, lowest trained stage).

    Raises
    ------
    TrainingError
        When a step closes a stage that one before opened, or names one the network does not have.
    """
    problems: list[str] = []
    resolved: list[tuple[float, int]] = []
    for number, (start, scope) in enumerate(plan):
        try:
            resolved.append((start, resolve_scope(scope, stages)))
        except TrainingError as error:
            problems.append(f"step {number + 1}: {error.message}")
    for (_, lowest), (start, below) in pairwise(resolved):
        if below > lowest:
            problems.append(
                f"freezes {stages[lowest].name} again at {start:g}; expected each step to open the same stages or more"
            )
    if problems:
        raise TrainingError("unfreeze: the plan cannot be followed", problems)
    return tuple(resolved)


def describe_plan(
    plan: Sequence[tuple[float, int]], stages: Sequence[Stage], network: nn.Module, steps: int
) -> list[str]:
    """Return one line for each step of a plan: when, what is trained, how many parameters."""
    owners = stage_of_parameters(network, stages)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    lines = []
    for start, lowest in plan:
        open_stages = [stage.name for stage in stages[lowest:]]
        count = sum(size for name, size in sizes.items() if owners[name] in open_stages)
        lines.append(
            f"from step {round(start * steps)}: {', '.join(open_stages)} ({count:,} of {sum(sizes.values()):,} parameters)"
        )
    return lines


def set_trainable(network: nn.Module, stages: Sequence[Stage], lowest: int, batch_norm: BatchNorm) -> None:
    """Put the network into training with everything below stage `lowest` as still as in evaluation.

    Frozen stages get no gradient, keep their BatchNorm statistics and drop nothing out. In trained stages BatchNorm's
    statistics move only with `batch_norm="train"`, and its scale and shift stay with `"frozen"`.
    """
    owners = stage_of_parameters(network, stages)
    open_names = {stage.name for stage in stages[lowest:]}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(owners[name] in open_names)
    network.train()
    for stage in stages[:lowest]:
        for module in stage.modules:
            network.get_submodule(module).eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        if batch_norm != "train":
            norm.eval()
        if batch_norm == "frozen":
            norm.requires_grad_(False)
