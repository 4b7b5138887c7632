"""Evaluators of the RBF SVM, of classes and of numbers: one matrix of squared distances per fold, from which every kernel follows."""

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

from pipeline.data.classes import expand_scores
from pipeline.heads.head import Params, configure
from pipeline.heads.tuning.evaluation import Evaluator, FoldOutcome, Problem, one_by_one, scaled, standardised
from pipeline.heads.tuning.features import Array

log = logging.getLogger(__name__)

KERNEL_BYTES = 2 << 30
"""A fold's kernel in float64, as libsvm wants it, may take this much; larger problems are fitted from the features."""


KERNEL_ROWS = 256
"""Rows of a kernel computed at once, few enough to stay in the processor's cache."""


@dataclass(frozen=True)
class Distances:
    """Squared distances of scaled features, the training rows in the order of their classes.

    libsvm solves one pair of classes after the other, and finds neighbours in memory faster than scattered rows.

    within : ndarray of shape (n, n), float32
    across : ndarray of shape (n_held_out, n), float32: held-out rows to training rows
    y : ndarray of shape (n,), int64, or numbers, float64, of shape (n,) or (n, k)
    order : ndarray of shape (n,), int64: their places in the fold's training rows
    """

    within: Array
    across: Array
    y: NDArray[Any]
    order: NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.within.nbytes + self.across.nbytes


def prepare_distances(problem: Problem, fold: int) -> Distances:
    """Scale a fold once and measure all its distances."""
    y = problem.learned(fold)
    order = np.argsort(y.reshape(len(y), -1)[:, 0], kind="stable")
    train, held_out = standardised(problem, fold)
    train = train[order]
    within = _squared_distances(train, train)
    np.fill_diagonal(within, 0)
    return Distances(within, _squared_distances(held_out, train), y[order], order)


@one_by_one
def rbf_svm(problem: Problem, fold: int, distances: Distances, params: Params) -> FoldOutcome:
    """Fit a support vector machine on the kernel exp(-gamma * squared distance)."""
    start = time.perf_counter()
    machine, within, judged, places = _kernels(problem, distances, params)
    machine.set_params(decision_function_shape="ovr").fit(within, distances.y)
    fitted = time.perf_counter()
    scores = np.concatenate([machine.decision_function(rows) for rows in judged])[places]
    present = machine.classes_
    likeliest = scores.argmax(axis=1) if len(present) > 2 else (scores > 0).astype(np.int64)
    full = expand_scores(scores, present, problem.target.width, "decision")
    return FoldOutcome(present[likeliest], full, "decision", fitted - start, time.perf_counter() - fitted)


@one_by_one
def rbf_svr(problem: Problem, fold: int, distances: Distances, params: Params) -> FoldOutcome:
    """Fit support vector regression likewise, a machine for each number."""
    start = time.perf_counter()
    machine, within, judged, places = _kernels(problem, distances, params)
    machines = [clone(machine).fit(within, column) for column in distances.y.reshape(len(distances.y), -1).T]
    fitted = time.perf_counter()
    said = np.stack([np.concatenate([each.predict(rows) for rows in judged])[places] for each in machines], axis=1)
    return FoldOutcome(
        problem.target.told(said), fit_seconds=fitted - start, score_seconds=time.perf_counter() - fitted
    )


@one_by_one
def rbf_svm_labels(problem: Problem, fold: int, distances: Distances, params: Params) -> FoldOutcome:
    """Fit a support vector machine likewise for each label; what all rows say is said of all."""
    start = time.perf_counter()
    machine, within, judged, places = _kernels(problem, distances, params)
    scores = np.empty((sum(map(len, judged)), problem.target.width), dtype=np.float32)
    for label, column in enumerate(distances.y.T):
        scores[:, label] = column[0] - 0.5
        if np.ptp(column):
            each = clone(machine).fit(within, column)
            scores[:, label] = np.concatenate([each.decision_function(rows) for rows in judged])[places]
    return FoldOutcome(scores > 0, scores, "decision", time.perf_counter() - start)


def _kernels(problem: Problem, distances: Distances, params: Params) -> tuple[Any, NDArray[np.float64], list[Any], Any]:
    """Return the unfitted machine, the kernel it is fitted on, float64 of shape (n, n), those of the rows judged, and their places."""
    machine = configure(problem.head, params, problem.seed)[-1]
    gamma = np.float32(machine.gamma)
    places: Any = slice(None)
    within, across = _kernel(distances.within, gamma), _kernel(distances.across, gamma)
    judged = [across, within] if problem.judge_training else [across]
    if problem.judge_training:
        places = np.concatenate([np.arange(len(across)), len(across) + np.argsort(distances.order)])
    return machine.set_params(kernel="precomputed"), within, judged, places


def fit_each(pipeline: Pipeline, X: NDArray[np.float32], y: NDArray[np.float64]) -> Pipeline:
    """Fit a pipeline whose last step takes one number; a copy of that for each where y is of shape (n, k).

    X : float32 of shape (n, dim); y : float64 of shape (n,) or (n, k)
    """
    if y.ndim > 1:
        pipeline.steps[-1] = (pipeline.steps[-1][0], MultiOutputRegressor(pipeline[-1]))
    return pipeline.fit(X, y)


def _kernel(distances: Array, gamma: np.float32) -> NDArray[np.float64]:
    """exp(-gamma * squared distance), computed in float32 and given in float64, as libsvm wants it."""
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
    if not scaled(problem):
        return False
    rows = max(len(train) for train, _ in problem.folds)
    if rows**2 * 8 > KERNEL_BYTES:
        log.warning(
            "head %s: the kernel of %d training rows takes %.1f GB, more than the %.1f GB that are kept; each trial is fitted "
            "from the features, which may take minutes to hours; leave the head out of `heads` if that is too long",
            problem.head.name,
            rows,
            rows**2 * 8 / 1e9,
            KERNEL_BYTES / 1e9,
        )
    return rows**2 * 8 <= KERNEL_BYTES


def _work_bytes(problem: Problem) -> int:
    """Return what a fold takes: distances in float32 and kernels in float64, and what libsvm keeps of two classes."""
    cache = configure(problem.head, problem.head.defaults, problem.seed)[-1].cache_size
    classes = problem.target.classes
    pair = int(np.sort(np.bincount(problem.y))[-2:].sum()) if classes and problem.y.ndim == 1 else len(problem.y)
    kernels = max(12 * len(train) * (len(train) + len(held_out)) for train, held_out in problem.folds)
    return kernels + min(int(cache * 1e6), 4 * pair**2)


RBF_SVM, RBF_SVR, RBF_SVM_LABELS = (
    Evaluator(fit.__name__, fit, prepare_distances, usable=_fits_in_memory, work_bytes=_work_bytes)
    for fit in (rbf_svm, rbf_svr, rbf_svm_labels)
)
