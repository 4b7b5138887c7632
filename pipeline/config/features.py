"""The sections of stage one: where the images are, and how they become vectors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.section import Scalar, Section, device_of, not_empty

WEIGHTS_FILES = (".safetensors", ".pth", ".pt")
"""Endings of weights files."""

NETWORK_DEVICES = ("auto", "cpu", "mps", "cuda")
"""Where a network may compute."""


class DatasetConfig(Section):
    """Where the images are and how they are split."""

    source: Literal["digits", "folder", "manifest", "torchvision"] = "digits"
    path: str | None = None
    """A folder of class folders, a manifest file, or the folder a torchvision data set is downloaded to."""
    name: str | None = None
    """The torchvision data set's class name, such as `CIFAR10`."""
    test_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the images set aside for the test when the data come without a test split."""
    leaks: Literal["drop_train", "drop_test", "keep", "error"] = "drop_train"
    """What to do with the same content in train and test."""
    max_failures: float = Field(0.1, ge=0)
    """Images that may fail before the run stops: a share when below 1, a number from 1 up."""
    max_pixels: int = Field(64_000_000, ge=1)
    """Larger images are refused before they are decoded."""
    follow_symlinks: bool = False
    target: Literal["auto", "classification"] = "auto"
    """`auto` stops where labels look like a number to predict, or like a name for every image."""

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> DatasetConfig:
        needs = {"digits": (), "folder": ("path",), "manifest": ("path",), "torchvision": ("path", "name")}[self.source]
        missing = [key for key in needs if getattr(self, key) is None]
        if missing:
            raise ValueError(f"source '{self.source}' also needs {' and '.join(repr(key) for key in missing)}")
        return self


class PreprocessingConfig(Section):
    """An explicit override of the preprocessing that belongs to the weights; recorded in the store's identity."""

    resize: int = Field(256, ge=1)
    crop: int = Field(224, ge=1)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(float(v) if type(v) is int else v for v in value) if isinstance(value, list) else value


class BackboneConfig(Section):
    """One frozen network and the layers whose output is kept."""

    name: str
    """A network, such as `efficientnet_lite0` or torchvision's `resnet50`."""
    weights: str = "random"
    """`imagenet`, torchvision's exact name (`IMAGENET1K_V2`), `bundled`, `random`, or a `.safetensors` / `.pth` file."""
    layers: tuple[str, ...] = ("penultimate",)
    """`penultimate` is the input of the last linear layer; any node listed by `manyheads layers` will do."""
    pooling: Literal["avg", "max", "grid", "flatten", "cls"] = "avg"
    """How a layer with a spatial or token axis becomes one vector."""
    arguments: dict[str, Scalar] = Field(default_factory=dict)
    """The architecture's own constructor arguments, such as `width_mult`."""
    preprocessing: PreprocessingConfig | None = None

    @field_validator("layers", mode="before")
    @classmethod
    def _yaml_has_lists(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("layers")
    @classmethod
    def _at_least_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return not_empty(value)

    @field_validator("weights")
    @classmethod
    def _weights_are_exact(cls, value: str) -> str:
        if value == "DEFAULT":
            raise ValueError(
                "'DEFAULT' may change between torchvision versions; give the exact name, such as 'IMAGENET1K_V2'"
            )
        return value


class ExtractionConfig(Section):
    """How images become vectors: nothing here but `precision`, `engine` and `decode` changes the vectors."""

    device: Annotated[str, device_of(*NETWORK_DEVICES)] = "auto"
    batch_size: Literal["auto"] | int = "auto"
    workers: Literal["auto"] | int = "auto"
    """Threads that read and decode."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: Literal["auto", "torch", "openvino"] = "auto"
    """What computes; `auto` takes OpenVINO where it is installed and the job is long enough to gain from it."""
    decode: Literal["standard", "exact", "fast"] = "standard"
    """`exact` gives the pixels of torchvision's transforms on a PIL image bit for bit, `standard` is within one grey level of
    them, `fast` also decodes a JPEG more than twice as large as needed at a fraction of its size."""

    @field_validator("batch_size", "workers")
    @classmethod
    def _positive(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError("should be 'auto' or a whole number from 1 up")
        return value
