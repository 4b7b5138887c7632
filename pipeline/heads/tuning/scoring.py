"""Score columns: what an estimator says of each class, with a column for every class of the problem."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


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
