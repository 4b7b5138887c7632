"""Scores a search can maximise, as plain functions of codes and score columns; higher is better."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score

Scorer = Callable[[NDArray[np.int64], NDArray[np.int64], "NDArray[np.float32] | None"], float]


def accuracy(y: NDArray[np.int64], predictions: NDArray[np.int64], probabilities: NDArray[np.float32] | None) -> float:
    """Share of rows predicted right."""
    return float(np.mean(y == predictions))


def balanced_accuracy(
    y: NDArray[np.int64], predictions: NDArray[np.int64], probabilities: NDArray[np.float32] | None
) -> float:
    """Mean over the classes that occur in y of the share of their rows predicted right."""
    counts = np.bincount(y)
    right = np.bincount(y[y == predictions], minlength=len(counts))
    return float(np.mean(right[counts > 0] / counts[counts > 0]))


def macro_f1(y: NDArray[np.int64], predictions: NDArray[np.int64], probabilities: NDArray[np.float32] | None) -> float:
    """Mean F1 over the classes that occur in y or are predicted."""
    return float(f1_score(y, predictions, average="macro", zero_division=0.0))


def log_loss(y: NDArray[np.int64], predictions: NDArray[np.int64], probabilities: NDArray[np.float32] | None) -> float:
    """Minus the mean log loss in nats, so that higher is better here too."""
    assert probabilities is not None, "a head without probabilities is refused before the search"
    own = probabilities[np.arange(len(y)), y].astype(np.float64)
    return float(np.mean(np.log(np.clip(own, 1e-15, 1.0))))


SCORERS: Mapping[str, Scorer] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "log_loss": log_loss,
}


def expand_scores(
    scores: NDArray[np.floating], present: NDArray[np.int64], n_classes: int, kind: str
) -> NDArray[np.float32]:
    """Give an estimator's scores one column per class of the whole problem.

    scores : ndarray of shape (n,) for two classes, or (n, len(present))
    present : ndarray of shape (len(present),), int64: the classes the estimator was fitted on
    Returns an ndarray of shape (n, n_classes). One decision value z of two classes becomes -z and z. An absent class gets
    probability 0, or 1 less than the row's lowest decision value.
    """
    if scores.ndim == 1:
        scores = np.stack([-scores, scores], axis=1)
    if len(present) == n_classes:
        return scores.astype(np.float32)
    absent = 0.0 if kind == "probability" else scores.min(axis=1, keepdims=True) - 1
    full = np.zeros((len(scores), n_classes), dtype=np.float32) + np.float32(absent)
    full[:, present] = scores
    return full
