"""Images as Python code gives them: paths, PIL images and arrays of pixels, one or many."""

from __future__ import annotations

import os
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DatasetError
from pipeline.images.contents import content_key
from pipeline.images.decoding import decode_opened
from pipeline.images.reading import ImageProblem, open_file, stat_of
from pipeline.io.digests import content_digest
from pipeline.io.remote import Stat, absolute

Pixels = NDArray[np.uint8] | Image.Image
"""An array of shape (height, width), (height, width, 1), (…, 3) or (…, 4), or a PIL image."""

EXPECTED: Final = "expected a path, a PIL image or a uint8 array of shape (height, width) or (height, width, 3), or several of one kind"
RACY_NS = 2_000_000_000
"""A file touched so shortly before may be changed once more without its times showing it."""

_OPENING = threading.Lock()
"""An image that Pillow has opened is read when its pixels are asked for, which two threads must not do at once."""


def one_by_one(images: Any) -> list[str | Pixels]:
    """Return images as a list: of one or a sequence, of a pandas Series or column, or of an array (n, height, width, 3), uint8.

    Raises
    ------
    DatasetError
        When there are none, or something else among them.
    """
    if hasattr(images, "iloc"):
        images = images.to_numpy().reshape(-1)
    elif isinstance(images, str | os.PathLike | Image.Image) or _is_array(images) or not hasattr(images, "__iter__"):
        images = [images]
    found = [os.fsdecode(image) if isinstance(image, str | os.PathLike) else image for image in images]
    wrong = next((image for image in found if not (isinstance(image, str | Image.Image) or _is_array(image))), found)
    if wrong is not found or not found:
        about = f" of {wrong.dtype}, shape {wrong.shape}" if isinstance(wrong, np.ndarray) else ""
        raise DatasetError(
            f"got {f'a {type(wrong).__name__}{about}' if found else 'no images (0 samples)'}; {EXPECTED}"
        )
    return found


def _is_array(image: Any) -> bool:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not image.size:
        return False
    return image.ndim == 2 or (image.ndim == 3 and image.shape[2] in {1, 3, 4})


def rgb(image: Pixels, max_pixels: int) -> NDArray[np.uint8]:
    """Return pixels by the policy that files are decoded by: uint8 of shape (height, width, 3).

    Raises
    ------
    ImageProblem
        When they cannot be read, or are more than allowed.
    """
    if isinstance(image, np.ndarray):
        if image.shape[2:] == (3,):
            return image
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    with _OPENING:
        return decode_opened(image, max_pixels)


def given_key(image: str | Pixels, max_pixels: int) -> bytes:
    """Return the 16 bytes that name an image's content: of a file as everywhere, else of its pixels.

    Raises
    ------
    ImageProblem
        When it cannot be read.
    """
    if not isinstance(image, str):
        pixels = np.ascontiguousarray(rgb(image, max_pixels))
        return content_digest(pixels.data.cast("B"), b"pixels %d" % pixels.shape[1])
    path = absolute(image)
    if os.path.isdir(path):
        raise ImageProblem("unavailable", "it is a folder; give the files in it")
    try:
        stat = stat_of(os.stat(path))
    except OSError:  # remote, in an archive, or nowhere, which the reader knows
        stat = None
    kept = stat is not None and max(stat[1:]) < time.time_ns() - RACY_NS
    return _key(path, stat) if kept else _key.__wrapped__(path, stat)


@lru_cache(maxsize=1 << 18)
def _key(path: str, stat: Stat | None) -> bytes:
    """Return the key of a file as it was at these times; so it is not read again for each fold."""
    return content_key(open_file(Path("/"), path))
