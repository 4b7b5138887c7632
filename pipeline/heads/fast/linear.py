"""Evaluators of the linear heads: one decomposition per fold, all penalties of a round solved together.

They work on features in memory and on disk alike: there every product with the features is one pass over blocks of rows
(`blocked.Turned`), and only sums over rows are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.utils.class_weight import compute_sample_weight

from pipeline.data.classes import expand_scores
from pipeline.heads.fast.blocked import turn_blocks
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
from pipeline.heads.head import Params, configure
from pipeline.heads.tuning.evaluation import Evaluator, scaled, standardised
from pipeline.heads.tuning.records import FoldOutcome, Problem
from pipeline.heads.tuning.room import problem_bytes

LOGISTIC_TOLERANCE = 1e-4
HINGE_TOLERANCE = 2e-4
"""Largest derivative per row at which a problem counts as solved; scikit-learn's logistic regression has the same rule
and value, and on preconditioned axes it ends nearer to the optimum."""

BATCH_BYTES = 64 << 20
"""Scores of the problems solved at once may take this much, or as much as the fold's features if that is more."""


@dataclass(frozen=True)
class Prepared:
    """Training rows for one linear head: their features on their axes, their classes, the solutions so far.

    present : ndarray of int64, or of labels: the classes of the rows; of numbers one row's
    products : ndarray of shape (rank + 1, columns): the features' products with targets of -1 and 1, or with numbers
    """

    axes: Axes
    present: NDArray[Any]
    columns: int
    nbytes: int
    path: Path | None = None
    products: Any = None


Make = Callable[[NDArray[np.int64], int, Array], Family]
"""(places in the classes, the number of classes, weights of the rows) -> the family of problems; None for ridge."""


def logistic_family(y: NDArray[np.int64], n_classes: int, weights: Array) -> Family:
    """Return logistic regression on n rows of classes 0 to n_classes - 1: multinomial, for two classes binomial.

    y : int64 of shape (n,); weights : of the rows, float32 of shape (n,)
    """

    def loss(problems: NDArray[np.int64]) -> Loss:
        return binomial_loss(y, weights) if n_classes == 2 else softmax_loss(y, weights)

    columns = 1 if n_classes == 2 else n_classes
    return Family(loss, 1, columns, penalise_intercept=False, tolerance=LOGISTIC_TOLERANCE)


def hinge_family(y: NDArray[np.int64], n_classes: int, weights: Array) -> Family:
    """Return the squared hinge loss of one class against the rest; as in LIBLINEAR the intercept is penalised.

    y : int64 of shape (n,), classes 0 to n_classes - 1; weights : of the rows, float32 of shape (n,)
    """
    targets = targets_of(y, n_classes)
    width = targets.shape[1]
    # With more than two classes LIBLINEAR weights the rows of the one class and not those of the rest.
    costs = weights[:, None] if width == 1 else np.where(targets > 0, weights[:, None], 1)

    def loss(problems: NDArray[np.int64]) -> Loss:
        return squared_hinge_loss(targets[:, problems % width], costs[:, problems % width])

    return Family(loss, width, 1, penalise_intercept=True, tolerance=HINGE_TOLERANCE)


def prepare(share: Share, problem: Problem, fold: int) -> Prepared:
    """Share the axes of a fold, and the path of solutions along the penalty or the products it follows from."""
    train, held_out = problem.folds[fold]
    axes = turn_blocks(problem.X, train, held_out) if problem.on_disk else turn(*standardised(problem, fold))
    return share(problem, axes, problem.learned(train))


Share = Callable[[Problem, Axes, NDArray[Any]], Prepared]
"""(a problem, the axes of its rows, what is learned of them) -> what all candidates share."""


def _numbers(problem: Problem, axes: Axes, y: NDArray[np.float64]) -> Prepared:
    columns = y.reshape(len(y), -1).astype(np.float32)
    held = problem_bytes(len(problem.X), problem.X.shape[1], columns.shape[1]) if problem.on_disk else columns.nbytes
    held += axes.train.nbytes + axes.held_out.nbytes
    return Prepared(axes, y[:1], columns.shape[1], held, products=axes.train.T @ columns)


