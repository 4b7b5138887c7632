"""The transform that belongs to a network's weights: from a decoded image to the pixels the network is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.decoding import DECODE_POLICY

DECODE_MODES: Final[Mapping[str, str]] = {
    "exact": "resized by Pillow: the pixels of torchvision's transforms on a PIL image, bit for bit",
    "standard": "resized by torch: a value is at most one grey level away from that",
    "fast": "and a JPEG more than twice as large as needed is decoded at a fraction of its size",
}

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
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

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"unknown fit {self.fit!r}; there are {', '.join(FITS)}")
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; there are {', '.join(_INTERPOLATIONS)}")
        if self.decode not in DECODE_MODES:
            raise ValueError(f"unknown decode {self.decode!r}; there are {', '.join(DECODE_MODES)}")
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
        return values


def prepare(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and centre-crop a decoded image: ndarray of shape (height, width, 3), uint8, as is what comes out.

    In mode `exact` the pixels are bit for bit those of torchvision's transforms (Resize, CenterCrop) on a PIL image, before
    they are scaled and normalised; in the other modes a resized value may be one grey level away. A side shorter than the
    crop is padded with black, as there, with `fit: border` with the mean colour, as timm does. Only for extremely long images, whose resized form would pass `MAX_RESIZED_PIXELS`,
    the pixels may differ a little.
    """
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
