"""What every head is asked: which images, which folds, which test images; the same for all rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data import DatasetIndex, failed_digests, lineage
from pipeline.data.targets import Target, choose, record_of
from pipeline.embed.records import EmbeddingRecord
from pipeline.errors import DatasetError, StoreError
from pipeline.experiment import Artifacts
from pipeline.heads.tuning import Folds, make_folds
from pipeline.images import policy_key
from pipeline.io.digests import Digests, digests_to_hex, fingerprint
from pipeline.store import FeatureStore, JoinedStores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What every head is asked: the same rows, folds and test images for all of them.

    `y_train` and `y_test` are what the target makes of the labels, of shape (n,) or (n, k).
    """

    target: Target
    train: DatasetIndex
    test: DatasetIndex
    y_train: NDArray[Any]
    y_test: NDArray[Any]
    folds: Folds
    groups: NDArray[np.int64] | None
    """Training images that must share a fold, int64 of shape (n,); None when each may go anywhere."""
    key: str
    """Digest of everything above: equal keys ask the same question."""
    chose: int | None = None
    """Of the training images those that chose the weights of a fine-tuned network; None where all rows share the images."""


def make_task(
    config: Config, files: Artifacts, index: DatasetIndex, stores: Sequence[FeatureStore | JoinedStores]
) -> Task:
    """Choose the rows that have features, make the folds, and name the question.

    Raises
    ------
    DatasetError
        When there are too few classes or no test images.
    StoreError
        When images that did not fail have no features.
    """
    used = index.select("train", "validation", "test")
    usable = used.rows(
        _usable(used.digests, stores, failed_digests(files.dataset, policy_key(config.dataset.max_pixels)))
    )
    train, test = usable.select("train", "validation"), usable.select("test")
    target = choose(usable, *config.dataset.kinds)
    y_train, y_test = target.encode(train), target.encode(test)
    problem = target.problem(y_train)
    if problem is not None:
        raise DatasetError(problem)
    if len(test) == 0:
        raise DatasetError("there are no test images; every leaderboard needs some: see dataset.test_fraction")
    return _with_folds(target, train, test, y_train, y_test, config)


def unseen_task(task: Task, record: EmbeddingRecord, config: Config) -> Task:
    """Return the task without the training images that an embedding's network has learned from.

    On those its vectors tell the labels, so heads neither fit nor are cross-validated on them. Images that chose the weights
    are left out too, where at least as many others remain; else heads use them, and `chose` says that they judge nothing.
    The test images stay.

    Raises
    ------
    DatasetError
        When too few images are left, or the test images taught or chose the weights.
    """
    known = lineage.NONE
    for part in record.parts or (record,):
        known = known.with_other(lineage.of(part.section, part.spec.trained_on))
    told = known.learned(task.test.digests) | known.chose(task.test.digests)
    if told.any():
        raise DatasetError(
            f"{record.name}: its network has learned from, or was chosen by, {int(told.sum()):,} of the {len(told):,} test images, "
            "so no score on them means anything; leave it out of backbones, or give other test images"
        )
    learned, chose = known.learned(task.train.digests), known.chose(task.train.digests)
    if not (learned | chose).any():
        return task
    if task.groups is not None:  # a frame of a film that was learned from is not unseen
        learned, chose = (np.isin(task.groups, task.groups[part]) for part in (learned, chose))
    if known.chosen_on is None:
        chose = np.ones_like(learned)
    fresh, chose = ~learned & ~chose, chose & ~learned
    enough = fresh.sum() >= max(chose.sum(), config.tuning.folds) and task.target.problem(task.y_train[fresh]) is None
    kept = fresh if enough else ~learned
    left = task.train.rows(kept)
    if task.target.problem(task.y_train[kept]) is not None or len(left) < config.tuning.folds:
        raise DatasetError(
            f"{record.name}: its network has learned from {int(learned.sum()):,} of the {len(learned):,} training images, and the "
            f"other {len(left):,} are too few to fit and compare heads on; give more training images, or leave it out of backbones"
        )
    log.info("%s: heads use the %d training images its network has not learned from", record.name, len(left))
    return _with_folds(task.target, left, task.test, task.y_train[kept], task.y_test, config, int((chose & kept).sum()))


def _with_folds(
    target: Target,
    train: DatasetIndex,
    test: DatasetIndex,
    y_train: NDArray[Any],
    y_test: NDArray[Any],
    config: Config,
    chose: int | None = None,
) -> Task:
    """Make the folds and name the question."""
    groups = train.fold_groups()
    folds = make_folds(target.strata(y_train), config.tuning.folds, config.seed, groups)
    key = fingerprint(
        {
            **record_of(target),
            "train": [digests_to_hex(train.digests), y_train.tolist()],
            "test": [digests_to_hex(test.digests), y_test.tolist()],
            "folds": [held_out.tolist() for _, held_out in folds],
            **({} if chose is None else {"chose": chose}),
        }
    )
    return Task(target, train, test, y_train, y_test, folds, groups, key, chose)


def _usable(digests: Digests, stores: Sequence[FeatureStore | JoinedStores], failed: Digests) -> NDArray[np.bool_]:
    """Which images did not fail, shape (n,); those must have a vector in every store."""
    missing = np.zeros(len(digests), dtype=bool)
    for store in stores:
        missing |= store.missing(digests)
    known = set(digests_to_hex(failed))
    unread = np.array([digest in known for digest in digests_to_hex(digests)], dtype=bool)
    lost = int((missing & ~unread).sum())
    if lost:
        raise StoreError(f"{lost:,} of {len(digests):,} images have no features yet; run `manyheads features` first")
    if unread.any():
        log.info("%d images could not be read and are left out; dataset/failures.csv names each", int(unread.sum()))
    return ~unread
