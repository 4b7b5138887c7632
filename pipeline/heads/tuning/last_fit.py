"""Fits on all rows: of the best parameters at the end of a search, or of given ones.

The fit on all rows has no held-out rows, and may converge badly even if the fits on folds did not. So its score on its training rows
is compared with theirs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from pipeline.data.classes import ANY_CLASSES
from pipeline.errors import UnfittedError
from pipeline.evaluation import Metric, Predictions
from pipeline.evaluation.leaderboard import LastFit
from pipeline.heads.head import Head, Params, configure
from pipeline.heads.tuning.evaluation import (
    Measured,
    Problem,
    counted,
    counting_warnings,
    derived_seed,
    evaluator_for,
    failed,
    smaller_caches,
    working_memory,
)
from pipeline.heads.tuning.features import FeatureMatrix, Projections, blocks, without_scaler

FEW_FEATURES = 1 << 25
"""Size of a feature matrix below which the last fit uses a single BLAS thread."""

TRIES = 4
"""Maximum number of fits on all rows, each with another seed, until one keeps its promise."""

CHANCE = 3.09
"""The 99.9 % quantile of the normal distribution, in standard errors."""


@dataclass(frozen=True)
class Promise:
    """The training scores of the folds' fits, and the decrease allowed to a fit on all rows."""

    scores: tuple[Measured, ...]
    allowance: float

    @staticmethod
    def of(mean: float, scores: Sequence[Measured]) -> Promise:
        """Derive the training score expected of a fit on all rows; `mean` is the score on held-out rows.

        With more rows n, training scores fall and held-out scores rise towards the same limit. If the gap shrinks no
        faster than 1 / n, the k / (k - 1) times as many rows of the last fit reduce it by at most 1 / k.
        """
        gap = float(np.mean([measured.score for measured in scores])) - mean
        return Promise(tuple(scores), max(0.0, gap) / len(scores))

    def kept(self, found: Measured) -> bool:
        """Whether a fit's training score is within the allowance and chance of the folds' lowest."""
        lowest = min(self.scores, key=lambda measured: measured.score)
        return found.score >= lowest.score - self.allowance - CHANCE * float(np.hypot(found.error, lowest.error))


def fit_as_promised(
    problem: Problem, params: Params, y: NDArray[Any], jobs: int, metric: Metric, promise: Promise
) -> tuple[Pipeline, float, LastFit]:
    """Fit on all rows with seeds not used on folds, until the promise is kept; return the best fit, its seconds, and its record.

    y : labels as the target's `learned` returns them: of any dtype, shape (n,), or numbers, float64 of shape (n,) or
        (n, k)

    UnfittedError if every attempt raised an exception.
    """
    tries, best, errors, labels = 0, None, Counter[str](), np.empty(0)
    for attempt in range(TRIES):
        seeded = changed(problem, seed=derived_seed(problem.seed, 1, attempt))
        start, tries = time.perf_counter(), attempt + 1
        try:
            with counting_warnings(), counted() as counts:
                pipeline = fit_on_all(seeded, params, y, jobs)
                seconds = time.perf_counter() - start
                predictions = _recalled(seeded, pipeline, metric)
            found = Measured.of(metric, predictions)
        except Exception as error:  # a user's head may fail in any way, and so may a solver
            errors[failed(error, {}).error or ""] += 1
            continue
        if best is None or found.score > best[2].score:
            best = pipeline, seconds, found, dict(counts)
        # A deterministic head would give the same fit again.
        if promise.kept(found) or np.array_equal(predictions.y_pred, labels):
            break
        labels = predictions.y_pred
    if best is None:
        raise UnfittedError(
            f"head {problem.head.name}: the best trial could not be fitted on all rows",
            [f"{count} x {error}" for error, count in errors.items()],
        )
    pipeline, seconds, found, warnings = best
    scores = tuple(measured.score for measured in promise.scores)
    return pipeline, seconds, LastFit(found.score, scores, tries, promise.kept(found), warnings)


def _recalled(problem: Problem, pipeline: Pipeline, metric: Metric) -> Predictions:
    """Return the predictions of a fit on all rows for these rows."""
    with working_memory(problem.work_bytes):
        parts = [problem.target.recalled(pipeline, block) for _, block in blocks(problem.X)]
    labels, target = np.concatenate([labels for labels, _ in parts]), problem.target
    looked_at = metric.needs_probabilities or (metric.threshold and not target.exclusive)
    columns = np.concatenate([columns for _, columns in parts]) if looked_at else None
    if metric.threshold:
        labels = target.decided(problem.y, labels, columns, metric.threshold)
    return Predictions(problem.y, labels, columns, target=target)


def refit(
    head: Head,
    params: Params,
    X: FeatureMatrix,
    y: NDArray[Any],
    seed: int,
    pca: int | float | None = None,
) -> Pipeline:
    """Fit a head with given parameters on all rows, as `tune` does with the best ones.

    X : float32 of shape (n, dim), as for `tune`; on disk only for heads that support it, or with `pca`
    y : labels of any dtype, shape (n,)
    """
    target, codes, _ = ANY_CLASSES.narrowed(y)
    problem = Problem(head, X, codes, target, (), seed)
    if pca is not None:
        problem = changed(problem, head=without_scaler(head), projections=Projections(X, pca))
    with counting_warnings(), threadpool_limits(limits=1, user_api="openmp"):
        return fit_on_all(problem, params, y, jobs=1)


def fit_on_all(problem: Problem, params: Params, y: NDArray[Any], jobs: int) -> Pipeline:
    """Fit the head's pipeline on all rows; `n_jobs` and smaller caches apply to the fit only.

    y : labels as the target's `learned` returns them: of any dtype, shape (n,), or numbers, float64 of shape (n,) or
        (n, k)
    """
    # For small matrix products, synchronising threads takes longer than the work.
    few = problem.X.shape[0] * problem.X.shape[1] < FEW_FEATURES
    with threadpool_limits(limits=1 if few else None, user_api="blas"):
        own = problem.head.evaluator
        if problem.on_disk or (own is not None and own.quicker and problem.projections is None):
            fit_in_blocks = evaluator_for(problem).fit_in_blocks
            if fit_in_blocks is not None:
                return fit_in_blocks(problem, params, y)
        projection, X = (None, problem.X) if problem.projections is None else problem.projections.whole()
        pipeline = configure(problem.head, params, problem.seed)
        params = pipeline.get_params()
        used = smaller_caches(pipeline, problem.work_bytes)
        for step, key in ((key.removesuffix("__n_jobs"), key) for key in params if key.endswith("__n_jobs")):
            if not isinstance(params[step], LogisticRegression):  # there it has no effect, and scikit-learn warns
                used[key] = jobs
        kept = {key: params[key] for key in used}
        fitted = problem.head.fit(pipeline.set_params(**used), X, y)
        fitted.set_params(**{key: kept[key] for key in kept.keys() & fitted.get_params()})
        if projection is None:
            return fitted
        return Pipeline([("scaler", projection.scaler), ("pca", projection.pca), *fitted.steps])
