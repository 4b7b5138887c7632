"""Evaluator of the RBF SVM: one matrix of squared distances per fold, from which every kernel follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC

from pipeline.heads import Params, configure
from pipeline.tuning.evaluation import Evaluator, counted, failed
from pipeline.tuning.records import FoldOutcome, Problem
from pipeline.tuning.scoring import expand_scores
from pipeline.tuning.solvers import Array, standardise

KERNEL_BYTES = 2 << 30
"""A fold's kernel in float64, as libsvm wants it, may take this much; larger problems are fitted from the features."""


@dataclass(frozen=True)
class Distances:
    """Squared distances of scaled features: (n, n) within the training rows, (n_held_out, n) of the held-out rows to them."""

    within: Array
    across: Array


def prepare_distances(problem: Problem, fold: int) -> Distances:
    """Scale a fold once and measure all its distances."""
    train, held_out = standardise(*(problem.X[rows] for rows in problem.folds[fold]))
    within = _squared_distances(train, train)
    np.fill_diagonal(within, 0)
    return Distances(within, _squared_distances(held_out, train))


def rbf_svm(problem: Problem, fold: int, distances: Distances, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit support vector machines on the kernel exp(-gamma * squared distance)."""
    return [_fit_one(problem, fold, distances, params) for params in candidates]


def _fit_one(problem: Problem, fold: int, distances: Distances, params: Params) -> FoldOutcome:
    y = problem.y[problem.folds[fold][0]]
    gamma = np.float32(configure(problem.head, params, problem.seed)[-1].gamma)
    with counted() as counts:
        try:
            start = time.perf_counter()
            classifier: SVC = configure(problem.head, params, problem.seed)[-1]
            # One against one, from which both scikit-learn's prediction and its one-against-rest scores follow.
            classifier.set_params(kernel="precomputed", decision_function_shape="ovo")
            classifier.fit(np.exp(distances.within * -gamma).astype(np.float64), y)
            fitted = time.perf_counter()
            pairs = classifier.decision_function(np.exp(distances.across * -gamma).astype(np.float64))
        except Exception as error:  # a trial that fails is a result: it is recorded and the search goes on
            return failed(error, counts)
    present = np.asarray(classifier.classes_, dtype=np.int64)
    votes, scores = (pairs > 0).astype(np.int64), pairs
    if len(present) > 2:
        votes, scores = vote(pairs, len(present))
        votes = votes.argmax(axis=1)
    full = expand_scores(scores, present, problem.n_classes, "decision")
    seconds = time.perf_counter() - fitted
    return FoldOutcome(present[votes], full, "decision", fitted - start, seconds, dict(counts))


def vote(pairs: NDArray[np.float64], n_classes: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Turn decision values of class pairs, shape (n, k (k - 1) / 2), into votes and scores of shape (n, k).

    The scores are votes plus the summed values squashed below one half, as `SVC.decision_function` defines them; the
    most voted class, the first of equals, is what libsvm predicts.
    """
    votes = np.zeros((len(pairs), n_classes), dtype=np.int64)
    sums = np.zeros((len(pairs), n_classes))
    first, second = np.triu_indices(n_classes, 1)
    for column, (a, b) in enumerate(zip(first, second, strict=True)):
        won = pairs[:, column] > 0
        votes[:, a] += won
        votes[:, b] += ~won
        sums[:, a] += pairs[:, column]
        sums[:, b] -= pairs[:, column]
    return votes, votes + sums / (3 * (np.abs(sums) + 1))


def _squared_distances(a: Array, b: Array) -> Array:
    distances: Array = a @ (-2 * b.T)
    distances += np.einsum("ij,ij->i", a, a)[:, None]
    distances += np.einsum("ij,ij->i", b, b)[None, :]
    np.maximum(distances, 0, out=distances)
    return distances


def _fits_in_memory(problem: Problem) -> bool:
    return max(len(train) for train, _ in problem.folds) ** 2 * 8 <= KERNEL_BYTES


RBF_SVM = Evaluator(rbf_svm, prepare_distances, usable=_fits_in_memory)
