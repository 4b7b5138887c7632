"""Atomic, durable writing of files, and file locks.

A file is written under a temporary name, synced and renamed, and its folder is synced: after a kill or a power loss the final name has
either the old content or the new. A failed `fsync` is never repeated on the same descriptor, as the kernel may have dropped the pages.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

SYSTEM: dict[str, Callable[..., Any]] = {
    "open": os.open,
    "write": os.write,
    "fsync": os.fsync,
    "close": os.close,
    "rename": os.replace,
    "link": os.link,
    "unlink": os.unlink,
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "ftruncate": os.ftruncate,
}
"""Name -> system call: all calls that change the file system, so that tests can record them or make them fail."""

BytesLike = bytes | bytearray | memoryview

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

NOT_ORDINARY = {errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EFBIG}
"""Errors of reading or locking a folder, a forbidden link, a socket, a pipe or device, or a file that is too large."""

REMEDIES = {
    errno.ENOSPC: "free some space there, or write to another place",
    errno.EDQUOT: "free some of your quota, or write to another place",
    errno.EROFS: "write to another place",
    errno.EACCES: "allow it, or choose another place",
    errno.EPERM: "allow it, or choose another place",
    errno.EISDIR: "it is a folder, expected the name of a file",
    errno.ENOTDIR: "a file is where a folder was expected; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the symbolic links on the way to it",
    errno.EIO: "check the disk",
    errno.EINVAL: "name an ordinary file",
    errno.EFBIG: "name a smaller file",
    errno.EMFILE: "close other programs, or raise the limit with `ulimit -n`",
}
"""Error number -> advice, for errors that users can remedy. All others count as bugs of this program."""


def refusal(error: OSError) -> str | None:
    """Describe a file system error and its remedy in one line; None for errors that may be bugs of this program."""
    if error.errno not in REMEDIES:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else "the output"
    return f"{where}: cannot be used ({error.strerror}); {REMEDIES[error.errno]}"


_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, because opening a pipe in place of a file would wait forever."""


