"""Linear heads, written as one layer: what a network can end with, and what each place of a map can be given to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.errors import HeadError
from pipeline.heads.table import HEADS

Vectors = NDArray[np.float64]
Layer = tuple[Vectors, Vectors]
"""Weights of shape (n_classes, dim) and biases of shape (n_classes,), float64: scores = x @ weights.T + bias."""


def as_layer(pipeline: Pipeline) -> Layer:
    """Write a fitted pipeline of scalers, PCA and a linear classifier as one layer on the raw features.

    Weights (n_classes, dim) and biases (n_classes,), float64, have the order of `classes_`; two classes get two rows, -w/2 and
    w/2, whose softmax is the same probability.

    Raises
    ------
    HeadError
        When a step is not linear.
    """
    classifier = pipeline[-1]
    if not hasattr(classifier, "coef_"):
        able = ", ".join(name for name, row in HEADS.items() if row.linear)
        raise HeadError(f"a {type(classifier).__name__} is no linear layer; heads that are: {able}")
    # Of two classes a ridge keeps one dimension less than the other linear classifiers.
    weights = np.asarray(classifier.coef_, dtype=np.float64).reshape(-1, classifier.n_features_in_)
    bias = np.zeros(len(weights)) + np.asarray(classifier.intercept_, dtype=np.float64)
    for _, step in reversed(pipeline.steps[:-1]):
        if step is None or step == "passthrough":
            continue
        if type(step) not in _FOLDS:
            able = ", ".join(kind.__name__ for kind in _FOLDS)
            raise HeadError(f"a {type(step).__name__} before the head cannot be folded into a layer; only: {able}")
        weights, bias = _FOLDS[type(step)](step, weights, bias)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights, bias


def _fold_scaler(step: StandardScaler, weights: Vectors, bias: Vectors) -> Layer:
    if step.scale_ is not None:
        weights = weights / step.scale_
    if step.mean_ is not None and step.with_mean:
        bias = bias - weights @ step.mean_
    return weights, bias


def _fold_pca(step: PCA, weights: Vectors, bias: Vectors) -> Layer:
    if step.whiten:
        weights = weights / np.sqrt(np.maximum(step.explained_variance_, np.finfo(np.float64).eps))
    weights = weights @ step.components_
    return weights, bias - weights @ step.mean_


_FOLDS: Mapping[type, Callable[[Any, Vectors, Vectors], Layer]] = {StandardScaler: _fold_scaler, PCA: _fold_pca}
