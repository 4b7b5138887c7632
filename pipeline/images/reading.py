"""Reading a file of a data set: the one place where an image's bytes are read, whole and of a file that holds still."""

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
    """Return what tells whether a file was touched."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def read_steadily(path: str, flags: int = 0) -> tuple[bytes, Stat | None]:
    """Read a regular file, once more when it changes meanwhile; `flags` are further ones for `os.open`.

    It may also be remote, or lie in an archive: what tells whether it was touched is then what it was listed with, and None here.

    ImageProblem with status 'unavailable'.
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
    """Read a file, with what it was before and after."""
    # O_NONBLOCK: a pipe in the file's place must not make a run wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | flags)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ImageProblem("unavailable", "it is not a regular file")
        # One byte more than there is: a file that grew shows it, and one that did not needs no second call to find its end.
        data = os.read(descriptor, about.st_size + 1)
        while len(data) < about.st_size and (more := os.read(descriptor, about.st_size - len(data))):
            data += more  # at most 2 GB come at once
        return data, stat_of(about), stat_of(os.fstat(descriptor))
    finally:
        os.close(descriptor)


def open_file(root: Path, relative_path: str, digest: bytes | None = None) -> bytes:
    """Read one file of a data set, and nothing outside its root, symbolic links included.

    With `digest` given, the bytes are the ones with this `content_key` or it is a problem.

    ImageProblem with status 'unavailable'.
    """
    data, _ = read_steadily(_place(root, relative_path), os.O_NOFOLLOW)
    if digest is not None and content_key(data) != digest:
        raise ImageProblem("unavailable", "it changed after the scan; run again")
    return data


def _place(root: Path, relative_path: str) -> str:
    """Return where a file is, links followed, if it is inside the root; below `/`, which holds everything, are remote files too."""
    if str(root) == "/" and (address := address_of(relative_path)):
        return address
    address = address_of(root)
    real_root = address or os.path.realpath(root)
    place = f"{real_root}/{relative_path}"
    if address is None:
        real = os.path.realpath(os.path.join(real_root, relative_path))
        if os.path.commonpath([real, real_root]) == real_root:
            return real
    # An archive that the user named may be a link, as in caches of downloads; its members cannot lie elsewhere.
    if ".." in relative_path.split("/") or (address is None and not (inside(place) or ("", ""))[1]):
        raise ImageProblem("unavailable", f"it lies outside {root}")
    return place


Pixels = NDArray[np.uint8] | Image.Image
"""An array of shape (height, width), (height, width, 1), (…, 3) or (…, 4), or a PIL image."""

EXPECTED: Final = "expected a path, a PIL image or a uint8 array of shape (height, width) or (height, width, 3), or several of one kind"
RACY_NS = 2_000_000_000
"""A file touched so shortly before may be changed once more without its times showing it."""

_OPENING = threading.Lock()
"""An image that Pillow has opened is read when its pixels are asked for, which two threads must not do at once."""


def one_by_one(images: Any) -> list[str | Pixels]:
    """Return images as a list: of one or a sequence, of a pandas Series or column, or of an array (n, height, width, 3), uint8.

    DatasetError when there are none, or something else among them.
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
    """Return pixels by the policy that files are decoded by, uint8 of shape (height, width, 3), or raise ImageProblem."""
    if isinstance(image, np.ndarray):
        if image.shape[2:] == (3,):
            return image
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    with _OPENING:
        return decode_opened(image, max_pixels)


def given_key(image: str | Pixels, max_pixels: int) -> bytes:
    """Return the 16 bytes that name an image's content, of a file as everywhere, else of its pixels; ImageProblem where unread."""
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
