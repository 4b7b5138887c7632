"""Cross-validation folds of the training rows, made once for all heads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from pipeline.errors import HeadError
from pipeline.evaluation.intervals import numbered
from pipeline.evaluation.learning_curve import stratified_order

log = logging.getLogger(__name__)

Folds = tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
"""One (training rows, validation rows) pair per fold; every row is held out exactly once."""


def make_folds(y: ArrayLike, n_folds: int, seed: int, groups: Sequence[Any] | NDArray[Any] | None = None) -> Folds:
    """Divide n rows into folds, stratified by class, with each group in a single fold.

    A class with fewer rows than folds is held out in some folds only; a class of one row is missing from the training
    rows of the fold that holds it out, so that row is always predicted wrongly. If even the largest class, or the
    number of groups, is smaller than `n_folds`, there are as many folds as it allows, and a warning is logged.

    y : array of shape (n,), of any dtype; or int64 of shape (n, k), the strata that a row belongs to, padded with -1; all are
        kept in proportion
    groups : array of shape (n,), of any dtype, or None

    Returns for each fold the indices of its training and of its held-out rows, int64 of shape (k,) and (n - k,); HeadError if fewer
    than two folds are possible.
    """
    given = np.asarray(y)
    several = given.ndim > 1
    classes, codes, counts = np.unique(given[given >= 0] if several else given, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise HeadError(f"the training rows have {len(classes)} class; a classifier needs at least 2")
    units = numbered(None if groups is None else np.asarray(groups), len(given))
    possible = min(n_folds, int(counts.max()), int(units.max()) + 1)
    if possible < 2:
        raise HeadError("cross-validation needs two images of a class, and two groups; give more images")
    if possible < n_folds:
        log.warning("%d folds instead of %d: the training rows do not allow more", possible, n_folds)
    if several:
        place = spread(given, possible, seed, units)
        return tuple((np.flatnonzero(place != fold), np.flatnonzero(place == fold)) for fold in np.unique(place))
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    rows = np.zeros(len(codes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rare classes were reported when the images were listed
        pairs = list(splitter(possible, shuffle=True, random_state=seed).split(rows, codes, groups))
    # With few groups of very different sizes, scikit-learn may leave a fold without rows.
    return tuple((train.astype(np.int64), held_out.astype(np.int64)) for train, held_out in pairs if len(held_out))


def spread(strata: NDArray[np.int64], n_folds: int, seed: int, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the fold of each of n rows with several strata, shape (n,): iterative stratification (Sechidis et al. 2011).

    Repeatedly, the units of the stratum with the fewest rows left are assigned, large ones first, each to the fold that lacks most
    rows of this stratum, and among equals to the one that lacks most rows overall.
    strata : ndarray of shape (n, k), padded with -1, at least one per row. units : ndarray of shape (n,), numbered from 0
    """
    rows, columns = np.nonzero(strata >= 0)
    sizes = np.bincount(units)
    counts = np.zeros((len(sizes), int(strata.max()) + 1))
    np.add.at(counts, (units[rows], strata[rows, columns]), 1)
    rng, place = np.random.default_rng(seed), np.full(len(sizes), -1)
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    lacking, room = np.tile(counts.sum(axis=0) / n_folds, (n_folds, 1)), np.full(n_folds, len(units) / n_folds)
    while (place < 0).any():
        left = counts[place < 0].sum(axis=0)
        stratum = np.where(left > 0, left, np.inf).argmin()
        for unit in order[(place[order] < 0) & (counts[order, stratum] > 0)]:
            fold = np.lexsort((rng.random(n_folds), -room, -lacking[:, stratum]))[0]
            place[unit] = fold
            lacking[fold] -= counts[unit]
            room[fold] -= sizes[unit]
    return place[units]


def growing(folds: Folds, strata: NDArray[np.int64], sizes: Sequence[int], seed: int) -> Folds:
    """Return each fold with a stratified subset of its training rows, for every size: the fits of a learning curve, size by size.

    strata : int64 of shape (n,), or of shape (n, k), padded with -1, of which the rarest stratum of each row is used
    """
    if strata.ndim > 1:
        there = strata >= 0
        strata = np.where(there, there.sum(axis=0), len(strata) + 1).argmin(axis=1)
    orders = [train[stratified_order(strata[train], seed + fold)] for fold, (train, _) in enumerate(folds)]
    parts = [(size, order, held) for size in sizes for order, (_, held) in zip(orders, folds, strict=True)]
    return tuple((np.sort(order[:size]), held) for size, order, held in parts)
