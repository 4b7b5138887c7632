"""What a file is, by its first bytes; its name says nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from PIL import features

START_BYTES: Final = 512
"""How much of a file's start tells what it is."""

HEIC_EXTRA: Final = "pip install 'manyheads[heic]'"


@dataclass(frozen=True)
class Kind:
    """A kind of file: what people call it, and what its first bytes look like.

    `format` is Pillow's name of the decoder that reads it, '' where none does.
    """

    name: str
    start: re.Pattern[bytes]
    format: str = ""
    is_image: bool = True

    @property
    def refusal(self) -> str:
        """Why files of this kind are not read, and what to do; '' for those that are."""
        if self.format == "HEIF" and not reads_heic():
            return f"it is {self.name}; {HEIC_EXTRA} has it read, or save it as JPEG or PNG"
        if self.format == "AVIF" and not features.check("avif"):
            return f"it is {self.name}, which this Pillow was built without; install Pillow from PyPI, or save it as JPEG or PNG"
        return "" if self.format else f"it is {self.name}; save it as JPEG or PNG"


def _kind(name: str, start: bytes, format: str = "", *, is_image: bool = True) -> Kind:
    return Kind(name, re.compile(start, re.DOTALL | re.IGNORECASE if not format else re.DOTALL), format, is_image)


KINDS: Final = (
    _kind("a JPEG image", rb"\xff\xd8\xff", "JPEG"),
    _kind("a PNG image", rb"\x89PNG\r\n\x1a\n", "PNG"),
    _kind("a GIF image", rb"GIF8[79]a", "GIF"),
    _kind("a WebP image", rb"RIFF....WEBP", "WEBP"),
    _kind("a BMP image", rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"),
    _kind("a camera's raw file", rb"II\x2a\0....CR\x02|II(RO|RS|U\0)|MMOR|FUJIFILMCCD-RAW|....ftypcrx |\0MRM"),
    _kind("a TIFF image", rb"(II|MM)(\0[*+]|[*+]\0)", "TIFF"),
    _kind("an AVIF image", rb"....ftyp(avi[fs]|m[is]f1.{4}(.{4}){0,7}avi[fs])", "AVIF"),
    _kind("a HEIC photo", rb"....ftyp(hei[cxms]|hev[cxms]|m[is]f1)", "HEIF"),
    _kind("a JPEG XL image", rb"\xff\x0a|\0\0\0\x0cJXL "),
    _kind("a JPEG 2000 image", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    _kind("a Photoshop file", rb"8BPS"),
    _kind("an OpenEXR image", rb"v/1\x01"),
    _kind("a DICOM image", rb".{128}DICM"),
    _kind("an icon", rb"\0\0\x01\0[^\0]\0"),
    _kind("a netpbm image", rb"P[1-6]\s+(#[^\n]*\n)*\s*\d+\s+\d+\s"),
    _kind("an SVG drawing", rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg"),
    _kind("a PDF document", rb"%PDF", is_image=False),
    _kind("a web page", rb"\s*(<!DOCTYPE html|<html)", is_image=False),
)
"""In the order they are looked for."""

READ: Final = tuple(kind.format for kind in KINDS if kind.format)
"""Pillow's decoders that may touch a user's file; it has dozens more, some with a record of holes."""


def kind_of(start: bytes) -> Kind | None:
    """Return what a file is that begins with these bytes (`START_BYTES` of them are enough); None where nobody knows."""
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
