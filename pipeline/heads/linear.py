"""Linear heads, written as one layer that a network can end with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.errors import HeadError
from pipeline.heads.table import HEADS

Vectors = NDArray[np.float64]


def linear_parts(pipeline: Pipeline) -> tuple[Vectors, Vectors, Vectors, Vectors]:
    """Write a fitted linear head as a layer: scores = ((x - mean) / scale) @ weights.T + bias.

    Returns
    -------
    weights : ndarray of shape (n_classes, dim), float64
        Rows in the order of `classes_`. With two classes scikit-learn keeps one row w; here it is split into -w/2 and
        w/2, whose softmax gives the same probabilities and whose larger score is the same class.
    bias : ndarray of shape (n_classes,), float64
    mean, scale : ndarray of shape (dim,), float64
        Of the scaler inside the pipeline.

    Raises
    ------
    HeadError
        When the head is not linear.
    """
    classifier = pipeline[-1]
    scalers = [step for _, step in pipeline.steps[:-1]]
    foreign = len(scalers) > 1 or any(not isinstance(step, StandardScaler) for step in scalers)
    if foreign or not hasattr(classifier, "coef_"):
        able = ", ".join(name for name, row in HEADS.items() if row.linear)
        raise HeadError(
            f"a {type(classifier).__name__} is not a linear layer over scaled features; heads that are: {able}"
        )
    weights = np.asarray(classifier.coef_, dtype=np.float64).reshape(-1, classifier.n_features_in_)
    bias = np.asarray(classifier.intercept_, dtype=np.float64).reshape(-1)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    dim = weights.shape[1]
    scaler = scalers[0] if scalers else None
    mean = np.zeros(dim) if scaler is None or scaler.mean_ is None else np.asarray(scaler.mean_, dtype=np.float64)
    scale = np.ones(dim) if scaler is None or scaler.scale_ is None else np.asarray(scaler.scale_, dtype=np.float64)
    return weights, bias, mean, scale
