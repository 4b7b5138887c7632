"""Reading a file of a data set: the one place where an image's bytes are read, whole and of a file that holds still."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.images.archives import inside, read_elsewhere
from pipeline.images.contents import content_key
from pipeline.io.remote import Stat, address_of


class ImageProblem(Exception):
    """One image cannot be used, for a reason the user can act on; never the end of a run.

    `status` is 'unreadable', 'truncated', 'too_many_pixels' or 'unsupported_format', which stay true while the bytes and
    the policy do, or 'unavailable': the file could not be read this time.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def stat_of(about: os.stat_result) -> Stat:
    """Return what tells whether a file was touched."""
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def read_steadily(path: str, flags: int = 0) -> tuple[bytes, Stat | None]:
    """Read a regular file, once more when it changes meanwhile; `flags` are further ones for `os.open`.

    It may also be remote, or lie in an archive: what tells whether it was touched is then what it was listed with, and None here.

    Raises
    ------
    ImageProblem
        With status 'unavailable'.
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

    Raises
    ------
    ImageProblem
        With status 'unavailable'.
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
