"""Evaluator of the RBF SVM, of classes, numbers and labels: one matrix of squared distances per fold, from which every kernel follows."""

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
    """Fit support vector machines on the kernel exp(-gamma * squared distance), of numbers and labels one for each."""
    start, target = time.perf_counter(), problem.target
    machine = configure(problem.head, params, problem.seed)[-1].set_params(kernel="precomputed")
    within, across = (_kernel(part, np.float32(machine.gamma)) for part in (distances.within, distances.across))
    judged, places = [across], np.arange(len(across))
    if problem.judge_training:
        judged, places = [across, within], np.append(places, len(across) + np.argsort(distances.order))

    def said(fitted: Any) -> NDArray[np.float64]:
        tell = getattr(fitted, "decision_function", fitted.predict)
        return np.concatenate([tell(rows) for rows in judged])[places]

    if target.exclusive:
        fitted = machine.set_params(decision_function_shape="ovr").fit(within, distances.y)
        seconds, scores, present = time.perf_counter() - start, said(fitted), fitted.classes_
        likeliest = scores.argmax(axis=1) if len(present) > 2 else (scores > 0).astype(np.int64)
        full = expand_scores(scores, present, target.width, "decision")
        return FoldOutcome(present[likeliest], full, "decision", seconds, time.perf_counter() - start - seconds)
    scores = np.empty((len(places), target.width))
    for column, y in enumerate(distances.y.reshape(len(distances.y), -1).T):
        if target.kind == "multilabel" and not np.ptp(y):
            scores[:, column] = y[0] - 0.5  # what all rows say is said of all
        else:
            scores[:, column] = said(clone(machine).fit(within, y))
    seconds = time.perf_counter() - start
    if target.kind == "regression":
        return FoldOutcome(target.told(scores), fit_seconds=seconds)
    return FoldOutcome(scores > 0, scores.astype(np.float32), "decision", seconds)


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
    """Return what a fold takes: distances in float32 and kernels in float64, and what libsvm keeps of two classes."""
    cache = configure(problem.head, problem.head.defaults, problem.seed)[-1].cache_size
    pair = int(np.sort(np.bincount(problem.y))[-2:].sum()) if problem.target.exclusive else len(problem.y)
    kernels = max(12 * len(train) * (len(train) + len(held_out)) for train, held_out in problem.folds)
    return kernels + min(int(cache * 1e6), 4 * pair**2)


RBF_SVM = Evaluator(rbf_svm.__name__, rbf_svm, prepare_distances, usable=_fits_in_memory, work_bytes=_work_bytes)
