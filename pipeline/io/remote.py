"""Files of other machines, by addresses such as `s3://bucket/photos`, through fsspec: nothing is connected to that is not named so."""

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
"""Size, mtime_ns and ctime_ns of a file, or what else tells whether it was touched; a size of -1 is not known before it is read."""

CONNECT_SECONDS = 10.0

CONNECTIONS = 16
"""Files that are asked for at a time: most of the time is waiting."""

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
"""Under which names file systems say what tells one version of a file from the next."""


def address_of(path: object) -> str | None:
    """Return the address of a remote file, also where pathlib has left one slash of `://`; None for a path on this machine."""
    found = _ADDRESS.match(str(path))
    return None if found is None else f"{found[1]}://{str(path)[found.end() :]}"


def absolute(path: object) -> str:
    """Return the address of a remote file, or a path from the root of this machine."""
    return address_of(path) or os.path.abspath(str(path))


def file_system(address: str) -> tuple[Any, str]:
    """Return the file system of an address and the file's name there; DatasetError when it is none that is known here."""
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
    """Let an error of a file system, which may be of any kind, be one that callers expect."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(None, first_line(error)) from None


def read_remote(address: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a file, or the bytes of it from `start` to before `end`; OSError where it cannot be."""
    system, name = file_system(address)
    with _as_os_errors():
        data = bytes(system.cat_file(name, start=start, end=end))
    # A web server may know nothing of ranges, and send all.
    return data[start:end] if start is not None and end is not None and len(data) > end - start else data


def open_remote(address: str) -> BinaryIO:
    """Open a file to be read anywhere; OSError where it cannot be."""
    system, name = file_system(address)
    with _as_os_errors():
        return system.open(name, "rb")  # type: ignore[no-any-return]


def write_remote(address: str, data: bytes) -> None:
    """Write a file in one go: others see all of it, or nothing; OSError where it cannot be."""
    system, name = file_system(address)
    with _as_os_errors():
        system.makedirs(name.rpartition("/")[0], exist_ok=True)
        system.pipe_file(name, data)


@cache
def list_remote(address: str) -> dict[str, Stat | None]:
    """Return what a remote folder holds, asked once until `forget_listings`: size and times of each file by its name, None for a folder.

    OSError when it is not there, or cannot be listed; NotADirectoryError when it is a file.
    """
    system, root = file_system(address)
    is_web = address.startswith("http")
    with _as_os_errors(), ThreadPoolExecutor(CONNECTIONS) as threads:
        found = {str(entry["name"]).rstrip("/"): entry for entry in system.ls(root, detail=True)}
        if [*found] == [root.rstrip("/")] and found[root.rstrip("/")]["type"] == "file":
            raise NotADirectoryError(address)
        own = [name for name in found if name != root.rstrip("/") and "?" not in name]
        # A page of links says nothing of what they lead to.
        about = threads.map(
            lambda name: found[name] | (system.info(name) if is_web and found[name]["type"] != "directory" else {}), own
        )
        names = [unquote(name) if is_web else name for name in own]
        return {name.rpartition("/")[2]: _stat_of(entry) for name, entry in zip(names, about, strict=True)}


def stat_remote(address: str) -> Stat:
    """Return size and times of a remote file; OSError where there is none."""
    system, name = file_system(address)
    with _as_os_errors():
        found = _stat_of(system.info(name))
    if found is None:
        raise IsADirectoryError(address)
    return found


def forget_listings(address: str) -> None:
    """Have a file system look anew at what is there."""
    list_remote.cache_clear()
    file_system(address)[0].invalidate_cache()


def _stat_of(entry: Mapping[str, Any]) -> Stat | None:
    """Return size and times for what a file system says of a file; None for a folder.

    Where it says nothing by which a change would show, the time is now: the file is never taken for unchanged.
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
"""Of memory for Ray's objects on this machine: neither images nor vectors go through them."""


@dataclass(frozen=True)
class Engine:
    """An engine by its name, the address of a running cluster, and the number of workers; None starts one here, of as many as it likes."""

    name: str
    address: str | None = None
    workers: int | None = None

    @staticmethod
    def of(name: str | None, address: str | None = None, workers: int | None = None) -> Engine | None:
        """Return the engine that a user names; None without a name, where nothing else may be said either."""
        if name is None and (address or workers):
            raise PipelineError("--address and --workers are of an engine; they need --engine")
        return None if name is None else Engine(name, address, workers)


def require_answer(address: str, start: str) -> None:
    """See that a process listens at a cluster's address, before an engine waits for minutes for one that does not.

    Nothing but that address is asked; `start` is the command that starts a cluster there.

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
    """Yield the module `ray`, connected, also by the caller before; PipelineError when there is no Ray, or no such cluster."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else it tells its makers of every cluster
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
        # Else it asks a port that is not Ray's for a quarter of an hour.
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
