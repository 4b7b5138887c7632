"""The family of torchvision's classification models: by name, with the weights that torchvision fetches."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.embed.published import NO_DOWNLOAD, UNKNOWN, Family, Fetch, Published
from pipeline.errors import BackboneError
from pipeline.images import Preprocessing
from pipeline.io.vision import torchvision

logger = logging.getLogger(__name__)


def _regnet(block_params: Mapping[str, Any], **arguments: Any) -> nn.Module:
    """A RegNet of any shape; `block_params` are BlockParams' own, or those of its `from_init_params`."""
    from torchvision.models.regnet import BlockParams, RegNet

    make = BlockParams.from_init_params if "depth" in block_params else BlockParams
    module: nn.Module = RegNet(make(**block_params), **arguments)
    return module


CONSTRUCTORS: Mapping[str, Callable[..., nn.Module]] = {
    "torchvision.models.regnet.RegNet": _regnet,
}
"""Architectures with nested arguments, which only a weights file's own description can name."""

# The auxiliary classifiers of these two serve training only; without `init_weights` they warn.
ALWAYS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
LICENSES = {"https://github.com/facebookresearch/SWAG/blob/main/LICENSE": "cc-by-nc-4.0"}
"""What torchvision says of some weights -> the licence that stands there. Of all others it says that they may have terms of
their own, which are for the user to find out: their licence is unknown."""

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def classification_models() -> list[str]:
    """Return the names of torchvision's classification models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _has(architecture: str) -> bool:
    return architecture in CONSTRUCTORS or architecture in classification_models()


def _build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    if architecture in CONSTRUCTORS:
        return CONSTRUCTORS[architecture](**arguments)
    # Numbers that will be replaced need no distribution of their own, nor where there is no memory for them.
    needless = "weights" in arguments or torch.empty(0).device.type == "meta"
    unfilled = {"init_weights": False} if needless and architecture in ALWAYS else {}
    module: nn.Module = torchvision.models.get_model(
        architecture, **{**ALWAYS.get(architecture, {}), **unfilled, **arguments}
    )
    return module


def preprocessing_of(member: Any) -> Preprocessing:
    """Return the transform that comes with a member of torchvision's weights."""
    return preprocessing_of_preset(member.transforms())


def preprocessing_of_preset(preset: Any) -> Preprocessing:
    """Return the transform that one of torchvision's presets is."""
    return Preprocessing(
        resize=_side(preset.resize_size),
        crop=_side(preset.crop_size),
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _side(sizes: list[int]) -> int | tuple[int, int]:
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def _weights(architecture: str) -> dict[str, Published]:
    if architecture in CONSTRUCTORS:
        return {}
    # `DEFAULT` may name another member in another version.
    members = torchvision.models.get_model_weights(architecture).__members__
    return {name: _published(architecture, member) for name, member in members.items() if name != "DEFAULT"}


def _published(architecture: str, member: Any) -> Published:
    def load(arguments: Mapping[str, Any]) -> nn.Module:
        require_checkpoint(member)
        with tensors_only():
            return _build(architecture, {**arguments, "weights": member})

    def to_fetch() -> Fetch | None:
        path = checkpoint(member)
        return None if path.exists() else Fetch(member.url, path.parent, float(member.meta.get("_file_size", 0)))

    return Published(
        load,
        preprocessing_of(member),
        to_fetch,
        license=LICENSES.get(member.meta.get("license"), UNKNOWN),
        megabytes=float(member.meta.get("_file_size", 0)),
        dim=lambda: _dim(architecture),
    )


@cache
def _dim(architecture: str) -> int:
    """What goes into the last layer, which scores the classes; found on torch's meta device but for some regnets."""
    try:
        with torch.device("meta"):
            module = _build(architecture, {})
    except RuntimeError:  # they compute their widths with tensors
        module = _build(architecture, {})
    *_, last = (part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))
    return last.in_features if isinstance(last, nn.Linear) else last.in_channels


def checkpoint(member: Any) -> Path:
    """Return where torchvision keeps the file of its weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / str(member.url.rsplit("/", 1)[-1])


def require_checkpoint(member: Any) -> None:
    """Have torchvision's file in its folder, fetched if need be, with the hash in its name."""
    path = checkpoint(member)
    folder = path.parent
    found = re.search(r"-([a-f0-9]{8,})\.", path.name)
    prefix = found.group(1) if found else ""
    if not path.exists():
        logger.info("fetching %s to %s", member.url, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(member.url, str(path), prefix or None, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise BackboneError(
                f"weights {member} cannot be fetched ({error}); fetch {member.url} elsewhere and put it in {folder}; "
                f"{NO_DOWNLOAD}"
            ) from None
    if prefix:
        with path.open("rb") as file:
            digest = _sha256(file)
        if not digest.startswith(prefix):
            raise BackboneError(
                f"{path} is damaged: its SHA-256 starts with {digest[: len(prefix)]}, its name says {prefix}; delete it and run again"
            )


def _sha256(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def tensors_only() -> Iterator[None]:
    """Make torch refuse pickled code in torchvision's files too; it asks for the opposite by default."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


FAMILY = Family(
    title="torchvision's classification models",
    library="torchvision",
    names=classification_models,
    has=_has,
    build=_build,
    weights=_weights,
)
