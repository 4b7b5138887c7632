"""Cosine-weighted voting by the nearest training images, as in DINO's protocol, or by one prototype per class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from pipeline.evaluation.strangeness import directions

BLOCK_NUMBERS = 1 << 22
"""Maximum number of cosines in memory."""


class CosineVote(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """The `n_neighbors` references nearest by cosine (None: all) vote for their class with exp(cosine / temperature).

    References are the training rows, or with `prototypes` the mean of each class's rows. With `centre`, the mean of the training
    rows is subtracted first. Source: Caron et al. 2021 (DINO), Wu et al. 2018; prototypes: Chen et al. 2019.
    """

    def __init__(
        self,
        n_neighbors: int | None = 20,
        temperature: float = 0.07,
        centre: bool = False,
        prototypes: bool = False,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.temperature = temperature
        self.centre = centre
        self.prototypes = prototypes

    def fit(self, X: ArrayLike, y: ArrayLike) -> CosineVote:
        """Store the references of rows X, shape (n, dim), and classes y, shape (n,)."""
        rows = np.asarray(X, dtype=np.float32)
        self.classes_, self.codes_ = np.unique(np.asarray(y), return_inverse=True)
        self.n_features_in_ = rows.shape[1]
        self.mean_ = rows.mean(axis=0) if self.centre else np.zeros(rows.shape[1], np.float32)
        self.references_ = directions(rows, self.mean_)
        if self.prototypes:
            places = np.arange(len(self.classes_))
            means = [self.references_[self.codes_ == place].mean(axis=0) for place in places]
            self.references_, self.codes_ = directions(np.stack(means), 0), places
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return each class's share of the vote, float64 of shape (n, n_classes), for rows X of any dtype, (n, dim)."""
        rows = directions(np.asarray(X, dtype=np.float32), self.mean_)
        count, made = len(self.references_), np.empty((len(rows), len(self.classes_)))
        neighbours = count if self.n_neighbors is None else min(self.n_neighbors, count)
        block = max(1, BLOCK_NUMBERS // count)
        for start in range(0, len(rows), block):
            cosines = (rows[start : start + block] @ self.references_.T).astype(np.float64)
            least = np.partition(cosines, count - neighbours, axis=1)[:, count - neighbours, None]
            weights = np.exp((cosines - cosines.max(axis=1, keepdims=True)) / self.temperature)
            weights[cosines < least] = 0
            votes = weights @ np.eye(len(self.classes_))[self.codes_]
            made[start : start + block] = votes / votes.sum(axis=1, keepdims=True)
        return made

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the class with the most votes for each row of X, of the dtype of `classes_`, shape (n,)."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])
