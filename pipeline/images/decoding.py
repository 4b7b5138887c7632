"""Bytes to pixels: one documented policy for every format.

The policy, which is part of a store's identity (`DECODE_POLICY`):

- JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and, with the extra `heic`, HEIC, recognised by content; of several frames or pages
  the first.
- The EXIF orientation is applied.
- Transparency, from an alpha channel, a palette or a transparent colour, is composited on white.
- JPEG is decoded by libjpeg-turbo with the accurate DCT and smooth upsampling, bit for bit as Pillow does.
- 16-bit grey is scaled to 8 bits by value * 255 / 65535, rounded, 12-bit grey likewise; where white is zero it is turned
  round. 16-bit colour keeps its high byte.
- CMYK and YCbCr become RGB as Pillow does it; colour profiles are ignored.
- What is not about the pixels, such as texts, profiles and broken EXIF, costs no image.
- 32-bit, float or signed pixels, which have no agreed brightness, cameras' raw files, and files with data missing are refused.
- An image of more pixels than allowed is refused before its pixels are decoded.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.errors import DatasetError
from pipeline.images.formats import (
    READ,
    START_BYTES,
    ImageFormat,
    ImageProblem,
    TiffPixels,
    is_transparent,
    kind_of,
    odd_transparency,
    pixels_only,
    reads_heic,
    silence_libtiff,
)
from pipeline.io.digests import fingerprint

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
"""What of decoding changes the pixels of ordinary images. `version` goes up by hand when this file changes them; where only
some kinds of files are concerned, `content_key` sets those apart instead, so that nothing else is embedded again."""

REFUSALS: Final = 1
"""Goes up by hand when other files are refused, or for other reasons: then those that failed are tried again."""

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

_DATA_LOST = re.compile(r"premature end|bad (Huffman|arithmetic) code|instead of RST", re.IGNORECASE)
"""What libjpeg-turbo remarks where pixels are missing; it also remarks on what does no harm."""

_CUT_OFF = re.compile(r"truncated|end of file|requires a buffer", re.IGNORECASE)
_UNKNOWN_PIXELS = re.compile(r"unknown (pixel|raw) mode")
"""What Pillow and the libraries in it say of files that are cut off, and of TIFFs that it knows no way to read."""

NO_IMAGE: Final = f"it is not an image of a known format ({', '.join(READ)})"

# What Pillow remarks on broken metadata helps nobody here: the image is decoded, or it is a problem with a reason. Its own
# limit on pixels, which only odd GIFs meet as `_open` does not ask for it, ends in an exception that `decode` makes such a problem.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
silence_libtiff()


def policy_key(max_pixels: int) -> str:
    """Return the short name of the decode policy under which a content failed, for the list of failures."""
    refusals = {"refusals": REFUSALS, "heic": reads_heic(), "max_pixels": max_pixels}
    return fingerprint({**DECODE_POLICY, **refusals})[:16]


def decode(data: bytes, *, max_pixels: int, at_least: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file's bytes by the policy above: RGB of shape (height, width, 3), uint8.

    With `at_least` given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps that many
    pixels: the decoder then works on fewer coefficients, which saves most of the time of a large photo.

    ImageProblem when it is broken, truncated, too large, or of a kind that is not supported; DatasetError when the process has told
    Pillow to accept truncated files, so that no result could be trusted.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DatasetError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True in this process: truncated images would pass as whole; leave it False"
        )
    kind = kind_of(data[:START_BYTES])
    if kind is None:
        raise ImageProblem("unreadable", NO_IMAGE if data else "the file is empty")
    if kind.refusal:
        raise ImageProblem("unsupported_format", kind.refusal)
    try:
        try:
            return _decode(data, kind, max_pixels, at_least)
        except Exception as error:  # it may be about what is not the pixels
            if kind.format != "PNG" or isinstance(error, ImageProblem):
                raise
        return _decode(pixels_only(data), kind, max_pixels, at_least)
    except ImageProblem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageProblem(
            "too_many_pixels", f"it has more than the {max_pixels:,} pixels of dataset.max_pixels"
        ) from None
    except Exception as error:  # Pillow's readers raise almost anything on damaged files
        raise _problem(data, kind, error) from None


def _decode(data: bytes, kind: ImageFormat, max_pixels: int, at_least: int | None) -> NDArray[np.uint8]:
    tiff = _tiff(data) if kind.format == "TIFF" else None
    if kind.format not in Image.OPEN:
        Image.init()
    # By its own decoder and no other, which says what is wrong with it.
    with Image.OPEN[kind.format][0](io.BytesIO(data), "") as image:
        _require_modest(image, max_pixels)
        pixels = _jpeg(data, image, at_least)
        if pixels is None:
            image.load()  # turns a TIFF upright and drops the tag
            pixels = np.asarray(_to_rgb(data, image, tiff))
        return _upright(pixels, image)


def decode_opened(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    """Return the RGB pixels of an image that Pillow has opened or made, as `decode`: (height, width, 3), uint8."""
    try:
        _require_modest(image, max_pixels)
        copy = image.copy()  # whose file is not asked for
        return _upright(np.asarray(_to_rgb(b"", copy, None)), image)
    except ImageProblem:
        raise
    except Exception as error:  # Pillow raises almost anything where the file behind an image is damaged
        raise ImageProblem("unreadable", f"its pixels cannot be read ({error})") from None


def _require_modest(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageProblem(
            "too_many_pixels", f"it has {width:,} x {height:,} pixels, dataset.max_pixels allows {max_pixels:,}"
        )


def _upright(pixels: NDArray[np.uint8], image: Image.Image) -> NDArray[np.uint8]:
    try:
        method = _ORIENTATIONS.get(int(image.getexif().get(_ORIENTATION_TAG, 1)))
    except Exception:  # any damage to metadata is no reason to lose the pixels
        method = None
    return pixels if method is None else np.asarray(Image.fromarray(pixels).transpose(method))


def _tiff(data: bytes) -> TiffPixels:
    """Read the tags of a TIFF that Pillow reads rightly, if at all."""
    tiff = TiffPixels.read(data)
    if tiff.is_raw:
        raise ImageProblem(
            "unsupported_format", "it is a camera's raw file, or begins with a preview; save the photo as JPEG or PNG"
        )
    if tiff.is_read_wrongly:
        raise _not_read(tiff)
    return tiff


def _not_read(tiff: TiffPixels) -> ImageProblem:
    return ImageProblem("unsupported_format", f"a TIFF of {tiff} is not read; save it as PNG, or in RGB with 8 bits")


def _jpeg(data: bytes, image: Image.Image, at_least: int | None) -> NDArray[np.uint8] | None:
    """Decode a JPEG straight to RGB; None for what that decoder does not take, which is left to Pillow.

    The same pixels as Pillow's in two thirds of the time: they are written once, without a fourth byte each.
    """
    if image.format not in _JPEG_FORMATS:
        return None
    colours = "CMYK" if image.mode == "CMYK" else "RGB"
    divisor = next((by for by in (8, 4, 2) if at_least is not None and min(image.size) >= at_least * by), 1)
    width, height = (-(-side // divisor) for side in image.size)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
    except ValueError as error:
        if _DATA_LOST.search(str(error)):  # of which Pillow says nothing: it fills up with grey
            raise ImageProblem("truncated", f"some of its data are missing or damaged ({error})") from None
        return None  # anything else that is odd: Pillow knows whether it matters, and says what it is
    return pixels if colours == "RGB" else None


def _to_rgb(data: bytes, image: Image.Image, tiff: TiffPixels | None) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey16(image, tiff)
    if mode in {"I", "F"}:
        bits = "32" if tiff is None else f"{'signed ' * tiff.is_signed}{max(tiff.bits)}"
        raise ImageProblem(
            "unsupported_format",
            f"it has {bits}-bit pixels, whose brightness range is not known; save it with 8 or 16 bits",
        )
    if mode in {"La", "RGBa"}:
        image = image.convert(mode[:-1] + "A")
    colour = odd_transparency(data) if image.format == "PNG" else None
    if colour is not None:
        transparent = is_transparent(data, image, colour)
        del image.info["transparency"]
        pixels = np.array(image.convert("RGB"))
        pixels[transparent] = 255
        return Image.fromarray(pixels)
    if mode in {"LA", "PA", "La", "RGBA", "RGBa"} or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey16(image: Image.Image, tiff: TiffPixels | None) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    most = 65535 if tiff is None else 2 ** tiff.bits[0] - 1
    grey = ((values * 255 + most // 2) // most).astype(np.uint8)
    if tiff is not None and tiff.white_is_zero:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _problem(data: bytes, kind: ImageFormat, error: Exception) -> ImageProblem:
    """Say in the user's words what Pillow could not do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if kind.format == "TIFF":
        with suppress(Exception):  # its tags may be what is damaged
            tiff = TiffPixels.read(data)
            if _UNKNOWN_PIXELS.search(text) or tiff.compression not in TiffImagePlugin.COMPRESSION_INFO:
                return _not_read(tiff)
    if isinstance(error, EOFError) or _CUT_OFF.search(text):
        return ImageProblem("truncated", f"its end is missing ({text})")
    return ImageProblem("unreadable", f"it is {kind.name}, and damaged ({text})")
