"""Room: what a search takes in memory, and what a limit leaves for fits at once and for what they share."""

from __future__ import annotations

from dataclasses import dataclass

import joblib

from pipeline.config import TuningConfig
from pipeline.heads import Head
from pipeline.heads.tuning.features import BLOCK_BYTES
from pipeline.heads.tuning.on_disk import needed_bytes
from pipeline.heads.tuning.records import Problem
from pipeline.io import memory
from pipeline.store import StoredRows

FREE_SHARE = 0.75
"""Of the memory that is free, what `tuning.memory: auto` takes: the needs are estimates."""

COPIES = 5
"""Times its own size that one fold's work on features in memory takes besides them; scikit-learn turns some to float64."""

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
    return tuning.model_copy(update={"memory": f"{FREE_SHARE * memory.available_bytes() / 1e6:.3f}MB"})


def memory_needed(shape: tuple[int, int]) -> int:
    """Return about how many bytes a search takes at least with features of shape (n, dim), float32, in memory."""
    return (1 + COPIES) * 4 * shape[0] * shape[1]


def memory_needed_on_disk(head: Head, shape: tuple[int, int], n_classes: int) -> int | None:
    """Return the same for features that stay on disk, for a head that can be fitted so; None for another."""
    return None if head.on_disk is None else needed_bytes(head, shape, n_classes)


def memory_needed_to_project(shape: tuple[int, int], pca: int | float, folds: int) -> int:
    """Return about what a search takes on the principal components of features that stay on disk, of shape (n, dim)."""
    kept = 4 * shape[0] * most_components(shape, pca)
    return 4 * BLOCK_BYTES + 40 * shape[1] ** 2 + (folds + 1 + COPIES) * kept


def most_components(shape: tuple[int, int], pca: int | float) -> int:
    """Return how many components there can be; a share of the variance may need all."""
    return shape[1] if isinstance(pca, float) else min(pca, *shape)


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
        each = needed_bytes(problem.head, shape, problem.n_classes)
    elif isinstance(problem.X, StoredRows) and tuning.pca is not None:
        each = 40 * shape[1] ** 2 + COPIES * 4 * shape[0] * most_components(shape, tuning.pca)
    else:
        each, left = COPIES * problem.X.nbytes, limit - problem.X.nbytes
    work = work_bytes if each + work_bytes <= left else 0
    jobs = max(1, min(wanted, left // max(1, each + work)))
    spare = max(0, left - jobs * (each + work))
    return Room(jobs, spare // (2 * jobs), min(shared, spare // 2), work + spare // (2 * jobs))
