"""Heads on features that stay on disk: each pass reads a block of rows, adds what it says to sums, and lets it go.

The optimum is the one that is found in memory. Only sums over rows are kept: counts and means per class for centroids, the
products X'X and X'y for ridge, and for logistic regression and the linear SVM the same solver as in memory, whose two
products with the features per step are made block by block. A fit gives an ordinary fitted scikit-learn pipeline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from pipeline.errors import HeadError
from pipeline.heads import Head, Params
from pipeline.heads.fast.block_fits import (
    PER_PRODUCT,
    prepare_centroids,
    prepare_path,
    prepare_ridge,
    problem_bytes,
    solve_centroids,
    solve_path,
    solve_ridge,
)
from pipeline.heads.fast.linear import hinge_family, logistic_family
from pipeline.heads.tuning.evaluation import Evaluator, answers, counted, failed
from pipeline.heads.tuning.features import BLOCK_BYTES, blocks
from pipeline.heads.tuning.records import FoldOutcome, Problem


@dataclass(frozen=True)
class Fit:
    """One way to fit a head from passes over blocks of rows."""

    prepare: Callable[[Problem, NDArray[np.int64], NDArray[Any]], Any]
    """(problem, rows, y of all rows) -> what all parameters share."""
    solve: Callable[[Problem, Any, Sequence[Params]], list[Pipeline]]
    """(problem, what `prepare` returned, candidates) -> one fitted pipeline per candidate."""
    square: bool = True
    """Whether a matrix of dim x dim must fit in memory."""


def needed_bytes(head: Head, shape: tuple[int, int], n_classes: int) -> int:
    """Return about what one fold's work on features of shape (n, dim) takes at least while they stay on disk."""
    n, dim = shape
    columns = 1 if n_classes == 2 else n_classes
    rows = n * (32 + 12 * n_classes)
    if head.on_disk is None or not FITS[head.on_disk].square:
        return rows + 6 * BLOCK_BYTES + 64 * dim * n_classes
    return rows + 6 * BLOCK_BYTES + PER_PRODUCT * dim * dim + 2 * problem_bytes(n, dim, columns)


def evaluator_on_disk(head: Head) -> Evaluator:
    """Return how a head is judged on features that stay on disk.

    Raises
    ------
    HeadError
        When it cannot be.
    """
    if head.on_disk is None or head.on_disk not in FITS:
        raise HeadError(f"head {head.name}: cannot be fitted on features that are larger than memory")
    fit = FITS[head.on_disk]
    return Evaluator(
        partial(_evaluate, fit), lambda problem, fold: fit.prepare(problem, problem.folds[fold][0], problem.y), True
    )


def fit_on_disk(problem: Problem, params: Params, y: NDArray[Any]) -> Pipeline:
    """Fit a head on all rows; its classes are those of y."""
    fit = FITS[str(problem.head.on_disk)]
    return fit.solve(problem, fit.prepare(problem, np.arange(len(y)), y), [params])[0]


def _evaluate(fit: Fit, problem: Problem, fold: int, prepared: Any, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit all candidates on the same passes, and judge them on one pass over the rows they are judged on."""
    with counted() as counts:
        try:
            start = time.perf_counter()
            pipelines = fit.solve(problem, prepared, candidates)
            fitted = time.perf_counter()
            said = [
                [answers(pipeline, block, problem.n_classes) for pipeline in pipelines]
                for _, block in blocks(problem.X, problem.judged(fold))
            ]
        except Exception as error:  # a trial that fails is a result: it is recorded and the search goes on
            return [failed(error, counts) for _ in candidates]
    shares = ((fitted - start) / len(candidates), (time.perf_counter() - fitted) / len(candidates))
    outcomes = []
    for parts in zip(*said, strict=True):
        predictions = np.concatenate([part[0] for part in parts])
        scores = np.concatenate([part[1] for part in parts])
        outcomes.append(FoldOutcome(predictions, scores, parts[0][2], *shares, dict(counts)))
    return outcomes


FITS: Mapping[str, Fit] = {
    "nearest_centroid": Fit(prepare_centroids, solve_centroids, square=False),
    "ridge": Fit(prepare_ridge, solve_ridge),
    "logistic_regression": Fit(partial(prepare_path, logistic_family), solve_path),
    "linear_svm": Fit(partial(prepare_path, hinge_family), solve_path),
}
"""The fits on disk, by the name a head gives in `Head.on_disk`."""