def _classes(make: Make | None, problem: Problem, axes: Axes, y: NDArray[Any]) -> Prepared:
    present, places = np.unique(y, return_inverse=True)
    targets = targets_of(places, len(present))
    columns = targets.shape[1]
    # On disk the features are no part of what is held, and what a solver holds of the rows is most of it.
    held = problem_bytes(len(problem.X), problem.X.shape[1], columns) if problem.on_disk else targets.nbytes
    held += axes.train.nbytes + axes.held_out.nbytes
    if make is None:
        return Prepared(axes, present, columns, held, products=axes.train.T @ targets)
    family = make(places.astype(np.int64), len(present), row_weights(problem, places))
    return Prepared(axes, present, columns, held, path=Path(axes, family))


def _solve(problem: Problem, prepared: Prepared, batch: Sequence[Params]) -> Array:
    """Return the weights of candidates, shape (rank + 1, len(batch), columns)."""
    models = [configure(problem.head, params, problem.seed)[-1] for params in batch]
    if prepared.path is not None:
        found = prepared.path.solve(np.array([1 / float(model.C) for model in models]))
        return found.reshape(len(found), len(batch), prepared.columns)
    solved = []
    for model in models:
        penalty = np.full_like(prepared.axes.squares, float(model.alpha))
        penalty[-1] = 0
        solved.append(prepared.products / (prepared.axes.squares + penalty)[:, None])
    made: Array = np.stack(solved, axis=1)
    return made


def logistic_regression(
    problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]
) -> list[FoldOutcome]:
    """Fit logistic regression with an L2 penalty at every C."""
    present = prepared.present
    outcomes = []
    for scores, seconds in _scores(problem, prepared, candidates):
        if len(present) == 2:
            raised = 1 / (1 + np.exp(-scores.astype(np.float64)))
            probabilities = np.hstack([1 - raised, raised])
        else:
            shares = np.exp((scores - scores.max(axis=1, keepdims=True)).astype(np.float64))
            probabilities = shares / shares.sum(axis=1, keepdims=True)
        full = expand_scores(probabilities, present, problem.width, "probability")
        outcomes.append(FoldOutcome(present[probabilities.argmax(axis=1)], full, "probability", seconds))
    return outcomes


def linear_svm(problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit one-against-rest linear SVMs with the squared hinge loss at every C."""
    return _decided(problem, prepared, candidates)


def ridge(problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit ridge regression onto targets of -1 and 1 at every alpha, from the fold's one decomposition."""
    return _decided(problem, prepared, candidates)


def ridge_of_numbers(
    problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]
) -> list[FoldOutcome]:
    """Fit ridge regression onto one or several numbers at every alpha, from the fold's one decomposition."""
    solved = _scores(problem, prepared, candidates)
    return [FoldOutcome(problem.target.told(scores), fit_seconds=seconds) for scores, seconds in solved]


