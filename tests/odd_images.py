"""TIFF and PNG files of any kind, byte by byte, from samples whose right pixels are known."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.int64]
"""Values as the file has them, shape (height, width, samples)."""

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def packed(rows: Samples, bits: int, dtype: str) -> list[bytes]:
    """Each row of values of 1 to 32 bits, the first value in the highest bits of a byte."""
    if bits % 8 == 0:
        return [row.astype(dtype).tobytes() for row in rows]
    ones = (rows[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.astype(np.uint8).ravel()).tobytes() for row in ones]


def tiff(
    samples: Samples,
    bits: int,
    photometric: int,
    order: str = "<",
    separate: bool = False,
    compression: int = 1,
    tags: Sequence[tuple[int, Sequence[int]]] = (),
) -> bytes:
    """A TIFF of one strip, or one for each plane; `tags` are further ones, their values written as 16 bits."""
    height, width, count = samples.shape
    dtype = f"{order}u{max(bits, 8) // 8}"
    planes = [samples[..., place] for place in range(count)] if separate else [samples.reshape(height, -1)]
    strips = [b"".join(packed(plane, bits, dtype)) for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compression == 8 else strips
    wanted = {256: [width], 257: [height], 258: [bits] * count, 259: [compression], 262: [photometric], 277: [count]}
    wanted |= {278: [height], 284: [1 + separate], 279: [len(strip) for strip in strips], **dict(tags)}
    body = bytearray(8)
    wanted[273] = []
    for strip in strips:
        wanted[273].append(len(body))
        body += strip + b"\0" * (len(strip) % 2)
    entries = b""
    for tag, values in sorted(wanted.items()):
        kind, letter = (4, "I") if tag in {273, 279} else (3, "H")
        value = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(value) > 4:
            place = len(body)
            body += value + b"\0" * (len(value) % 2)
            value = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, kind, len(values)) + value.ljust(4, b"\0")
    body[:8] = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, len(body))
    return bytes(body) + struct.pack(f"{order}H", len(wanted)) + entries + b"\0\0\0\0"


def chunk(name: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG, with a wrong checksum if wanted."""
    right = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", right if checksum is None else checksum)


def png(
    samples: Samples, bits: int, colour: int, before: bytes = b"", after: bytes = b"", interlaced: bool = False
) -> bytes:
    """A PNG of a colour type, with chunks before and after its pixels."""
    steps = ADAM7 if interlaced else ((0, 0, 1, 1),)
    passes = [samples[y::down, x::across] for y, x, down, across in steps]
    rows = [
        row
        for part in passes
        if part.size
        for row in packed(part.reshape(len(part), -1), bits, ">u2" if bits == 16 else "u1")
    ]
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, colour, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), before, chunk(b"IDAT", pixels), after, chunk(b"IEND", b"")]
    )
