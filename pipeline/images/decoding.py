"""Bytes to pixels: recognition of formats by the first bytes, and one documented decoding policy for all formats.

The policy, which is part of a store's identity (`DECODE_POLICY`):

- JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF and, with the extra `heic`, HEIC are read, recognised by content. Only the first of
  several frames or pages is used.
- The EXIF orientation is applied.
- Transparency, from an alpha channel, a palette or a transparent colour, is composited on white.
- JPEG is decoded by libjpeg-turbo with the accurate DCT and smooth upsampling, bit-identical to Pillow.
- 16-bit grey is scaled to 8 bits by value * 255 / 65535, rounded, and 12-bit grey likewise; it is inverted if white is zero.
  16-bit colour keeps its high byte.
- CMYK and YCbCr are converted to RGB as by Pillow; colour profiles are ignored.
- Damage outside the pixels, such as in texts, profiles and EXIF, is no reason to refuse an image.
- 32-bit, float or signed pixels, whose brightness range is undefined, cameras' raw files, and incomplete files are refused.
- An image of more pixels than allowed is refused before its pixels are decoded.
"""

from __future__ import annotations

import ctypes
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin, _imaging, features

from pipeline.errors import DatasetError
from pipeline.io.digests import content_digest, fingerprint

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
"""The parts of decoding that affect the pixels of ordinary images. Increase `version` when this file changes them; for changes
to only some kinds of files, change their `content_key` instead, so that other images are not embedded again."""

REFUSALS: Final = 1
"""Increase it when the refused files or their reasons change: then failed files are tried again."""

# ---- file formats


class ImageProblem(Exception):
    """One image cannot be used, for a reason the user can act on; it never ends a run.

    `status` is 'unreadable', 'truncated', 'too_many_pixels' or 'unsupported_format', which depend only on the bytes and
    the policy, or 'unavailable': the file could not be read this time.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


START_BYTES: Final = 512
"""Number of bytes at a file's start that suffice to recognise its format."""

HEIC_EXTRA: Final = "pip install 'manyheads[heic]'"


@dataclass(frozen=True)
class ImageFormat:
    """An image format: its name in messages, the pattern of its first bytes, and Pillow's name of the decoder, '' if it is not read."""

    name: str
    start: re.Pattern[bytes]
    format: str

    @property
    def refusal(self) -> str:
        """Why files of this format are not read, and what to do; '' if they are read."""
        if self.format == "HEIF" and not reads_heic():
            return f"it is {self.name}; {HEIC_EXTRA} has it read, or save it as JPEG or PNG"
        is_read = features.check("avif") if self.format == "AVIF" else self.format
        return "" if is_read else f"it is {self.name}; save it as JPEG or PNG"


_RAW = rb"II\x2a\0....CR\x02|II(RO|RS|U\0)|MMOR|FUJIFILMCCD-RAW|....ftypcrx |\0MRM"
KINDS: Final = tuple(
    ImageFormat(name, re.compile(start, re.DOTALL), format)
    for name, start, format in (
        ("a JPEG image", rb"\xff\xd8\xff", "JPEG"),
        ("a PNG image", rb"\x89PNG\r\n\x1a\n", "PNG"),
        ("a GIF image", rb"GIF8[79]a", "GIF"),
        ("a WebP image", rb"RIFF....WEBP", "WEBP"),
        ("a BMP image", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
        ("a camera's raw file", _RAW, ""),
        ("a TIFF image", rb"(II|MM)(\0[*+]|[*+]\0)", "TIFF"),
        ("an AVIF image", rb"....ftyp(avi[fs]|m[is]f1.{4}(.{4}){0,7}avi[fs])", "AVIF"),
        ("a HEIC photo", rb"....ftyp(hei[cxms]|hev[cxms]|m[is]f1)", "HEIF"),
    )
)
"""The known formats, in the order of recognition."""

READ: Final = tuple(kind.format for kind in KINDS if kind.format)
"""Pillow's decoders that are used; it has dozens more, some with a history of vulnerabilities."""


def kind_of(start: bytes) -> ImageFormat | None:
    """Return the format of a file from its first bytes (`START_BYTES` are enough); None for an unknown format."""
    return next((kind for kind in KINDS if kind.start.match(start)), None)


@cache
def reads_heic() -> bool:
    """Whether HEIC can be read; the first call registers it with Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"


def pixels_only(data: bytes) -> bytes:
    """Return a PNG without chunks that do not affect its first picture, such as texts and profiles; undamaged EXIF data are kept."""
    kept = [SIGNATURE]
    for name, begin, end in _chunks(data):
        chunk = data[begin:end]
        whole_exif = name == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or whole_exif:
            kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, begin and end of each chunk of a PNG; the last may be truncated."""
    begin = len(SIGNATURE)
    while begin + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, begin)
        end = min(begin + 12 + length, len(data))
        yield name, begin, end
        begin = end


