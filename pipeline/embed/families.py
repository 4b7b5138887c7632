"""The table of families, and what is the same for networks of each: find the row, build, build without memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config import BackboneConfig, guess
from pipeline.embed import efficientnet_lite, torchvision_models
from pipeline.embed.family import Family
from pipeline.errors import BackboneError

FAMILIES: tuple[Family, ...] = (efficientnet_lite.FAMILY, torchvision_models.FAMILY)


def family_of(architecture: str) -> Family:
    """Return the family of a network's name or architecture.

    Raises
    ------
    BackboneError
        When none has it.
    """
    for family in FAMILIES:
        if family.builds(architecture):
            return family
    names = [name for family in FAMILIES for name in family.names()]
    raise BackboneError(
        f"no network {architecture!r}{guess(architecture, names)}; there are torchvision's and efficientnet_lite0 to 2"
    )


def family_with_weights(config: BackboneConfig) -> Family:
    """Return the family of a section's network, which publishes the weights that it names.

    Raises
    ------
    BackboneError
    """
    family = family_of(config.name)
    published = family.weights(config.name)
    if config.weights not in published:
        raise BackboneError(
            f"{config.name} has no weights {config.weights!r}{guess(config.weights, list(published))}; "
            f"there are {', '.join([*published, 'random', 'bundled'])}, or a .safetensors or .pth file"
        )
    return family


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a network in eval mode with whatever weights its constructor makes.

    Raises
    ------
    BackboneError
        When there is no such architecture, or it does not take the arguments.
    """
    family = family_of(architecture)
    try:
        return family.build(architecture, arguments).eval()
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Uninitialised():
                return build(architecture, arguments)
        except BackboneError:  # a regnet computes its widths with tensors; a wrong argument fails again here
            return build(architecture, arguments)
