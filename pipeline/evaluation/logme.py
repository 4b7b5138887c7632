"""LogME: the evidence of labels under a Bayesian linear model of features, an estimate of how well features transfer.

You, Liu, Wang, Long, LogME: Practical Assessment of Pre-trained Models for Transfer Learning, ICML 2021. For each class the labels
(1 for the class, 0 for others) are a normal variable of precision beta around F w, with a normal prior of precision alpha on w; the
logarithm of the evidence is maximised over both, and averaged over classes and images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 1000
"""Most steps of the fixed-point iteration: a few suffice where n > dim, more are needed otherwise."""


def logme(X: NDArray[np.floating], y: NDArray[np.int64]) -> float:
    """Return the mean log evidence per image; higher is better, comparable only between features of the same images.

    X : ndarray of shape (n, dim), floating; y : ndarray of shape (n,), int64: classes
    """
    X = X.astype(np.float64)
    left, singular, _ = np.linalg.svd(X, full_matrices=False)
    targets = (y[:, None] == np.unique(y)).astype(np.float64)
    projected = (left.T @ targets) ** 2
    outside = np.maximum((targets**2).sum(axis=0) - projected.sum(axis=0), 0.0)
    (n, dim), columns = X.shape, zip(projected.T, outside.tolist(), strict=True)
    return float(np.mean([_evidence(n, dim, singular**2, inside, rest) for inside, rest in columns]) / n)


def _evidence(n: int, dim: int, squares: NDArray[np.float64], projected: NDArray[np.float64], outside: float) -> float:
    """Return the largest log evidence of one class.

    squares, projected : ndarray of shape (min(n, dim),), float64: squared singular values, and squared projections of the labels on
    the left singular vectors; outside : squared length of the labels' component orthogonal to these vectors
    """
    alpha = beta = 1.0

    def lengths() -> tuple[float, float]:
        """Return the squared lengths of the posterior mean weights and of their residuals."""
        shrunk = alpha + beta * squares
        weights = float(np.sum(beta**2 * squares * projected / shrunk**2))
        return weights, float(np.sum(projected * (alpha / shrunk) ** 2)) + outside

    for _ in range(ROUNDS):
        before = alpha / beta
        used = float(np.sum(beta * squares / (alpha + beta * squares)))
        weights, misfit = lengths()
        alpha, beta = used / max(weights, 1e-300), (n - used) / max(misfit, 1e-12)
        if abs(alpha / beta - before) <= 1e-9 * before:
            break
    weights, misfit = lengths()
    determinant = float(np.sum(np.log(alpha + beta * squares))) + (dim - len(squares)) * np.log(alpha)
    constant = n * np.log(beta / (2 * np.pi)) + dim * np.log(alpha)
    return float(constant - beta * misfit - alpha * weights - determinant) / 2
