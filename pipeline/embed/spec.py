"""EmbeddingSpec: the identity of one embedding, as pure data.

A field belongs to the identity if and only if changing it changes the vectors. Batch size, workers, device index and
paths are therefore excluded; the device matters only through the precision resolved for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.io.digests import fingerprint

if TYPE_CHECKING:
    from pipeline.embed.backbone import Backbone
    from pipeline.embed.baselines import Baseline

EMBED_VERSION = 1
"""Increase it when a change to this package's own code changes vectors of the same identity."""


VIEW = "view"


@dataclass(frozen=True)
class EmbeddingSpec:
    """One embedding: a network or baseline, one of its layers, and all that its vectors depend on."""

    name: str
    """Readable and valid as a file name, such as `resnet18-random-penultimate`."""
    kind: str
    """`backbone`, `baseline`, `concat` of several, or `view` of transformed images."""
    library: str
    architecture: str
    arguments: Mapping[str, Any]
    weights: str
    """A readable name; `weights_digest` identifies the numbers."""
    weights_digest: str
    layer: str
    """The node of the network's graph, resolved: never `penultimate`."""
    pooling: str
    """As in a config, with the first averaged token if needed, as in `avg[5:]`; `none` if the layer's output is already one vector."""
    dim: int
    preprocessing: Mapping[str, Any]
    """`Preprocessing.identity()`: the transform and the decoding policy."""
    precision: str
    """`fp32`, `bf16` or `fp16`."""
    engine: str
    """The library that computed the vectors: `torch`, `openvino`, or that of a baseline."""
    untrained: bool = False
    trained_on: str | None = None
    """Digest of the training images' contents, for weights trained by this project; does not affect vectors."""
    code: Mapping[str, str] = field(default_factory=dict)
    """For a user's own network, the digests of its printed form and of its source; otherwise empty."""
    license: str = ""
    """The weights' licence, as in `Published.license`; '' in specs of earlier versions. Does not affect vectors."""

    def identity(self) -> dict[str, Any]:
        """Return all that the vectors depend on, and nothing else."""
        same = ("library", "architecture", "layer", "pooling", "dim", "precision", "engine")
        return {
            "embed_version": EMBED_VERSION,
            **{name: getattr(self, name) for name in same},
            "arguments": dict(self.arguments),
            "weights": self.weights_digest,
            "dtype": "float32",
            "preprocessing": dict(self.preprocessing),
            **({"code": dict(self.code)} if self.code else {}),
        }

    def fingerprint(self) -> str:
        """Return the digest of the identity, which is part of the feature store's name."""
        return fingerprint(self.identity())


def embedding_name(*parts: str) -> str:
    """Return the name of an embedding, valid on any file system, from its parts: network, weights, layer, pooling."""
    return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", part).strip("._") or "x" for part in parts)


EmbeddingModel: TypeAlias = "Backbone | Baseline"
"""An embedder: it computes the vectors of one or more embeddings in one pass."""


def probe_images(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return four fixed images for comparing networks, uint8 of shape (4, height, width, 3): gradient, waves, checkerboard, noise."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    gradient = np.stack([255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1), (x + y) % 256], axis=-1)
    waves = np.stack([x * x // 8 % 256, y * y // 8 % 256, x * y // 8 % 256], axis=-1)
    board = np.stack([((x // 16 + y // 16) % 2) * level for level in (255, 128, 64)], axis=-1)
    number = (y * width + x)[..., None] * 3 + np.arange(3)
    noise = (number * number * 1664525 + 1013904223) % 2**32 >> 24
    return np.stack([gradient, waves, board, noise]).astype(np.uint8)
