"""Evaluators of the linear heads: one decomposition per fold, after which all penalties of a round are solved together.

All but discriminant analysis work on features both in memory and on disk: on disk, every product with the features is one pass over
blocks of rows (`solvers.Turned`), and only sums over rows are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from pipeline.data.classes import expand_scores
from pipeline.heads.fast.solvers import (
    Array,
    Axes,
    Loss,
    Path,
    ProblemFamily,
    binomial_loss,
    decompose,
    softmax_loss,
    squared_hinge_loss,
    turn,
    turn_blocks,
)
from pipeline.heads.head import Params, configure
from pipeline.heads.tuning.evaluation import Evaluate, Evaluator, FoldOutcome, Problem, outcome_of, scaled, standardised
from pipeline.heads.tuning.room import SPARE_BYTES, problem_bytes

LOGISTIC_TOLERANCE = 1e-4
HINGE_TOLERANCE = 2e-4
"""Largest derivative per row at which a problem counts as solved; scikit-learn's logistic regression uses the same rule
and value, which on preconditioned axes stops nearer to the optimum."""

BATCH_BYTES = 64 << 20
"""Maximum size of the scores of problems solved together, or the size of the fold's features if larger."""


@dataclass(frozen=True)
class Prepared:
    """The shared work of a fold for one linear head: rotated features, classes, and the solutions so far.

    present : y of the fewest rows with which scikit-learn's model is valid: the classes that occur; for regression one row's
        numbers; for several labels one row with none and one with all
    products : ndarray of shape (rank + 1, columns): the features' products with targets of -1 and 1, or with numbers
    """

    axes: Axes
    present: NDArray[Any]
    columns: int
    nbytes: int
    path: Path | None = None
    products: Any = None


Make = Callable[[Array, Array, bool], ProblemFamily]
"""(targets of -1 and 1, float32 of shape (n, k); row weights; whether each row has exactly one label) -> the family of problems."""


def logistic_family(targets: Array, weights: Array, exclusive: bool) -> ProblemFamily:
    """Return logistic regression: multinomial for more than two exclusive classes, otherwise binomial for each column."""
    width = targets.shape[1]
    if exclusive and width > 1:
        y = targets.argmax(axis=1)
        return ProblemFamily(lambda problems: softmax_loss(y, weights), 1, width, False, LOGISTIC_TOLERANCE)

    def loss(problems: NDArray[np.int64]) -> Loss:
        return binomial_loss(targets[:, problems % width], weights)

    return ProblemFamily(loss, width, 1, penalise_intercept=False, tolerance=LOGISTIC_TOLERANCE)


def hinge_family(targets: Array, weights: Array, exclusive: bool) -> ProblemFamily:
    """Return the squared hinge loss of each column separately; as in LIBLINEAR, the intercept is penalised."""
    width = targets.shape[1]
    # With more than two classes, LIBLINEAR weights only the rows of the positive class, not those of the rest.
    costs = weights[:, None] if width == 1 else np.where(targets > 0, weights[:, None], 1)

    def loss(problems: NDArray[np.int64]) -> Loss:
        return squared_hinge_loss(targets[:, problems % width], costs[:, problems % width])

    return ProblemFamily(loss, width, 1, penalise_intercept=True, tolerance=HINGE_TOLERANCE)


def prepare(make: Make | None, problem: Problem, fold: int) -> Prepared:
    """Return the shared work of a fold: its axes, and the path of solutions along the penalty, or the products for ridge."""
    train, held_out = problem.folds[fold]
    axes = turn_blocks(problem.X, train, held_out) if problem.on_disk else turn(*standardised(problem, fold))
    return _shared(make, problem, axes, problem.learned(fold))


def _shared(make: Make | None, problem: Problem, axes: Axes, y: NDArray[Any]) -> Prepared:
    """Return the work that all candidates share, for y as `Target.learned` returns it; without `make`, the head is a ridge."""
    weights, kind = np.ones(len(y), np.float32), problem.target.kind
    if kind == "regression":
        present, targets = y[:1], y.reshape(len(y), -1).astype(np.float32)
    elif kind == "multilabel":
        present, targets = np.repeat([[0], [1]], y.shape[1], axis=1), 2 * y.astype(np.float32) - 1
    else:
        present, places = np.unique(y, return_inverse=True)
        targets = 2 * (places[:, None] == np.arange(len(present))).astype(np.float32) - 1
        targets = targets[:, 1:] if len(present) == 2 else targets
        model = configure(problem.head, problem.head.defaults, problem.seed)[-1]
        class_weight = model.get_params().get("class_weight")
        weights = weights if class_weight is None else compute_sample_weight(class_weight, places).astype(np.float32)
    columns = targets.shape[1]
    # On disk, the features are not in memory, and the solver's arrays over the rows dominate.
    held = problem_bytes(len(problem.X), problem.X.shape[1], columns) if problem.on_disk else targets.nbytes
    held += axes.train.nbytes + axes.held_out.nbytes
    if make is None:
        return Prepared(axes, present, columns, held, products=axes.train.T @ targets)
    return Prepared(axes, present, columns, held, path=Path(axes, make(targets, weights, problem.target.exclusive)))


