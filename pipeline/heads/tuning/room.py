"""Room: what a search takes in memory, and what a limit leaves for fits at once and for what they share."""

from __future__ import annotations

from dataclasses import dataclass

import joblib

from pipeline.config import TuningConfig
from pipeline.heads.head import Head
from pipeline.heads.tuning import features
from pipeline.heads.tuning.evaluation import works_on_disk
from pipeline.heads.tuning.records import Problem
from pipeline.io import process

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


@dataclass(frozen=True)
class Room:
    """How many folds are worked on at once, what each may take, and what may be kept from one round to the next."""

    jobs: int
    spare_bytes: int
    shared_bytes: int
    work_bytes: int | None
    """What each may take besides copies of the features; None without a limit."""


def limited(tuning: TuningConfig) -> TuningConfig:
    """Return the section with `memory: auto` turned into the size it means here and now."""
    if tuning.memory_bytes is not None:
        return tuning
    return tuning.model_copy(update={"memory": f"{FREE_SHARE * process.available_bytes() / 1e6:.3f}MB"})


def memory_needed(shape: tuple[int, int]) -> int:
    """Return about how many bytes a search takes at least with features of shape (n, dim), float32, in memory."""
    return (1 + COPIES) * 4 * shape[0] * shape[1]


def memory_needed_on_disk(
    head: Head, shape: tuple[int, int], width: int, pca: int | float | None = None, folds: int = 1
) -> int | None:
    """Return the same for features that stay on disk and a target of so many numbers, worked on there or as principal components; None for a head that cannot."""
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
        return Room(wanted, SPARE_BYTES, shared, None)
    shape, left = problem.X.shape, limit
    if problem.on_disk:
        each = memory_needed_on_disk(problem.head, shape, problem.width) or 0
    elif tuning.pca is not None and features.on_disk(problem.X):
        each = 40 * shape[1] ** 2 + COPIES * _components_bytes(shape, tuning.pca)
    else:
        each, left = COPIES * problem.X.nbytes, limit - problem.X.nbytes
    work = work_bytes if each + work_bytes <= left else 0
    jobs = max(1, min(wanted, left // max(1, each + work)))
    spare = max(0, left - jobs * (each + work))
    return Room(jobs, spare // (2 * jobs), min(shared, spare // 2), work + spare // (2 * jobs))
