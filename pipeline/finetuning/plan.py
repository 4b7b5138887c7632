"""The plan: when each stage of a network is trained, and which stages stay frozen; the last linear layer is the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.embed.graph import Stage, find_stages
from pipeline.errors import TrainingError

SAME = 1e-5
"""Largest relative change of a network's outputs by folding norms, due to rounding."""

Plan = tuple[tuple[float, int], ...]
"""(fraction of the steps, lowest stage trained from then on), in order."""


def stages_of(network: nn.Module, size: tuple[int, int]) -> tuple[Stage, ...]:
    """Return the stages of a classification network for images of `size`, height and width in pixels, the stem first.

    TrainingError if the network has no linear layer at its end.
    """
    return find_stages(network, size, last_linear(network))


def last_linear(network: nn.Module) -> str:
    """Return the name of the linear layer with the network's outputs: its own classifier, as timm names it, or the last linear layer."""
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
    """Return the stage of every parameter; parameters outside all modules (a class token) belong to the stem."""
    owners = {name: stages[0].name for name, _ in network.named_parameters()}
    for stage in stages:
        for module in stage.modules:
            owners |= {name: stage.name for name in owners if name.startswith(f"{module}.")}
    return owners


def check_plan(plan: Sequence[tuple[float, str]], stages: Sequence[Stage]) -> Plan:
    """Return a plan of (fraction of the steps, scope) with the lowest stage that each scope trains.

    TrainingError if a step freezes a stage trained by an earlier step, or names an unknown stage.
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
        f"freezes {stages[lowest].name} again at {start:g}; expected each step to train the same stages or more"
        for (_, lowest), (start, below) in pairwise(resolved)
        if below > lowest
    ]
    if problems:
        raise TrainingError("unfreeze: the plan cannot be followed", problems)
    return resolved


def describe_plan(plan: Plan, stages: Sequence[Stage], network: nn.Module, steps: int) -> list[str]:
    """Return a line for each step of a plan: its start, the stages and the number of parameters trained."""
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


def set_trainable(network: nn.Module, stages: Sequence[Stage], lowest: int) -> None:
    """Put the network into training mode, except for BatchNorm and stages below `lowest`, which get no gradient and no dropout."""
    owners = stage_of_parameters(network, stages)
    trained = {stage.name for stage in stages[lowest:]}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(owners[name] in trained)
    network.train()
    for stage in stages[:lowest]:
        for module in stage.modules:
            network.get_submodule(module).eval()
    for norm in (module for module in network.modules() if isinstance(module, _BatchNorm)):
        norm.eval().requires_grad_(False)


# ---- folding of frozen norms


def fold_norms(network: nn.Module, images: Tensor) -> int:
    """Fold each BatchNorm into the convolution right before it, and return the number folded; the network's state does not change.

    A frozen norm is a scale and a shift per channel, which a convolution applies to its weights and bias as it runs, so
    that neither pass visits the activations again. If the network's outputs would change, nothing is folded.

    images : examples, float32 of shape (n, 3, h, w), normalised
    """
    made, behind = list[tuple[Tensor, nn.Conv2d]](), dict[nn.Conv2d, nn.BatchNorm2d]()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made.append((output, module))

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats:
            behind.update((conv, module) for output, conv in made if output is inputs[0])

    hooks = [part.register_forward_hook(keep) for part in network.modules() if type(part) is nn.Conv2d]
    hooks += [part.register_forward_pre_hook(look) for part in network.modules()]
    with torch.inference_mode():
        expected = network.eval()(images)
        for hook in hooks:
            hook.remove()
        for conv, norm in behind.items():
            conv.norm = (norm,)  # type: ignore[assignment]  # in a tuple, so that it is not registered as a submodule
            conv.forward, norm.forward = MethodType(_normed, conv), MethodType(_passed, norm)  # type: ignore[method-assign]
        if _same(network(images), expected):
            return len(behind)
    for part in (*behind, *behind.values()):
        del part.forward
    return 0


def _normed(conv: Any, images: Tensor) -> Tensor:
    (norm,) = conv.norm
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - scale * (norm.running_mean if conv.bias is None else norm.running_mean - conv.bias)
    return conv._conv_forward(images, conv.weight * scale[:, None, None, None], shift)  # type: ignore[no-any-return]


def _passed(module: nn.Module, images: Tensor) -> Tensor:
    return images


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool(found.shape == expected.shape and (found - expected).abs().max() <= SAME * expected.abs().max())


# ---- frozen stages, which need to run only once


def modules_below(network: nn.Module, stage: Stage, images: Tensor) -> tuple[nn.Module, ...]:
    """Return the modules that run before a stage; empty if skipping them would change the outputs.

    images : examples, float32 of shape (n, 3, h, w), normalised
    """
    order, entering = dict[nn.Module, None](), list[Tensor]()  # a module may run more than once
    entry = network.get_submodule(stage.modules[0])
    hooks = [entry.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))]
    for part in network.modules():
        hooks.append(part.register_forward_hook(lambda module, *_: None if entering else order.update({module: None})))
    with torch.inference_mode():
        expected = network.eval()(images)
        for hook in hooks:
            hook.remove()
        try:
            with passing(tuple(order)):
                return tuple(order) if _same(network(entering[0]), expected) else ()
        except Exception:  # arbitrary code between the modules may not accept the skipped shapes
            return ()


@contextmanager
def passing(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Make modules return their input unchanged within the block."""
    own = [vars(module).pop("forward", None) for module in modules]
    for module in modules:
        module.forward = MethodType(_passed, module)
    try:
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward
