"""What names an image's content wherever one is named: in the index, the stores and the failures."""

from __future__ import annotations

from typing import Final

from pipeline.images.kinds import START_BYTES, kind_of
from pipeline.images.png import odd_transparency
from pipeline.images.tiff import TiffPixels
from pipeline.io.digests import content_digest

_REVISION: Final = b"decode 3"
"""Sets apart the contents that version 2 of the decode policy took for other pixels."""


def content_key(data: bytes) -> bytes:
    """Return the 16 bytes that name an image's content in the index, the stores and the failures.

    It is the digest of its bytes, except for the few kinds of files that earlier versions took for other pixels: those have
    a name of their own, so that vectors made of the wrong pixels are never taken for theirs.
    """
    return content_digest(data, _REVISION if is_read_otherwise(data) else b"")


def is_read_otherwise(data: bytes) -> bool:
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