def read_file(path: Path, most: int | None = None) -> bytes:
    """Return the content of an ordinary file of at most `most` bytes, without blocking.

    OSError as from the system; `EINVAL` for a pipe or device, `EFBIG` for a larger file.
    """
    with open(open_ordinary(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"It has {size:,} bytes, expected at most {most:,}", str(path))
        return file.read()


def open_ordinary(path: Path, flags: int = 0) -> int:
    """Open an ordinary file for reading, without blocking; return the descriptor. OSError as from the system, `EINVAL` for a pipe."""
    descriptor = os.open(path, os.O_RDONLY | _FLAGS | flags)
    try:
        _require_ordinary(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _require_ordinary(descriptor: int, path: Path) -> os.stat_result:
    state = os.fstat(descriptor)
    if stat.S_ISDIR(state.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(state.st_mode):
        raise OSError(errno.EINVAL, "It is not an ordinary file", str(path))
    return state


_HELD: dict[tuple[int, int], int] = {}
"""(device, inode) of each locked file -> id of the process that holds it; a forked child inherits the table."""


def open_alone(path: Path, flags: int = 0) -> int:
    """Open a file, creating it, for exclusive reading and writing by this process; release it with `close_alone`.

    It takes a POSIX record lock, which ends with its process even if a forked worker lives on; `flock` and HDF5's own locks stay with
    the child. A record lock does not exclude a second user in the same process, and closing any descriptor of the file releases it,
    so `_HELD` is checked first. BlockingIOError when another process holds it, or this one already; OSError when it is a symbolic link
    or no ordinary file (see `NOT_ORDINARY`), or cannot be opened or locked.
    """
    while True:
        if is_held(path):
            raise BlockingIOError(errno.EAGAIN, "This process has it already", str(path))
        flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | _FLAGS
        descriptor = int(SYSTEM["open"](path, flags, 0o666))
        try:
            state = _require_ordinary(descriptor, path)
            _lock(descriptor)
            # The file may have been replaced or moved between the two calls.
            if os.path.samestat(state, os.stat(path, follow_symlinks=False)):
                _HELD[state.st_dev, state.st_ino] = os.getpid()
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except PermissionError as error:  # some systems raise this in place of EAGAIN
        raise BlockingIOError(errno.EAGAIN, error.strerror) from None


def close_alone(descriptor: int) -> None:
    """Close a file that `open_alone` opened; in a forked child the parent keeps the lock."""
    state = os.fstat(descriptor)
    if _HELD.get((state.st_dev, state.st_ino)) == os.getpid():
        del _HELD[state.st_dev, state.st_ino]
    os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether this process holds the file by `open_alone`."""
    try:
        state = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return _HELD.get((state.st_dev, state.st_ino)) == os.getpid()


def locked_elsewhere(path: Path) -> bytes | None:
    """Return the first 4 KB of a file that another process holds by `open_alone`; None if none does."""
    if is_held(path):  # closing a descriptor would release the lock
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | _FLAGS)
        try:
            _lock(descriptor)
        except BlockingIOError:
            return os.pread(descriptor, 4096, 0)
        finally:
            os.close(descriptor)
    return None


STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Defer stop signals until the block ends: an exception inside a callback of libhdf5 is lost or breaks it."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread only
        yield
        return
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    before = {number: signal.signal(number, note) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def require_place(path: Path) -> None:
    """Check that a file can be written to this path, and make its folder: before the work that makes its content.

    OSError as from writing, and for a device such as /dev/null, which a rename would replace.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise PermissionError(errno.EPERM, "It is not an ordinary file", str(path))
    make_folder(path.parent)
    with _named(path):
        remove(write_temporary(path.parent, [], f".{path.name}"))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Make errors name the user's file in place of a temporary one or none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomic(path: Path, data: BytesLike) -> None:
    """Replace a file's content atomically."""
    with _named(path):
        rename(write_temporary(path.parent, [data], f".{path.name}"), path)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file's content atomically, as UTF-8 with newlines as given."""
    write_atomic(path, text.encode("utf-8"))


@dataclass
class Growing:
    """A file that is being written under a temporary name; `written` counts the bytes."""

    path: Path
    target: Path
    descriptor: int
    written: int = 0

    def add(self, data: BytesLike) -> None:
        """Pass bytes to the system, so that they survive a kill of this process."""
        with _named(self.target):
            write_all(self.descriptor, data)
        self.written += len(data)


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Growing]:
    """Write a file as `NAME.*.partial` next to `path` and rename it to `path` when the block ends.

    If the block fails or the process is killed, the partial file stays, unless it is empty.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    with _named(path):
        file = Growing(partial, path, create(partial))
    try:
        yield file
        with _named(path):
            sync(file.descriptor)
            SYSTEM["rename"](partial, path)
    except BaseException:
        if not file.written:
            remove(partial)
        raise
    finally:
        SYSTEM["close"](file.descriptor)
    sync_folder(path.parent)


def write_temporary(folder: Path, parts: Iterable[BytesLike], prefix: str = "") -> Path:
    """Write and sync a new file under a unique name; return its path. On failure the file is removed."""
    path = folder / f"{prefix}.{secrets.token_hex(6)}.tmp"
    descriptor = create(path)
    try:
        try:
            for part in parts:
                write_all(descriptor, part)
            sync(descriptor)
        finally:
            SYSTEM["close"](descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(path)
        raise
    return path


def create(path: Path) -> int:
    """Create a file that must not exist yet; return a descriptor for writing."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    return int(SYSTEM["open"](path, flags, 0o666))


def write_all(descriptor: int, data: BytesLike) -> None:
    """Write every byte, as one system call may write fewer."""
    rest = memoryview(data).cast("B")
    while rest:
        # Linux takes 2 GiB at most in one call, macOS refuses more.
        written = SYSTEM["write"](descriptor, rest[: 1 << 30])
        if written <= 0:
            raise OSError(errno.EIO, "the system wrote nothing")
        rest = rest[written:]


def sync(descriptor: int) -> None:
    """Wait until a file's content is on the disk."""
    if sys.platform == "darwin":  # fsync there leaves the data in the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        return
    SYSTEM["fsync"](descriptor)


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        SYSTEM["fsync"](descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename a synced file, replacing the target, and sync the folder. The source is removed on failure."""
    try:
        SYSTEM["rename"](source, target)
    except OSError:
        with contextlib.suppress(OSError):
            remove(source)
        raise
    sync_folder(target.parent)


def publish(source: Path, target: Path) -> None:
    """Rename a synced file and sync the folder; FileExistsError if the target exists.

    The source is removed in every case.
    """
    try:
        try:
            SYSTEM["link"](source, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            # Without hard links: reserve the name, then replace the empty file, which no reader accepts.
            SYSTEM["close"](create(target))
            SYSTEM["rename"](source, target)
        else:
            remove(source)
    except OSError:
        with contextlib.suppress(OSError):
            remove(source)
        raise
    sync_folder(target.parent)


def remove(path: Path) -> None:
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError):
        SYSTEM["unlink"](path)


def make_folder(path: Path) -> None:
    """Create a folder with its parents if needed, and sync each name; NotADirectoryError for a file of that name."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        SYSTEM["mkdir"](path)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    except FileNotFoundError:  # though its parent exists: a file system without new folders, such as /proc
        raise PermissionError(errno.EPERM, "No folder can be made there", str(path)) from None
    sync_folder(path.parent)
