"""A perceptual hash that survives resizing, compression, brightness and small crops.

An image is hashed as it is and as sixteen crops of it; a crop of it is then like one of those. Each of these views is 143 signs:
of a thumbnail's lowest frequencies but the mean (the DCT hash of Zauner, Implementation and Benchmarking of Perceptual Image
Hash Functions, 2010).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from PIL import Image

SIZE = 32
"""Side of the thumbnail."""
FREQUENCIES = 12
"""Lowest frequencies kept along each side."""
SAMPLED = (192, 384)
"""Of a large image only about so many rows and columns are looked at: its low frequencies are in them, and a hash of a photo
costs 0.3 ms."""
CUT = 0.05
"""Share of a side that a crop may lack."""
LEAST = 10.0
"""A frequency below this, 0.0024 grey levels on average, has no sign: a flat image's hash is 0 throughout."""

HASH_BITS = FREQUENCIES**2 - 1
HASH_IDENTITY: Final[dict[str, Any]] = {
    "hash": "signs of a thumbnail's DCT, of the image and of sixteen crops",
    "version": 1,
    "thumbnail": SIZE,
    "frequencies": FREQUENCIES,
    "cut": CUT,
}
"""All that changes a hash; `version` goes up by hand when this file changes one otherwise."""
HASH_STORE: Final = f"hashes-{HASH_IDENTITY['version']}.store"
"""Name of the store, in the folder of a data set's index, that holds its images' hashes."""


def _views() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what turns a thumbnail's columns and rows into frequencies of each view: (views, FREQUENCIES, SIZE) each."""
    whole = (0.0, 1.0)
    aside = [(0.0, 1 - CUT), (CUT / 2, 1 - CUT / 2), (CUT, 1.0)]
    sides = [(y, x) for y in (whole, *aside) for x in (whole, *aside)] + [((CUT, 1 - CUT),) * 2]
    waves = scipy.fft.dct(np.eye(SIZE), axis=0)[:FREQUENCIES]
    ways = {side: (waves @ _resampled(*side)).astype(np.float32) for side in dict.fromkeys(sum(sides, ()))}
    return np.stack([ways[y] for y, _ in sides]), np.stack([ways[x] for _, x in sides])


def _resampled(start: float, stop: float) -> NDArray[np.float64]:
    """Return the matrix that spreads a part of a side over all of it, by means: (SIZE, SIZE)."""
    edges = np.linspace(start, stop, SIZE + 1) * SIZE
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(SIZE)
    shared: NDArray[np.float64] = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, None)
    return shared / (high - low)


_DOWN, _ACROSS = _views()
HASH_VIEWS = len(_DOWN)
HASH_BYTES = HASH_VIEWS * -(-HASH_BITS // 8)


def perceptual_hash(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Hash an image of shape (height, width, 3), uint8: bytes of shape (HASH_BYTES,), uint8, one view after the other.

    An image with a side below SIZE gets 0 throughout: in so few pixels different things look alike.
    """
    if min(pixels.shape[:2]) < SIZE:
        return np.zeros(HASH_BYTES, dtype=np.uint8)
    down, across = (max(1, side // most) for side, most in zip(pixels.shape, SAMPLED, strict=False))
    sampled = np.ascontiguousarray(pixels[::down, ::across])
    grey = Image.fromarray(sampled).convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
    waves = (_DOWN @ np.asarray(grey, np.float32) @ _ACROSS.transpose(0, 2, 1)).reshape(HASH_VIEWS, -1)
    return np.packbits(waves[:, 1:] > LEAST, axis=1).ravel()


def hash_distances(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the share of bits in which images differ, as a whole or as a crop of the other: shape (n,), 0 to 1.

    first, second : hashes of n images each, shape (n, HASH_BYTES), uint8. A hash of 0, as of a flat or a tiny image,
    tells nothing: its distance is 1.
    """
    a, b = (hashes.reshape(len(hashes), HASH_VIEWS, HASH_BYTES // HASH_VIEWS) for hashes in (first, second))
    differing = [np.bitwise_count(one[:, :1] ^ other).sum(axis=2).min(axis=1) for one, other in ((a, b), (b, a))]
    told = first.any(axis=1) & second.any(axis=1)
    return np.where(told, np.minimum(*differing) / HASH_BITS, 1.0)
