"""Where features are while heads are tuned on them: in memory, or on disk where they are too large for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import TuningConfig
from pipeline.data import DatasetIndex
from pipeline.export.bundle import ModelBundle
from pipeline.heads import HEADS, Head
from pipeline.heads.tuning import (
    Features,
    Projections,
    blocks,
    memory_needed,
    memory_needed_on_disk,
    on_disk,
    working_memory,
    works_on_disk,
)
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, StoredRows


@dataclass(frozen=True)
class Place:
    """Where the features of one embedding are, and why."""

    embedding: str
    shape: tuple[int, int]
    """Rows and columns of the training features."""
    classes: int
    needed: int
    """Bytes that tuning in memory takes."""
    limit: int
    pca: int | float | None = None
    folds: int = 1

    @property
    def on_disk(self) -> bool:
        """Whether the features stay in the store's files."""
        return self.needed > self.limit

    def sentence(self) -> str:
        """Say it for people."""
        return (
            f"{self.embedding}: its features stayed on disk, as tuning on them in memory takes about {size(self.needed)} "
            f"and {size(self.limit)} are allowed (tuning.memory)."
        )

    def objection(self, head: Head) -> str | None:
        """Say in one line why a head is left out, with what to do; None when it can be tuned."""
        if not self.on_disk:
            return None
        where = f"{self.embedding} / {head.name}: left out"
        found = memory_needed_on_disk(head, self.shape, self.classes, self.pca, self.folds)
        if found is None:
            able = ", ".join(name for name, row in HEADS.items() if works_on_disk(row))
            return (
                f"{where}: it needs the features in memory, about {size(self.needed)}, and {size(self.limit)} are allowed; "
                f"raise tuning.memory, set tuning.pca to a number of components, or use heads that work from disk: {able}"
            )
        if found > self.limit:
            return (
                f"{where}: even with its features on disk it needs about {size(found)}, and {size(self.limit)} are allowed; "
                "raise tuning.memory, set tuning.pca to a smaller number of components, or choose a layer or pooling with fewer numbers"
            )
        return None


def place_of(embedding: str, dim: int, task: Task, tuning: TuningConfig) -> Place:
    """Decide where an embedding's features are; `tuning` as `tuning.limited` returns it."""
    shape, limit = (len(task.train), dim), tuning.memory_bytes
    assert limit is not None
    needed = memory_needed(shape) + 4 * len(task.test) * dim
    return Place(embedding, shape, len(task.classes), needed, limit, tuning.pca, len(task.folds))


@dataclass(frozen=True)
class Embedded:
    """The features of an embedding, and the principal components that its heads share where `tuning.pca` asks for them.

    train, test : of shape (n, dim), float32; one constant column where a head needs no image.
    """

    train: Features
    test: Features
    projections: Projections | None = None

    @staticmethod
    def of(store: FeatureStore | None, task: Task, on_disk: bool, tuning: TuningConfig) -> Embedded:
        """Read the features, or find them where they are to stay."""
        train, test = (_vectors(store, part, on_disk) for part in (task.train, task.test))
        return Embedded(train, test, None if tuning.pca is None else Projections(train, tuning.pca, tuning.whiten))


def _vectors(store: FeatureStore | None, part: DatasetIndex, on_disk: bool) -> Features:
    if store is None:
        return np.zeros((len(part), 1), dtype=np.float32)
    return StoredRows.of(store, part.digests) if on_disk else store.read(part.digests)


def predict(
    bundle: ModelBundle, X: Features, tuning: TuningConfig
) -> tuple[NDArray[np.object_], NDArray[np.float64] | None]:
    """Label vectors as `ModelBundle.predict` does, within `tuning.memory`: block by block where they are on disk."""
    if not on_disk(X):
        left = None if tuning.memory_bytes is None else max(0, tuning.memory_bytes - memory_needed(X.shape))
        with working_memory(left):
            return bundle.predict(np.asarray(X))
    labels, probabilities = zip(*(bundle.predict(block) for _, block in blocks(X)), strict=True)
    return np.concatenate(labels), None if probabilities[0] is None else np.concatenate(probabilities)


def size(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
