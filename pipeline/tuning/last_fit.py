"""Fits on all rows: of the best parameters at the end of a search, and of known ones elsewhere."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from pipeline.heads import Head, Params, configure
from pipeline.tuning.evaluation import counting_warnings, smaller_caches
from pipeline.tuning.features import Features
from pipeline.tuning.on_disk import fit_on_disk
from pipeline.tuning.projection import Projections, without_scaler
from pipeline.tuning.records import Problem

BY_BLOCKS = frozenset({"linear_svm"})
"""Heads on disk whose last fit is made that way in memory too: at 2,500 x 512 and 20 classes LIBLINEAR takes twenty times
as long to the same optimum."""

FEW_FEATURES = 1 << 25
"""Numbers in a feature matrix below which the last fit uses one thread for its products."""


def refit(
    head: Head,
    params: Params,
    X: Features,
    y: NDArray[Any],
    seed: int,
    pca: int | float | None = None,
    whiten: bool = False,
) -> Pipeline:
    """Fit a head with given parameters on all rows, as `tune` does with the best it found.

    X : as for `tune`, and as there on disk only for heads that can be fitted so, or with `pca`
    """
    classes, codes = np.unique(y, return_inverse=True)
    problem = Problem(head, X, codes.astype(np.int64), len(classes), (), seed)
    if pca is not None:
        problem = changed(problem, head=without_scaler(head), projections=Projections(X, pca, whiten))
    with threadpool_limits(limits=1, user_api="openmp"):
        return fit_on_all(problem, params, y, jobs=1)


def fit_on_all(problem: Problem, params: Params, y: NDArray[Any], jobs: int) -> Pipeline:
    """Fit the head's pipeline on all rows; `n_jobs` and smaller caches are used for the fit and not kept."""
    # Threads of a small product wait for each other longer than they work.
    few = problem.X.shape[0] * problem.X.shape[1] < FEW_FEATURES
    with counting_warnings(), threadpool_limits(limits=1 if few else None, user_api="blas"):
        if problem.on_disk or (problem.projections is None and problem.head.on_disk in BY_BLOCKS):
            return fit_on_disk(problem, params, y)
        projection, X = (None, problem.X) if problem.projections is None else problem.projections.whole()
        pipeline = configure(problem.head, params, problem.seed)
        used: dict[str, float] = {key: jobs for key in pipeline.get_params() if key.endswith("__n_jobs")}
        used |= smaller_caches(pipeline, problem.work_bytes)
        kept = {key: pipeline.get_params()[key] for key in used}
        fitted = pipeline.set_params(**used).fit(X, y).set_params(**kept)
        return fitted if projection is None else projection.before(fitted)
