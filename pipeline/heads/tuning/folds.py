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

log = logging.getLogger(__name__)

Folds = tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
"""One (training rows, validation rows) pair per fold; every row is held out exactly once."""


def make_folds(y: ArrayLike, n_folds: int, seed: int, groups: Sequence[Any] | NDArray[Any] | None = None) -> Folds:
    """Divide n rows into folds that keep the shares of the classes, and keep a group in one fold.

    A class with fewer rows than folds is held out in some folds only; a class of one row is absent from the training
    rows of the fold that holds it out, so that row is always predicted wrongly. When even the largest class, or the
    number of groups, is smaller than `n_folds`, there are as many folds as it allows, and a warning says so.

    Parameters
    ----------
    y : array of shape (n,), of any dtype
    groups : array of shape (n,), of any dtype, or None

    Returns
    -------
    For each fold the numbers of its training and of its held-out rows, int64 of shape (k,) and (n - k,).

    Raises
    ------
    HeadError
        When no two folds can be made.
    """
    classes, codes, counts = np.unique(np.asarray(y), return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise HeadError(f"the training rows have {len(classes)} class; a classifier needs at least 2")
    possible = min(n_folds, int(counts.max()))
    if groups is not None:
        possible = min(possible, len(set(np.asarray(groups).tolist())))
    if possible < 2:
        found = "all training rows are in one group" if counts.max() > 1 else "every class has one training row"
        raise HeadError(f"cross-validation is not possible: {found}; expected at least 2 folds, so give more images")
    if possible < n_folds:
        log.warning("%d folds instead of %d: the training rows do not allow more", possible, n_folds)
    rare = [str(name) for name, count in zip(classes, counts, strict=True) if count < possible]
    if rare:
        names = ", ".join(rare[:5]) + (" ..." if len(rare) > 5 else "")
        have = "1 class has" if len(rare) == 1 else f"{len(rare)} classes have"
        log.warning("%s fewer training rows than the %d folds: %s", have, possible, names)
    splitter = StratifiedKFold if groups is None else StratifiedGroupKFold
    rows = np.zeros(len(codes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what it says of rare classes is said above
        pairs = list(splitter(possible, shuffle=True, random_state=seed).split(rows, codes, groups))
    # With few groups of very different size scikit-learn may leave a fold without rows.
    return tuple((train.astype(np.int64), held_out.astype(np.int64)) for train, held_out in pairs if len(held_out))
