"""The family of torchvision's classification models: by name, with the weights that torchvision downloads."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.embed.published import NO_DOWNLOAD, UNKNOWN, Arguments, Family, Fetch, Published
from pipeline.errors import BackboneError, first_line
from pipeline.images import Preprocessing
from pipeline.io.vision import torchvision

logger = logging.getLogger(__name__)


def _regnet(block_params: Mapping[str, Any], **arguments: Any) -> nn.Module:
    """Build a RegNet of any shape; `block_params` are the arguments of BlockParams or of its `from_init_params`."""
    from torchvision.models.regnet import BlockParams, RegNet

    make = BlockParams.from_init_params if "depth" in block_params else BlockParams
    module: nn.Module = RegNet(make(**block_params), **arguments)
    return module


CONSTRUCTORS: Mapping[str, Callable[..., nn.Module]] = {"torchvision.models.regnet.RegNet": _regnet}
"""Architectures with nested arguments, which only the description in a weights file can name."""

# The auxiliary classifiers of these two are only for training; without `init_weights` there are warnings.
ALWAYS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")

LICENSES = {"https://github.com/facebookresearch/SWAG/blob/main/LICENSE": "cc-by-nc-4.0"}
"""torchvision's licence entry of some weights -> the licence. For all others it says that they may have terms of their own,
which the user must find out: their licence is unknown."""


def classification_models() -> list[str]:
    """Return the names of torchvision's classification models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _build(architecture: str, arguments: Arguments) -> nn.Module:
    if architecture in CONSTRUCTORS:
        return CONSTRUCTORS[architecture](**arguments)
    # Weights that will be replaced, or are on the meta device, need no initialisation.
    needless = "weights" in arguments or torch.empty(0).device.type == "meta"
    unfilled = {"init_weights": False} if needless and architecture in ALWAYS else {}
    given = {**ALWAYS.get(architecture, {}), **unfilled, **arguments}
    module: nn.Module = torchvision.models.get_model(architecture, **given)
    return module


def preprocessing_of(preset: Any) -> Preprocessing:
    """Return the transform of one of torchvision's presets."""
    resize, crop = (
        sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1]) for sizes in (preset.resize_size, preset.crop_size)
    )
    return Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _weights(architecture: str) -> dict[str, Published]:
    if architecture in CONSTRUCTORS:
        return {}
    # `DEFAULT` is an alias that may change between versions.
    members = torchvision.models.get_model_weights(architecture).__members__
    return {name: _published(architecture, member) for name, member in members.items() if name != "DEFAULT"}


def _published(architecture: str, member: Any) -> Published:
    megabytes = float(member.meta.get("_file_size", 0))
    path = Path(torch.hub.get_dir()) / "checkpoints" / str(member.url.rsplit("/", 1)[-1])

    def load(arguments: Arguments) -> nn.Module:
        if not path.exists():
            logger.info("fetching %s to %s", member.url, path.parent)
        try:
            with _tensors_only():
                return _build(architecture, {**arguments, "weights": member, "progress": sys.stderr.isatty()})
        except OSError as error:
            raise BackboneError(
                f"weights {member} cannot be fetched ({error}); fetch {member.url} elsewhere and put it in {path.parent}; "
                f"{NO_DOWNLOAD}"
            ) from None
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:  # torch's errors for an incomplete file
            raise BackboneError(f"{path} is damaged ({first_line(error)}); delete it, to fetch it again") from None

    return Published(
        load,
        preprocessing_of(member.transforms()),
        lambda: None if path.exists() else Fetch(member.url, path.parent, megabytes),
        license=LICENSES.get(member.meta.get("license"), UNKNOWN),
        megabytes=megabytes,
    )


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make torch refuse pickled code in torchvision's files, which torchvision allows by default."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


FAMILY = Family(
    title="torchvision's classification models",
    library="torchvision",
    names=classification_models,
    has=lambda architecture: architecture in CONSTRUCTORS or architecture in classification_models(),
    build=_build,
    weights=_weights,
)
