"""Evaluators of the linear heads: one decomposition per fold, all penalties of a round solved together."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.class_weight import compute_sample_weight

from pipeline.heads import Params, configure
from pipeline.heads.fast.solvers import (
    Array,
    Axes,
    Family,
    Loss,
    Path,
    binomial_loss,
    softmax_loss,
    squared_hinge_loss,
    turn,
)
from pipeline.heads.tuning.evaluation import Evaluator, standardised
from pipeline.heads.tuning.records import FoldOutcome, Problem
from pipeline.heads.tuning.scoring import expand_scores

LOGISTIC_TOLERANCE = 1e-4
HINGE_TOLERANCE = 2e-4
"""Largest derivative per row at which a problem counts as solved; scikit-learn's logistic regression has the same rule
and value, and on preconditioned axes it ends nearer to the optimum."""

BATCH_BYTES = 64 << 20
"""Scores of the problems solved at once may take this much, or as much as the fold's features if that is more."""


@dataclass(frozen=True)
class Prepared:
    """A fold for one linear head: its features on their axes, its labels, the solutions so far."""

    axes: Axes
    path: Path | None
    present: NDArray[np.int64]
    targets: Array
    """For one-against-rest heads, shape (n, problems): -1 and 1; two classes are one problem."""

    @property
    def nbytes(self) -> int:
        """Bytes held, about: the path grows to a few dozen solutions."""
        return self.axes.train.nbytes + self.axes.held_out.nbytes + self.targets.nbytes


def logistic_family(y: NDArray[np.int64], n_classes: int, weights: Array) -> Family:
    """Return logistic regression on n rows of classes 0 to n_classes - 1: multinomial, for two classes binomial."""

    def loss(problems: NDArray[np.int64]) -> Loss:
        return binomial_loss(y, weights) if n_classes == 2 else softmax_loss(y, weights)

    columns = 1 if n_classes == 2 else n_classes
    return Family(loss, 1, columns, penalise_intercept=False, tolerance=LOGISTIC_TOLERANCE)


def hinge_family(y: NDArray[np.int64], n_classes: int, weights: Array) -> Family:
    """Return the squared hinge loss of one class against the rest; as in LIBLINEAR the intercept is penalised."""
    targets = targets_of(y, n_classes)
    width = targets.shape[1]
    # With more than two classes LIBLINEAR weights the rows of the one class and not those of the rest.
    costs = weights[:, None] if width == 1 else np.where(targets > 0, weights[:, None], 1)

    def loss(problems: NDArray[np.int64]) -> Loss:
        return squared_hinge_loss(targets[:, problems % width], costs[:, problems % width])

    return Family(loss, width, 1, penalise_intercept=True, tolerance=HINGE_TOLERANCE)


def prepare_logistic(problem: Problem, fold: int) -> Prepared:
    """Share the axes of a fold and the path of logistic regression."""
    axes, y, present, weights = _fold(problem, fold)
    path = Path(axes, logistic_family(y, len(present), weights))
    return Prepared(axes, path, present, targets_of(y, len(present)))


def prepare_hinge(problem: Problem, fold: int) -> Prepared:
    """Share the axes of a fold and the path of the squared hinge loss."""
    axes, y, present, weights = _fold(problem, fold)
    path = Path(axes, hinge_family(y, len(present), weights))
    return Prepared(axes, path, present, targets_of(y, len(present)))


def prepare_ridge(problem: Problem, fold: int) -> Prepared:
    """Share the axes of a fold."""
    axes, y, present, _ = _fold(problem, fold)
    return Prepared(axes, None, present, targets_of(y, len(present)))


def logistic_regression(
    problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]
) -> list[FoldOutcome]:
    """Fit logistic regression with an L2 penalty at every C."""
    present = prepared.present

    def solve(batch: Sequence[Params]) -> Array:
        assert prepared.path is not None
        return prepared.path.solve(np.array([1 / float(one["C"]) for one in batch]))

    outcomes = []
    for scores, seconds in _solved(problem, prepared, candidates, 1 if len(present) == 2 else len(present), solve):
        if len(present) == 2:
            raised = 1 / (1 + np.exp(-scores.astype(np.float64)))
            probabilities = np.hstack([1 - raised, raised])
        else:
            shares = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64))
            probabilities = shares / shares.sum(axis=1, keepdims=True)
        full = expand_scores(probabilities, present, problem.n_classes, "probability")
        outcomes.append(FoldOutcome(present[probabilities.argmax(axis=1)], full, "probability", seconds))
    return outcomes


