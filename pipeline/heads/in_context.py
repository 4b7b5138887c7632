"""TabICL as a head: a network that reads the training rows at prediction time instead of being fitted; the user provides its weights."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.pipeline import Pipeline

from pipeline.errors import HeadError, first_line
from pipeline.io.digests import file_digest

VARIABLE = "TABICL_CHECKPOINT"
"""The environment variable with the path of the weights."""


class InContext(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Classify rows by TabICL's network with the stored training rows as context. Source: Qu et al. 2025.

    `checkpoint` is the digest of the weights; predicting with a missing or different file raises HeadError.
    """

    def __init__(self, checkpoint: str = "", random_state: int = 0) -> None:
        self.checkpoint = checkpoint
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> InContext:
        """Store rows X, shape (n, dim), and classes y, shape (n,)."""
        self.X_, self.y_ = np.asarray(X, dtype=np.float32), np.asarray(y)
        self.classes_, self.n_features_in_ = np.unique(self.y_), self.X_.shape[1]
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return each class's probability, float64 of shape (n, n_classes), for rows X of any dtype, (n, dim)."""
        path, digest = _checkpoint()
        if digest != self.checkpoint:
            raise HeadError(
                f"head tabicl: it was made with another file of weights than {path}; name that one in {VARIABLE}"
            )
        from tabicl import TabICLClassifier

        model = TabICLClassifier(model_path=path, allow_auto_download=False, random_state=self.random_state)
        shares = np.asarray(model.fit(self.X_, self.y_).predict_proba(np.asarray(X, dtype=np.float32)), np.float64)
        return np.asarray(shares / shares.sum(axis=1, keepdims=True))

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return the most probable class of each row of X, of the dtype of `classes_`, shape (n,)."""
        return np.asarray(self.classes_[self.predict_proba(X).argmax(axis=1)])


def build(seed: int) -> Pipeline:
    """Return the unfitted pipeline; HeadError, with what to do, if the package or the weights are missing."""
    return Pipeline([("head", InContext(_checkpoint()[1], seed))])


def _checkpoint() -> tuple[Path, str]:
    """Return the path and the digest of the weights, without any download."""
    if importlib.util.find_spec("tabicl") is None:
        raise HeadError("head tabicl: the package is not installed here; run `pip install 'manyheads[tabicl]'`")
    named = os.environ.get(VARIABLE, "")
    path = Path(named).expanduser()
    if not named or not path.is_file():
        found = f"there is no file {named}" if named else f"{VARIABLE} is not set"
        raise HeadError(
            f"head tabicl: {found}; get a checkpoint of TabICL's classifier, tabicl-classifier-v2-20260212.ckpt, which is not "
            f"downloaded for you, and set {VARIABLE}=FILE"
        )
    return path, _digest(path, path.stat().st_mtime_ns)


@cache
def _digest(path: Path, changed: int) -> str:
    """Check a file of weights and return its digest; it is read as tensors and plain data, so it cannot run code."""
    import torch

    try:
        classes = torch.load(path, map_location="cpu", weights_only=True)["config"].get("max_classes", 10)
    except Exception as error:  # a file may hold anything
        raise HeadError(f"head tabicl: {path} is not a TabICL checkpoint ({first_line(error)})") from None
    if classes < 1:
        raise HeadError(f"head tabicl: {path} is a checkpoint for regression; use that of the classifier")
    return file_digest(path)
