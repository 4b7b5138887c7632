"""Weights: copies of a network's state, and the safetensors file that `backbone` loads by itself, with how to build the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from pipeline.data.lineage import Lineage
from pipeline.embed.weights_files import DIGEST_KEY, METADATA_KEY, weights_digest
from pipeline.experiment import MADE_BY, made_by
from pipeline.io.files import make_folder, write_atomic

FORMAT = "manyheads weights"
VERSION = 1

Weights = dict[str, Tensor]
"""A network's state by name, detached copies on the CPU."""

Score = tuple[float, float]
"""Accuracy and minus the mean log-loss: the second decides between equal accuracies."""


def copy_weights(network: nn.Module) -> Weights:
    """Return a copy of a network's whole state, buffers included; shapes and dtypes are the network's."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in network.state_dict().items()}


def describe(
    *,
    name: str,
    architecture: str,
    arguments: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    classes: tuple[str, ...],
    lineage: Lineage | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Return the description that goes into the header: what `backbone` needs, and where the weights come from.

    `preprocessing` has the keys of that section of a config; `lineage` is told where features of the same images may be
    cross-validated.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "architecture": architecture,
        "arguments": {**arguments, "num_classes": len(classes)},
        "preprocessing": dict(preprocessing),
        "classes": list(classes),
        "trained_on": None if lineage is None else lineage.digest,
        **more,
    }


def write_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    description: Mapping[str, Any],
    lineage: Lineage | None = None,
) -> None:
    """Write a weights file in one move; shapes and dtypes stay as they are."""
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    described = json.dumps({**description, MADE_BY: made_by()}, ensure_ascii=False)
    header = {METADATA_KEY: described, **({} if lineage is None else lineage.header())}
    make_folder(path.parent)
    write_atomic(path, save(tensors, {**header, DIGEST_KEY: weights_digest(tensors, header)}))
