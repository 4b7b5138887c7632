"""Resources for fits: the memory of a search, the number of parallel fits within a limit, and distributed joblib backends.

A caller chooses a distributed backend by `joblib.parallel_config(backend="dask")`, or that of Ray or Spark; `on` chooses it by name.
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
"""Share of the free memory that `tuning.memory: auto` uses; the rest is a reserve, as needs are estimates."""

COPIES = 5
"""Memory of one fold's work besides the features in memory, as a multiple of these; scikit-learn converts some to float64."""

PER_SCORE, PER_WEIGHT, PER_PRODUCT = 28, 200, 32
"""Bytes that a linear solver holds per row and class, per dimension and class, and per pair of dimensions, including the copies
of L-BFGS and the workspace of an eigendecomposition."""

SHARED_BYTES_FLOOR = 256 << 20
SHARED_BYTES_FACTOR = 8
"""The folds' shared work is kept up to this multiple of the feature matrix's size, or the floor if larger."""

SPARE_BYTES = 64 << 20
"""Memory beyond the minimum for each fold's work on disk, without a limit."""

SHARING: ContextVar[int] = ContextVar("SHARING", default=1)
"""Number of workers that share the cores and the memory of this machine; 1 on a cluster, whose workers have their own."""


class Room(NamedTuple):
    """The number of folds in parallel, the memory for work kept between rounds, and each fold's `Problem.work_bytes`."""

    jobs: int
    shared_bytes: int
    work_bytes: int | None


def limited(tuning: TuningConfig) -> TuningConfig:
    """Return the config section with `memory: auto` resolved to a share of the memory now available."""
    if tuning.memory_bytes is not None:
        return tuning
    return tuning.model_copy(update={"memory": f"{FREE_SHARE * process.available_bytes() / 1e6:.3f}MB"})


def divided(tuning: TuningConfig) -> TuningConfig:
    """Return the section for one worker: a value of `auto` becomes its share of this machine's cores or memory."""
    workers, limit = SHARING.get(), limited(tuning).memory_bytes
    changes: dict[str, int | str] = {}
    if tuning.jobs == "auto" and workers > 1:
        changes["jobs"] = max(1, joblib.cpu_count() // workers)
    if limit and tuning.memory == "auto" and workers > 1:
        changes["memory"] = f"{limit // workers / 1e6:.3f}MB"
    return tuning.model_copy(update=changes)


def memory_needed(shape: tuple[int, int]) -> int:
    """Return the estimated minimum of bytes for a search with features of shape (n, dim), float32, in memory."""
    return (1 + COPIES) * 4 * shape[0] * shape[1]


def memory_needed_on_disk(
    head: Head, shape: tuple[int, int], width: int, pca: int | float | None = None, folds: int = 1
) -> int | None:
    """Return the estimated minimum of bytes with features on disk, used there or as principal components; None if the head cannot.

    width : number of classes, labels or numbers predicted per image
    """
    n, dim = shape
    if pca is not None:
        return 4 * features.BLOCK_BYTES + 40 * dim**2 + (folds + 1 + COPIES) * _components_bytes(shape, pca)
    if not works_on_disk(head):
        return None
    held = problem_bytes(n, dim, 1 if width == 2 else width)
    return n * (32 + 12 * width) + 6 * features.BLOCK_BYTES + PER_PRODUCT * dim**2 + 2 * held


def problem_bytes(n: int, dim: int, columns: int) -> int:
    """Return the estimated bytes, besides the features, for solving one linear problem of n rows with `columns` scores each."""
    return columns * (PER_SCORE * n + PER_WEIGHT * dim)


def _components_bytes(shape: tuple[int, int], pca: int | float) -> int:
    """Return the maximum size of the components; a share of the variance may need all of them."""
    return 4 * shape[0] * (shape[1] if isinstance(pca, float) else min(pca, *shape))


def room_for(problem: Problem, tuning: TuningConfig, work_bytes: int = 0) -> Room:
    """Divide the memory limit of a search between parallel folds and kept work; `auto` must be resolved already.

    work_bytes : memory for a fold's shared work besides copies of the features, granted if it fits
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
    """Whether a distributed backend is active, that is, none of joblib's own."""
    return not type(joblib.parallel.get_active_backend()[0]).__module__.startswith("joblib._parallel_backends")


def spread(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Call a function with the arguments of each task on the active backend, and yield the results in the order of the tasks."""
    backend, _ = joblib.parallel.get_active_backend()
    how = "generator" if backend.supports_return_generator else "list"  # Ray returns all results at the end
    run = joblib.Parallel(n_jobs=-1, return_as=how, pre_dispatch="all", batch_size=1)
    yield from run(joblib.delayed(function)(*task) for task in tasks)


@contextmanager
def on(engine: Engine | None) -> Iterator[None]:
    """Activate the backend of an engine; None changes nothing.

    PipelineError if it is not installed, or no cluster answers at its address.
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
                raise PipelineError(f"{engine.address}: no connection to a Dask cluster: {error}") from None
            stack.enter_context(joblib.parallel_config(backend="dask"))
        token = SHARING.set(count or 1)
        try:
            yield
        finally:
            SHARING.reset(token)
