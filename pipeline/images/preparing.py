"""From an image's pixels to the input of a network, by the transform of its weights, and to a perceptual hash.

The hash is robust to resizing, compression, brightness and small crops. It covers the image and sixteen crops of it, one of which
resembles any small crop. Each of these views has 143 bits: the signs of a thumbnail's lowest frequencies except the mean (the DCT
hash of Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final
from zlib import crc32

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from pipeline.images.decoding import DECODE_POLICY

DECODE_MODES: Final[Mapping[str, str]] = {
    "exact": "resized by Pillow: the pixels of torchvision's transforms on a PIL image, bit for bit",
    "standard": "resized by torch: a value is at most one grey level away from that",
    "fast": "and a JPEG more than twice as large as needed is decoded at a fraction of its size",
}

_INTERPOLATIONS = {
    name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
}
FITS: Final[Mapping[str, str]] = {
    "crop": "the shorter side gets the length of resize, and the centre is cut out",
    "squash": "both sides get it, whatever that does to the proportions",
    "border": "the longer side gets it, and the rest is filled with the mean colour",
}
"""The ways to make a square of another image."""

MAX_RESIZED_PIXELS = 1 << 24
"""Above this number of pixels (50 MB of RGB), only the cropped part of a resized image is computed."""

_TORCH_MODES = frozenset({"bilinear", "bicubic"})
"""Filters for which torch smooths like Pillow; for others Pillow is used in every mode."""


@dataclass(frozen=True)
class Preprocessing:
    """The transform of a network's weights: resize, centre crop, scale to [0, 1], normalise.

    `resize` is the length of the shorter side, or (height, width); `crop` is a side or (height, width); `interpolation` is a
    Pillow filter in lower case. `mean` and `std` are those of the RGB channels in [0, 1]. `decode` is a key of `DECODE_MODES`.
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int]
    interpolation: str = "bilinear"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    decode: str = "exact"
    fit: str = "crop"
    """A key of `FITS`; the last two are timm's crop modes of the same names."""
    view: str = ""
    """The view for `viewed`, computed first, with its random seed, as in `crop 0`."""

    def __post_init__(self) -> None:
        for key, words in {"fit": FITS, "interpolation": _INTERPOLATIONS, "decode": DECODE_MODES}.items():
            if (word := getattr(self, key)) not in words:
                raise ValueError(f"unknown {key} {word!r}; there are {', '.join(words)}")
        if not self.antialias:
            raise ValueError("antialias=False is not supported: Pillow always smooths when it makes an image smaller")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prepared image."""
        return _pair(self.crop)

    @property
    def at_least(self) -> int | None:
        """Minimal length of the shorter side of a decoded JPEG; None to decode it at full size."""
        return 2 * max(_pair(self.resize)) if self.decode == "fast" else None

    def identity(self) -> dict[str, Any]:
        """Return the parts of decoding and preprocessing that affect the vectors."""
        values = {**asdict(self), "decode": {**DECODE_POLICY, "mode": self.decode}}
        if self.fit == "crop":
            del values["fit"]  # as in identities before there was a choice
        if not self.view:
            del values["view"]
        return values


def viewed(pixels: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    """Return a view of an image, uint8 of shape (height, width, 3); randomness depends only on the pixels and the seed.

    `flip` swaps left and right; `crop` cuts out half of the area or more, with an aspect ratio changed by up to a third, as
    in `finetune.augment: crop`; `colour` changes brightness, contrast and saturation by up to three tenths each.
    """
    name, _, seed = view.partition(" ")
    rng = np.random.default_rng([crc32(pixels.tobytes()), int(seed or 0)])
    image = Image.fromarray(pixels)
    if name == "flip":
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    if name == "colour":
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(rng.uniform(0.7, 1.3))
        return np.asarray(image)
    share, stretch = rng.uniform(0.5, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
    sides = np.minimum(np.round(np.sqrt(share) * np.array(image.size) * [stretch, 1 / stretch]), image.size).clip(1)
    left, top = (rng.integers(0, whole - side + 1) for whole, side in zip(image.size, sides.astype(int), strict=True))
    return np.asarray(image.crop((left, top, left + int(sides[0]), top + int(sides[1]))))


def prepare(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and centre-crop a decoded image; input and output are uint8 of shape (height, width, 3).

    In mode `exact` the pixels are bit-identical to torchvision's transforms (Resize, CenterCrop) on a PIL image, before
    scaling and normalisation; in the other modes a resized value may be one grey level off. A side shorter than the crop is
    padded with black, as in torchvision, or for `fit: border` with the mean colour, as in timm. The pixels may differ slightly
    only for extremely long images, whose resized form would exceed `MAX_RESIZED_PIXELS`.
    """
    pixels = viewed(pixels, preprocessing.view) if preprocessing.view else pixels
    height, width = pixels.shape[:2]
    wide, high = _resized((width, height), preprocessing)
    name = preprocessing.interpolation
    if wide * high > MAX_RESIZED_PIXELS:
        pixels = _resize_the_kept(pixels, high, wide, preprocessing)
    elif (height, width) != (high, wide) and preprocessing.decode != "exact" and name in _TORCH_MODES:
        pixels = _resize_by_torch(pixels, high, wide, name)
    elif (height, width) != (high, wide):
        pixels = np.asarray(Image.fromarray(pixels).resize((wide, high), _INTERPOLATIONS[name]))
    fill = [round(255 * value) for value in preprocessing.mean] if preprocessing.fit == "border" else [0, 0, 0]
    return _crop(pixels, preprocessing.size, fill)


