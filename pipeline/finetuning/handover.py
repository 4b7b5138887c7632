"""Hand-over: a fitted scikit-learn head becomes the last layer of a network, exactly.

Fine-tuning then starts where stage two ended, and not from a random layer whose first gradients would tear at the
pretrained weights (Kumar et al. 2022, "Fine-tuning can distort pretrained features": LP-FT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pipeline.errors import TrainingError
from pipeline.finetuning.plan import last_linear

Vectors = NDArray[np.float64]
Layer = tuple[Vectors, Vectors]
"""Weights of shape (classes, dim) and biases of shape (classes,): scores = x @ weights.T + bias."""


def fold(pipeline: Pipeline) -> Layer:
    """Write a fitted pipeline of scalers, PCA and a linear classifier as one layer on the raw features.

    Returns
    -------
    weights : ndarray of shape (n_classes, dim), float64, rows in the order of `classes_`
    bias : ndarray of shape (n_classes,), float64
        Two classes get two rows, -w/2 and w/2, whose softmax is the same probability.

    Raises
    ------
    TrainingError
        When a step is not linear.
    """
    classifier = pipeline[-1]
    if not hasattr(classifier, "coef_"):
        raise TrainingError(
            f"a {type(classifier).__name__} is no linear layer and cannot be handed over; expected a linear head such as logistic_regression"
        )
    # Of two classes a ridge keeps one dimension less than the other linear classifiers.
    weights = np.asarray(classifier.coef_, dtype=np.float64).reshape(-1, classifier.n_features_in_)
    bias = np.zeros(len(weights)) + np.asarray(classifier.intercept_, dtype=np.float64)
    for _, step in reversed(pipeline.steps[:-1]):
        if step is None or step == "passthrough":
            continue
        if type(step) not in _FOLDS:
            able = ", ".join(kind.__name__ for kind in _FOLDS)
            raise TrainingError(f"a {type(step).__name__} before the head cannot be folded into a layer; only: {able}")
        weights, bias = _FOLDS[type(step)](step, weights, bias)
    if len(weights) == 1:
        weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    return weights, bias


def put_head(network: nn.Module, layer: Layer) -> None:
    """Replace the network's last linear layer by weights (n_classes, dim) and biases (n_classes,), float64; it becomes float32.

    Raises
    ------
    TrainingError
        When the layer takes vectors of another length than the network has.
    """
    name = last_linear(network)
    old = network.get_submodule(name)
    assert isinstance(old, nn.Linear)
    weights, bias = layer
    if weights.shape[1] != old.in_features:
        raise TrainingError(
            f"the head takes vectors of {weights.shape[1]} numbers, the network's last layer {name!r} gets {old.in_features}; "
            "use a head trained on the penultimate layer"
        )
    new = nn.Linear(weights.shape[1], len(weights), device=old.weight.device)
    with torch.no_grad():
        new.weight.copy_(torch.from_numpy(weights))
        new.bias.copy_(torch.from_numpy(bias))
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def random_layer(classes: int, dim: int, seed: int) -> Layer:
    """Return the layer torch would start with: weights (classes, dim) and biases (classes,), float64; the control that starts from no head."""
    bound = dim**-0.5
    rng = np.random.default_rng(seed)
    return rng.uniform(-bound, bound, (classes, dim)), rng.uniform(-bound, bound, classes)


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
