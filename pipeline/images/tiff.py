"""TIFF files: how their tags say the pixels are to be taken, which Pillow does not always do."""

from __future__ import annotations

import ctypes
import io
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from PIL import TiffImagePlugin, _imaging

_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT, _DNG = 254, 258, 259, 262, 284, 339, 50706
_SEPARATE, _UNSIGNED, _SIGNED = 2, 1, 2
_COLOURS: Final = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIE Lab"}


@dataclass(frozen=True)
class TiffPixels:
    """How a TIFF stores its first picture, by its tags; `bits` has those of each sample of a pixel."""

    bits: tuple[int, ...]
    photometric: int
    compression: int
    separate: bool
    """Each sample in a plane of its own."""
    sample_format: int
    is_raw: bool
    """It is a camera's raw file, or its first picture is a small preview of another."""

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
    def has_known_compression(self) -> bool:
        """Whether Pillow knows how its pixels are compressed."""
        return self.compression in TiffImagePlugin.COMPRESSION_INFO

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
