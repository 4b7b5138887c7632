"""The transform that belongs to weights: torchvision's, a description's, an architecture's usual one, or the config's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.backbone.architectures import CONSTRUCTORS
from pipeline.config import BackboneConfig, PreprocessingConfig
from pipeline.errors import BackboneError
from pipeline.images import Preprocessing
from pipeline.vision import torchvision


def preprocessing_of(member: Any) -> Preprocessing:
    """The transform that comes with torchvision's weights."""
    preset = member.transforms()
    return Preprocessing(
        resize=_side(preset.resize_size),
        crop=_side(preset.crop_size),
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def default_preprocessing(architecture: str) -> Preprocessing:
    """The transform of an architecture's first published weights, for weights that come without one."""
    if architecture in CONSTRUCTORS:
        return Preprocessing(resize=256, crop=224)
    members = list(torchvision.models.get_model_weights(architecture))
    return preprocessing_of(members[0]) if members else Preprocessing(resize=256, crop=224)


def described_preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    """The transform that a weights file of this project describes."""

    def plain(key: str) -> Any:
        return tuple(values[key]) if isinstance(values[key], list) else values[key]

    return Preprocessing(
        resize=plain("resize"),
        crop=plain("crop"),
        interpolation=plain("interpolation"),
        mean=plain("mean"),
        std=plain("std"),
    )


def fitting_preprocessing(config: BackboneConfig, module: nn.Module, default: Preprocessing) -> Preprocessing:
    """The config's transform before the weights' own; a network of one fixed image size gets that size."""
    size = getattr(module, "image_size", None)  # vision transformers
    asked: PreprocessingConfig | None = config.preprocessing
    if asked is not None:
        if size not in (None, asked.crop):
            raise BackboneError(
                f"{config.name} takes images of {size} x {size} pixels only, the config says preprocessing.crop: {asked.crop}"
            )
        return Preprocessing(
            resize=asked.resize, crop=asked.crop, interpolation=asked.interpolation, mean=asked.mean, std=asked.std
        )
    if size is not None and default.size != (size, size):
        return replace(default, resize=size, crop=size)
    return default


def _side(sizes: list[int]) -> int | tuple[int, int]:
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
