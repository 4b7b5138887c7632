"""Files for other programs that an experiment's heads can be made into, one row each, and what every row is given."""

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
"""n images as each of some networks takes them, uint8 of shape (n, height, width, 3)."""


@dataclass(frozen=True)
class Model:
    """What is exported: the head of each target by its name, '' for one alone, and the networks before them."""

    heads: Mapping[str, ModelBundle]
    networks: Networks
    """As `predict` runs them."""
    exact: Networks
    """The same by torch in float32, which a file is made of; bf16 rounds, and OpenVINO adds up in another order."""

    def said(self, networks: Networks, prepared: PreparedImages) -> dict[str, tuple[NDArray[Any], Any]]:
        """Return what each head says of n images by some networks, as `ModelBundle.said` does."""
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
    """A decoded image that an export is proven on: its name, and its pixels, uint8 of shape (height, width, 3), raw and prepared."""

    name: str
    pixels: NDArray[np.uint8]
    prepared: PreparedImages
    """Of one image each."""
    odd: bool = False
    """Whether it is a cutting of an unusual size."""


@dataclass(frozen=True)
class Export:
    """A kind of file: the packages that write it, the extra that installs them, and the function `write` of a module of ours."""

    ending: str
    extra: str
    packages: tuple[str, ...]
    module: str

    def require_installed(self) -> None:
        """See that its packages are here; PipelineError with what to install."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise PipelineError(f"{self.ending} needs {' and '.join(missing)}; pip install 'manyheads[{self.extra}]'")

    @property
    def write(self) -> Callable[[Model, Iterable[Photo]], tuple[bytes, list[str]]]:
        """(model, photos to prove it on) -> the file's content, and lines on it; PipelineError where it is not proven."""
        return importlib.import_module(self.module).write  # type: ignore[no-any-return]


EXPORTS: Mapping[str, Export] = {
    "onnx": Export(".onnx", "onnx", ("onnx", "onnxruntime", "skl2onnx"), "pipeline.export.onnx")
}
"""By the option of `manyheads export` that names the file."""
