"""Engines that spread work over machines: which one and where; and a connection to Ray's, which ends with the block."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError

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
