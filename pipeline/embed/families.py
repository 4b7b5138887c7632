"""The table of families, and what is the same for all of them: find a network and its weights, build it, also without memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config import BackboneConfig, guess, names_vectors
from pipeline.embed import efficientnet_lite, own_modules, own_vectors, timm_models, torchvision_models
from pipeline.embed.family import Arguments, Family, Published
from pipeline.errors import BackboneError, first_line
from pipeline.images import Preprocessing
from pipeline.io.process import is_out_of_memory

FAMILIES: tuple[Family, ...] = (
    efficientnet_lite.FAMILY,
    torchvision_models.FAMILY,
    timm_models.FAMILY,
    own_modules.FAMILY,
)


def family_of(architecture: str) -> Family:
    """Return the family of a network's name or architecture.

    Raises
    ------
    BackboneError
        When none has it.
    """
    if names_vectors(architecture):
        raise own_vectors.no_network(architecture)
    for family in FAMILIES:
        if family.has(architecture):
            return family
    raise BackboneError(
        f"no network {architecture!r}{guess(architecture, network_names())}; there are "
        + "; ".join(family.title for family in FAMILIES)
    )


def network_names() -> list[str]:
    """Return all names that a config can have for a network."""
    return [name for family in FAMILIES for name in family.names()]


def published(config: BackboneConfig) -> Published:
    """Return the weights that a section names, of those that its network's family publishes.

    Raises
    ------
    BackboneError
        When there are no such weights, or no such network.
    """
    found = family_of(config.name).weights(config.name)
    if config.weights not in found:
        raise BackboneError(
            f"{config.name} has no weights {config.weights!r}{guess(config.weights, list(found))}; "
            f"there are {', '.join([*found, 'random', 'bundled'])}, or a .safetensors or .pth file"
        )
    return found[config.weights]


def usual_preprocessing(architecture: str) -> Preprocessing:
    """Return the transform for weights that come without one: that of the first published ones, else ImageNet's usual."""
    weights = family_of(architecture).weights(architecture)
    return next((each.preprocessing for each in weights.values()), Preprocessing(resize=256, crop=224))


def build(architecture: str, arguments: Arguments) -> nn.Module:
    """Construct a network in eval mode with whatever weights its constructor makes.

    Raises
    ------
    BackboneError
        When there is no such architecture, or it does not take the arguments.
    """
    return _in_eval_mode(partial(family_of(architecture).build, architecture), architecture, arguments)


def load(config: BackboneConfig) -> nn.Module:
    """Construct a section's network in eval mode with the published weights that it names, fetched if need be.

    Raises
    ------
    BackboneError
        When there are no such weights, they are not to be had, or the network does not take the arguments.
    """
    return _in_eval_mode(published(config).load, config.name, config.arguments)


def load_file(config: BackboneConfig, path: Path) -> nn.Module | None:
    """Construct a section's network in eval mode with the weights of a file, where its family reads such files itself."""
    make = family_of(config.name).load_file
    return make and _in_eval_mode(lambda arguments: make(config.name, arguments, path), config.name, config.arguments)


def _in_eval_mode(make: Callable[[Arguments], nn.Module], name: str, arguments: Arguments) -> nn.Module:
    try:
        return make(arguments).eval()
    except (TypeError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BackboneError(f"{name} cannot be built with arguments {dict(arguments)}: {first_line(error)}") from None


class _Uninitialised(TorchFunctionMode):
    """Leaves out the initialisation of weights that have no memory, for which torch would load its compiler first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_RANDOM_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_})


def build_empty(architecture: str, arguments: Arguments) -> nn.Module:
    """Construct a network without memory for its weights, in milliseconds; one that needs numbers to be built gets them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Uninitialised():
                return build(architecture, arguments)
        except BackboneError:  # a regnet computes its widths with tensors; a wrong argument fails again here
            return build(architecture, arguments)
