"""Heads in a few lines of numpy, quick enough to be fitted thousands of times in a simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
Labels = NDArray[np.int64]


def centroid(X: Features, y: Labels, X_new: Features) -> Labels:
    classes = np.unique(y)
    centres = np.stack([X[y == label].mean(axis=0) for label in classes])
    return classes[((X_new[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)]


def ridge(X: Features, y: Labels, X_new: Features) -> Labels:
    classes, middle = np.unique(y), X.mean(axis=0)
    targets = (y[:, None] == classes) - np.mean(y[:, None] == classes, axis=0)
    weights = np.linalg.solve((X - middle).T @ (X - middle) + np.eye(X.shape[1]), (X - middle).T @ targets)
    return classes[((X_new - middle) @ weights + np.mean(y[:, None] == classes, axis=0)).argmax(axis=1)]


def nearest(X: Features, y: Labels, X_new: Features, k: int = 1) -> Labels:
    classes = np.unique(y)
    near = np.argsort((X_new**2).sum(axis=1)[:, None] + (X**2).sum(axis=1) - 2 * X_new @ X.T, axis=1)[:, :k]
    return classes[(y[near][:, :, None] == classes).sum(axis=1).argmax(axis=1)]


def five_nearest(X: Features, y: Labels, X_new: Features) -> Labels:
    return nearest(X, y, X_new, 5)


def stump(X: Features, y: Labels, X_new: Features) -> Labels:
    """The most frequent label on either side of the first feature's median."""
    cut = np.median(X[:, 0])
    left, right = (np.bincount(y[side]).argmax() for side in (X[:, 0] <= cut, X[:, 0] > cut))
    return np.where(X_new[:, 0] <= cut, left, right)


CHEAP_HEADS: dict[str, Callable[[Features, Labels, Features], Labels]] = {
    "centroid": centroid,
    "ridge": ridge,
    "nearest": nearest,
    "five_nearest": five_nearest,
    "stump": stump,
}


def folds_of(y: Labels, k: int, seed: int) -> NDArray[np.int64]:
    """Stratified folds: each class is dealt out in turn."""
    rng = np.random.default_rng(seed)
    folds = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        folds[rows] = (np.arange(len(rows)) + rng.integers(k)) % k
    return folds


def out_of_fold(
    X: Features, y: Labels, folds: NDArray[np.int64], names: Sequence[str] = tuple(CHEAP_HEADS)
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, list[float]]]:
    """Which rows each head labels right out of fold, and its fold scores."""
    correct = {name: np.zeros(len(y), dtype=bool) for name in names}
    scores: dict[str, list[float]] = {name: [] for name in names}
    for fold in np.unique(folds):
        held = folds == fold
        for name in names:
            correct[name][held] = CHEAP_HEADS[name](X[~held], y[~held], X[held]) == y[held]
            scores[name].append(float(correct[name][held].mean()))
    return correct, scores
