"""The task that all heads share (images, labels and folds), and the features of each embedding, in memory or on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, TuningConfig
from pipeline.data import DatasetIndex, failed_digests, lineage
from pipeline.data.targets import Target, choose, record_of
from pipeline.embed.records import EmbeddingRecord
from pipeline.errors import DatasetError, StoreError, UnfittedError
from pipeline.experiment import Artifacts
from pipeline.export.bundle import ModelBundle
from pipeline.heads import TABLES, Head
from pipeline.heads.tuning import (
    FeatureMatrix,
    Folds,
    Projections,
    blocks,
    check,
    make_folds,
    memory_needed,
    memory_needed_on_disk,
    on_disk,
    working_memory,
    works_on_disk,
)
from pipeline.images import policy_key
from pipeline.io.digests import bytes_digest, digests_to_hex, fingerprint
from pipeline.store import FeatureStore, JoinedStores, StoredRows
from pipeline.store.share import write_npy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """The training images, folds and test images that all heads share.

    `y_train` and `y_test` are the labels as the target encodes them, of shape (n,) or (n, k).
    """

    target: Target
    train: DatasetIndex
    test: DatasetIndex
    y_train: NDArray[Any]
    y_test: NDArray[Any]
    folds: Folds
    groups: NDArray[np.int64] | None
    """Group numbers of training images, int64 of shape (n,): a group stays in one fold; None if there are no groups."""
    key: str
    """Digest of all fields above; tasks with equal keys are the same."""
    chose: int | None = None
    """Number of training images that selected the weights of a fine-tuned network; None if all rows share the same images."""

    @property
    def fold(self) -> NDArray[np.int64]:
        """The fold in which each training image is held out, int64 of shape (n,)."""
        place = np.full(len(self.train), -1)
        for number, (_, held_out) in enumerate(self.folds):
            place[held_out] = number
        return place


def make_task(
    config: Config, files: Artifacts, index: DatasetIndex, stores: Sequence[FeatureStore | JoinedStores]
) -> Task:
    """Return the task on the images that have features, with its folds and key.

    DatasetError if there are too few classes or no test images; StoreError if readable images have no features.
    """
    used = index.select("train", "validation", "test")
    known = set(digests_to_hex(failed_digests(files.dataset, policy_key(config.dataset.max_pixels))))
    unread = np.array([digest in known for digest in digests_to_hex(used.digests)], dtype=bool)
    missing = np.zeros(len(used), dtype=bool)
    for store in stores:
        missing |= store.missing(used.digests)
    lost = int((missing & ~unread).sum())
    if lost:
        raise StoreError(f"{lost:,} of {len(used):,} images have no features yet; run `manyheads features` first")
    if unread.any():
        log.info("%d images could not be read and are left out; dataset/failures.csv names each", int(unread.sum()))
    usable = used.rows(~unread)
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
    """Return the task without the training images that an embedding's network was trained on.

    The network's vectors of these images reveal their labels, so heads are neither fitted nor cross-validated on them. Images
    that selected the weights are left out too if at least as many others remain; otherwise heads use them, and `chose` counts
    them. The test images stay.

    DatasetError if too few images are left, or the network was trained on, or selected by, test images.
    """
    known = lineage.NONE
    for part in record.parts or (record,):
        known = known.with_other(lineage.of(part.section, part.spec.trained_on))
    seen = known.learned(task.test.digests) | known.chose(task.test.digests)
    if seen.any():
        raise DatasetError(
            f"{record.name}: its network has learned from, or was chosen by, {int(seen.sum()):,} of the {len(seen):,} test images, "
            "so no score on them means anything; leave it out of backbones, or give other test images"
        )
    learned, chose = known.learned(task.train.digests), known.chose(task.train.digests)
    if not (learned | chose).any():
        return task
    if task.groups is not None:  # a frame counts as seen if any frame of its film was trained on
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
    """Return the task with its folds and key."""
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


@dataclass(frozen=True, eq=False)
class Embedding:
    """The features that some heads are tuned on, with their task and search settings; without a record, those of the constant guess."""

    heads: tuple[Head, ...]
    task: Task
    tuning: TuningConfig
    """As `tuning.limited` returns it."""
    record: EmbeddingRecord | None = None
    store: FeatureStore | JoinedStores | None = None

    @property
    def name(self) -> str:
        """The embedding's name, or that of the constant guess."""
        return self.task.target.constant if self.record is None else self.record.name

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the training features; one column for the constant guess."""
        return len(self.task.train), 1 if self.store is None else self.store.dim

    @property
    def needed(self) -> int:
        """Bytes needed for tuning in memory."""
        return memory_needed(self.shape) + 4 * len(self.task.test) * self.shape[1]

    @property
    def on_disk(self) -> bool:
        """Whether the features stay in the store's files, because tuning in memory needs more than `tuning.memory`."""
        limit = self.tuning.memory_bytes
        return self.store is not None and limit is not None and self.needed > limit

    def sentence(self) -> str:
        """Return a message on why the features stay on disk."""
        return (
            f"{self.name}: its features stayed on disk, as tuning on them in memory takes about {_size(self.needed)} "
            f"and {_size(self.tuning.memory_bytes or 0)} are allowed (tuning.memory)."
        )

    def require(self, head: Head) -> None:
        """Raise UnfittedError, with the reasons, if a head cannot be tuned on this embedding."""
        problems = check(head, self.tuning, self.task.target.kind)
        if not problems and self.on_disk:
            width, folds = self.task.target.width, len(self.task.folds)
            problems = objections(head, self.shape, width, self.needed, self.tuning, folds)
        if problems:
            raise UnfittedError("; ".join(problems))


