"""joblib's backends of many machines: which is chosen, and work spread over it.

Whoever calls us inside `joblib.parallel_config(backend="dask")`, or that of Ray or Spark, has chosen one; `on` does it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import joblib
from joblib import cpu_count

from pipeline.errors import PipelineError
from pipeline.io.remote import CONNECT_SECONDS, Engine, connected, require_answer

__all__ = ["SHARING", "cpu_count", "is_spread", "on", "spread"]

SHARING: ContextVar[int] = ContextVar("SHARING", default=1)
"""How many workers divide the cores and the memory of this machine; those of a cluster have their own."""


def is_spread() -> bool:
    """Whether a backend of many machines is chosen; joblib's own are of this one."""
    return not type(joblib.parallel.get_active_backend()[0]).__module__.startswith("joblib._parallel_backends")


def spread(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Call a function with the arguments of each task on the chosen backend, and yield what it returns, as it comes."""
    backend, _ = joblib.parallel.get_active_backend()
    how = "generator_unordered" if backend.supports_return_generator else "list"  # Ray's has all at once, in the end
    run = joblib.Parallel(n_jobs=-1, return_as=how, pre_dispatch="all", batch_size=1)
    yield from run(joblib.delayed(function)(*task) for task in tasks)


@contextmanager
def on(engine: Engine | None) -> Iterator[None]:
    """Choose the backend of an engine; without one nothing is changed.

    Raises
    ------
    PipelineError
        When it is not installed, or there is no cluster at that address.
    """
    if engine is None:
        yield
        return
    count = None if engine.address else min(engine.workers or cpu_count(), cpu_count())
    with ExitStack() as stack:
        if engine.name == "ray":
            stack.enter_context(connected(engine.address))
            from ray.util.joblib import register_ray

            register_ray()  # type: ignore[no-untyped-call]
            cores = {} if count is None else {"ray_remote_args": {"num_cpus": cpu_count() // count}}
            stack.enter_context(joblib.parallel_config(backend="ray", **cores))
        else:
            try:
                from distributed import Client, LocalCluster
            except ImportError:
                raise PipelineError(
                    "--engine dask: Dask is not installed here; pip install 'manyheads[dask]'"
                ) from None
            if engine.address:
                require_answer(engine.address, "dask scheduler")
            local = {"n_workers": count, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
            try:
                made: Any = engine.address or LocalCluster(**local, silence_logs=logging.ERROR)  # type: ignore[no-untyped-call]
                stack.enter_context(nullcontext() if engine.address else made)
                stack.enter_context(Client(made, timeout=CONNECT_SECONDS))  # type: ignore[no-untyped-call]
            except OSError as error:
                raise PipelineError(f"{engine.address}: no Dask cluster could be had: {error}") from None
            stack.enter_context(joblib.parallel_config(backend="dask"))
        token = SHARING.set(count or 1)
        try:
            yield
        finally:
            SHARING.reset(token)
