"""Heads that are screened by cheap fits: forests with few trees, perceptrons with few epochs.

The trees of a forest are independent, so a few of them are a noisier version of the same forest at a fraction of the cost. Forests
are scored on each fold's held-out rows, never on out-of-bag rows, whose group or near-duplicates may have been trained on.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import is_classifier
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from sklearn.utils.multiclass import unique_labels

from pipeline.data.classes import expand_scores
from pipeline.heads.head import Params, configure
from pipeline.heads.tuning.evaluation import Evaluator, FoldOutcome, Problem, Screening, generic, one_by_one

FEW = 16
"""Number of trees in the cheap fit of a candidate that costs as much as the head's defaults."""

FEWEST, MOST = 8, 32
"""Bounds of this number for more expensive and cheaper candidates."""

BUDGET = 7.0
"""Cost limit of the full fits after a screening, in fits of the head's defaults; these are fitted in full in any case."""

KEPT_BYTES = 64 << 20
"""Maximum size of the votes kept per fold; a forest without kept votes is grown from its first tree, with the same result."""

FIRST_EPOCHS = 12
"""Number of epochs in the cheap fit of a perceptron; most full fits take five times as many."""


def usable(problem: Problem) -> bool:
    """Whether the head is a forest with at least twice as many trees as a cheap fit."""
    model = configure(problem.head, problem.head.defaults, problem.seed)[-1]
    forest = isinstance(model, RandomForestClassifier | ExtraTreesClassifier) and not model.warm_start
    return forest and "n_estimators" not in problem.head.space and bool(model.n_estimators >= 2 * MOST)


Votes = dict[str, tuple[int, NDArray[np.float64], NDArray[np.float64]]]
"""The state after cheap fits, by a forest's parameters: its number of trees, the sum of their probabilities for each row, and the
sum of the squares of these."""


def _no_votes(problem: Problem, fold: int) -> Votes:
    return {}


@one_by_one
def forest(problem: Problem, fold: int, grown: Votes, params: Params) -> FoldOutcome:
    """Fit a forest, continuing from its cheap fit if kept; the held-out predictions of a cheap fit are `extrapolated`."""
    whole = int(configure(problem.head, {}, problem.seed)[-1].n_estimators)
    X_train, X = problem.matrices(fold)
    start = time.perf_counter()
    pipeline = configure(problem.head, params, problem.fold_seed(fold))
    model, name = pipeline[-1], repr(sorted({**params, "n_estimators": None}.items()))
    trees, (done, total, squares) = model.n_estimators, grown.pop(name, (0, np.zeros(()), np.zeros(())))
    # A forest draws one random number per tree, so drawing those of the existing trees gives the later trees their own.
    state = np.random.RandomState(model.random_state)
    state.randint(np.iinfo(np.int32).max, size=done)
    model.set_params(n_estimators=trees - done, random_state=state)
    pipeline.fit(X_train, problem.learned(fold))
    fitted = time.perf_counter()
    for _, step in pipeline.steps[:-1]:
        X = step.transform(X)
    for tree in model.estimators_:  # in scikit-learn's order of summation: the last digit decides ties
        vote = tree.predict_proba(X)
        total = total + vote
        squares = squares + np.einsum("ij,ij->i", vote, vote)
    present, shares, held_out = model.classes_, total / trees, problem.folds[fold][1]
    if trees < whole:
        n = len(held_out)
        shares[:n] = extrapolated(total[:n], squares[:n], problem.y[held_out], trees, whole)
        if sum(kept.nbytes for _, kept, _ in list(grown.values())) + total.nbytes <= KEPT_BYTES:
            grown[name] = trees, total, squares
    predictions = present[shares.argmax(axis=1)]
    full = expand_scores(shares, present, problem.target.width, "probability")
    return FoldOutcome(predictions, full, "probability", fitted - start, time.perf_counter() - fitted)


def cost(problem: Problem, params: Params) -> float:
    """Return the number of features considered per split, to which the time of growing a tree is proportional."""
    dim, wanted = problem.dim, configure(problem.head, params, problem.seed)[-1].max_features
    named = {"sqrt": np.sqrt(dim), "log2": np.log2(dim), None: dim}
    return max(1.0, float(named[wanted] if wanted in named else wanted if isinstance(wanted, int) else wanted * dim))