def _resize_the_kept(
    pixels: NDArray[np.uint8], height: int, width: int, preprocessing: Preprocessing
) -> NDArray[np.uint8]:
    """Resize only the part of the image that the crop keeps: a strip of 1 x 60,000 pixels would become 256 x 15,360,000."""
    rows, columns = map(_kept, (height, width), preprocessing.size)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    size = columns.stop - columns.start, rows.stop - rows.start
    return np.asarray(Image.fromarray(pixels).resize(size, _INTERPOLATIONS[preprocessing.interpolation], box=box))


def _resize_by_torch(pixels: NDArray[np.uint8], height: int, width: int, interpolation: str) -> NDArray[np.uint8]:
    """Resize with smoothing like Pillow, in half the time: torch's weights have 16 bits, Pillow's 32."""
    import torch  # needed only by runs with a network

    if not pixels.flags.writeable:  # avoids torch's warning about read-only memory
        pixels = pixels.copy()
    channels_last = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        channels_last, (height, width), mode=interpolation, antialias=True, align_corners=False
    )
    made: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return made


def _crop(pixels: NDArray[np.uint8], size: tuple[int, int], fill: Sequence[int]) -> NDArray[np.uint8]:
    """Cut out the centre; a shorter side is padded with the colour `fill`."""
    rows, columns = map(_kept, pixels.shape, size)
    kept = pixels[rows, columns]
    if kept.shape[:2] == size:
        return np.array(kept)
    padded = np.full((*size, 3), fill, np.uint8)
    top, left = ((crop - side) // 2 for crop, side in zip(size, kept.shape, strict=False))
    padded[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
    return padded


def _kept(length: int, crop: int) -> slice:
    """Return the part of a side that the crop keeps; torchvision also uses Python's round, half to even."""
    start = max(round((length - crop) / 2.0), 0)
    return slice(start, start + min(length, crop))


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Return width and height after the resize; the longer side is rounded down, as in torchvision; for `border` as in timm."""
    width, height = size
    resize, fit = preprocessing.resize, preprocessing.fit
    if not isinstance(resize, int) or fit == "squash":
        high, wide = _pair(resize)
        return wide, high
    if fit == "border":
        ratio = max(width / resize, height / resize)
        return max(round(width / ratio), 1), max(round(height / ratio), 1)
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


SIZE = 32
"""Side of the thumbnail."""
FREQUENCIES = 12
"""Number of lowest frequencies kept along each side."""
SAMPLED = (192, 384)
"""Approximate number of rows and columns sampled from a large image: they suffice for its low frequencies, and a photo's hash
takes 0.3 ms."""
CUT = 0.05
"""Share of a side that the hashed crops omit."""
LEAST = 10.0
"""Frequencies below this, 0.0024 grey levels on average, give the bit 0: a flat image's hash is all 0."""

HASH_BITS = FREQUENCIES**2 - 1
HASH_IDENTITY: Final[dict[str, Any]] = {
    "hash": "signs of a thumbnail's DCT, of the image and of sixteen crops",
    "version": 1,
    "thumbnail": SIZE,
    "frequencies": FREQUENCIES,
    "cut": CUT,
}
"""All that affects a hash; increase `version` when this file changes it in another way."""
HASH_STORE: Final = f"hashes-{HASH_IDENTITY['version']}.store"
"""Name of the store of the images' hashes, in the folder of a data set's index."""


def _views() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the matrices from a thumbnail's columns and rows to the frequencies of each view: (views, FREQUENCIES, SIZE) each."""
    whole = (0.0, 1.0)
    aside = [(0.0, 1 - CUT), (CUT / 2, 1 - CUT / 2), (CUT, 1.0)]
    sides = [(y, x) for y in (whole, *aside) for x in (whole, *aside)] + [((CUT, 1 - CUT),) * 2]
    waves = scipy.fft.dct(np.eye(SIZE), axis=0)[:FREQUENCIES]
    ways = {side: (waves @ _resampled(*side)).astype(np.float32) for side in dict.fromkeys(sum(sides, ()))}
    return np.stack([ways[y] for y, _ in sides]), np.stack([ways[x] for _, x in sides])


def _resampled(start: float, stop: float) -> NDArray[np.float64]:
    """Return the matrix that stretches a part of a side to its full length, by averaging: (SIZE, SIZE)."""
    edges = np.linspace(start, stop, SIZE + 1) * SIZE
    low, high = edges[:-1, None], edges[1:, None]
    cells = np.arange(SIZE)
    shared: NDArray[np.float64] = np.clip(np.minimum(high, cells + 1) - np.maximum(low, cells), 0, None)
    return shared / (high - low)


_DOWN, _ACROSS = _views()
HASH_VIEWS = len(_DOWN)
HASH_BYTES = HASH_VIEWS * -(-HASH_BITS // 8)


def perceptual_hash(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the hash of an image of shape (height, width, 3), uint8: shape (HASH_BYTES,), uint8, the bytes of all views.

    The hash of an image with a side below SIZE is all 0, as different images look alike at this size.
    """
    if min(pixels.shape[:2]) < SIZE:
        return np.zeros(HASH_BYTES, dtype=np.uint8)
    down, across = (max(1, side // most) for side, most in zip(pixels.shape, SAMPLED, strict=False))
    sampled = np.ascontiguousarray(pixels[::down, ::across])
    grey = Image.fromarray(sampled).convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
    waves = (_DOWN @ np.asarray(grey, np.float32) @ _ACROSS.transpose(0, 2, 1)).reshape(HASH_VIEWS, -1)
    return np.packbits(waves[:, 1:] > LEAST, axis=1).ravel()


def hash_distances(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the share of differing bits of image pairs, compared as a whole or as a crop of the other: shape (n,), 0 to 1.

    first, second : hashes of n images each, shape (n, HASH_BYTES), uint8. The distance of a hash that is all 0, as of a flat
    or tiny image, is 1, as it has no information.
    """
    a, b = (hashes.reshape(len(hashes), HASH_VIEWS, HASH_BYTES // HASH_VIEWS) for hashes in (first, second))
    differing = [np.bitwise_count(one[:, :1] ^ other).sum(axis=2).min(axis=1) for one, other in ((a, b), (b, a))]
    informative = first.any(axis=1) & second.any(axis=1)
    return np.where(informative, np.minimum(*differing) / HASH_BITS, 1.0)
