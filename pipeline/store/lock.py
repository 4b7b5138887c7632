"""The lock of a store: one writer at a time, and the second is told who the first is.

A POSIX record lock (`fcntl.lockf`), because it dies with its process even when a forked worker lives on; `flock` and
HDF5's own locks stay with the child. Such a lock does not keep out a second writer of the same process, and closing any
descriptor of the file gives it up: so a table of held locks goes first, and nobody else opens the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.errors import StoreError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "LOCK"
_HELD: dict[tuple[int, int], int] = {}
"""(device, inode) of each lock file that a process holds -> its process id; a forked child inherits the table."""


@dataclass
class Lock:
    """A lock that is held until `release`."""

    descriptor: int
    key: tuple[int, int]
    process: int

    def release(self) -> None:
        """Give the lock up; a forked child has none to give up, and a second call does nothing."""
        if self.descriptor < 0 or self.process != os.getpid():
            return
        _HELD.pop(self.key, None)
        os.close(self.descriptor)
        self.descriptor = -1


def acquire(folder: Path) -> Lock:
    """Take the lock of a store.

    Raises
    ------
    StoreError
        When another writer has it: says which process, on which host, since when.
    """
    descriptor = int(files.SYSTEM["open"](folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666))
    status = os.fstat(descriptor)
    key = (status.st_dev, status.st_ino)
    if _HELD.get(key) == os.getpid():
        # Closing the new descriptor would give up the lock; it is leaked on purpose in this rare mistake.
        raise StoreError(f"{folder}: this process is writing to it already; close that writer first")
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = _describe(os.pread(descriptor, 4096, 0))
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, PermissionError)):
            raise StoreError(f"{folder}: is being written by {holder}; wait until it ends, or stop it") from None
        raise StoreError(
            f"{folder}: cannot be locked here ({error.strerror}); put the store on a file system that has locks"
        ) from None
    _HELD[key] = os.getpid()
    lock = Lock(descriptor, key, os.getpid())
    try:
        note = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        files.SYSTEM["ftruncate"](descriptor, 0)
        files.write_all(descriptor, json.dumps(note).encode())
    except BaseException:
        lock.release()
        raise
    return lock


def holder(folder: Path) -> str | None:
    """Say who writes to a store now, or None when nobody does."""
    try:
        status = (folder / LOCK).stat()
    except OSError:
        return None
    if _HELD.get((status.st_dev, status.st_ino)) == os.getpid():
        return "this process"
    if fcntl is None:
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / LOCK, os.O_RDWR)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return _describe(os.pread(descriptor, 4096, 0))
        finally:
            os.close(descriptor)
    return None


def _describe(data: bytes) -> str:
    try:
        note: dict[str, Any] = json.loads(data)
        return f"process {int(note['pid'])} on {str(note['host'])!r} since {str(note['since'])!r}"
    except (ValueError, KeyError, TypeError):
        return "another process"
