"""Vectors of the user's own: a `.npy` or `.parquet` file in place of a network's name, whose vectors were made elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import OWN, BackboneConfig
from pipeline.embed.licenses import UNKNOWN
from pipeline.embed.spec import EmbeddingSpec, embedding_name
from pipeline.errors import BackboneError, StoreError
from pipeline.images import Preprocessing
from pipeline.io.digests import file_digest
from pipeline.store.share import read_vectors


@dataclass(frozen=True)
class OwnVectors:
    """A file of vectors, where an `Embedder` is expected; no image can be embedded by it."""

    path: Path
    specs: tuple[EmbeddingSpec, ...]
    device: str = "cpu"
    probe: tuple[NDArray[np.float32], ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """There is none."""
        raise no_network(str(self.path))

    def embed(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
        """Refuse: pixels are uint8 of shape (n, height, width, 3)."""
        raise no_network(str(self.path))


def load(section: BackboneConfig) -> OwnVectors:
    """Return what a section's file holds; BackboneError where it cannot be read."""
    path = Path(section.name)
    try:
        dim, digest = read_vectors(path)[1].shape[1], file_digest(path)
    except StoreError as error:
        raise BackboneError(error.message) from None
    name = embedding_name(path.name)
    spec = EmbeddingSpec(
        name, "backbone", "none", path.name, {}, OWN, digest, "", "none", dim, {}, "fp32", "file", license=UNKNOWN
    )
    return OwnVectors(path, (spec,))


def no_network(name: str) -> BackboneError:
    """Return the error for who asks for a network."""
    return BackboneError(
        f"{name} holds vectors that were made elsewhere, and no network is known that makes such of an image; to predict, give "
        "a .npy or .parquet file of vectors in place of images"
    )
