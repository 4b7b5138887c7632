"""What every head is asked: which images, which folds, which test images; the same for all rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Artifacts, Config
from pipeline.dataset import DatasetIndex, failed_digests
from pipeline.digests import Digests, digests_to_hex, fingerprint
from pipeline.errors import DatasetError, StoreError
from pipeline.images import policy_key
from pipeline.store import FeatureStore
from pipeline.tuning import Folds, make_folds

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What every head is asked: the same rows, folds and test images for all of them.

    `y_train` and `y_test` are places in `classes`: int64 of shape (n,).
    """

    classes: tuple[str, ...]
    train: DatasetIndex
    test: DatasetIndex
    y_train: NDArray[np.int64]
    y_test: NDArray[np.int64]
    folds: Folds
    groups: NDArray[np.int64] | None
    """Training images that must share a fold, int64 of shape (n,); None when each may go anywhere."""
    key: str
    """Digest of everything above: equal keys ask the same question."""


def make_task(config: Config, files: Artifacts, stores: Sequence[FeatureStore]) -> Task:
    """Choose the rows that have features, make the folds, and name the question.

    Raises
    ------
    DatasetError
        When there are too few classes or no test images.
    StoreError
        When images that did not fail have no features.
    """
    index = DatasetIndex.read(files.dataset)
    used = index.select("train", "validation", "test")
    usable = used.rows(
        _usable(used.digests, stores, failed_digests(files.dataset, policy_key(config.dataset.max_pixels)))
    )
    train, test = usable.select("train", "validation"), usable.select("test")
    classes = usable.classes
    if len(set(train.labels)) < 2:
        raise DatasetError(f"the training images are of {len(set(train.labels))} class; a classifier needs at least 2")
    if len(test) == 0:
        raise DatasetError("there are no test images; every leaderboard needs some: see dataset.test_fraction")
    place = {label: code for code, label in enumerate(classes)}
    y_train, y_test = (np.array([place[label] for label in part.labels], dtype=np.int64) for part in (train, test))
    groups = train.fold_groups()
    folds = make_folds(y_train, config.tuning.folds, config.seed, groups)
    key = fingerprint(
        {
            "classes": list(classes),
            "train": [digests_to_hex(train.digests), y_train.tolist()],
            "test": [digests_to_hex(test.digests), y_test.tolist()],
            "folds": [held_out.tolist() for _, held_out in folds],
        }
    )
    return Task(classes, train, test, y_train, y_test, folds, groups, key)


def _usable(digests: Digests, stores: Sequence[FeatureStore], failed: Digests) -> NDArray[np.bool_]:
    """Which images have a vector in every store; those that have none must be known to have failed."""
    missing = np.zeros(len(digests), dtype=bool)
    for store in stores:
        missing |= store.missing(digests)
    known = set(digests_to_hex(failed))
    lost = [digest for digest in digests_to_hex(digests[missing]) if digest not in known]
    if lost:
        raise StoreError(
            f"{len(lost):,} of {len(digests):,} images have no features yet; run `manyheads features` first"
        )
    if missing.any():
        log.info("%d images could not be read and are left out; dataset/ledger.csv names each", int(missing.sum()))
    return ~missing
