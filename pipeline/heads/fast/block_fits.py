"""Fits of heads from passes over blocks of standardised rows; `on_disk.FITS` has the table.

Each head has two functions: one reads the rows and keeps what all parameters share, the other makes a fitted pipeline for
every set of parameters. Class weights are those of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.errors import HeadError
from pipeline.heads import Params, configure
from pipeline.heads.fast.linear import row_weights, targets_of
from pipeline.heads.fast.solvers import Array, Axes, Family, Path
from pipeline.heads.fast.standardised import Standardised
from pipeline.heads.tuning.records import Problem

PER_SCORE, PER_WEIGHT, PER_PRODUCT = 28, 200, 32
"""Bytes a solver holds per row and class, per dimension and class, and per pair of dimensions; the copies that L-BFGS
keeps and the workspace of an eigendecomposition are among them."""


def problem_bytes(n: int, dim: int, columns: int) -> int:
    """Return about what solving one problem of n rows, with so many scores each, takes."""
    return columns * (PER_SCORE * n + PER_WEIGHT * dim)


@dataclass(frozen=True)
class Rows:
    """The rows of a fit, and what is known of each.

    y : ndarray of shape (n,), int64: places in `classes`
    weights : ndarray of shape (n,), float32: the class weights
    """

    data: Standardised
    classes: NDArray[Any]
    y: NDArray[np.int64]
    weights: Array

    @staticmethod
    def of(problem: Problem, rows: NDArray[np.int64], y: NDArray[Any]) -> Rows:
        """Standardise the rows and sort their labels along."""
        data = Standardised.of(problem.X, rows)
        classes, codes = np.unique(y[data.rows], return_inverse=True)
        return Rows(data, classes, codes.astype(np.int64), row_weights(problem, codes))


@dataclass(frozen=True)
class Turned:
    """Standardised rows on the axes of their covariance, with a column of ones: `Axes.train` without the matrix.

    The axes turn the weights and not the rows: (X V) w = X (V w).
    """

    rows: Rows
    vectors: Array

    def __matmul__(self, weights: Array) -> Array:
        turned = self.vectors @ weights[:-1]
        made = np.empty((len(self.rows.y), weights.shape[1]), dtype=np.float32)
        for place, block in self.rows.data.blocks():
            np.matmul(block, turned, out=made[place])
        made += weights[-1]
        return made

    @property
    def T(self) -> _Transposed:
        """What `Turned.T @ slopes` is made with."""
        return _Transposed(self)


@dataclass(frozen=True)
class _Transposed:
    turned: Turned

    def __matmul__(self, slopes: Array) -> Array:
        rows, vectors = self.turned.rows, self.turned.vectors
        total = np.zeros((len(vectors), slopes.shape[1]))
        for place, block in rows.data.blocks():
            total += block.T @ slopes[place]
        ones = slopes.sum(axis=0, dtype=np.float64)
        return np.vstack([vectors.T @ total.astype(np.float32), ones[None, :].astype(np.float32)])


def _turn(rows: Rows) -> Axes:
    """Find the axes of the rows' covariance, as `solvers.turn` does in memory."""
    total = rows.data.products()
    values, vectors = scipy.linalg.eigh(total.astype(np.float32), driver="evd", overwrite_a=True, check_finite=False)
    if len(total) > len(rows.y):
        vectors = np.ascontiguousarray(vectors[:, values > 1e-6 * values.max()])
    squares = np.append(np.einsum("ij,ij->j", vectors, total @ vectors), len(rows.y))
    turned: Any = Turned(rows, vectors)
    return Axes(turned, np.empty((0, vectors.shape[1] + 1), np.float32), np.maximum(squares, 0).astype(np.float32))


@dataclass(frozen=True)
class _Solver:
    """A fold's rows and the solutions found so far; the rows themselves stay on disk."""

    rows: Rows
    path: Path
    vectors: Array
    family: Family

    @property
    def nbytes(self) -> int:
        """Bytes held, about."""
        columns = self.family.width * self.family.columns
        return self.vectors.nbytes + problem_bytes(len(self.rows.y), len(self.vectors), columns)


def prepare_path(
    make: Callable[[NDArray[np.int64], int, Array], Family], problem: Problem, rows: NDArray[np.int64], y: NDArray[Any]
) -> _Solver:
    """Find the axes of the rows, and start the path of solutions of a family."""
    kept = Rows.of(problem, rows, y)
    axes = _turn(kept)
    family = make(kept.y, len(kept.classes), kept.weights)
    turned: Any = axes.train
    return _Solver(kept, Path(axes, family), turned.vectors, family)


def solve_path(problem: Problem, solver: _Solver, candidates: Sequence[Params]) -> list[Pipeline]:
    """Solve at every C."""
    rows, family = solver.rows, solver.family
    columns = family.width * family.columns
    # Penalties that are solved at once share their passes over the features.
    size = 1 + problem.spare_bytes // problem_bytes(len(rows.y), len(solver.vectors), columns)
    pipelines = []
    for start in range(0, len(candidates), size):
        batch = candidates[start : start + size]
        found = solver.path.solve(np.array([1 / float(_parameter(problem, one, "C")) for one in batch]))
        found = found.reshape(len(found), len(batch), columns)
        for place, params in enumerate(batch):
            weights = found[:, place]
            pipelines.append(_linear(problem, rows, params, (solver.vectors @ weights[:-1]).T, weights[-1]))
    return pipelines


@dataclass(frozen=True)
class _Ridge:
    """The one decomposition all penalties follow from: X'X = vectors * values * vectors', around the weighted mean."""

    rows: Rows
    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    products: NDArray[np.float64]
    """vectors' X'Y, shape (dim, columns)."""
    mean: NDArray[np.float64]
    target_mean: NDArray[np.float64]


