"""Reading an image's bytes from a data set: completely, and only if the file does not change meanwhile."""

from __future__ import annotations

import os
import stat
import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import DatasetError
from pipeline.images.archives import inside, read_elsewhere
from pipeline.images.decoding import ImageProblem, content_key, decode_opened
from pipeline.io.digests import content_digest
from pipeline.io.remote import Stat, absolute, address_of


def stat_of(about: os.stat_result) -> Stat:
    """Return the size and times of a file, to detect changes."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def read_steadily(path: str, flags: int = 0) -> tuple[bytes, Stat | None]:
    """Read a regular, remote or archived file and its `Stat`, a second time if it changes meanwhile; `flags` are for `os.open`.

    The stat is None for a remote or archived file, whose changes are detected in its listing.

    ImageProblem with status 'unavailable' if it cannot be read, or changes again.
    """
    try:
        if address_of(path) is not None:
            return read_elsewhere(path), None
        try:
            for _ in range(2):
                data, before, after = _read(path, flags)
                if before == after and len(data) == after[0]:
                    return data, after
        except NotADirectoryError:
            return read_elsewhere(path), None
    except OSError as error:
        raise ImageProblem("unavailable", f"it cannot be read: {error.strerror or error}") from None
    raise ImageProblem("unavailable", "it changes while it is read")


def _read(path: str, flags: int) -> tuple[bytes, Stat, Stat]:
    """Read a file, with its stat before and after."""
    # O_NONBLOCK: a pipe in place of the file must not block a run forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ImageProblem("unavailable", "it is not a regular file")
        # One byte more than the size detects a file that grew, without a second call to find its end.
        data = os.read(descriptor, about.st_size + 1)
        while len(data) < about.st_size and (more := os.read(descriptor, about.st_size - len(data))):
            data += more  # one call reads at most 2 GB
        return data, stat_of(about), stat_of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def open_file(root: Path, relative_path: str, digest: bytes | None = None) -> bytes:
    """Read one file of a data set; symbolic links may not lead outside its root.

    ImageProblem with status 'unavailable' if it cannot be read, is outside, or does not have the `content_key` `digest`, if given.
    """
    data, _ = read_steadily(_place(root, relative_path), os.O_NOFOLLOW)
    if digest is not None and content_key(data) != digest:
        raise ImageProblem("unavailable", "it changed after the scan; run again")
    return data


def _place(root: Path, relative_path: str) -> str:
    """Return the resolved path of a file, or its address if it is remote; ImageProblem if it is outside the root."""
    if str(root) == "/" and (address := address_of(relative_path)):
        return address
    address = address_of(root)
    real_root = address or os.path.realpath(root)
    place = f"{real_root}/{relative_path}"
    if address is None:
        real = os.path.realpath(os.path.join(real_root, relative_path))
        if os.path.commonpath([real, real_root]) == real_root:
            return real
    # An archive may be a symbolic link, as in download caches; its members cannot be elsewhere.
    if ".." in relative_path.split("/") or (address is None and not (inside(place) or ("", ""))[1]):
        raise ImageProblem("unavailable", f"it lies outside {root}")
    return place


Pixels = NDArray[np.uint8] | Image.Image
"""An array of shape (height, width), (height, width, 1), (…, 3) or (…, 4), or a PIL image."""

EXPECTED: Final = "expected a path, a PIL image or a uint8 array of shape (height, width) or (height, width, 3), or several of one kind"
RACY_NS = 2_000_000_000
"""A file modified more recently than this may change again without new times."""

_OPENING = threading.Lock()
"""Pillow reads an opened image when its pixels are first used, which two threads must not do at once."""


def one_by_one(images: Any) -> list[str | Pixels]:
    """Return images as a list, from one image or a sequence, a pandas Series or column, or an array (n, height, width, 3), uint8.

    DatasetError if there are none, or for anything that is not an image.
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
    """Convert an image to RGB by the decoding policy for files, uint8 of shape (height, width, 3); ImageProblem if that fails."""
    if isinstance(image, np.ndarray):
        if image.shape[2:] == (3,):
            return image
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    with _OPENING:
        return decode_opened(image, max_pixels)


def given_key(image: str | Pixels, max_pixels: int) -> bytes:
    """Return the 16-byte digest of an image's content, a file's `content_key` or that of pixels; ImageProblem if it cannot be read."""
    if not isinstance(image, str):
        pixels = np.ascontiguousarray(rgb(image, max_pixels))
        return content_digest(pixels.data.cast("B"), b"pixels %d" % pixels.shape[1])
    path = absolute(image)
    if os.path.isdir(path):
        raise ImageProblem("unavailable", "it is a folder; give the files in it")
    try:
        stat = stat_of(os.stat(path))
    except OSError:  # remote, in an archive, or missing, which `_key` finds out
        stat = None
    kept = stat is not None and max(stat[1:]) < time.time_ns() - RACY_NS
    return _key(path, stat) if kept else _key.__wrapped__(path, stat)


@lru_cache(maxsize=1 << 18)
def _key(path: str, stat: Stat | None) -> bytes:
    """Return the key of a file, cached by its stat, so that it is not read again for each fold."""
    return content_key(open_file(Path("/"), path))
