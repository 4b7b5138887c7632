"""Engines that spread work over machines: which one and where; and a connection to Ray's, which ends with the block."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import PipelineError

CONNECT_SECONDS = 10.0

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
    """Yield the module `ray`, connected; a connection that the caller has already is used and stays.

    Raises
    ------
    PipelineError
        When Ray is not installed, or there is no cluster at that address.
    """
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
        os.environ.setdefault(
            "RAY_gcs_server_port_wait_time_s", "1"
        )  # else it asks a port that is not Ray's for a quarter of an hour
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
