"""Solvers of linear classifiers for many penalties at once, in float32.

Features are first rotated to the principal axes of their covariance. An L2 penalty is invariant to rotation, so the
optimum is the same, but along these axes the curvature is nearly diagonal and known, so that preconditioned L-BFGS needs
tens of steps instead of hundreds. All penalties share each product with the features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from pipeline.heads.tuning.features import Array, FeatureMatrix, Standardised

Loss = Callable[[Array], tuple[NDArray[np.float64], Array]]
"""Scores of shape (n, problems, columns) -> the loss of each problem, and its derivative with respect to each score."""

ANCHORS_PER_DECADE = 1
"""Number of anchors per factor of ten of C; solutions in between start from them."""

MEMORY_PAIRS = 20
"""Number of pairs of step and gradient difference in the memory of L-BFGS."""

MOST_STEPS = 500


@dataclass(frozen=True)
class Axes:
    """Standardised features, rotated to the principal axes of their covariance.

    train : matrix of shape (n, rank + 1), float32; the last column is 1 for the intercept. An ndarray, or `Turned` if
        the features stay on disk
    held_out : matrix of shape (n_held_out, rank + 1), float32
    squares : ndarray of shape (rank + 1,), float32: sum of squares of each column of `train`
    """

    train: Any
    held_out: Any
    squares: Array


def turn(train: Array, held_out: Array) -> Axes:
    """Rotate centred features to the principal axes of their covariance, and append a column of ones.

    train, held_out : float32 of shape (n, dim) and (n_held_out, dim)
    """
    n, dim = train.shape
    if dim <= n:
        _, vectors = decompose(train.T @ train)
        turned, other = train @ vectors, held_out @ vectors
    else:
        values, vectors = decompose(train @ train.T)
        # Directions in which the training rows hardly vary do not affect the optimum and would cause division by zero.
        kept = values > 1e-6 * values.max()
        root = np.sqrt(values[kept])
        turned, other = vectors[:, kept] * root, held_out @ (train.T @ (vectors[:, kept] / root))
    turned, other = (np.hstack([part, np.ones((len(part), 1), np.float32)]) for part in (turned, other))
    return Axes(turned, other, np.einsum("ij,ij->j", turned, turned))


@dataclass(frozen=True)
class Turned:
    """Implicit matrix of standardised rows on their principal axes, with a column of ones, or its transpose.

    The weights are rotated instead of the rows: (X V) w = X (V w).
    """

    data: Standardised
    vectors: Array
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return int(self.vectors.nbytes)

    @property
    def T(self) -> Turned:
        """The transpose."""
        return replace(self, transposed=not self.transposed)

    def __len__(self) -> int:
        return len(self.data.rows)

    def __matmul__(self, columns: Array) -> Array:
        if self.transposed:
            total = np.zeros((len(self.vectors), columns.shape[1]))
            for place, block in self.data.blocks():
                total += block.T @ columns[place]
            ones = columns.sum(axis=0, dtype=np.float64)
            return np.vstack([self.vectors.T @ total.astype(np.float32), ones[None, :].astype(np.float32)])
        turned = self.vectors @ columns[:-1]
        made = np.empty((len(self), columns.shape[1]), dtype=np.float32)
        for place, block in self.data.blocks():
            made[place] = block @ turned
        made += columns[-1]
        return made


def turn_blocks(X: FeatureMatrix, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> Axes:
    """Rotate rows to the axes of the training rows' covariance, like `turn`, without copying the rows.

    X : float32 of shape (n, dim); train, held_out : row indices, int64 of shape (k,) and (m,)
    """
    data = Standardised.of(X, train)
    total = data.products()
    values, vectors = decompose(total.astype(np.float32))
    if len(total) > len(train):
        vectors = np.ascontiguousarray(vectors[:, values > 1e-6 * values.max()])
    squares = np.append(np.einsum("ij,ij->j", vectors, total @ vectors), len(train))
    others = Turned(Standardised(X, held_out, data.scaler), vectors)
    return Axes(Turned(data, vectors), others, np.maximum(squares, 0).astype(np.float32))


def decompose(matrix: Array) -> tuple[Array, Array]:
    """Return the eigenvalues and eigenvectors of a symmetric matrix, which may be overwritten.

    matrix : float32 of shape (k, k); returns float32 of shape (k,), in ascending order, and (k, k), one column each
    """
    # numpy's eigh copies the matrix and takes half as long again.
    values, vectors = scipy.linalg.eigh(matrix, driver="evd", overwrite_a=True, check_finite=False)
    return values, vectors


def softmax_loss(y: NDArray[np.int64], weights: Array) -> Loss:
    """Return the weighted cross-entropy of n rows, for problems with a column per class.

    y : class indices, int64 of shape (n,); weights : float32 of shape (n,)
    """
    doubled, rows = weights.astype(np.float64), np.arange(len(y))

    def loss(scores: Array) -> tuple[NDArray[np.float64], Array]:
        own = scores[rows, :, y]
        top = scores.max(axis=2)
        shares = np.exp(scores - top[:, :, None])
        total = shares.sum(axis=2)
        value = doubled @ (np.log(total) + top - own).astype(np.float64)
        shares *= (weights[:, None] / total)[:, :, None]
        shares[rows, :, y] -= weights[:, None]
        return value, shares

    return loss


def binomial_loss(targets: Array, weights: Array) -> Loss:
    """Return the weighted binary cross-entropy of n rows with targets of -1 and 1.

    targets : float32 of shape (n, 1) or (n, problems); weights : float32 of shape (n,)
    """
    doubled = weights.astype(np.float64)
    sign = -targets[:, :, None]

    def loss(scores: Array) -> tuple[NDArray[np.float64], Array]:
        margin = scores * sign
        # Equal to logaddexp and a sigmoid, but several times as fast.
        value = doubled @ (np.maximum(margin, 0) + np.log(1 + np.exp(-np.abs(margin))))[:, :, 0].astype(np.float64)
        slope = 1 / (1 + np.exp(np.minimum(-margin, 80)))
        return value, slope * sign * weights[:, None, None]

    return loss


def squared_hinge_loss(targets: Array, weights: Array) -> Loss:
    """Return the weighted squared hinge loss of n rows; targets of -1 and 1 and weights are float32 of shape (n, problems)."""

    def loss(scores: Array) -> tuple[NDArray[np.float64], Array]:
        short = np.clip(1 - targets * scores[:, :, 0], 0, None)
        slope = weights * short
        value = np.einsum("np,np->p", slope.astype(np.float64), short.astype(np.float64))
        slope *= -2 * targets
        return value, slope[:, :, None]

    return loss


@dataclass(frozen=True)
class ProblemFamily:
    """A family of problems on one fold, to be solved at many penalties: `width` separate problems of `columns` scores each.

    loss(problems) returns the loss of the problems with these indices, which are numbered penalty by penalty.
    """

    loss: Callable[[NDArray[np.int64]], Loss]
    width: int
    columns: int
    penalise_intercept: bool
    tolerance: float
    """Largest derivative, divided by the number of rows, at which a problem is solved."""


class Path:
    """The regularisation path of a family, computed as far as needed.

    Anchors are evenly spaced in log C, with C = 1 / penalty, and each is solved starting from the one before. A solution in
    between starts from the interpolation of its neighbours, a few steps from the optimum. It depends only on the fold, not on
    earlier requests, so a resumed search finds the same.
    """

    def __init__(self, axes: Axes, family: ProblemFamily) -> None:
        self._axes, self._family = axes, family
        # Up to this C, the penalty dominates even along the longest axis: nearly all weights are zero.
        longest = float(axes.squares[:-1].max(initial=1.0))
        self._first = int(np.floor(-ANCHORS_PER_DECADE * np.log10(longest)))
        self._weights: list[Array] = []
        self._thetas: list[Array] = []
        self._state: _State | None = None

    def solve(self, penalties: NDArray[np.float64]) -> Array:
        """Return the solutions at these penalties.

        penalties : float64 of shape (k,); returns float32 of shape (rank + 1, k * width, columns)
        """
        family = self._family
        place = np.maximum(-ANCHORS_PER_DECADE * np.log10(penalties) - self._first, 0)
        below = np.floor(place).astype(int)
        for _ in range(len(self._weights), int(below.max()) + 2):
            self._extend()
        share = np.minimum(place - below, 1).astype(np.float32).tolist()
        start = np.concatenate(
            [self._weights[b] * (1 - s) + self._weights[b + 1] * s for b, s in zip(below, share, strict=True)], axis=1
        )
        thetas = np.concatenate([self._thetas[b] for b in below])
        repeated = np.repeat(penalties, family.width)
        return minimise(self._axes, family, repeated, start, thetas)

    def solve_once(self, penalty: float) -> Array:
        """Return the solution at one penalty, starting from zero: for a single solution this takes fewer steps than anchors."""
        return minimise(self._axes, self._family, np.full(self._family.width, penalty), *self._nothing())

    def _nothing(self) -> tuple[Array, Array]:
        width = self._family.width
        zero = np.zeros((len(self._axes.squares), width, self._family.columns), np.float32)
        return zero, np.full(width, 0.25, np.float32)

    def _extend(self) -> None:
        """Solve the next anchor."""
        penalty = 10 ** (-(self._first + len(self._weights)) / ANCHORS_PER_DECADE)
        if self._state is None:
            penalties = np.full(self._family.width, penalty)
            self._state = _State(self._axes, self._family, penalties, *self._nothing())
        else:
            self._state.repenalise(penalty)
        for _ in range(MOST_STEPS):
            if self._state.solved(self._family.tolerance).all():
                break
            self._state.advance(self._axes)
        self._weights.append(self._state.weights)
        self._thetas.append(self._state.theta)


def minimise(axes: Axes, family: ProblemFamily, penalties: NDArray[np.float64], start: Array, theta: Array) -> Array:
    """Minimise loss(train @ w) + penalty / 2 * |w|^2 in every problem, by L-BFGS preconditioned with the axes.

    The curvature along axis j is approximated by penalty + theta * squares[j], with theta from the last step. All problems of
    a batch share the two products with the features per step; a converged problem leaves the batch.

    penalties : ndarray of shape (problems,)
    start : ndarray of shape (rank + 1, problems, columns), float32
    theta : ndarray of shape (problems,), float32
    Returns weights, an ndarray of shape (rank + 1, problems, columns), float32.
    """
    solution = np.empty_like(start)
    running = np.arange(len(penalties))
    state = _State(axes, family, penalties, start, theta)
    for _ in range(MOST_STEPS):
        leaving = state.solved(family.tolerance)
        if leaving.any():
            solution[:, running[leaving]] = state.weights[:, leaving]
            running = running[~leaving]
            if not len(running):
                return solution
            state.keep(~leaving)
            state.loss = family.loss(running)
        state.advance(axes)
    solution[:, running] = state.weights
    return solution


class _State:
    """The state of a batch of problems between two steps; arrays have the shape (rank + 1, problems, columns)."""

    def __init__(
        self, axes: Axes, family: ProblemFamily, penalties: NDArray[np.float64], weights: Array, theta: Array
    ) -> None:
        self.loss, self.weights, self.theta = family.loss(np.arange(len(penalties))), weights, theta
        self.penalty: Array = np.zeros_like(weights[:, :, 0]) + penalties.astype(np.float32)
        if not family.penalise_intercept:
            self.penalty[-1] = 0
        self.scores = _product(axes.train, weights)
        value, slope = self.loss(self.scores)
        self.gradient: Array = _product(axes.train.T, slope) + self.penalty[:, :, None] * weights
        self.value: NDArray[np.float64] = value + self._held(weights, weights) / 2
        self.stalled: NDArray[np.int64] = np.zeros_like(value, dtype=np.int64)
        self.pairs: list[tuple[Array, Array, Array]] = []

    def solved(self, tolerance: float) -> NDArray[np.bool_]:
        """Return which problems have converged or cannot improve."""
        solved = np.abs(self.gradient).max(axis=(0, 2)) <= tolerance * len(self.scores)
        return np.asarray(solved | (self.stalled >= 2))

    def repenalise(self, penalty: float) -> None:
        """Change the penalty and keep the state: the effect on value, gradient and curvature is known."""
        change = (penalty - self.penalty) * (self.penalty > 0)
        self.value = self.value + np.einsum("rbk,rb,rbk->b", self.weights, change, self.weights) / 2
        self.gradient = self.gradient + change[:, :, None] * self.weights
        self.penalty = self.penalty + change
        pairs = []
        for step, difference, _ in self.pairs:
            moved: Array = difference + change[:, :, None] * step
            curvature = _dot(step, moved)
            pairs.append((step, moved, _inverse(curvature)))
        self.pairs = pairs
        self.stalled = np.zeros_like(self.stalled)

    def _held(self, a: Array, b: Array) -> NDArray[np.float64]:
        """Return the inner product of a and b weighted by the penalty, for each problem."""
        weighted: Array = self.penalty[:, :, None] * b
        return _dot(a, weighted).astype(np.float64)

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Keep only these problems."""
        self.weights, self.scores, self.gradient = self.weights[:, kept], self.scores[:, kept], self.gradient[:, kept]
        self.penalty, self.value = self.penalty[:, kept], self.value[kept]
        self.theta, self.stalled = self.theta[kept], self.stalled[kept]
        self.pairs = [(s[:, kept], y[:, kept], r[kept]) for s, y, r in self.pairs]

    def advance(self, axes: Axes) -> None:
        """Take one step of L-BFGS in every problem."""
        direction = self._direction(axes)
        descent = _dot(self.gradient, direction)
        moved = _product(axes.train, direction)
        length, scores, value, slope = self._line_search(direction, moved, descent)
        change = direction * length[None, :, None]
        weights = self.weights + change
        gradient = _product(axes.train.T, slope) + self.penalty[:, :, None] * weights
        difference = gradient - self.gradient
        curvature = _dot(change, difference)
        useful = curvature > 1e-12
        along = _dot(change, axes.squares[:, None, None] * change)
        held = self._held(change, change)
        theta = np.where(along > 0, (curvature - held) / np.clip(along, 1e-30, None), self.theta)
        self.theta = np.where(useful & (theta > 0), theta, self.theta).astype(np.float32)
        self.pairs = [*self.pairs[-(MEMORY_PAIRS - 1) :], (change, difference, _inverse(curvature))]
        self.stalled = np.where(length > 0, 0, self.stalled + 1)
        self.weights, self.scores, self.value, self.gradient = weights, scores, value, gradient

    def _direction(self, axes: Axes) -> Array:
        """Return the negative product of the inverse Hessian's estimate and the gradient: the two-loop recursion of L-BFGS."""
        vector: Array = self.gradient.copy()
        shares = []
        for change, difference, inverse in reversed(self.pairs):
            share = inverse * _dot(change, vector)
            vector -= share[None, :, None] * difference
            shares.append(share)
        curvature = self.penalty + self.theta[None, :] * axes.squares[:, None]
        vector /= np.clip(curvature, 1e-12, None)[:, :, None]
        for (change, difference, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            vector += (share - inverse * _dot(difference, vector))[None, :, None] * change
        return -vector

    def _line_search(
        self, direction: Array, moved: Array, descent: Array
    ) -> tuple[Array, Array, NDArray[np.float64], Array]:
        """Halve each problem's step until its value decreases enough; scores are linear in the step, so no product is needed."""
        linear, square = self._held(self.weights, direction), self._held(direction, direction)
        base = self._held(self.weights, self.weights) / 2
        length = np.ones_like(descent)
        # The rounding error of float32 scores; without this allowance, no step near the optimum would be accepted.
        noise = 1e-6 * np.abs(self.value)
        for _ in range(12):
            scores = self.scores + moved * length[None, :, None]
            loss, slope = self.loss(scores)
            value = loss + base + length * linear + length * length * square / 2
            short = ~(value <= self.value + 1e-4 * length * descent + noise)
            if not short.any():
                break
            length = np.where(short, length / 2, length)
        else:
            length = np.where(short, 0, length)
            scores = self.scores + moved * length[None, :, None]
            loss, slope = self.loss(scores)
            value = loss + base + length * linear + length * length * square / 2
            self.pairs = []
        return length, scores, value, slope


def _inverse(curvature: Array) -> Array:
    """Return 1 / curvature, or 0 if the curvature is only rounding error, which removes the pair from the sums."""
    made: Array = np.where(curvature > 1e-12, 1 / np.clip(curvature, 1e-30, None), 0)
    return made


def _product(matrix: Any, vectors: Array) -> Array:
    """Return matrix @ vectors for vectors of shape (m, problems, columns), as one product."""
    flat = vectors.reshape(vectors.shape[0], -1)
    # With few columns, BLAS computes the transposed product a quarter faster.
    made: Array = matrix @ flat if isinstance(matrix, Turned) else (flat.T @ matrix.T).T
    return made.reshape(-1, *vectors.shape[1:])


def _dot(a: Array, b: Array) -> Array:
    """Return the inner product of each problem: shape (problems,)."""
    made: Array = np.einsum("rbk,rbk->b", a, b)
    return made