def odd_transparency(data: bytes) -> tuple[int, ...] | None:
    """Return a PNG's transparent colour if Pillow compares it wrongly: in grey with 2 or 4 bits, and RGB with 16; else None."""
    bits, kind = (data[24], data[25]) if len(data) > 25 else (0, 0)
    if (bits, kind) not in {(2, 0), (4, 0), (16, 2)}:
        return None
    samples = 3 if kind else 1
    for name, begin, end in _chunks(data):
        if name == b"tRNS" and end - begin - 12 >= 2 * samples:
            return struct.unpack_from(f">{samples}H", data, begin + 8)
        if name == b"IDAT":
            break
    return None


def is_transparent(data: bytes, image: Image.Image, colour: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where a PNG, decoded as `image`, has the colour of `odd_transparency`: bool of shape (height, width)."""
    values, bits = np.asarray(image), data[24]
    if bits < 16:
        return np.asarray(values == colour[0] * 255 // (2**bits - 1))
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as other:
        # Decoded with the opposite byte order, Pillow keeps the low bytes.
        other.tile = [tile._replace(args="RGB;16L") for tile in other.tile]
        whole = np.asarray(values, np.uint16) << 8 | np.asarray(other)
    return np.asarray((whole == colour).all(axis=2))


_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _DNG = 254, 258, 259, 262, 284, 339, 50706


@dataclass(frozen=True)
class TiffPixels:
    """A TIFF's storage of its first picture, from its tags: `bits` of each sample of a pixel, `separate` planes for the samples.

    `is_raw` is true for a camera's raw file, or if the first picture is a preview of another.
    """

    bits: tuple[int, ...]
    photometric: int
    compression: int
    separate: bool
    is_signed: bool
    is_raw: bool

    @staticmethod
    def read(data: bytes) -> TiffPixels:
        """Read the tags; Pillow's exceptions if they are damaged."""
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if 43 in data[2:4] else data[:8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        return TiffPixels(
            bits=tags.get(_BITS, (1,)),
            photometric=tags.get(_PHOTOMETRIC, 0),
            compression=tags.get(_COMPRESSION, 1),
            separate=tags.get(_PLANAR, 1) == 2,
            is_signed=max(tags.get(_SAMPLE_FORMAT, (1,))) == 2,
            is_raw=_DNG in tags or bool(tags.get(_SUBFILE, 0) & 1),
        )

    @property
    def is_read_wrongly(self) -> bool:
        """Whether Pillow would decode the file to wrong pixels, so that it must not be used."""
        planes = self.separate and len(self.bits) > 1 and max(self.bits) > 8 and self.compression == 1
        return planes or (self.is_signed and max(self.bits) <= 8)

    def not_read(self) -> ImageProblem:
        """Return the problem of a file with an unsupported kind of pixels."""
        layout = ", signed" * self.is_signed + ", in separate planes" * self.separate
        found = f"a TIFF of {len(self.bits)} x {max(self.bits)} bits (photometric {self.photometric}, compression {self.compression}{layout})"
        return ImageProblem("unsupported_format", f"{found} is not read; save it as PNG, or in RGB with 8 bits")


# ---- the policy

_ORIENTATION = 0x0112
_JPEG_FORMATS = frozenset({"JPEG", "MPO"})
"""MPO is a JPEG followed by more pictures, as written by phones."""

_DATA_LOST = re.compile(r"premature end|bad (Huffman|arithmetic) code|instead of RST", re.IGNORECASE)
"""Warnings of libjpeg-turbo that mean missing pixels; its other warnings are harmless."""

_CUT_OFF = re.compile(r"truncated|end of file|requires a buffer", re.IGNORECASE)
_UNKNOWN_PIXELS = re.compile(r"unknown (pixel|raw) mode")
"""Messages of Pillow and its libraries for truncated files, and for TIFFs with unsupported pixels."""

NO_IMAGE: Final = f"it is not an image of a known format ({', '.join(READ)})"

# Pillow's warnings about broken metadata are not useful: the image is decoded, or there is an ImageProblem. Its own limit on
# pixels, which applies only to odd GIFs here, becomes an exception, which `decode` turns into an ImageProblem.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
with suppress(OSError, AttributeError):  # in other builds of Pillow, libtiff may write to the terminal
    _library = ctypes.CDLL(_imaging.__file__)
    for _name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
        getattr(_library, _name)(None)


def policy_key(max_pixels: int) -> str:
    """Return a short digest of the decoding policy, for the list of failures."""
    refusals = {"refusals": REFUSALS, "heic": reads_heic(), "max_pixels": max_pixels}
    return fingerprint({**DECODE_POLICY, **refusals})[:16]


def decode(data: bytes, *, max_pixels: int, at_least: int | None = None) -> NDArray[np.uint8]:
    """Decode an image file's bytes by the policy above: RGB of shape (height, width, 3), uint8.

    With `at_least`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if its shorter side keeps that many pixels: the
    decoder then uses fewer coefficients, which saves most of the time for a large photo.

    ImageProblem if it is damaged, truncated, too large, or of an unsupported format; DatasetError if Pillow is set to accept
    truncated files, as no result could be trusted.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DatasetError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True: truncated images would pass as whole; leave it False"
        )
    kind = kind_of(data[:START_BYTES])
    if kind is None:
        raise ImageProblem("unreadable", NO_IMAGE if data else "the file is empty")
    if kind.refusal:
        raise ImageProblem("unsupported_format", kind.refusal)
    try:
        try:
            return _decode(data, kind, max_pixels, at_least)
        except Exception as error:  # it may concern only metadata
            if kind.format != "PNG" or isinstance(error, ImageProblem):
                raise
        return _decode(pixels_only(data), kind, max_pixels, at_least)
    except ImageProblem:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageProblem(
            "too_many_pixels", f"it has more than the {max_pixels:,} pixels of dataset.max_pixels"
        ) from None
    except Exception as error:  # Pillow's readers may raise anything on damaged files
        raise _problem(data, kind, error) from None


def _decode(data: bytes, kind: ImageFormat, max_pixels: int, at_least: int | None) -> NDArray[np.uint8]:
    tiff = TiffPixels.read(data) if kind.format == "TIFF" else None
    if tiff is not None and tiff.is_raw:
        raise ImageProblem(
            "unsupported_format", "it is a camera's raw file, or begins with a preview; save the photo as JPEG or PNG"
        )
    if tiff is not None and tiff.is_read_wrongly:
        raise tiff.not_read()
    if kind.format not in Image.OPEN:
        Image.init()
    # Only by the decoder of its format, whose error describes the damage.
    with Image.OPEN[kind.format][0](io.BytesIO(data), "") as image:
        _require_modest(image, max_pixels)
        pixels = _jpeg(data, image, at_least)
        if pixels is None:
            image.load()  # rotates a TIFF upright and removes the tag
            pixels = np.asarray(_to_rgb(data, image, tiff))
        return _upright(pixels, image)


def decode_opened(image: Image.Image, max_pixels: int) -> NDArray[np.uint8]:
    """Return the RGB pixels of a PIL image by the same policy as `decode`: (height, width, 3), uint8."""
    try:
        _require_modest(image, max_pixels)
        copy = image.copy()  # loads the pixels without changing the caller's image
        return _upright(np.asarray(_to_rgb(b"", copy, None)), image)
    except ImageProblem:
        raise
    except Exception as error:  # Pillow may raise anything if the image's file is damaged
        raise ImageProblem("unreadable", f"its pixels cannot be read ({error})") from None


def _require_modest(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageProblem(
            "too_many_pixels", f"it has {width:,} x {height:,} pixels, dataset.max_pixels allows {max_pixels:,}"
        )


def _upright(pixels: NDArray[np.uint8], image: Image.Image) -> NDArray[np.uint8]:
    """Apply the EXIF orientation to pixels, uint8 (height, width, 3); damaged EXIF data are ignored."""
    with suppress(Exception):
        if (orientation := int(image.getexif().get(_ORIENTATION, 1))) != 1:
            turned = Image.fromarray(pixels)
            turned.getexif()[_ORIENTATION] = orientation
            return np.asarray(ImageOps.exif_transpose(turned))
    return pixels


def _jpeg(data: bytes, image: Image.Image, at_least: int | None) -> NDArray[np.uint8] | None:
    """Decode a JPEG directly to RGB; None if that decoder does not support it, so that Pillow must be used.

    The pixels are the same as Pillow's, in two thirds of the time: they are written once, without a fourth byte each.
    """
    if image.format not in _JPEG_FORMATS:
        return None
    colours = "CMYK" if image.mode == "CMYK" else "RGB"
    divisor = next((by for by in (8, 4, 2) if at_least is not None and min(image.size) >= at_least * by), 1)
    width, height = (-(-side // divisor) for side in image.size)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width)
    except ValueError as error:
        if _DATA_LOST.search(str(error)):  # Pillow would silently fill the missing pixels with grey
            raise ImageProblem("truncated", f"some of its data are missing or damaged ({error})") from None
        return None  # Pillow decides whether any other warning matters, and describes it
    return pixels if colours == "RGB" else None


def _to_rgb(data: bytes, image: Image.Image, tiff: TiffPixels | None) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey16(image, tiff)
    if mode in {"I", "F"}:
        raise ImageProblem(
            "unsupported_format",
            "it has 32-bit, floating or signed pixels, whose brightness range is not known; save it with 8 or 16 bits",
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
    if tiff is not None and tiff.photometric == 0:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _problem(data: bytes, kind: ImageFormat, error: Exception) -> ImageProblem:
    """Return a Pillow error as an ImageProblem."""
    text = " ".join(str(error).split()) or type(error).__name__
    if kind.format == "TIFF":
        with suppress(Exception):  # its tags may be damaged
            tiff = TiffPixels.read(data)
            if _UNKNOWN_PIXELS.search(text) or tiff.compression not in TiffImagePlugin.COMPRESSION_INFO:
                return tiff.not_read()
    if isinstance(error, EOFError) or _CUT_OFF.search(text):
        return ImageProblem("truncated", f"its end is missing ({text})")
    return ImageProblem("unreadable", f"it is {kind.name}, and damaged ({text})")


# ---- digests of contents

_REVISION: Final = b"decode 3"
"""Distinguishes contents that version 2 of the decoding policy decoded to other pixels."""


def content_key(data: bytes) -> bytes:
    """Return the 16-byte key of an image's content in the index, the stores and the failures.

    It is the digest of its bytes; for the few kinds of files that earlier versions decoded to other pixels the digest is
    different, so that vectors of the wrong pixels are never used for them.
    """
    return content_digest(data, _REVISION if _is_read_otherwise(data) else b"")


def _is_read_otherwise(data: bytes) -> bool:
    """Whether a file is decoded to other pixels than by version 2 of the policy, or refused only now."""
    kind = kind_of(data[:START_BYTES])
    if kind is not None and kind.format == "PNG":
        return odd_transparency(data) is not None
    if kind is None or kind.format != "TIFF":
        return False
    try:
        tiff = TiffPixels.read(data)
    except Exception:  # Pillow may raise anything on damaged tags, in both versions
        return False
    return tiff.is_raw or tiff.is_read_wrongly or tiff.bits == (12,) or (tiff.bits == (16,) and tiff.photometric == 0)