def prepare_ridge(problem: Problem, rows: NDArray[np.int64], y: NDArray[Any]) -> _Ridge:
    """Sum up the products of rows and targets, around their weighted means, and decompose them."""
    kept = Rows.of(problem, rows, y)
    targets = targets_of(kept.y, len(kept.classes))
    dim, root = problem.X.shape[1], np.sqrt(kept.weights)
    square, products, total = np.zeros((dim, dim)), np.zeros((dim, targets.shape[1])), np.zeros(dim)
    for place, block in kept.data.blocks():
        block *= root[place, None]
        square += block.T @ block
        products += block.T @ (root[place, None] * targets[place])
        total += root[place] @ block
    weight = float(kept.weights.sum(dtype=np.float64))
    mean, target_mean = total / weight, kept.weights.astype(np.float64) @ targets / weight
    square -= np.outer(total, mean)
    products -= np.outer(total, target_mean)
    # Transposed it is in the order LAPACK wants, and needs no copy.
    values, vectors = scipy.linalg.eigh(square.T, driver="evd", overwrite_a=True, check_finite=False)
    return _Ridge(kept, np.maximum(values, 0), vectors, vectors.T @ products, mean, target_mean)


def solve_ridge(problem: Problem, ridge: _Ridge, candidates: Sequence[Params]) -> list[Pipeline]:
    """Solve at every alpha."""
    pipelines = []
    for params in candidates:
        weights = ridge.vectors @ (
            ridge.products / (ridge.values + float(_parameter(problem, params, "alpha")))[:, None]
        )
        intercept = ridge.target_mean - ridge.mean @ weights
        pipelines.append(_linear(problem, ridge.rows, params, weights.T, intercept))
    return pipelines


@dataclass(frozen=True)
class _Centroids:
    rows: Rows
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]
    """Sum over all rows of the squared distance to their class's centroid, shape (dim,)."""


def prepare_centroids(problem: Problem, rows: NDArray[np.int64], y: NDArray[Any]) -> _Centroids:
    """Sum up the rows of each class."""
    kept = Rows.of(problem, rows, y)
    member = np.eye(len(kept.classes), dtype=np.float32)
    sums, squares = np.zeros((len(member), problem.X.shape[1])), np.zeros(problem.X.shape[1])
    for place, block in kept.data.blocks():
        sums += member[kept.y[place]].T @ block
        squares += np.einsum("ij,ij->j", block, block)
    counts = np.bincount(kept.y)
    return _Centroids(kept, sums, np.maximum(squares - (sums**2 / counts[:, None]).sum(axis=0), 0))


def solve_centroids(problem: Problem, kept: _Centroids, candidates: Sequence[Params]) -> list[Pipeline]:
    """Shrink the centroids as scikit-learn does (Tibshirani et al. 2002, nearest shrunken centroids)."""
    n, counts = len(kept.rows.y), np.bincount(kept.rows.y)
    means, centre = kept.sums / counts[:, None], kept.sums.sum(axis=0) / n
    spread = np.sqrt(kept.squares / max(n - len(counts), 1))
    unit = np.sqrt(1 / counts - 1 / n)[:, None] * (spread + np.median(spread))
    pipelines = []
    for params in candidates:
        pipeline = _fitted_on_little(problem, kept.rows, params)
        classifier = pipeline[-1]
        with np.errstate(divide="ignore", invalid="ignore"):
            deviations = (means - centre) / unit
        centroids = means
        if classifier.shrink_threshold:
            deviations = np.sign(deviations) * np.maximum(np.abs(deviations) - classifier.shrink_threshold, 0)
            centroids = centre + unit * deviations
        classifier.centroids_, classifier.deviations_ = centroids, deviations
        classifier.within_class_std_dev_ = spread
        if classifier.priors == "empirical":
            classifier.class_prior_ = counts / n
        pipelines.append(pipeline)
    return pipelines


def _parameter(problem: Problem, params: Params, name: str) -> Any:
    """Return a parameter's value, whether it is searched, held by the config, or scikit-learn's default."""
    return configure(problem.head, params, problem.seed)[-1].get_params()[name]


def _linear(problem: Problem, rows: Rows, params: Params, weights: NDArray[Any], intercept: NDArray[Any]) -> Pipeline:
    """Make a fitted pipeline of a linear head from its weights, shape (classes or 1, dim)."""
    pipeline = _fitted_on_little(problem, rows, params)
    classifier = pipeline[-1]
    classifier.coef_, classifier.intercept_ = weights.astype(np.float64), intercept.astype(np.float64)
    return pipeline


def _fitted_on_little(problem: Problem, rows: Rows, params: Params) -> Pipeline:
    """Return the head's pipeline as scikit-learn fits it to one made-up row per class, with the scaler of the real rows.

    All that scikit-learn keeps besides the solution is then there; the caller puts the solution in.
    """
    pipeline = configure(problem.head, params, problem.seed)
    if len(pipeline.steps) != 2 or type(pipeline[0]) is not StandardScaler:
        names = ", ".join(type(step).__name__ for _, step in pipeline.steps)
        raise HeadError(
            f"head {problem.head.name}: on_disk needs a pipeline of a StandardScaler and a classifier, found {names}"
        )
    pipeline.steps[0] = (pipeline.steps[0][0], rows.data.scaler)
    classifier = pipeline[-1]
    little = np.arange(len(rows.classes), dtype=np.float32)[:, None]
    classifier.fit(little if problem.head.on_disk == "nearest_centroid" else np.zeros_like(little), rows.classes)
    classifier.n_features_in_ = problem.X.shape[1]
    if hasattr(classifier, "n_iter_"):
        del classifier.n_iter_
    return pipeline
