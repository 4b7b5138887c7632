"""The transform of a network: what a weights file describes, or the config, before what the family has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.config import BackboneConfig, PreprocessingConfig
from pipeline.errors import BackboneError
from pipeline.images import Preprocessing


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
