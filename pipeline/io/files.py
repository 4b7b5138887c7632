"""Writing files so that a name only ever shows whole, synced content.

A file is written under a temporary name, synced, renamed, and its folder is synced: after a kill or a power loss the final name shows
the old content or the new. A failed `fsync` is never repeated on the same descriptor, as the kernel may have dropped the pages.
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
"""Name -> the operating system's function: every call that changes the file system, so that tests can make it fail, or record it."""

BytesLike = bytes | bytearray | memoryview

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

NOT_ORDINARY = {errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EINVAL, errno.EFBIG}
"""What reading or locking says of a folder, a link where none may be, a socket, a pipe or device, and a file too large."""

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
"""What the file system refuses to users -> what they can do. Every other error number is taken for a bug of ours."""


def refusal(error: OSError) -> str | None:
    """Say in one line what the file system refuses and what to do about it; None where it may be a bug of ours."""
    if error.errno not in REMEDIES:
        return None
    where = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else "the output"
    return f"{where}: cannot be used ({error.strerror}); {REMEDIES[error.errno]}"


_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
"""Not waiting: a pipe that somebody put in place of a file would be waited for forever."""


def read_file(path: Path, most: int | None = None) -> bytes:
    """Return every byte of an ordinary file, of at most so many bytes; never waits.

    OSError as from the system; `EINVAL` for a pipe or device, `EFBIG` for a larger file.
    """
    with open(open_ordinary(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most is not None and size > most:
            raise OSError(errno.EFBIG, f"It has {size:,} bytes, expected at most {most:,}", str(path))
        return file.read()


def open_ordinary(path: Path, flags: int = 0) -> int:
    """Open an ordinary file for reading, without waiting; return the descriptor. OSError as from the system, `EINVAL` for a pipe."""
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
"""(device, inode) of each file that a process has for itself -> its process id; a forked child inherits the table."""


def open_alone(path: Path, flags: int = 0) -> int:
    """Open a file for reading and writing by this process alone, creating it; give it back with `close_alone`.

    A POSIX record lock, because it dies with its process even when a forked worker lives on; `flock` and HDF5's own locks
    stay with the child. Such a lock does not keep out a second user of the same process, and closing any descriptor of the
    file gives it up: so a table of held files goes first. BlockingIOError when another process has it, or this one already; OSError
    when it is a symbolic link or no ordinary file (see `NOT_ORDINARY`), or cannot be opened or locked.
    """
    while True:
        if is_held(path):
            raise BlockingIOError(errno.EAGAIN, "This process has it already", str(path))
        flags |= os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | _FLAGS
        descriptor = int(SYSTEM["open"](path, flags, 0o666))
        try:
            state = _require_ordinary(descriptor, path)
            _lock(descriptor)
            # It may have been replaced or set aside between the two calls.
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
    except PermissionError as error:  # what some systems say for EAGAIN
        raise BlockingIOError(errno.EAGAIN, error.strerror) from None


def close_alone(descriptor: int) -> None:
    """Close what `open_alone` opened; in a forked child, whose parent goes on having it, nothing else changes."""
    state = os.fstat(descriptor)
    if _HELD.get((state.st_dev, state.st_ino)) == os.getpid():
        del _HELD[state.st_dev, state.st_ino]
    os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether this process has the file by `open_alone`."""
    try:
        state = os.stat(path, follow_symlinks=False)
    except OSError:
        return False
    return _HELD.get((state.st_dev, state.st_ino)) == os.getpid()


def locked_elsewhere(path: Path) -> bytes | None:
    """Return what stands in a file that another process has by `open_alone`, its first 4 KB; None where none has it."""
    if is_held(path):  # closing a descriptor would give the lock up
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
    """Let a signal to stop wait until the block ends: libhdf5 drops what is raised while it calls back, or trips over it."""
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
    """See that a file can be written under this name, and make its folder: before the work whose result it is to hold.

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
    """Let errors name the file that the user knows, in place of a temporary one or none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def write_atomic(path: Path, data: BytesLike) -> None:
    """Replace a file's content in one step."""
    with _named(path):
        rename(write_temporary(path.parent, [data], f".{path.name}"), path)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file's content in one step, as UTF-8 with the newlines as given."""
    write_atomic(path, text.encode("utf-8"))


@dataclass
class Growing:
    """A file that is being written beside the name it will have; `written` counts the bytes."""

    path: Path
    target: Path
    descriptor: int
    written: int = 0

    def add(self, data: BytesLike) -> None:
        """Hand bytes to the system, so that they outlive this process."""
        with _named(self.target):
            write_all(self.descriptor, data)
        self.written += len(data)


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Growing]:
    """Open a file that grows beside `path` as `NAME.*.partial` and takes that name when the block ends.

    Where the block fails or the process is killed, what was written before stays there; an empty file does not.
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
    """Write and sync a new file under a name of its own; return its path. Nothing is left behind when it fails."""
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
    """Write every byte; the system may take fewer than it is given."""
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
    """Give a synced file its final name, replacing what had it, and sync the folder. The source is removed on failure."""
    try:
        SYSTEM["rename"](source, target)
    except OSError:
        with contextlib.suppress(OSError):
            remove(source)
        raise
    sync_folder(target.parent)


def publish(source: Path, target: Path) -> None:
    """Give a synced file its final name only where nothing has that name yet, else FileExistsError; sync the folder.

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
    """Remove a file; one that is gone already is fine."""
    with contextlib.suppress(FileNotFoundError):
        SYSTEM["unlink"](path)


def make_folder(path: Path) -> None:
    """Create a folder with its parents and sync the name of each; one that exists is fine, a file of that name is not."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        SYSTEM["mkdir"](path)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    except FileNotFoundError:  # though its parent is there: a file system that has no room for new names, such as /proc
        raise PermissionError(errno.EPERM, "No folder can be made there", str(path)) from None
    sync_folder(path.parent)
