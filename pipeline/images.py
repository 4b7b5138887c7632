"""Bytes to pixels: one documented policy for every format, and the transform that belongs to the weights.

The policy, which is part of a store's identity (`DECODE_POLICY`):

- JPEG, PNG, WebP, BMP, GIF and TIFF, recognised by content; of several frames or pages the first.
- The EXIF orientation is applied; broken EXIF is as good as none.
- Transparency, from an alpha channel, a palette or a transparent colour, is composited on white.
- 16-bit grey is scaled to 8 bits by value * 255 / 65535, rounded; 16-bit colour keeps its high byte.
- CMYK and YCbCr become RGB as Pillow does it; colour profiles are ignored.
- 32-bit integer or float pixels, which have no agreed brightness, and truncated files are refused.
- An image of more pixels than allowed is refused before its pixels are decoded.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, features

from pipeline.digests import content_digest, fingerprint
from pipeline.errors import DatasetError

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""The decoders that may touch a user's file; Pillow has dozens more, some with a record of holes."""

DECODE_POLICY: Final[Mapping[str, str | int]] = {
    "version": 1,
    "decoder": "Pillow",
    "jpeg": f"libjpeg-turbo {features.version('libjpeg_turbo') or 'absent'}",
    "frame": "first",
    "exif_orientation": "applied",
    "alpha": "on white",
    "grey16": "value * 255 / 65535, rounded",
    "colour16": "high byte",
    "cmyk": "Pillow",
    "icc": "ignored",
}
"""What of decoding changes the pixels. `version` goes up by hand when this file changes them."""

_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
MAX_RESIZED_PIXELS = 1 << 24
"""Above this, a resized image is not made in full before it is cropped; 50 MB of RGB."""

_LIMIT_LOCK = threading.Lock()

# What Pillow remarks on broken metadata helps nobody here: the image is decoded, or it is a problem with a reason. Its own
# limit on pixels ends in an exception instead of a remark; `decode` makes it a problem of that image.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class ImageProblem(Exception):
    """One image cannot be used, for a reason the user can act on; never the end of a run.

    `status` is 'unreadable', 'truncated', 'too_many_pixels' or 'unsupported_format', which stay true while the bytes and
    the policy do, or 'unavailable': the file could not be read this time.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Preprocessing:
    """The transform that belongs to a network's weights: resize, centre crop, scale to [0, 1], normalise.

    `resize` is the length of the shorter side, or (height, width); `crop` is a side or (height, width); `interpolation` is a
    Pillow filter in lower case. `mean` and `std` are of the RGB channels in [0, 1].
    """

    resize: int | tuple[int, int]
    crop: int | tuple[int, int]
    interpolation: str = "bilinear"
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if self.interpolation not in _INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {self.interpolation!r}; there are {', '.join(_INTERPOLATIONS)}")
        if not self.antialias:
            raise ValueError("antialias=False is not to be had: Pillow always smooths when it makes an image smaller")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prepared image."""
        return _pair(self.crop)

    def identity(self) -> dict[str, Any]:
        """Return what of decoding and preprocessing changes the vectors."""
        return {**asdict(self), "decode": dict(DECODE_POLICY)}


def policy_key(max_pixels: int) -> str:
    """Return the short name of the decode policy under which a content failed, for the ledger."""
    return fingerprint({**DECODE_POLICY, "max_pixels": max_pixels})[:16]


def open_file(root: Path, relative_path: str, digest: bytes | None = None) -> bytes:
    """Read one file of a data set, and nothing outside its root, symbolic links included.

    With `digest` given, the bytes are the ones with this content digest or it is a problem. A file that changes while it is
    read is read once more.

    Raises
    ------
    ImageProblem
        With status 'unavailable'.
    """
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, relative_path))
    if os.path.commonpath([real, real_root]) != real_root:
        raise ImageProblem("unavailable", f"it lies outside {root}")
    for _ in range(2):
        try:
            data, steady = _read_steadily(real)
        except OSError as error:
            raise ImageProblem("unavailable", f"it cannot be read: {error.strerror or error}") from None
        if steady:
            break
    else:
        raise ImageProblem("unavailable", "it changes while it is read")
    if digest is not None and content_digest(data) != digest:
        raise ImageProblem("unavailable", "it changed after the scan; run again")
    return data


