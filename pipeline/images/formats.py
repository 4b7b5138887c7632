"""What a file is, by its first bytes, and what names its content; its name says nothing.

Of PNG and TIFF also what Pillow takes otherwise than the file says: transparent colours of another depth, and pixels whose tags it
does not follow.
"""

from __future__ import annotations

import ctypes
import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, TiffImagePlugin, _imaging, features

from pipeline.io.digests import content_digest


class ImageProblem(Exception):
    """One image cannot be used, for a reason the user can act on; never the end of a run.

    `status` is 'unreadable', 'truncated', 'too_many_pixels' or 'unsupported_format', which stay true while the bytes and
    the policy do, or 'unavailable': the file could not be read this time.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


START_BYTES: Final = 512
"""How much of a file's start tells what it is."""

HEIC_EXTRA: Final = "pip install 'manyheads[heic]'"


@dataclass(frozen=True)
class ImageFormat:
    """A kind of image: what people call it, what its first bytes look like, and Pillow's name of its decoder, '' where none reads it."""

    name: str
    start: re.Pattern[bytes]
    format: str

    @property
    def refusal(self) -> str:
        """Why files of this kind are not read, and what to do; '' for those that are."""
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
"""In the order they are looked for."""

READ: Final = tuple(kind.format for kind in KINDS if kind.format)
"""Pillow's decoders that may touch a user's file; it has dozens more, some with a record of holes."""


def kind_of(start: bytes) -> ImageFormat | None:
    """Return what a file is that begins with these bytes (`START_BYTES` of them are enough); None where it is no image of these kinds."""
    return next((kind for kind in KINDS if kind.start.match(start)), None)


@cache
def reads_heic() -> bool:
    """Whether HEIC is read here; the first call makes it known to Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_SAMPLES: Final = {0: 1, 2: 3}
"""Values of a transparent colour, by the header's colour type: grey, RGB."""

_ABOUT_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def pixels_only(data: bytes) -> bytes:
    """Return a PNG without what says nothing of its first picture, such as texts and profiles; whole EXIF data stay."""
    kept = [SIGNATURE]
    for name, begin, end in _chunks(data):
        chunk = data[begin:end]
        whole_exif = name == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if name in _ABOUT_PIXELS or whole_exif:
            kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, begin and end of each chunk; the last may be cut off."""
    begin = len(SIGNATURE)
    while begin + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, begin)
        end = min(begin + 12 + length, len(data))
        yield name, begin, end
        begin = end


def odd_transparency(data: bytes) -> tuple[int, ...] | None:
    """Return a PNG's transparent colour where Pillow compares it wrongly: in grey of 2 or 4 bits, and RGB of 16; else None."""
    bits, kind = (data[24], data[25]) if len(data) > 25 else (0, 0)
    if (bits, kind) not in {(2, 0), (4, 0), (16, 2)}:
        return None
    for name, begin, end in _chunks(data):
        if name == b"tRNS" and end - begin - 12 >= 2 * _SAMPLES[kind]:
            return struct.unpack_from(f">{_SAMPLES[kind]}H", data, begin + 8)
        if name == b"IDAT":
            break
    return None


