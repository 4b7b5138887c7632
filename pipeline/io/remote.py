"""Remote files by addresses such as `s3://bucket/photos` through fsspec, and clusters; only named addresses are connected to."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from pipeline.errors import DatasetError, PipelineError, first_line
from pipeline.io.digests import bytes_digest

Stat = tuple[int, int, int]
"""Size (-1 if unknown), mtime_ns and ctime_ns of a file, or other marks that change with its content."""

CONNECT_SECONDS = 10.0

CONNECTIONS = 16
"""Parallel requests, which mostly wait."""

_ADDRESS = re.compile(r"(?!file:)([a-z][a-z0-9+]+):/+")

_MARKS = ("ETag", "etag", "md5Hash", "generation", "content_md5", "Content-MD5", "Digest", "checksum")
_TIMES = (
    "mtime",
    "LastModified",
    "Last-Modified",
    "last_modified",
    "updated",
    "modified",
    "modificationTime",
    "created",
)
"""Fields in which file systems report a file's version or time of change."""


def address_of(path: object) -> str | None:
    """Return the address of a remote file, restoring a `//` that pathlib has shortened; None for a local path."""
    found = _ADDRESS.match(str(path))
    return None if found is None else f"{found[1]}://{str(path)[found.end() :]}"


def absolute(path: object) -> str:
    """Return the address of a remote file, or the absolute path of a local one."""
    return address_of(path) or os.path.abspath(str(path))


def file_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address and the file's name there; DatasetError when its protocol is not available."""
    try:
        import fsspec
    except ImportError:
        raise DatasetError(f"{address}: remote files need fsspec; pip install 'manyheads[remote]'") from None
    try:
        system, name = fsspec.core.url_to_fs(address)
    except Exception as error:  # each protocol's package has errors of its own
        raise DatasetError(f"{address}: cannot be opened ({first_line(error)})") from None
    return system, name


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Convert errors of remote file systems, which may be of any type, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, first_line(error)) from None


def read_remote(address: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a file or its bytes `start` to `end` (exclusive); OSError on failure."""
    system, name = file_system(address)
    with _as_os_errors():
        data = bytes(system.cat_file(name, start=start, end=end))
    # A web server without range requests sends the whole file.
    return data[start:end] if start is not None and end is not None and len(data) > end - start else data


def open_remote(address: str) -> BinaryIO:
    """Open a file for random access; OSError on failure."""
    system, name = file_system(address)
    with _as_os_errors():
        return system.open(name, "rb")  # type: ignore[no-any-return]


def write_remote(address: str, data: bytes) -> None:
    """Write a file atomically; OSError on failure."""
    system, name = file_system(address)
    with _as_os_errors():
        system.makedirs(name.rpartition("/")[0], exist_ok=True)
        system.pipe_file(name, data)


@cache
def list_remote(address: str) -> dict[str, Stat | None]:
    """List a remote folder, cached until `forget_listings`: name -> size and times of a file, or None for a folder.

    OSError when it is missing or cannot be listed; NotADirectoryError when it is a file.
    """
    system, root = file_system(address)
    is_web = address.startswith("http")
    with _as_os_errors(), ThreadPoolExecutor(CONNECTIONS) as threads:
        found = {str(entry["name"]).rstrip("/"): entry for entry in system.ls(root, detail=True)}
        if [*found] == [root.rstrip("/")] and found[root.rstrip("/")]["type"] == "file":
            raise NotADirectoryError(address)
        own = [name for name in found if name != root.rstrip("/") and "?" not in name]
        # A web page of links does not tell sizes and times of their targets.
        about = threads.map(
            lambda name: found[name] | (system.info(name) if is_web and found[name]["type"] != "directory" else {}), own
        )
        names = [unquote(name) if is_web else name for name in own]
        return {name.rpartition("/")[2]: _stat_of(entry) for name, entry in zip(names, about, strict=True)}


def stat_remote(address: str) -> Stat:
    """Return size and times of a remote file; OSError if it is missing."""
    system, name = file_system(address)
    with _as_os_errors():
        found = _stat_of(system.info(name))
    if found is None:
        raise IsADirectoryError(address)
    return found


def forget_listings(address: str) -> None:
    """Clear cached listings, so that a remote file system is read again."""
    list_remote.cache_clear()
    file_system(address)[0].invalidate_cache()


def _stat_of(entry: Mapping[str, Any]) -> Stat | None:
    """Convert a file system's entry into size and times; None for a folder.

    An entry without any mark of change gets the current time, so that the file never counts as unchanged.
    """
    if entry["type"] == "directory":
        return None
    mark = next((entry[key] for key in _MARKS if entry.get(key)), "")
    when = next((entry[key] for key in _TIMES if entry.get(key)), "")
    seconds = when.timestamp() if isinstance(when, datetime) else when
    changed = 0 if mark or isinstance(seconds, str) else int(seconds * (1e6 if seconds > 1e11 else 1e9))
    known = int(bytes_digest(repr((mark, when)).encode())[:14], 16) if mark or when else time.time_ns()
    return -1 if entry.get("size") is None else int(entry["size"]), changed, known


OBJECT_BYTES = 100 << 20
"""Memory for Ray's object store on this machine, through which neither images nor vectors go."""


@dataclass(frozen=True)
class Engine:
    """An engine's name, the address of its cluster (None: start one here) and its number of workers (None: the engine decides)."""

    name: str
    address: str | None = None
    workers: int | None = None

    @staticmethod
    def of(name: str | None, address: str | None = None, workers: int | None = None) -> Engine | None:
        """Return the engine that a user names; None without a name; PipelineError for other options without a name."""
        if name is None and (address or workers):
            raise PipelineError("--address and --workers are of an engine; they need --engine")
        return None if name is None else Engine(name, address, workers)


def require_answer(address: str, start: str) -> None:
    """Check that a process listens at a cluster's address, because engines wait for minutes if none does.

    It connects only to that address; `start` is the command that starts a cluster there.

    Raises
    ------
    PipelineError
        After ten seconds, or twice that for a name with two addresses.
    """
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        if not place.hostname or not place.port:
            raise ValueError("no port")
    except ValueError:
        raise PipelineError(f"--address {address}: expected HOST:PORT, where a cluster runs") from None
    try:
        socket.create_connection((place.hostname, place.port), CONNECT_SECONDS).close()
    except OSError as error:
        raise PipelineError(
            f"--address {address}: {place.hostname} does not answer at port {place.port} ({error.strerror or error}); start a cluster "
            f"there with `{start}`, or leave out --address to have one on this machine"
        ) from None


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Connect to Ray, unless the caller has, and yield its module; PipelineError without Ray, or without the cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # otherwise it reports every cluster to its makers
    try:
        import ray
    except ImportError:
        raise PipelineError("--engine ray: Ray is not installed here; pip install 'manyheads[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address not in (None, "auto", "local"):
        require_answer(address, "ray start --head")
        # Otherwise it tries a port that is not Ray's for a quarter of an hour.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
    if address is None:
        settings |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": OBJECT_BYTES}
    try:
        ray.init(address=address or "local", **settings)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        found = " ".join(str(error).split())[:300]
        raise PipelineError(f"{address or '--engine ray'}: no Ray cluster could be had: {found}") from None
    try:
        yield ray
    finally:
        ray.shutdown()
