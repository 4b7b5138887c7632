"""A trained network as one safetensors file that `backbone` loads by itself: tensors, and in the header how to build it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pipeline.data.lineage import Lineage
from pipeline.embed.weights_files import DIGEST_KEY, METADATA_KEY, weights_digest
from pipeline.experiment import MADE_BY, made_by
from pipeline.io.files import make_folder, write_atomic

FORMAT = "manyheads weights"
VERSION = 1


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

    `preprocessing` holds resize, crop, interpolation, mean and std; `lineage` is told where features of the same images may be
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
    half: bool = False,
) -> None:
    """Write a weights file in one move; `half` stores numbers with 11 bits of precision in half the space."""
    tensors = {
        name: (tensor.to(torch.float16) if half and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in weights.items()
    }
    described = json.dumps({**description, MADE_BY: made_by()}, ensure_ascii=False)
    header = {METADATA_KEY: described, **({} if lineage is None else lineage.header())}
    make_folder(path.parent)
    write_atomic(path, save(tensors, {**header, DIGEST_KEY: weights_digest(tensors, header)}))
