"""Where fits run: what a search takes in memory, what a limit leaves for fits at once, and joblib's backends of many machines.

Whoever calls us inside `joblib.parallel_config(backend="dask")`, or that of Ray or Spark, has chosen one; `on` does it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import joblib

from pipeline.config import TuningConfig
from pipeline.errors import PipelineError
from pipeline.heads.head import Head
from pipeline.heads.tuning import features
from pipeline.heads.tuning.evaluation import Problem, works_on_disk
from pipeline.io import process
from pipeline.io.remote import CONNECT_SECONDS, Engine, connected, require_answer

FREE_SHARE = 0.75
"""Of the memory that is free, what `tuning.memory: auto` takes: the needs are estimates."""

COPIES = 5
"""Times its own size that one fold's work on features in memory takes besides them; scikit-learn turns some to float64."""

PER_SCORE, PER_WEIGHT, PER_PRODUCT = 28, 200, 32
"""Bytes a linear solver holds per row and class, per dimension and class, and per pair of dimensions; the copies that L-BFGS
keeps and the workspace of an eigendecomposition are among them."""

SHARED_BYTES_FLOOR = 256 << 20
SHARED_BYTES_FACTOR = 8
"""What folds prepare and share is kept up to this many times the feature matrix, or the floor."""

SPARE_BYTES = 64 << 20
"""What each fold's work on disk may take beyond the least where there is no limit."""

SHARING: ContextVar[int] = ContextVar("SHARING", default=1)
"""How many workers divide the cores and the memory of this machine; those of a cluster have their own."""


class Room(NamedTuple):
    """How many folds are worked on at once, what may be kept from one round to the next, and what each may take as `Problem` has it."""

    jobs: int
    shared_bytes: int
    work_bytes: int | None


def limited(tuning: TuningConfig) -> TuningConfig:
    """Return the section with `memory: auto` turned into the size it means here and now."""
    if tuning.memory_bytes is not None:
        return tuning
    return tuning.model_copy(update={"memory": f"{FREE_SHARE * process.available_bytes() / 1e6:.3f}MB"})


def divided(tuning: TuningConfig) -> TuningConfig:
    """Leave each worker of this machine its share of the cores and of the memory, where the section says nothing of them."""
    workers, limit = SHARING.get(), limited(tuning).memory_bytes
    changes: dict[str, int | str] = {}
    if tuning.jobs == "auto" and workers > 1:
        changes["jobs"] = max(1, joblib.cpu_count() // workers)
    if limit and tuning.memory == "auto" and workers > 1:
        changes["memory"] = f"{limit // workers / 1e6:.3f}MB"
    return tuning.model_copy(update=changes)


def memory_needed(shape: tuple[int, int]) -> int:
    """Return about how many bytes a search takes at least with features of shape (n, dim), float32, in memory."""
    return (1 + COPIES) * 4 * shape[0] * shape[1]


def memory_needed_on_disk(
    head: Head, shape: tuple[int, int], width: int, pca: int | float | None = None, folds: int = 1
) -> int | None:
    """Return the same for features that stay on disk, worked on there or as principal components; None for a head that cannot.

    width : the classes, labels or numbers that are said of an image
    """
    n, dim = shape
    if pca is not None:
        return 4 * features.BLOCK_BYTES + 40 * dim**2 + (folds + 1 + COPIES) * _components_bytes(shape, pca)
    if not works_on_disk(head):
        return None
    held = problem_bytes(n, dim, 1 if width == 2 else width)
    return n * (32 + 12 * width) + 6 * features.BLOCK_BYTES + PER_PRODUCT * dim**2 + 2 * held


def problem_bytes(n: int, dim: int, columns: int) -> int:
    """Return about what solving one linear problem of n rows, with so many scores each, takes besides the features."""
    return columns * (PER_SCORE * n + PER_WEIGHT * dim)


def _components_bytes(shape: tuple[int, int], pca: int | float) -> int:
    """Return the size of the most components there can be; a share of the variance may need all."""
    return 4 * shape[0] * (shape[1] if isinstance(pca, float) else min(pca, *shape))


def room_for(problem: Problem, tuning: TuningConfig, work_bytes: int = 0) -> Room:
    """Divide the memory a search may take; `auto` has become a size before, or there is no limit.

    work_bytes : what a fold's work takes besides copies of the features, if there is so much room
    """
    limit = tuning.memory_bytes
    wanted = joblib.cpu_count() if tuning.jobs == "auto" else tuning.jobs
    shared = max(SHARED_BYTES_FLOOR, SHARED_BYTES_FACTOR * problem.X.nbytes)
    if limit is None:
        return Room(wanted, shared, None)
    shape, left = problem.X.shape, limit
    if problem.on_disk:
        each = memory_needed_on_disk(problem.head, shape, problem.target.width) or 0
    elif tuning.pca is not None and features.on_disk(problem.X):
        each = 40 * shape[1] ** 2 + COPIES * _components_bytes(shape, tuning.pca)
    else:
        each, left = COPIES * problem.X.nbytes, limit - problem.X.nbytes
    work = work_bytes if each + work_bytes <= left else 0
    jobs = max(1, min(wanted, left // max(1, each + work)))
    spare = max(0, left - jobs * (each + work))
    return Room(jobs, min(shared, spare // 2), work + spare // (2 * jobs))


def is_spread() -> bool:
    """Whether a backend of many machines is chosen; joblib's own are of this one."""
    return not type(joblib.parallel.get_active_backend()[0]).__module__.startswith("joblib._parallel_backends")


def spread(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Call a function with the arguments of each task on the chosen backend, and yield what it returns, in their order."""
    backend, _ = joblib.parallel.get_active_backend()
    how = "generator" if backend.supports_return_generator else "list"  # Ray's has all at once, in the end
    run = joblib.Parallel(n_jobs=-1, return_as=how, pre_dispatch="all", batch_size=1)
    yield from run(joblib.delayed(function)(*task) for task in tasks)


@contextmanager
def on(engine: Engine | None) -> Iterator[None]:
    """Choose the backend of an engine; without one nothing is changed.

    PipelineError where it is not installed, or there is no cluster at that address.
    """
    if engine is None:
        yield
        return
    count = None if engine.address else min(engine.workers or joblib.cpu_count(), joblib.cpu_count())
    with ExitStack() as stack:
        if engine.name == "ray":
            stack.enter_context(connected(engine.address))
            from ray.util.joblib import register_ray

            register_ray()  # type: ignore[no-untyped-call]
            cores = {} if count is None else {"ray_remote_args": {"num_cpus": joblib.cpu_count() // count}}
            stack.enter_context(joblib.parallel_config(backend="ray", **cores))
        else:
            try:
                from distributed import Client, LocalCluster
            except ImportError:
                raise PipelineError(
                    "--engine dask: Dask is not installed here; pip install 'manyheads[dask]'"
                ) from None
            local = {"n_workers": count, "threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": None}
            if engine.address:
                require_answer(engine.address, "dask scheduler")
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
