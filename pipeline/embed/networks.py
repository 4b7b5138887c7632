"""Backbone: a frozen torchvision network, its weights and some of its layers, from pixels to vectors.

    precision.py      which device and number format a run uses
    engines.py        torch or OpenVINO: which one, and how the latter is made
    families.py       the table of families of networks: torchvision_models.py, efficientnet_lite.py
    weights_files.py  files of weights -> tensors, and nothing else
    preprocessing.py  the transform that belongs to weights
    weights.py        enum member, local file, bundled or random weights -> a network in eval mode
    graph.py          the network's graph: nodes, shapes, the default layer, pooling
    network.py        Backbone: uint8 pixels -> float32 vectors

Nothing here imports torch before a network is asked for: a run with nothing to do never pays for that import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import WEIGHTS_FILES, BackboneConfig, ExtractionConfig
from pipeline.embed.engines import choose_batch_size, openvino_is_there
from pipeline.embed.precision import choice_inputs, choose_precision
from pipeline.embed.spec import EmbeddingSpec

if TYPE_CHECKING:
    from pipeline.embed.backbone import Backbone

BUNDLED = Path(__file__).resolve().parent / "bundled" / "bundled.safetensors"
"""The weights that come with the package; beside them a `.json` of the same name describes them."""

__all__ = [
    "BUNDLED",
    "EmbeddingSpec",
    "check",
    "choice_inputs",
    "choose_batch_size",
    "choose_precision",
    "engine_at_hand",
    "layers",
    "load",
    "openvino_is_there",
    "require_arithmetic",
    "to_fetch",
]


def check(config: BackboneConfig) -> None:
    """Say without loading or downloading anything whether a section names a model and weights that exist.

    Raises
    ------
    BackboneError
        When it does not.
    """
    from pipeline.embed import weights

    weights.check(config)


def to_fetch(config: BackboneConfig) -> tuple[str, Path, float] | None:
    """Return where a section's weights will be fetched from, to which folder, and how many MB; None where they are here."""
    from pipeline.embed import weights

    return weights.to_fetch(config)


def load(config: BackboneConfig, extraction: ExtractionConfig, seed: int, images: int = 0) -> Backbone:
    """Build a backbone as the config asks, on its device and in its precision, ready to embed.

    `seed` makes the weights of an untrained control (`weights: random`). `images` is how many the data set has: what
    `engine: auto` goes by.

    Raises
    ------
    BackboneError
        When the model, its weights, a layer, the pooling, the device or the precision is not to be had.
    """
    from pipeline.embed import backbone as network

    return network.load(config, extraction, seed, images)


def require_arithmetic(extraction: ExtractionConfig) -> str:
    """Return the device a run would compute on, having seen that it, the precision and the engine are to be had.

    Raises
    ------
    BackboneError
    """
    from pipeline.embed.engines import choose_engine
    from pipeline.embed.precision import resolve_device, resolve_precision

    device = resolve_device(extraction.device)
    _, precision, _ = resolve_precision(extraction.precision, device)
    there = openvino_is_there()
    choose_engine(extraction.engine, device.type, precision, images=0, layer_norms=False, there=there)
    return str(device)


def engine_at_hand(engine: str, device: str) -> str:
    """Return the engine where it can compute on the device, else `torch`, which always can."""
    from pipeline.embed.precision import resolve_device

    return engine if openvino_is_there() and resolve_device(device).type == "cpu" else "torch"


def layers(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """List the nodes of a model that give vectors, each with the shape of its output for one image.

    `name` is that of a torchvision model or of the bundled one, or a weights file that says what it holds.

    Raises
    ------
    BackboneError
        When there is no such model.
    """
    from pipeline.embed import backbone as network
    from pipeline.embed import weights
    from pipeline.embed.families import FAMILIES

    if name.endswith(WEIGHTS_FILES):
        return network.layers(BackboneConfig(name=Path(name).stem, weights=name))
    known = any(name in family.names() for family in FAMILIES)
    bundled = not known and name == weights.bundled()["name"]
    return network.layers(BackboneConfig(name=name, weights="bundled" if bundled else "random"))
