"""Reading a file of a data set: nothing outside its root, nothing that changes meanwhile."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from pipeline.images.contents import content_key


class ImageProblem(Exception):
    """One image cannot be used, for a reason the user can act on; never the end of a run.

    `status` is 'unreadable', 'truncated', 'too_many_pixels' or 'unsupported_format', which stay true while the bytes and
    the policy do, or 'unavailable': the file could not be read this time.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


def open_file(root: Path, relative_path: str, digest: bytes | None = None) -> bytes:
    """Read one file of a data set, and nothing outside its root, symbolic links included.

    With `digest` given, the bytes are the ones with this `content_key` or it is a problem. A file that changes while it is
    read is read once more.

    Raises
    ------
    ImageProblem
        With status 'unavailable'.
    """
    real_root = os.path.realpath(root)
    real = os.path.realpath(os.path.join(real_root, relative_path))
    if os.path.commonpath([real, real_root]) != real_root:
        raise ImageProblem("unavailable", f"it lies outside {root}")
    for _ in range(2):
        try:
            data, steady = _read_steadily(real)
        except OSError as error:
            raise ImageProblem("unavailable", f"it cannot be read: {error.strerror or error}") from None
        if steady:
            break
    else:
        raise ImageProblem("unavailable", "it changes while it is read")
    if digest is not None and content_key(data) != digest:
        raise ImageProblem("unavailable", "it changed after the scan; run again")
    return data


def _read_steadily(path: str) -> tuple[bytes, bool]:
    """Read a regular file; also say whether it stayed the same meanwhile."""
    # O_NONBLOCK: a pipe in the file's place must not make a run wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise ImageProblem("unavailable", "it is not a regular file")
        data = io.FileIO(descriptor, closefd=False).readall()
        after = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    same = (before.st_size, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    return data, same and len(data) == after.st_size