def _solve(problem: Problem, prepared: Prepared, batch: Sequence[Params], once: bool = False) -> Array:
    """Return the weights of candidates, shape (rank + 1, len(batch), columns); `once` solves a single one without the path."""
    models = [configure(problem.head, params, problem.seed)[-1] for params in batch]
    if prepared.path is not None:
        penalties = np.array([1 / float(model.C) for model in models])
        found = prepared.path.solve_once(penalties[0]) if once else prepared.path.solve(penalties)
        return found.reshape(len(found), len(batch), prepared.columns)
    solved = []
    for model in models:
        penalty = np.full_like(prepared.axes.squares, float(model.alpha))
        penalty[-1] = 0
        solved.append(prepared.products / (prepared.axes.squares + penalty)[:, None])
    made: Array = np.stack(solved, axis=1)
    return made


def likely(problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit a classifier whose scores are log-odds, at every C of the candidates."""
    present, outcomes = prepared.present, []
    for scores, seconds in _scores(problem, prepared, candidates):
        if len(present) == 2:
            raised = 1 / (1 + np.exp(-scores.astype(np.float64)))
            probabilities = np.hstack([1 - raised, raised])
        else:
            probabilities = softmax((scores - scores.max(axis=1, keepdims=True)).astype(np.float64), axis=1)
        full = expand_scores(probabilities, present, problem.target.width, "probability")
        outcomes.append(FoldOutcome(present[probabilities.argmax(axis=1)], full, "probability", seconds))
    return outcomes


def decided(problem: Problem, fold: int, prepared: Prepared, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit a head at every penalty: the highest score is the class, the signs are the labels, or the scores are the numbers."""
    present, target, outcomes = prepared.present, problem.target, []
    for scores, seconds in _scores(problem, prepared, candidates):
        binary = target.exclusive and len(present) == 2
        outcomes.append(outcome_of(target, scores[:, 0] if binary else scores, present, seconds))
    return outcomes


def _scores(problem: Problem, prepared: Prepared, candidates: Sequence[Params]) -> list[tuple[Array, float]]:
    """Solve candidates in batches that fit in memory; return for each the scores of the rows to predict, and its share of the time."""
    axes, n = prepared.axes, len(prepared.axes.train)
    if problem.on_disk:
        spare = SPARE_BYTES if problem.work_bytes is None else problem.work_bytes
        size = 1 + spare // problem_bytes(len(problem.X), problem.X.shape[1], prepared.columns)
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


def fit_in_blocks(make: Make | None, problem: Problem, params: Params, y: NDArray[Any]) -> Pipeline:
    """Fit the head's pipeline on all rows in passes over blocks of them; its classes are those of y.

    scikit-learn's other fitted attributes come from a fit on one artificial row per class.

    y : labels as the target's `learned` returns them: of any dtype, shape (n,), or numbers, float64 of shape (n,) or
        (n, k)
    """
    rows = np.arange(len(y))
    axes = turn_blocks(problem.X, rows, rows[:0])
    prepared = _shared(make, problem, axes, y)
    # On disk, each step of the solver takes two passes over all rows.
    weights = _solve(problem, prepared, [params], once=problem.on_disk)[:, 0]
    pipeline = configure(problem.head, params, problem.seed)
    pipeline.steps[0] = (pipeline.steps[0][0], axes.train.data.scaler)
    last = problem.head.fit(Pipeline(pipeline.steps[-1:]), np.zeros((len(prepared.present), 1)), prepared.present)
    pipeline.steps[-1] = last.steps[-1]
    coefficients = (axes.train.vectors @ weights[:-1]).T.astype(np.float64)
    models = getattr(last[-1], "estimators_", [last[-1]])
    parts = (np.array_split(part, len(models)) for part in (coefficients, weights[-1].astype(np.float64)))
    for model, coef, intercept in zip(models, *parts, strict=True):
        model.coef_ = coef.reshape(*model.coef_.shape[:-1], -1)
        model.intercept_ = intercept.reshape(np.shape(model.intercept_))
        if hasattr(model, "n_iter_"):
            del model.n_iter_
    for model in (last[-1], *models):
        model.n_features_in_ = problem.X.shape[1]
    return pipeline


def fit_each_label(pipeline: Pipeline, X: NDArray[np.float32], y: NDArray[np.int64]) -> Pipeline:
    """Fit a pipeline whose last step is a binary classifier; a copy of that step is fitted per column of y, shape (n, k)."""
    pipeline.steps[-1] = (pipeline.steps[-1][0], OneVsRestClassifier(pipeline[-1]))
    return pipeline.fit(X, y)


def unweighted(problem: Problem) -> bool:
    """Whether the head has scaled features and no class weights, which would move the centre of the decomposition."""
    return scaled(problem) and getattr(configure(problem.head, {}, problem.seed)[-1], "class_weight", None) is None


def evaluator(
    name: str, evaluate: Evaluate, make: Make | None, usable: Callable[[Problem], bool] = scaled, quicker: bool = False
) -> Evaluator:
    """Return the evaluator of a linear head; without a problem family (`make`), that of ridge."""
    fit = partial(fit_in_blocks, make)
    return Evaluator(name, evaluate, partial(prepare, make), True, usable, fit_in_blocks=fit, quicker=quicker)


RIDGE_OF_NUMBERS = evaluator("ridge_of_numbers", decided, None, unweighted)
LOGISTIC_LABELS, HINGE_LABELS, RIDGE_LABELS = (
    evaluator("one_vs_rest", decided, make, quicker=True) for make in (logistic_family, hinge_family, None)
)


# Discriminant analysis ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """A fold's scaled features, and their covariance within the classes.

    train, held_out : (rows, dim); y : (n,), int64; means : (n_present, dim); values, vectors : eigenvalues and -vectors of this covariance
    """

    train: Array
    held_out: Array
    y: NDArray[np.int64]
    means: Array
    values: Array
    vectors: Array

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.train.nbytes + self.held_out.nbytes + self.vectors.nbytes


def spread_of(problem: Problem, fold: int) -> Spread:
    """Scale a fold's features once and decompose their covariance within the classes."""
    train, held_out = standardised(problem, fold)
    y = problem.learned(fold)
    present, places = np.unique(y, return_inverse=True)
    means = np.stack([train[places == place].mean(axis=0) for place in range(len(present))])
    centred = train - means[places]
    return Spread(train, held_out, y, means, *decompose(centred.T @ centred / np.float32(len(train))))


def discriminant(problem: Problem, fold: int, spread: Spread, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit linear discriminant analysis at every shrinkage."""
    present, counts = np.unique(spread.y, return_counts=True)
    rows = np.concatenate([spread.held_out, spread.train]) if problem.judge_training else spread.held_out
    turned, outcomes = spread.means @ spread.vectors, []
    for params in candidates:
        if params["shrinkage"] == "auto":
            weights = _ledoit_wolf(spread)
        else:
            shrinkage = float(params["shrinkage"])
            shrunk = (1 - shrinkage) * spread.values + shrinkage * spread.values.mean()
            weights = spread.vectors @ (turned / shrunk).T
        offsets = np.log(counts / counts.sum()) - 0.5 * np.einsum("kd,dk->k", spread.means, weights)
        probabilities = softmax((rows @ weights + offsets).astype(np.float64), axis=1)
        full = expand_scores(probabilities, present, problem.target.width, "probability")
        outcomes.append(FoldOutcome(present[probabilities.argmax(axis=1)], full, "probability"))
    return outcomes


def _ledoit_wolf(spread: Spread) -> Array:
    """Return weights of shape (dim, n_present), with the covariance of each class shrunk separately, as in scikit-learn."""
    covariance = np.zeros_like(spread.vectors)
    for label in np.unique(spread.y):
        rows = spread.train[spread.y == label]
        scaler = StandardScaler()
        found = ledoit_wolf(scaler.fit_transform(rows))[0]
        covariance += len(rows) / len(spread.y) * found * np.outer(scaler.scale_, scaler.scale_)
    return np.asarray(scipy.linalg.solve(covariance, spread.means.T, assume_a="pos"))


def _square_bytes(problem: Problem) -> int:
    return int(16 * problem.X.shape[1] ** 2)


LDA = Evaluator("discriminant", discriminant, spread_of, together=True, usable=scaled, work_bytes=_square_bytes)