def linear_svm(problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit one-against-rest linear SVMs with the squared hinge loss at every C."""
    width = prepared.targets.shape[1]

    def solve(batch: Sequence[Params]) -> Array:
        assert prepared.path is not None
        found = prepared.path.solve(np.array([1 / float(one["C"]) for one in batch]))
        return found.reshape(len(found), len(batch), width)

    return _decided(problem, prepared.present, _solved(problem, prepared, candidates, width, solve))


def ridge(problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit ridge regression onto targets of -1 and 1 at every alpha, from the fold's one decomposition."""
    axes, targets = prepared.axes, prepared.targets
    products = axes.train.T @ targets

    def solve(batch: Sequence[Params]) -> Array:
        found = []
        for one in batch:
            penalty = np.full_like(axes.squares, float(one["alpha"]))
            penalty[-1] = 0
            found.append(products / (axes.squares + penalty)[:, None])
        made: Array = np.stack(found, axis=1)
        return made

    return _decided(problem, prepared.present, _solved(problem, prepared, candidates, targets.shape[1], solve))


def _fold(problem: Problem, fold: int) -> tuple[Axes, NDArray[np.int64], NDArray[np.int64], Array]:
    """Return a fold's axes, its training labels as places in the classes present, these classes, and row weights."""
    train, _ = problem.folds[fold]
    axes = turn(*standardised(problem, fold))
    present, y = np.unique(problem.y[train], return_inverse=True)
    return axes, y.astype(np.int64), present, row_weights(problem, y)


def row_weights(problem: Problem, y: NDArray[np.integer]) -> Array:
    """Return the weights that the head's `class_weight` gives rows of these classes, shape (n,)."""
    class_weight = configure(problem.head, problem.head.defaults, problem.seed)[-1].get_params().get("class_weight")
    weights = np.ones(len(y)) if class_weight is None else compute_sample_weight(class_weight, y)
    return weights.astype(np.float32)


def targets_of(y: NDArray[np.int64], n_classes: int) -> Array:
    """Return targets of -1 and 1, shape (n, n_classes); for two classes the one column of the second."""
    targets: Array = 2 * (y[:, None] == np.arange(n_classes)).astype(np.float32) - 1
    return targets[:, 1:] if n_classes == 2 else targets


def _solved(
    problem: Problem,
    prepared: Prepared,
    candidates: Sequence[Params],
    columns: int,
    solve: Callable[[Sequence[Params]], Array],
) -> list[tuple[Array, float]]:
    """Solve candidates in batches that fit in memory; return the scores of the rows judged and the share of the seconds."""
    axes = prepared.axes
    n = len(axes.train)
    size = max(1, int(max(BATCH_BYTES, axes.train.nbytes) // (6 * 4 * n * columns)))
    solved = []
    for start in range(0, len(candidates), size):
        batch = candidates[start : start + size]
        begun = time.perf_counter()
        weights = solve(batch)
        judged = (axes.held_out, axes.train) if problem.judge_training else (axes.held_out,)
        scores = np.concatenate([rows @ weights.reshape(len(weights), -1) for rows in judged])
        scores = scores.reshape(-1, len(batch), weights.shape[2])
        seconds = (time.perf_counter() - begun) / len(batch)
        solved += [(scores[:, place], seconds) for place in range(len(batch))]
    return solved


def _decided(problem: Problem, present: NDArray[np.int64], solved: Sequence[tuple[Array, float]]) -> list[FoldOutcome]:
    outcomes = []
    for scores, seconds in solved:
        values = scores[:, 0] if len(present) == 2 else scores
        full = expand_scores(values, present, problem.n_classes, "decision")
        predictions = present[(values > 0).astype(np.int64) if len(present) == 2 else values.argmax(axis=1)]
        outcomes.append(FoldOutcome(predictions, full, "decision", seconds))
    return outcomes


def _unweighted(problem: Problem) -> bool:
    """Class weights would shift the centre the decomposition is taken around."""
    return configure(problem.head, problem.head.defaults, problem.seed)[-1].class_weight is None


LOGISTIC_REGRESSION = Evaluator(logistic_regression, prepare_logistic, together=True)
LINEAR_SVM = Evaluator(linear_svm, prepare_hinge, together=True)
RIDGE = Evaluator(ridge, prepare_ridge, together=True, usable=_unweighted)
