"""Evaluator of the RBF SVM for all kinds of target: every kernel of a fold is computed from one matrix of squared distances."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import Pipeline

from pipeline.heads.head import Params, configure
from pipeline.heads.tuning.evaluation import (
    Evaluator,
    FoldOutcome,
    Problem,
    one_by_one,
    outcome_of,
    scaled,
    standardised,
)
from pipeline.heads.tuning.features import Array

log = logging.getLogger(__name__)

KERNEL_BYTES = 2 << 30
"""Maximum size of a fold's kernel in float64, the dtype of libsvm; larger problems are fitted from the features."""

KERNEL_ROWS = 256
"""Rows of a kernel computed at once, few enough to fit into the processor's cache."""


@dataclass(frozen=True)
class Distances:
    """Squared distances of scaled features, with the training rows sorted by class.

    libsvm solves the pairs of classes one by one, and reads adjacent rows faster than scattered ones.

    within : ndarray of shape (n, n), float32
    across : ndarray of shape (n_held_out, n), float32: held-out rows to training rows
    y : ndarray of shape (n,), int64, or numbers, float64, of shape (n,) or (n, k)
    order : ndarray of shape (n,), int64: the sorted rows' indices in the fold's training rows
    """

    within: Array
    across: Array
    y: NDArray[Any]
    order: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.within.nbytes + self.across.nbytes


def prepare_distances(problem: Problem, fold: int) -> Distances:
    """Scale a fold's features once and compute all distances."""
    y = problem.learned(fold)
    order = np.argsort(y.reshape(len(y), -1)[:, 0], kind="stable")
    train, held_out = standardised(problem, fold)
    train = train[order]
    within = _squared_distances(train, train)
    np.fill_diagonal(within, 0)
    return Distances(within, _squared_distances(held_out, train), y[order], order)


@one_by_one
def rbf_svm(problem: Problem, fold: int, distances: Distances, params: Params) -> FoldOutcome:
    """Fit a support vector machine on the kernel exp(-gamma * squared distance), for numbers and labels one per column."""
    start, target = time.perf_counter(), problem.target
    machine = configure(problem.head, params, problem.seed)[-1].set_params(kernel="precomputed")
    within, across = (_kernel(part, np.float32(machine.gamma)) for part in (distances.within, distances.across))
    judged, places = [across], np.arange(len(across))
    if problem.judge_training:
        judged, places = [across, within], np.append(places, len(across) + np.argsort(distances.order))

    def decisions(fitted: Any) -> NDArray[np.float64]:
        tell = getattr(fitted, "decision_function", fitted.predict)
        return np.concatenate([tell(rows) for rows in judged])[places]

    if target.exclusive:
        fitted = machine.set_params(decision_function_shape="ovr").fit(within, distances.y)
        seconds, scores = time.perf_counter() - start, decisions(fitted)
        return outcome_of(target, scores, fitted.classes_, seconds, time.perf_counter() - start - seconds)
    scores = np.empty((len(places), target.width))
    for column, y in enumerate(distances.y.reshape(len(distances.y), -1).T):
        if target.kind == "multilabel" and not np.ptp(y):
            scores[:, column] = y[0] - 0.5  # a constant label is predicted for all rows
        else:
            scores[:, column] = decisions(clone(machine).fit(within, y))
    return outcome_of(target, scores, np.arange(target.width), time.perf_counter() - start)


def fit_each(pipeline: Pipeline, X: NDArray[np.float32], y: NDArray[np.float64]) -> Pipeline:
    """Fit a pipeline whose last step predicts one number; for y of shape (n, k), a copy of that step is fitted per column.

    X : float32 of shape (n, dim); y : float64 of shape (n,) or (n, k)
    """
    if y.ndim > 1:
        pipeline.steps[-1] = (pipeline.steps[-1][0], MultiOutputRegressor(pipeline[-1]))
    return pipeline.fit(X, y)


def _kernel(distances: Array, gamma: np.float32) -> NDArray[np.float64]:
    """Return exp(-gamma * squared distance), computed in float32 and returned in float64, the dtype of libsvm."""
    kernel = np.empty(distances.shape)
    for start in range(0, len(distances), KERNEL_ROWS):
        block = slice(start, start + KERNEL_ROWS)
        kernel[block] = np.exp(distances[block] * -gamma)
    return kernel


def _squared_distances(a: Array, b: Array) -> Array:
    distances: Array = a @ (-2 * b.T)
    distances += np.einsum("ij,ij->i", a, a)[:, None]
    distances += np.einsum("ij,ij->i", b, b)[None, :]
    np.maximum(distances, 0, out=distances)
    return distances


def _fits_in_memory(problem: Problem) -> bool:
    rows = max(len(train) for train, _ in problem.folds)
    size = rows**2 * 8
    if scaled(problem) and size > KERNEL_BYTES:
        log.warning(
            "head %s: the kernel of %d training rows takes %.1f GB, so each trial is fitted from the features, which may take "
            "minutes to hours; leave the head out of `heads` if that is too long",
            problem.head.name,
            rows,
            size / 1e9,
        )
    return scaled(problem) and size <= KERNEL_BYTES


def _work_bytes(problem: Problem) -> int:
    """Return the memory of a fold's work: distances in float32, kernels in float64, and libsvm's cache for two classes."""
    cache = configure(problem.head, problem.head.defaults, problem.seed)[-1].cache_size
    pair = int(np.sort(np.bincount(problem.y))[-2:].sum()) if problem.target.exclusive else len(problem.y)
    kernels = max(12 * len(train) * (len(train) + len(held_out)) for train, held_out in problem.folds)
    return kernels + min(int(cache * 1e6), 4 * pair**2)


RBF_SVM = Evaluator(rbf_svm.__name__, rbf_svm, prepare_distances, usable=_fits_in_memory, work_bytes=_work_bytes)