def objections(
    head: Head, shape: tuple[int, int], width: int, needed: int, tuning: TuningConfig, folds: int = 1
) -> list[str]:
    """Return the reasons, with remedies, why a head cannot be tuned on features of this shape on disk; empty if it can."""
    found, limit = memory_needed_on_disk(head, shape, width, tuning.pca, folds), tuning.memory_bytes or 0
    if found is None:
        able = ", ".join(name for name, row in TABLES[head.targets[0]].heads.items() if works_on_disk(row))
        return [
            f"it needs the features in memory, about {_size(needed)}, and {_size(limit)} are allowed; "
            f"raise tuning.memory, set tuning.pca to a number of components, or use heads that work from disk: {able}"
        ]
    if found > limit:
        return [
            f"even with its features on disk it needs about {_size(found)}, and {_size(limit)} are allowed; "
            "raise tuning.memory, set tuning.pca to a smaller number of components, or choose a layer or pooling with fewer dimensions"
        ]
    return []


@dataclass(frozen=True)
class Asked:
    """A config, its scoring resolved from `auto`, with the opened results of stage one; `index` is the index's fingerprint."""

    config: Config
    files: Artifacts
    records: Sequence[EmbeddingRecord]
    index: str
    stores: Mapping[str, FeatureStore | JoinedStores]
    task: Task
    embeddings: Sequence[Embedding]


class SharedFeatures:
    """The features of an embedding, and the principal components that its heads share if `tuning.pca` is set.

    Each is read, or opened on disk, at its first use. With a folder, features in memory are mapped from a file there, which the
    processes of one machine share.
    """

    def __init__(self, embedding: Embedding, folder: Path | None = None) -> None:
        self.embedding, self._folder = embedding, folder

    @cached_property
    def train(self) -> FeatureMatrix:
        """The features of the training images, float32 of shape (n, dim); one column of zeros for the constant guess."""
        return self._read(self.embedding.task.train)

    @cached_property
    def test(self) -> FeatureMatrix:
        """The features of the test images, in the same form."""
        return self._read(self.embedding.task.test)

    @cached_property
    def projections(self) -> Projections | None:
        """The principal components; None without `tuning.pca`."""
        tuning = self.embedding.tuning
        return None if tuning.pca is None else Projections(self.train, tuning.pca)

    def _read(self, part: DatasetIndex) -> FeatureMatrix:
        store = self.embedding.store
        if store is None:
            return np.zeros((len(part), 1), dtype=np.float32)
        if self.embedding.on_disk:
            return StoredRows.of(store, part.digests)
        if self._folder is None:
            return store.read(part.digests)
        path = self._folder / f"{store.digest[:32]}-{bytes_digest(part.digests.tobytes())[:32]}.npy"
        if not path.exists():
            rows = StoredRows.of(store, part.digests)
            write_npy(path, rows.shape, (block for _, block in blocks(rows)))
        mapped: FeatureMatrix = np.load(path, mmap_mode="r")
        return mapped


def predict(
    bundle: ModelBundle, X: FeatureMatrix, tuning: TuningConfig
) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """Return the predictions of `ModelBundle.said` within `tuning.memory`: block by block for vectors on disk.

    X : of shape (n, dim), float32; labels are int64 of shape (n,), or as `Predictions` has them, and probabilities
        float64 of shape (n, width), None if the head has none
    """
    if not on_disk(X):
        left = None if tuning.memory_bytes is None else max(0, tuning.memory_bytes - memory_needed(X.shape))
        with working_memory(left):
            return bundle.said(np.asarray(X))
    labels, probabilities = zip(*(bundle.said(block) for _, block in blocks(X)), strict=True)
    return np.concatenate(labels), None if probabilities[0] is None else np.concatenate(probabilities)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