def _read_steadily(path: str) -> tuple[bytes, bool]:
    """Read a regular file; also say whether it stayed the same meanwhile."""
    # O_NONBLOCK: a pipe in the file's place must not make a run wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ImageProblem("unavailable", "it is not a regular file")
        data = io.FileIO(descriptor, closefd=False).readall()
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    same = (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    return data, same and len(data) == after.st_size


def decode(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode an image file's bytes to RGB by the policy above.

    Raises
    ------
    ImageProblem
        When it is broken, truncated, too large, or of a kind that is not supported.
    DatasetError
        When the process has told Pillow to accept truncated files, so that no result could be trusted.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DatasetError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True in this process: truncated images would pass as whole; leave it False"
        )
    _allow_pixels(max_pixels)
    try:
        return _decode(data, max_pixels)
    except ImageProblem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageProblem(
            "too_many_pixels", f"it has more than the {max_pixels:,} pixels of dataset.max_pixels"
        ) from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise _problem(data, error) from None


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageProblem(
                "too_many_pixels", f"it has {width:,} x {height:,} pixels, dataset.max_pixels allows {max_pixels:,}"
            )
        image.load()
        method = _ORIENTATIONS.get(_orientation(image))
        rgb = _to_rgb(image)
    return rgb.transpose(method) if method is not None else rgb


def _allow_pixels(max_pixels: int) -> None:
    """Lift Pillow's own limit where the user allows more; `_decode` applies the user's limit."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        with _LIMIT_LOCK:
            Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS)


def _orientation(image: Image.Image) -> int:
    """The orientation tag; 1, upright, when there is none or EXIF is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # any damage to metadata is no reason to lose the pixels
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "I" and image.format == "PNG":  # how Pillow before 11.3 opens 16-bit grey
        return _grey16(image)
    if mode.startswith("I;16"):
        return _grey16(image)
    if mode in {"I", "F"}:
        raise ImageProblem(
            "unsupported_format", "it has 32-bit pixels, whose brightness range is not known; save it with 8 or 16 bits"
        )
    if mode in {"La", "RGBa"}:
        image = image.convert(mode[:-1] + "A")
    if mode in {"LA", "PA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey16(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


_OTHER_KINDS = (
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop file"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"ftypheic", "a HEIC photo"),
    (b"ftypmif1", "a HEIF photo"),
    (b"ftypavif", "an AVIF image"),
    (b"\x00\x00\x00\x0cjp  ", "a JPEG 2000 image"),
)


def _problem(data: bytes, error: Exception) -> ImageProblem:
    """Say in the user's words what Pillow could not do."""
    if not data:
        return ImageProblem("unreadable", "the file is empty")
    start = data[:64].lower().lstrip()
    for mark, kind in _OTHER_KINDS:
        if mark.lower() in start:
            return ImageProblem("unsupported_format", f"it is {kind}; save it as JPEG or PNG")
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        return ImageProblem("unreadable", f"it is not an image of a known format ({', '.join(FORMATS)})")
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return ImageProblem("truncated", f"its end is missing ({text})")
    return ImageProblem("unreadable", f"it is damaged ({text})")


def prepare(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and centre-crop an RGB image: ndarray of shape (height, width, 3), uint8.

    The pixels are bit for bit those of torchvision's transforms (Resize, CenterCrop) on a PIL image, before they are scaled
    and normalised. A side shorter than the crop is padded with black, as there. Only for extremely long images, whose
    resized form would pass `MAX_RESIZED_PIXELS`, the pixels may differ a little.
    """
    if image.mode != "RGB":
        raise ValueError(f"expected an RGB image, got mode {image.mode!r}")
    width, height = _resized(image.size, preprocessing.resize)
    crop_height, crop_width = preprocessing.size
    left, top = _crop_start(width, crop_width), _crop_start(height, crop_height)
    resampling = _INTERPOLATIONS[preprocessing.interpolation]
    if width * height > MAX_RESIZED_PIXELS:
        # A strip of 1 x 60,000 pixels would become one of 256 x 15,360,000: make only the part that is kept.
        x, y = max(left, 0), max(top, 0)
        right, bottom = min(left + crop_width, width), min(top + crop_height, height)
        across, down = image.width / width, image.height / height
        image = image.resize(
            (right - x, bottom - y), resampling, box=(x * across, y * down, right * across, bottom * down)
        )
        left, top, width, height = left - x, top - y, *image.size
    elif (width, height) != image.size:
        image = image.resize((width, height), resampling)
    if (left, top, crop_width, crop_height) != (0, 0, width, height):
        image = image.crop((left, top, left + crop_width, top + crop_height))
    return np.array(image)


def _crop_start(length: int, crop: int) -> int:
    """Where the crop starts; below 0 where it is longer and is padded. Python's round, half to even, is torchvision's."""
    return round((length - crop) / 2.0) if crop <= length else -((crop - length) // 2)


def _resized(size: tuple[int, int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height after the resize; the longer side is rounded down, as in torchvision."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
