"""Networks by name: torchvision's models, and rows of our own for torchvision classes that have no name for a small size.

A row takes arguments that JSON can hold, so that a weights file can say how its network is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import BackboneError
from pipeline.vision import torchvision

if TYPE_CHECKING:
    from torch import nn


def regnet_small(
    num_classes: int = 1000,
    depths: Sequence[int] = (1, 2, 4),
    widths: Sequence[int] = (64, 160, 384),
    group_widths: Sequence[int] = (32, 80, 192),
    bottleneck_multipliers: Sequence[float] = (0.5, 0.5, 0.5),
    strides: Sequence[int] = (1, 2, 2),
    stem_width: int = 32,
    se_ratio: float | None = None,
) -> nn.Module:
    """Return torchvision's `RegNet` with three stages for small images; the default is the bundled network, 2.2 million parameters.

    Radosavovic et al. 2020, "Designing network design spaces". The stem halves the image, the stages divide it by 8 in all.
    A group as wide as the bottleneck is a plain convolution, which processors run far faster than grouped ones.
    """
    module: Any = importlib.import_module(f"{torchvision.__name__}.models.regnet")
    blocks = module.BlockParams(
        list(depths), list(widths), list(group_widths), list(bottleneck_multipliers), list(strides), se_ratio
    )
    network: nn.Module = module.RegNet(blocks, num_classes=num_classes, stem_width=stem_width)
    return network


CONSTRUCTORS: Mapping[str, Callable[..., nn.Module]] = {"regnet_small": regnet_small}
"""Name -> constructor, for what torchvision has a class for and no name."""


def build(name: str, arguments: Mapping[str, Any], num_classes: int | None = None) -> nn.Module:
    """Return a network with untrained weights from torch's global random state.

    `num_classes` None leaves the architecture's own number.

    Raises
    ------
    BackboneError
        When there is no such architecture, or it does not take the arguments.
    """
    known = dict(arguments) if num_classes is None else {**arguments, "num_classes": num_classes}
    try:
        if name in CONSTRUCTORS:
            return CONSTRUCTORS[name](**known)
        network: nn.Module = torchvision.models.get_model(name, weights=None, **known)
    except (TypeError, ValueError, AssertionError) as error:
        raise BackboneError(f"{name}: cannot be built with {known or 'no arguments'}: {error}") from None
    return network
