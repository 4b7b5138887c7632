"""The table of export formats, and the common input of their writers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.embed.records import Networks
from pipeline.errors import PipelineError
from pipeline.export.bundle import ModelBundle
from pipeline.images import Preprocessing

PreparedImages = Mapping[Preprocessing, NDArray[np.uint8]]
"""n images prepared with each of some transforms, uint8 of shape (n, height, width, 3)."""


@dataclass(frozen=True)
class Model:
    """The model to export: the head of each target by its name, '' for a single one, and their networks."""

    heads: Mapping[str, ModelBundle]
    networks: Networks
    """The networks as in `predict`."""
    exact: Networks
    """The same with torch in float32, for export: bf16 rounds, and OpenVINO sums in another order."""

    def said(self, networks: Networks, prepared: PreparedImages) -> dict[str, tuple[NDArray[Any], Any]]:
        """Return the predictions of each head for n images with the given networks, as `ModelBundle.said` does."""
        made = [embedder.embed(prepared[embedder.preprocessing]) for embedder in networks.embedders]
        return {
            target: head.said(
                *(
                    np.concatenate([made[number][output] for number, output in part], axis=1)
                    for part in networks.places[target]
                )
            )
            for target, head in self.heads.items()
        }


@dataclass(frozen=True)
class Photo:
    """A decoded image for verifying an export: its name, and its pixels, uint8 of shape (height, width, 3), raw and prepared."""

    name: str
    pixels: NDArray[np.uint8]
    prepared: PreparedImages
    """For this image alone."""
    odd: bool = False
    """Whether it is a crop of unusual size."""


@dataclass(frozen=True)
class Export:
    """An export format: the packages that write it, the extra that installs them, and our module with the function `write`."""

    ending: str
    extra: str
    packages: tuple[str, ...]
    module: str

    def require_installed(self) -> None:
        """Check that its packages are installed; PipelineError with what to install."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise PipelineError(f"{self.ending} needs {' and '.join(missing)}; pip install 'manyheads[{self.extra}]'")

    @property
    def write(self) -> Callable[[Model, Iterable[Photo]], tuple[bytes, list[str]]]:
        """(model, photos for verification) -> the file's content, and lines on it; PipelineError if verification fails."""
        return importlib.import_module(self.module).write  # type: ignore[no-any-return]


EXPORTS: Mapping[str, Export] = {
    "onnx": Export(".onnx", "onnx", ("onnx", "onnxruntime", "skl2onnx"), "pipeline.export.onnx")
}
"""Option of `manyheads export` -> format."""
