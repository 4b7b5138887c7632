"""Bytes to pixels: one documented policy for every format.

The policy, which is part of a store's identity (`DECODE_POLICY`):

- JPEG, PNG, WebP, BMP, GIF and TIFF, recognised by content; of several frames or pages the first.
- The EXIF orientation is applied; broken EXIF is as good as none.
- Transparency, from an alpha channel, a palette or a transparent colour, is composited on white.
- JPEG is decoded by libjpeg-turbo with the accurate DCT and smooth upsampling, bit for bit as Pillow does.
- 16-bit grey is scaled to 8 bits by value * 255 / 65535, rounded; 16-bit colour keeps its high byte.
- CMYK and YCbCr become RGB as Pillow does it; colour profiles are ignored.
- 32-bit integer or float pixels, which have no agreed brightness, and truncated files are refused.
- An image of more pixels than allowed is refused before its pixels are decoded.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Mapping
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from pipeline.digests import fingerprint
from pipeline.errors import DatasetError
from pipeline.images.reading import ImageProblem

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""The decoders that may touch a user's file; Pillow has dozens more, some with a record of holes."""

DECODE_POLICY: Final[Mapping[str, str | int]] = {
    "version": 2,
    "decoder": "Pillow",
    "jpeg": "libjpeg-turbo, accurate DCT, smooth upsampling",
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
_JPEG_FORMATS = frozenset({"JPEG", "MPO"})
"""MPO is a JPEG with more pictures behind it, as phones write it."""

_LIMIT_LOCK = threading.Lock()

# What Pillow remarks on broken metadata helps nobody here: the image is decoded, or it is a problem with a reason. Its own
# limit on pixels ends in an exception instead of a remark; `decode` makes it a problem of that image.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def policy_key(max_pixels: int) -> str:
    """Return the short name of the decode policy under which a content failed, for the ledger."""
    return fingerprint({**DECODE_POLICY, "max_pixels": max_pixels})[:16]


def decode(data: bytes, *, max_pixels: int, at_least: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file's bytes by the policy above: RGB of shape (height, width, 3), uint8.

    With `at_least` given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps that many
    pixels: the decoder then works on fewer coefficients, which saves most of the time of a large photo.

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
        return _decode(data, max_pixels, at_least)
    except ImageProblem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageProblem(
            "too_many_pixels", f"it has more than the {max_pixels:,} pixels of dataset.max_pixels"
        ) from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise _problem(data, error) from None


def _decode(data: bytes, max_pixels: int, at_least: int | None) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageProblem(
                "too_many_pixels", f"it has {width:,} x {height:,} pixels, dataset.max_pixels allows {max_pixels:,}"
            )
        pixels = _jpeg(data, image, at_least)
        if pixels is None:
            image.load()  # turns a TIFF upright and drops the tag
            pixels = np.asarray(_to_rgb(image))
        method = _ORIENTATIONS.get(_orientation(image))
    return pixels if method is None else np.asarray(Image.fromarray(pixels).transpose(method))


def _jpeg(data: bytes, image: Image.Image, at_least: int | None) -> NDArray[np.uint8] | None:
    """Decode a JPEG straight to RGB; None for what that decoder does not take, which is left to Pillow.

    The same pixels as Pillow's in two thirds of the time: they are written once, without a fourth byte each.
    """
    if image.format not in _JPEG_FORMATS or image.mode not in {"RGB", "L"}:
        return None
    divisor = next((by for by in (8, 4, 2) if at_least is not None and min(image.size) >= at_least * by), 1)
    width, height = (-(-side // divisor) for side in image.size)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width)
    except ValueError:  # anything odd: Pillow knows whether it matters, and says what it is
        return None
    return pixels


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
