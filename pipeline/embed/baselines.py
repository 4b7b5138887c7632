"""Embeddings without a network: the baselines thumbnails and HOG, and the user's precomputed vectors. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import OWN, BackboneConfig, unknown
from pipeline.embed.published import NO_WEIGHTS, UNKNOWN
from pipeline.embed.spec import EmbeddingSpec, embedding_name, probe_images
from pipeline.errors import BackboneError, StoreError
from pipeline.images import Preprocessing
from pipeline.io.digests import canonical_json, file_digest
from pipeline.store.share import read_vectors

THUMBNAIL = 16
HOG_SIZE = 64
HOG: Mapping[str, Any] = {
    "orientations": 9,
    "pixels_per_cell": (8, 8),
    "cells_per_block": (2, 2),
    "block_norm": "L2-Hys",
}
"""The settings of Dalal and Triggs, Histograms of Oriented Gradients for Human Detection, CVPR 2005."""


@dataclass(frozen=True)
class Baseline:
    """A fixed function from pixels to vectors with the interface of `Backbone`, on the CPU."""

    specs: tuple[EmbeddingSpec]
    preprocessing: Preprocessing
    recipe: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    device: str = "cpu"

    @property
    def probe(self) -> tuple[NDArray[np.float32]]:
        """The vectors of the built-in probe images: one float32 array of shape (k, dim)."""
        return self.embed(probe_images(self.preprocessing.size))

    def embed(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32]]:
        """Embed n prepared images, uint8 of shape (n, height, width, 3): one float32 array of shape (n, dim)."""
        return (self.recipe(pixels),)


def load(name: str, decode: str = "exact") -> Baseline:
    """Return a baseline by name; BackboneError for an unknown one. `decode` is the extraction's mode, where `standard` acts as `exact`."""
    if name not in _TABLE:
        raise BackboneError(unknown("baseline", name, NAMES))
    size, dim, library, arguments, recipe = _TABLE[name]
    # The whole image is squashed to a square: a centre crop would lose its borders.
    preprocessing = Preprocessing(
        resize=(size, size),
        crop=(size, size),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        decode="exact" if decode == "standard" else decode,
    )
    spec = EmbeddingSpec(
        name=name,
        kind="baseline",
        library=library,
        architecture=name,
        arguments=json.loads(canonical_json(arguments)),
        weights="none",
        weights_digest="",
        layer="",
        pooling="none",
        dim=dim,
        preprocessing=json.loads(canonical_json(preprocessing.identity())),
        precision="fp32",
        engine=library,
        license=NO_WEIGHTS,
    )
    return Baseline((spec,), preprocessing, recipe)


def _pixels(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Flatten thumbnails into vectors of colours in [0, 1]."""
    flat: NDArray[np.float32] = pixels.reshape(len(pixels), -1).astype(np.float32)
    return flat / np.float32(255)


def _hog(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Compute histograms of oriented gradients; each pixel uses the colour channel with the largest gradient."""
    from skimage.feature import hog

    rows = [hog(image, channel_axis=-1, feature_vector=True, **HOG) for image in pixels]
    return np.stack(rows).astype(np.float32)


_HOG_DIM = (HOG_SIZE // 8 - 1) ** 2 * 2 * 2 * 9
_TABLE: Mapping[str, tuple[int, int, str, Mapping[str, Any], Callable[[NDArray[np.uint8]], NDArray[np.float32]]]] = {
    # name: size of the thumbnail, length of the vector, library, arguments, recipe
    "pixels": (THUMBNAIL, 3 * THUMBNAIL**2, "numpy", {}, _pixels),
    "hog": (HOG_SIZE, _HOG_DIM, "scikit-image", HOG, _hog),
}

NAMES = tuple(_TABLE)


def load_vectors(section: BackboneConfig) -> Baseline:
    """Return a section's file of vectors as a `Baseline` that refuses to embed images; BackboneError if it cannot be read."""
    path = Path(section.name)
    try:
        dim, digest = read_vectors(path)[1].shape[1], file_digest(path)
    except StoreError as error:
        raise BackboneError(error.message) from None
    name = embedding_name(path.name)
    spec = EmbeddingSpec(
        name, "backbone", "none", path.name, {}, OWN, digest, "", "none", dim, {}, "fp32", "file", license=UNKNOWN
    )

    def refuse(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise no_network(section.name)

    return Baseline((spec,), Preprocessing(resize=1, crop=1), refuse)


def no_network(name: str) -> BackboneError:
    """Return the error for precomputed vectors where a network is needed."""
    return BackboneError(
        f"{name} holds precomputed vectors of an unknown network, so images cannot be embedded; to predict, give "
        "a .npy or .parquet file of vectors instead of images"
    )
