"""PNG files as bytes: their chunks, and the transparent colours that Pillow compares with values of another depth."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_SAMPLES: Final = {0: 1, 2: 3}
"""Values of a transparent colour, by the header's colour type: grey, RGB."""

_ABOUT_PIXELS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})


def pixels_only(data: bytes) -> bytes:
    """Return a PNG without what says nothing of its first picture, such as texts and profiles; whole EXIF data stay."""
    kept = [
        data[begin:end] for name, begin, end in _chunks(data) if name in _ABOUT_PIXELS or _is_exif(data, begin, end)
    ]
    return SIGNATURE + b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, begin and end of each chunk; the last may be cut off."""
    begin = len(SIGNATURE)
    while begin + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, begin)
        end = min(begin + 12 + length, len(data))
        yield name, begin, end
        begin = end


def _is_exif(data: bytes, begin: int, end: int) -> bool:
    chunk = data[begin:end]
    return chunk[4:8] == b"eXIf" and zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")


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