def is_transparent(data: bytes, image: Image.Image, colour: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return where a PNG, decoded as `image`, has its odd transparent colour: bool of shape (height, width)."""
    values, bits = np.asarray(image), data[24]
    if bits < 16:
        return np.asarray(values == colour[0] * 255 // (2**bits - 1))
    high, low = np.array(colour) >> 8, np.array(colour) & 255
    return np.asarray((values == high).all(axis=2) & (_low_bytes(data) == low).all(axis=2))


def _low_bytes(data: bytes) -> NDArray[np.uint8]:
    """Return the low bytes of a PNG in RGB of 16 bits: of values in the other byte order Pillow keeps those."""
    with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
        image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
        return np.asarray(image)


_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _DNG = 254, 258, 259, 262, 284, 339, 50706
_SEPARATE, _UNSIGNED, _SIGNED = 2, 1, 2
_COLOURS: Final = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIE Lab"}


@dataclass(frozen=True)
class TiffPixels:
    """How a TIFF stores its first picture, by its tags: `bits` of each sample of a pixel, `separate` planes for the samples.

    `is_raw` is a camera's raw file, or one whose first picture is a small preview of another.
    """

    bits: tuple[int, ...]
    photometric: int
    compression: int
    separate: bool
    sample_format: int
    is_raw: bool

    @staticmethod
    def read(data: bytes) -> TiffPixels:
        """Read the tags; raises what Pillow does where they are damaged."""
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[:16] if 43 in data[2:4] else data[:8])
        stream = io.BytesIO(data)
        stream.seek(tags.next)
        tags.load(stream)
        return TiffPixels(
            bits=tags.get(_BITS, (1,)),
            photometric=tags.get(_PHOTOMETRIC, 0),
            compression=tags.get(_COMPRESSION, 1),
            separate=tags.get(_PLANAR, 1) == _SEPARATE,
            sample_format=max(tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))),
            is_raw=_DNG in tags or bool(tags.get(_SUBFILE, 0) & 1),
        )

    @property
    def white_is_zero(self) -> bool:
        """Whether the smallest value is white."""
        return self.photometric == 0

    @property
    def is_signed(self) -> bool:
        """Whether values below zero are possible."""
        return self.sample_format == _SIGNED

    @property
    def is_read_wrongly(self) -> bool:
        """Whether Pillow gives pixels that the file does not have, so that it must not be asked."""
        planes = self.separate and len(self.bits) > 1 and max(self.bits) > 8 and self.compression == 1
        return planes or (self.is_signed and max(self.bits) <= 8)

    def __str__(self) -> str:
        """Say it in words: `3 x 12 bits (RGB, in separate planes)`."""
        count, bits = len(self.bits), max(self.bits)
        method = TiffImagePlugin.COMPRESSION_INFO.get(self.compression, f"compression {self.compression}")
        traits = {
            _COLOURS.get(self.photometric, f"colours of kind {self.photometric}"): True,
            "white is zero": self.white_is_zero,
            "signed": self.is_signed,
            "floating point": self.sample_format > _SIGNED,
            "in separate planes": self.separate and count > 1,
            method: self.compression != 1,
        }
        return f"{f'{count} x ' * (count > 1)}{bits} bit{'s' * (bits > 1)} ({', '.join(name for name, so in traits.items() if so)})"


def silence_libtiff() -> None:
    """Keep libtiff, which Pillow brings, from writing to the terminal: what it has to say becomes the reason of an image."""
    with suppress(OSError, AttributeError):  # a Pillow that is built otherwise: then it is heard
        library = ctypes.CDLL(_imaging.__file__)
        for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
            getattr(library, name)(None)


_REVISION: Final = b"decode 3"
"""Sets apart the contents that version 2 of the decode policy took for other pixels."""


def content_key(data: bytes) -> bytes:
    """Return the 16 bytes that name an image's content in the index, the stores and the failures.

    It is the digest of its bytes, except for the few kinds of files that earlier versions took for other pixels: those have
    a name of their own, so that vectors made of the wrong pixels are never taken for theirs.
    """
    return content_digest(data, _REVISION if _is_read_otherwise(data) else b"")


def _is_read_otherwise(data: bytes) -> bool:
    """Whether a file gives other pixels than by version 2 of the policy, or is refused now though it gave some."""
    kind = kind_of(data[:START_BYTES])
    if kind is not None and kind.format == "PNG":
        return odd_transparency(data) is not None
    if kind is None or kind.format != "TIFF":
        return False
    try:
        tiff = TiffPixels.read(data)
    except Exception:  # Pillow raises almost anything on damaged tags, then as now
        return False
    return tiff.is_raw or tiff.is_read_wrongly or tiff.bits == (12,) or (tiff.bits == (16,) and tiff.white_is_zero)
