"""Saved heads as scikit-learn estimators: vectors to classes, labels or numbers as the user writes them.

`fit` refits the head with the parameters chosen by the search, as for the last step of a pipeline in each fold.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, clone
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from pipeline.data.targets import Target
from pipeline.export.bundle import ModelBundle


def _blocks(bundle: ModelBundle, X: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Split concatenated vectors, float32 of shape (n, dim), into those of each part of a bundle."""
    return np.split(X, np.cumsum(_dims(bundle)[:-1]), axis=1) if bundle.members else [X]


def _dims(bundle: ModelBundle) -> list[int]:
    return [int(part.embedding["spec"]["dim"]) for part in bundle.parts]


def _refitted(bundle: ModelBundle, target: Target, X: NDArray[np.float32], y: NDArray[Any]) -> ModelBundle:
    """Refit a bundle's estimators on concatenated vectors, float32 of shape (n, dim), and y of any dtype, (n, ...)."""
    parts = zip(bundle.members, _blocks(bundle, X), strict=False)
    members = tuple(_refitted(member, target, block, y) for member, block in parts)
    estimator = None if members else clone(bundle.estimator).fit(X, y)
    return replace(bundle, target=target, estimator=estimator, members=members, calibrator=None)


def _predict(head: Any, X: ArrayLike) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """Return the result of `ModelBundle.said` for concatenated vectors, of any float dtype and shape (n, dim)."""
    check_is_fitted(head)
    rows = validate_data(head, X, dtype=np.float32, reset=False)
    predicted: tuple[NDArray[Any], NDArray[np.float64] | None] = head.bundle_.said(*_blocks(head.bundle_, rows))
    return predicted


def _has_probabilities(self: Any) -> bool:
    bundle = getattr(self, "bundle_", self.bundle)
    calibrated = bundle.calibrator is not None or bool(bundle.members) or not bundle.target.exclusive
    return calibrated or hasattr(bundle.estimator, "predict_proba")


class HeadClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A head for classes, or for several labels as columns of 0 and 1; calibrated like the bundle until it is refitted."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle

    def fit(self, X: ArrayLike, y: ArrayLike) -> HeadClassifier:
        """Fit the head on vectors X, of any float dtype and shape (n, dim), and y, classes of shape (n,) or 0 and 1, (n, k)."""
        rows, labels = validate_data(self, X, y, dtype=np.float32, multi_output=not self.bundle.target.exclusive)
        check_classification_targets(labels)
        target, learned = self.bundle.target.anew(labels)
        self.classes_ = np.unique(labels) if target.exclusive else np.array(target.classes, dtype=object)
        self.bundle_ = _refitted(self.bundle, target, rows, learned)
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Return classes of the dtype of `classes_`, shape (n,), or 0 and 1, int64 (n, k), for X of any float dtype, (n, dim)."""
        predicted = _predict(self, X)[0]
        return self.classes_[predicted] if self.bundle.target.exclusive else predicted.astype(np.int64)

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]  # scikit-learn has no types
    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class or label, float64 of shape (n, k), for X of any float dtype, (n, dim)."""
        found = _predict(self, X)[1]
        assert found is not None, "checked by `_has_probabilities`"
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = tags.target_tags.multi_output = not self.bundle.target.exclusive
        return tags


class HeadRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A head for one or several numbers."""

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle

    def fit(self, X: ArrayLike, y: ArrayLike) -> HeadRegressor:
        """Fit the head on vectors X, of any float dtype and shape (n, dim), and numbers y, shape (n,) or (n, k)."""
        rows, numbers = validate_data(self, X, y, dtype=np.float32, multi_output=True, y_numeric=True)
        numbers = column_or_1d(numbers, warn=True) if numbers.shape[1:] == (1,) else numbers
        target, learned = self.bundle.target.anew(numbers.astype(np.float64))
        self.bundle_ = _refitted(self.bundle, target, rows, learned)
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return numbers, float64 of shape (n,) or (n, k), for vectors X of any float dtype, shape (n, dim)."""
        return _predict(self, X)[0]


def estimator_of(bundle: ModelBundle) -> HeadClassifier | HeadRegressor:
    """Return a bundle as a fitted estimator on vectors, concatenated if there are several embeddings."""
    head = HeadClassifier(bundle) if bundle.classes else HeadRegressor(bundle)
    head.bundle_, head.n_features_in_ = bundle, sum(_dims(bundle))
    if bundle.classes:
        head.classes_ = np.array(bundle.classes, dtype=object)
    return head
