"""Folds: how training rows are divided for cross-validation, once, for every head."""

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
    """Divide n rows into folds that keep the shares of the classes, and keep a group in one fold.

    A class with fewer rows than folds is held out in some folds only; a class of one row is absent from the training
    rows of the fold that holds it out, so that row is always predicted wrongly. When even the largest class, or the
    number of groups, is smaller than `n_folds`, there are as many folds as it allows, and a warning says so.

    y : array of shape (n,), of any dtype; or int64 of shape (n, k), the several strata that a row is of, -1 for none, each of
        which is kept in proportion
    groups : array of shape (n,), of any dtype, or None

    Returns for each fold the numbers of its training and of its held-out rows, int64 of shape (k,) and (n - k,); HeadError where no
    two folds can be made.
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
        warnings.simplefilter(
            "ignore", UserWarning
        )  # what it says of rare classes was said when the images were listed
        pairs = list(splitter(possible, shuffle=True, random_state=seed).split(rows, codes, groups))
    # With few groups of very different size scikit-learn may leave a fold without rows.
    return tuple((train.astype(np.int64), held_out.astype(np.int64)) for train, held_out in pairs if len(held_out))


def spread(strata: NDArray[np.int64], n_folds: int, seed: int, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the fold of each of n rows of several strata, shape (n,): iterative stratification (Sechidis et al. 2011).

    Of the stratum with the fewest rows left, each unit goes to the fold that lacks most of it, and of equals to the one that
    lacks most rows; a large unit goes before small ones.
    strata : ndarray of shape (n, k), -1 for none; a row is of one at least. units : ndarray of shape (n,), numbered from 0
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
    """Return each fold with so many of its training images, for every size: a learning curve's fits, size by size.

    strata : ndarray of shape (n,), int64, what every part has in proportion; of shape (n, k), with -1 for none, by the rarest of a row
    """
    if strata.ndim > 1:
        there = strata >= 0
        strata = np.where(there, there.sum(axis=0), len(strata) + 1).argmin(axis=1)
    orders = [train[stratified_order(strata[train], seed + fold)] for fold, (train, _) in enumerate(folds)]
    parts = [(size, order, held) for size in sizes for order, (_, held) in zip(orders, folds, strict=True)]
    return tuple((np.sort(order[:size]), held) for size, order, held in parts)
