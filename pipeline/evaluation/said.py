"""What a fitted classifier says of vectors: a score for each of its classes, and the likeliest of them as the label."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.calibration import scores_as_columns
from pipeline.evaluation.predictions import ScoreKind


def said(
    estimator: Any, X: NDArray[np.float32]
) -> tuple[NDArray[np.intp], NDArray[np.floating] | None, ScoreKind | None]:
    """Return places in `classes_`, and probabilities or else decision values with a column for each of them.

    The label is the class with the highest score, whatever `predict` says: scikit-learn's NearestCentroid measures
    distances in another way there than for its probabilities, and an SVC without `break_ties` takes the first of equals.
    A classifier without a score per class is asked to predict.
    """
    model = estimator[-1] if hasattr(estimator, "steps") else estimator
    pairs = getattr(model, "decision_function_shape", "ovr") == "ovo"
    kinds: tuple[tuple[str, ScoreKind], ...] = (("predict_proba", "probability"), ("decision_function", "decision"))
    for name, kind in kinds:
        if hasattr(estimator, name) and not (pairs and kind == "decision" and len(estimator.classes_) > 2):
            columns = getattr(estimator, name)(X)
            columns = columns if kind == "probability" else scores_as_columns(columns)
            return columns.argmax(axis=1), columns, kind
    return np.searchsorted(estimator.classes_, estimator.predict(X)), None, None
