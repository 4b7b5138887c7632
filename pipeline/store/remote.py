"""Files of object stores (`s3://`, `gs://`, ...), through fsspec: which there are, one written, one read. None is ever changed.

An object is there as a whole or not at all, which is all that immutable files need; there are no locks and no renames.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.store.format import TRAILER


def is_remote(place: str | Path) -> bool:
    """Whether a place is an address, such as `s3://bucket/folder`, and no path."""
    return "://" in str(place)


def names(address: str) -> list[str]:
    """Return the names of what is in a folder, in order; none where there is no such folder."""
    with _explained(address), _opened(address) as (system, path):
        system.invalidate_cache()
        try:
            return sorted(str(name).rstrip("/").rpartition("/")[2] for name in system.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []


def put(address: str, parts: Iterable[bytes | memoryview]) -> None:
    """Write one object, from memory, in one go."""
    with _explained(address), _opened(address) as (system, path):
        system.makedirs(path.rpartition("/")[0], exist_ok=True)
        system.pipe_file(path, b"".join(parts))


def fetch(address: str, head_only: bool = False) -> mmap.mmap:
    """Return the bytes of an object, in a file without a name that goes when nobody has it any more.

    With `head_only` just the head of a store's file and its trailer are fetched, and zeros stand for the vectors.
    """
    with _explained(address), _opened(address) as (system, path):
        size = int(system.info(path)["size"])
        if size <= TRAILER.size:
            raise StoreError(f"{address}: has {size} bytes, too few for a feature store file")
        if head_only:
            data = mmap.mmap(-1, size)
            data[-TRAILER.size :] = system.cat_file(path, size - TRAILER.size, size)
            head = min(int(TRAILER.unpack(data[-TRAILER.size :])[1]), size - TRAILER.size)
            data[:head] = system.cat_file(path, 0, head)
            return data
        with tempfile.TemporaryFile() as file:
            with system.open(path, "rb") as source:
                shutil.copyfileobj(source, file, 16 << 20)
            file.flush()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@contextmanager
def _opened(address: str) -> Iterator[tuple[Any, str]]:
    import fsspec

    yield fsspec.core.url_to_fs(address)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Say in one line what a file system, or the library behind it, has against an address."""
    try:
        yield
    except StoreError:
        raise
    except ImportError as error:
        raise StoreError(
            f"{address}: cannot be opened here ({error}); install manyheads[remote], and what fsspec needs for this kind of address, "
            "such as s3fs"
        ) from None
    except Exception as error:  # each kind of file system has its own
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise StoreError(f"{address}: cannot be read or written: {found}") from error
