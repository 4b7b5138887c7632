"""Networks by name: torchvision's classification models, and the shapes that only a weights file describes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config import guess
from pipeline.errors import BackboneError
from pipeline.vision import torchvision


def _regnet(block_params: Mapping[str, Any], **arguments: Any) -> nn.Module:
    """A RegNet of any shape; `block_params` are BlockParams' own, or those of its `from_init_params`."""
    from torchvision.models.regnet import BlockParams, RegNet

    make = BlockParams.from_init_params if "depth" in block_params else BlockParams
    module: nn.Module = RegNet(make(**block_params), **arguments)
    return module


def _resnet(block: str, layers: list[int], **arguments: Any) -> nn.Module:
    """A ResNet of any depth; `block` is BasicBlock or Bottleneck."""
    from torchvision.models import resnet

    module: nn.Module = resnet.ResNet(
        {"BasicBlock": resnet.BasicBlock, "Bottleneck": resnet.Bottleneck}[block], layers, **arguments
    )
    return module


CONSTRUCTORS: Mapping[str, Callable[..., nn.Module]] = {
    "torchvision.models.regnet.RegNet": _regnet,
    "torchvision.models.resnet.ResNet": _resnet,
}
"""Architectures with nested arguments, which only a weights file's own description can name."""

# The auxiliary classifiers of these two serve training only; without `init_weights` they warn.
ALWAYS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def classification_models() -> list[str]:
    """Return the names of torchvision's classification models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a network in eval mode with whatever weights its constructor makes."""
    check_architecture(architecture)
    make = CONSTRUCTORS.get(architecture)
    try:
        if make is not None:
            return make(**arguments).eval()
        module: nn.Module = torchvision.models.get_model(architecture, **{**ALWAYS.get(architecture, {}), **arguments})
        return module.eval()
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise BackboneError(f"{architecture} cannot be built with arguments {dict(arguments)}: {error}") from None


class _Uninitialised(TorchFunctionMode):
    """Leaves out the initialisation of weights that have no memory, for which torch would load its compiler first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_RANDOM_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_})


def build_empty(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a network without memory for its weights, in milliseconds; one that needs numbers to be built gets them."""
    free = {"init_weights": False} if "init_weights" in ALWAYS.get(architecture, {}) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Uninitialised():
                return build(architecture, {**free, **arguments})
        except BackboneError:  # a regnet computes its widths with tensors; a wrong argument fails again here
            return build(architecture, {**free, **arguments})


def check_architecture(name: str) -> None:
    """Refuse a name that torchvision does not have.

    Raises
    ------
    BackboneError
    """
    if name not in CONSTRUCTORS and name not in classification_models():
        raise BackboneError(
            f"no classification model {name!r} in torchvision {torchvision.__version__}{guess(name, classification_models())}"
        )
