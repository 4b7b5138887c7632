"""Evaluator of linear discriminant analysis: one decomposition per fold, from which every shrinkage follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import StandardScaler

from pipeline.data.classes import expand_scores
from pipeline.heads.fast.solvers import Array, decompose
from pipeline.heads.head import Params
from pipeline.heads.tuning.evaluation import Evaluator, scaled, standardised
from pipeline.heads.tuning.records import FoldOutcome, Problem


@dataclass(frozen=True)
class Spread:
    """A fold's scaled features, and how they spread within the classes.

    train, held_out : (rows, dim); y : (n,), int64; means : (n_present, dim); values, vectors : of the covariance within classes
    """

    train: Array
    held_out: Array
    y: NDArray[np.int64]
    means: Array
    values: Array
    vectors: Array

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.train.nbytes + self.held_out.nbytes + self.vectors.nbytes


def prepare(problem: Problem, fold: int) -> Spread:
    """Scale a fold once and decompose its covariance within classes."""
    train, held_out = standardised(problem, fold)
    y = problem.y[problem.folds[fold][0]]
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
    """Return weights of shape (dim, n_present), the covariance of each class shrunk by itself as scikit-learn does it."""
    covariance = np.zeros_like(spread.vectors)
    for label in np.unique(spread.y):
        rows = spread.train[spread.y == label]
        scaler = StandardScaler()
        found = ledoit_wolf(scaler.fit_transform(rows))[0]
        covariance += len(rows) / len(spread.y) * found * np.outer(scaler.scale_, scaler.scale_)
    return np.asarray(scipy.linalg.solve(covariance, spread.means.T, assume_a="pos"))


def _work_bytes(problem: Problem) -> int:
    return int(16 * problem.X.shape[1] ** 2)


LDA = Evaluator(discriminant, prepare, together=True, usable=scaled, work_bytes=_work_bytes)
