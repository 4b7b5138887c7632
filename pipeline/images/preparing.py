"""What is made of an image's pixels: the input of a network, by the transform of its weights, and a perceptual hash.

The hash survives resizing, compression, brightness and small crops. An image is hashed as it is and as sixteen crops of it; a crop
of it is then like one of those. Each of these views is 143 signs: of a thumbnail's lowest frequencies but the mean (the DCT hash of
Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010).
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
"""How an image that is no square becomes one."""

MAX_RESIZED_PIXELS = 1 << 24
"""Above this, a resized image is not made in full before it is cropped; 50 MB of RGB."""

_TORCH_MODES = frozenset({"bilinear", "bicubic"})
"""Filters that torch smooths with as Pillow does; the others are left to Pillow in every mode."""


@dataclass(frozen=True)
class Preprocessing:
    """The transform that belongs to a network's weights: resize, centre crop, scale to [0, 1], normalise.

    `resize` is the length of the shorter side, or (height, width); `crop` is a side or (height, width); `interpolation` is a
    Pillow filter in lower case. `mean` and `std` are of the RGB channels in [0, 1]. `decode` says how the pixels are made, see `DECODE_MODES`.
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int]
    interpolation: str = "bilinear"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    decode: str = "exact"
    fit: str = "crop"
    """A word of `FITS`; the last two are timm's crop modes of these names."""
    view: str = ""
    """How the decoded image is changed first, see `viewed`, with the seed of what is drawn: `crop 0`."""

    def __post_init__(self) -> None:
        for key, words in {"fit": FITS, "interpolation": _INTERPOLATIONS, "decode": DECODE_MODES}.items():
            if (word := getattr(self, key)) not in words:
                raise ValueError(f"unknown {key} {word!r}; there are {', '.join(words)}")
        if not self.antialias:
            raise ValueError("antialias=False is not to be had: Pillow always smooths when it makes an image smaller")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prepared image."""
        return _pair(self.crop)

    @property
    def at_least(self) -> int | None:
        """Pixels the shorter side of a decoded JPEG has to have; None where it is to be decoded in full."""
        return 2 * max(_pair(self.resize)) if self.decode == "fast" else None

    def identity(self) -> dict[str, Any]:
        """Return what of decoding and preprocessing changes the vectors."""
        values = {**asdict(self), "decode": {**DECODE_POLICY, "mode": self.decode}}
        if self.fit == "crop":
            del values["fit"]  # as in identities of before there were others
        if not self.view:
            del values["view"]
        return values


def viewed(pixels: NDArray[np.uint8], view: str) -> NDArray[np.uint8]:
    """Return a view of an image, uint8 of shape (height, width, 3); what is drawn depends on the pixels and the seed alone.

    `flip` turns left and right round; `crop` cuts out half of the area or more, in proportions that differ by up to a third, as
    `finetune.augment: crop` does; `colour` changes brightness, contrast and saturation by up to three tenths each.
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
    """Resize and centre-crop a decoded image: ndarray of shape (height, width, 3), uint8, as is what comes out.

    In mode `exact` the pixels are bit for bit those of torchvision's transforms (Resize, CenterCrop) on a PIL image, before
    they are scaled and normalised; in the other modes a resized value may be one grey level away. A side shorter than the
    crop is padded with black, as there, with `fit: border` with the mean colour, as timm does. Only for extremely long images,
    whose resized form would pass `MAX_RESIZED_PIXELS`, the pixels may differ a little.
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
    """Make only the part of the resized image that the crop keeps: a strip of 1 x 60,000 pixels would become 256 x 15,360,000."""
    rows, columns = map(_kept, (height, width), preprocessing.size)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    box = (columns.start * across, rows.start * down, columns.stop * across, rows.stop * down)
    size = columns.stop - columns.start, rows.stop - rows.start
    return np.asarray(Image.fromarray(pixels).resize(size, _INTERPOLATIONS[preprocessing.interpolation], box=box))


def _resize_by_torch(pixels: NDArray[np.uint8], height: int, width: int, interpolation: str) -> NDArray[np.uint8]:
    """Resize with smoothing as Pillow does, in half the time: its weights have 16 bits where Pillow's have 32."""
    import torch  # only who runs a network gets here

    if not pixels.flags.writeable:  # torch warns of memory that it might write to; this is not written to
        pixels = pixels.copy()
    channels_last = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        channels_last, (height, width), mode=interpolation, antialias=True, align_corners=False
    )
    made: NDArray[np.uint8] = resized[0].permute(1, 2, 0).numpy()
    return made


def _crop(pixels: NDArray[np.uint8], size: tuple[int, int], fill: Sequence[int]) -> NDArray[np.uint8]:
    """Cut out the centre; a side that is too short is padded with a colour."""
    rows, columns = map(_kept, pixels.shape, size)
    kept = pixels[rows, columns]
    if kept.shape[:2] == size:
        return np.array(kept)
    padded = np.full((*size, 3), fill, np.uint8)
    top, left = ((crop - side) // 2 for crop, side in zip(size, kept.shape, strict=False))
    padded[top : top + kept.shape[0], left : left + kept.shape[1]] = kept
    return padded


def _kept(length: int, crop: int) -> slice:
    """Which part of a side is kept; Python's round, half to even, is torchvision's."""
    start = max(round((length - crop) / 2.0), 0)
    return slice(start, start + min(length, crop))


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Width and height after the resize; the longer side is rounded down, as in torchvision, with `border` as in timm."""
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