def _decided(problem: Problem, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    present, outcomes = prepared.present, []
    for scores, seconds in _scores(problem, prepared, candidates):
        values = scores[:, 0] if len(present) == 2 else scores
        full = expand_scores(values, present, problem.width, "decision")
        predictions = present[(values > 0).astype(np.int64) if len(present) == 2 else values.argmax(axis=1)]
        outcomes.append(FoldOutcome(predictions, full, "decision", seconds))
    return outcomes


def _scores(problem: Problem, prepared: Prepared, candidates: Sequence[Params]) -> list[tuple[Array, float]]:
    """Solve candidates in batches that fit in memory; return the scores of the rows judged and the share of the seconds."""
    axes, n = prepared.axes, len(prepared.axes.train)
    if problem.on_disk:
        size = 1 + problem.spare_bytes // problem_bytes(len(problem.X), problem.X.shape[1], prepared.columns)
    else:
        size = max(1, int(max(BATCH_BYTES, axes.train.nbytes) // (6 * 4 * n * prepared.columns)))
    solved = []
    for start in range(0, len(candidates), size):
        batch = candidates[start : start + size]
        begun = time.perf_counter()
        weights = _solve(problem, prepared, batch)
        judged = (axes.held_out, axes.train) if problem.judge_training else (axes.held_out,)
        scores = np.concatenate([rows @ weights.reshape(len(weights), -1) for rows in judged])
        scores = scores.reshape(-1, len(batch), weights.shape[2])
        seconds = (time.perf_counter() - begun) / len(batch)
        solved += [(scores[:, place], seconds) for place in range(len(batch))]
    return solved


def fit_in_blocks(share: Share, problem: Problem, params: Params, y: NDArray[Any]) -> Pipeline:
    """Fit the head's pipeline on all rows from passes over blocks of them; its classes are those of y.

    All that scikit-learn keeps besides the solution is what it keeps of a fit to one made-up row per class.

    y : what the target's `learned` makes of labels: of any dtype, shape (n,), or numbers, float64 of shape (n,) or
        (n, k)
    """
    rows = np.arange(len(y))
    axes = turn_blocks(problem.X, rows, rows[:0])
    prepared = share(problem, axes, y)
    weights = _solve(problem, prepared, [params])[:, 0]
    pipeline = configure(problem.head, params, problem.seed)
    pipeline.steps[0] = (pipeline.steps[0][0], axes.train.data.scaler)
    model = pipeline[-1].fit(np.zeros((len(prepared.present), 1), np.float32), prepared.present)
    coefficients = (axes.train.vectors @ weights[:-1]).T.astype(np.float64)
    model.coef_ = coefficients.reshape(*model.coef_.shape[:-1], -1)
    model.intercept_ = weights[-1].astype(np.float64).reshape(np.shape(model.intercept_))
    model.n_features_in_ = problem.X.shape[1]
    if hasattr(model, "n_iter_"):
        del model.n_iter_
    return pipeline


def row_weights(problem: Problem, y: NDArray[np.integer]) -> Array:
    """Return the weights that the head's `class_weight` gives rows of these classes.

    y : of any integer dtype, shape (n,); returns float32 of shape (n,)
    """
    class_weight = configure(problem.head, problem.head.defaults, problem.seed)[-1].get_params().get("class_weight")
    weights = np.ones(len(y)) if class_weight is None else compute_sample_weight(class_weight, y)
    return weights.astype(np.float32)


def targets_of(y: NDArray[np.integer], n_classes: int) -> Array:
    """Return targets of -1 and 1, a column for each class; for two classes the one column of the second.

    y : of any integer dtype, shape (n,); returns float32 of shape (n, n_classes) or (n, 1)
    """
    targets: Array = 2 * (y[:, None] == np.arange(n_classes)).astype(np.float32) - 1
    return targets[:, 1:] if n_classes == 2 else targets


def _unweighted(problem: Problem) -> bool:
    """Class weights would shift the centre the decomposition is taken around."""
    return scaled(problem) and getattr(configure(problem.head, {}, problem.seed)[-1], "class_weight", None) is None


def _evaluator(evaluate: Any, share: Share, usable: Callable[[Problem], bool], quicker: bool = False) -> Evaluator:
    fit = partial(fit_in_blocks, share)
    return Evaluator(evaluate, partial(prepare, share), True, usable, fit_in_blocks=fit, quicker=quicker)


LOGISTIC_REGRESSION = _evaluator(logistic_regression, partial(_classes, logistic_family), scaled)
# At 2,500 x 512 and 20 classes LIBLINEAR takes twenty times as long to the same optimum.
LINEAR_SVM = _evaluator(linear_svm, partial(_classes, hinge_family), scaled, quicker=True)
RIDGE = _evaluator(ridge, partial(_classes, None), _unweighted)
RIDGE_OF_NUMBERS = _evaluator(ridge_of_numbers, _numbers, _unweighted)