def few(problem: Problem, params: Params) -> Params:
    """Return the number of trees of a candidate's cheap fit, which takes about as long as `FEW` trees of the defaults.

    A forest whose splits consider few features is cheap, and its trees vary much: at an equal number of trees it would
    be underrated, and an expensive forest overrated, which would lead the surrogate to expensive trees.
    """
    trees = FEW * cost(problem, problem.head.defaults) / cost(problem, params)
    return {"n_estimators": int(np.clip(round(trees), FEWEST, MOST))}


def extrapolated(
    total: NDArray[np.float64], squares: NDArray[np.float64], y: NDArray[np.int64], trees: int, wanted: int
) -> NDArray[np.float64]:
    """Return vote shares with about the error rate of a forest with `wanted` trees, only for ranking parameters.

    With T trees, the share p of a row varies around the mean m of its class with variance b + s / T, where s is the variance
    between a row's trees, estimated from the sums of votes and of their squares, and b is the remainder. Each share is moved
    towards m until the variance is b + s / `wanted` (the shrinkage of James and Stein 1961). Otherwise parameters whose trees
    vary much, which gain most from more trees, would be underrated. The mean excludes the row itself, but uses its label.

    total, squares : the sum of the trees' probabilities, float64 of shape (n, n_present), and the sum of their squares over
        trees and classes, float64 of shape (n,)
    y : the classes of the rows, int64 of shape (n,); returns shares of shape (n, n_present) whose rows sum to 1
    """
    shares = total / trees
    codes, sizes = np.unique(y, return_inverse=True, return_counts=True)[1:]
    sums = np.zeros((len(sizes), shares.shape[1]))
    np.add.at(sums, codes, shares)
    companions = (sizes[codes] - 1)[:, None]
    mean = (sums[codes] - shares) / np.maximum(companions, 1)
    away = np.where(companions > 0, shares - mean, 0.0)
    # Around a mean that excludes the row itself, the variance is larger by a factor of 1 + 1 / companions.
    spread = float(np.mean((away**2).sum(axis=1) * (companions / (companions + 1))[:, 0]))
    within = np.maximum(squares - (total**2).sum(axis=1) / trees, 0.0) / max(trees - 1, 1)
    s = float(within.mean())
    b = max(spread - s / trees, 0.0)
    keep = np.sqrt((b + s / wanted) / (b + s / trees)) if s > 0 else 1.0
    return np.asarray(shares - (1 - keep) * away)


def fit_keeping_best(pipeline: Pipeline, X: NDArray[np.float32], y: NDArray[Any]) -> Pipeline:
    """Fit a pipeline that ends in an `MLPClassifier` or an `MLPRegressor`, and keep the best weights instead of the last.

    scikit-learn keeps the last ones, even if the loss has just jumped up. An epoch's loss is attributed to its initial
    weights. Stops like scikit-learn, by `tol`, `n_iter_no_change` and `max_iter`, the last with its ConvergenceWarning.

    X : float32 of shape (n, dim); y : classes of any dtype, shape (n,), or numbers, float64 of shape (n,) or (n, k)
    """
    for _, step in pipeline.steps[:-1]:
        X = step.fit_transform(X, y)
    model = pipeline[-1]
    classes = {"classes": unique_labels(y)} if is_classifier(model) else {}
    seed = model.random_state
    # An integer seed would shuffle the rows in the same order in every epoch.
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


def _width(problem: Problem, params: Params) -> float:
    """Return the cost of an epoch, an affine function of the number of hidden units, determined by timing."""
    return 64.0 + float({**problem.head.fixed, **problem.head.defaults, **params}["hidden_layer_sizes"])


def _few_epochs(problem: Problem, params: Params) -> Params:
    return {"max_iter": FIRST_EPOCHS}


FOREST = Evaluator("forest", forest, _no_votes, usable=usable, screening=Screening(few, BUDGET, cost))
FOREST_OF_NUMBERS = Evaluator("forest_of_numbers", generic, screening=Screening(few, BUDGET, cost))
"""Its cheap fits are scored without extrapolation."""
FEW_EPOCHS = Screening(_few_epochs, 4.0, _width)
"""The screening of perceptrons."""
