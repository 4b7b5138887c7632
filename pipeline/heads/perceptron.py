"""How a multi-layer perceptron is fitted: epoch by epoch, keeping the weights that the best epoch began with; and judged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline

from pipeline.heads.head import Params
from pipeline.heads.tuning.evaluation import Evaluator, Screening, generic
from pipeline.heads.tuning.records import FoldOutcome, Problem

FIRST_EPOCHS = 12
"""What a perceptron is first judged after; most take five times as many."""


def fit_keeping_best(pipeline: Pipeline, X: NDArray[np.float32], y: NDArray[Any]) -> Pipeline:
    """Fit a pipeline that ends in an `MLPClassifier` or an `MLPRegressor`, and keep the best weights and not the last.

    scikit-learn keeps the last, and counts a loss that jumps up as one that no longer falls: a fit may end in the jump.
    An epoch's loss is summed up while its weights move, so it judges those it began with and never those it ended with.
    Stops as scikit-learn does, by `tol`, `n_iter_no_change` and `max_iter`, the last with its ConvergenceWarning.

    X : float32 of shape (n, dim); y : classes of any dtype, shape (n,), or numbers, float64 of shape (n,) or (n, k)
    """
    for _, step in pipeline.steps[:-1]:
        X = step.fit_transform(X, y)
    model = pipeline[-1]
    classes = {"classes": np.unique(y)} if is_classifier(model) else {}
    seed = model.random_state
    # A number would shuffle the rows alike in every epoch.
    model.set_params(random_state=np.random.RandomState(seed))
    best, kept, waited = np.inf, None, 0
    for epoch in range(model.max_iter):
        began = [weights.copy() for weights in model.coefs_ + model.intercepts_] if epoch else None
        model.partial_fit(X, y, **classes)
        waited = 0 if model.loss_ < best - model.tol else waited + 1
        if began is not None and model.loss_ < best:
            best, kept = model.loss_, began
        if waited > model.n_iter_no_change:
            break
    else:
        warnings.warn(f"maximum iterations ({model.max_iter}) reached", ConvergenceWarning, stacklevel=2)
    if kept is not None:
        model.coefs_, model.intercepts_ = kept[: len(model.coefs_)], kept[len(model.coefs_) :]
    model.n_iter_ = epoch + 1
    return pipeline.set_params(**{f"{pipeline.steps[-1][0]}__random_state": seed})


def mlp(problem: Problem, fold: int, prepared: Any, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Fit each candidate from scratch."""
    return generic(problem, fold, prepared, candidates)


def _width(problem: Problem, params: Params) -> float:
    """Return what an epoch costs: an affine function of the hidden units, found by timing."""
    return 64.0 + float({**problem.head.fixed, **problem.head.defaults, **params}["hidden_layer_sizes"])


def _few_epochs(problem: Problem, params: Params) -> Params:
    return {"max_iter": FIRST_EPOCHS}


MLP = Evaluator(mlp, screening=Screening(_few_epochs, 4.0, _width))
