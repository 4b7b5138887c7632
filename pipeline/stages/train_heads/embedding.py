"""What heads are tuned on: features in memory, or on disk where they are too large for it; and the guess that needs none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import TuningConfig
from pipeline.data import DatasetIndex
from pipeline.embed.published import NO_WEIGHTS
from pipeline.embed.records import EmbeddingRecord
from pipeline.errors import UnfittedError
from pipeline.export.bundle import ModelBundle
from pipeline.heads import TABLES, Head
from pipeline.heads.tuning import (
    Features,
    Projections,
    blocks,
    check,
    memory_needed,
    memory_needed_on_disk,
    on_disk,
    working_memory,
    works_on_disk,
)
from pipeline.io.digests import bytes_digest
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, JoinedStores, StoredRows
from pipeline.store.share import write_npy


@dataclass(frozen=True)
class Place:
    """Where the features of one embedding are, and why."""

    embedding: str
    shape: tuple[int, int]
    """Rows and columns of the training features."""
    width: int
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
        found = memory_needed_on_disk(head, self.shape, self.width, self.pca, self.folds)
        if found is None:
            able = ", ".join(name for name, row in TABLES[head.targets[0]].heads.items() if works_on_disk(row))
            return (
                f"it needs the features in memory, about {size(self.needed)}, and {size(self.limit)} are allowed; "
                f"raise tuning.memory, set tuning.pca to a number of components, or use heads that work from disk: {able}"
            )
        if found > self.limit:
            return (
                f"even with its features on disk it needs about {size(found)}, and {size(self.limit)} are allowed; "
                "raise tuning.memory, set tuning.pca to a smaller number of components, or choose a layer or pooling with fewer numbers"
            )
        return None


@dataclass(frozen=True, eq=False)
class Embedding:
    """What heads are tuned on: the features of an embedding, its images, and the search; without a record no image is looked at."""

    heads: tuple[Head, ...]
    task: Task
    tuning: TuningConfig
    """As `tuning.limited` returns it."""
    record: EmbeddingRecord | None = None
    store: FeatureStore | JoinedStores | None = None

    @property
    def name(self) -> str:
        """The embedding's name."""
        return self.task.target.constant if self.record is None else self.record.name

    @property
    def license(self) -> str:
        """That of its network's weights."""
        return NO_WEIGHTS if self.record is None else self.record.spec.license

    @property
    def place(self) -> Place | None:
        """Where its features are; None where there are none."""
        if self.store is None:
            return None
        task, tuning, dim, limit = self.task, self.tuning, self.store.dim, self.tuning.memory_bytes
        assert limit is not None
        needed = memory_needed((len(task.train), dim)) + 4 * len(task.test) * dim
        shape, folds = (len(task.train), dim), len(task.folds)
        return Place(self.name, shape, task.target.width, needed, limit, tuning.pca, folds)

    def require(self, head: Head) -> None:
        """See that a head can be tuned here; UnfittedError with the reasons why it is left out."""
        problems = check(head, self.tuning, self.task.target.kind)
        objection = self.place.objection(head) if self.place is not None and not problems else None
        if problems or objection:
            raise UnfittedError("; ".join(problems) or str(objection))


class Vectors:
    """The features of an embedding, and the principal components its heads share where `tuning.pca` asks for them.

    train, test : of shape (n, dim), float32; one constant column where a head needs no image. Each is read, or found where it
    is to stay on disk, when it is first asked for.
    """

    def __init__(self, embedding: Embedding, folder: Path | None = None) -> None:
        self.embedding, self._folder = embedding, folder
        """With a folder, features in memory are those of a file there, which processes of one machine share."""

    @cached_property
    def train(self) -> Features:
        """The features of the training images, float32 of shape (n, dim)."""
        return self._read(self.embedding.task.train)

    @cached_property
    def test(self) -> Features:
        """The features of the test images, float32 of shape (n, dim)."""
        return self._read(self.embedding.task.test)

    @cached_property
    def projections(self) -> Projections | None:
        """The principal components."""
        tuning = self.embedding.tuning
        return None if tuning.pca is None else Projections(self.train, tuning.pca, tuning.whiten)

    def _read(self, part: DatasetIndex) -> Features:
        store, place = self.embedding.store, self.embedding.place
        if store is None or place is None:
            return np.zeros((len(part), 1), dtype=np.float32)
        if place.on_disk:
            return StoredRows.of(store, part.digests)
        if self._folder is None:
            return store.read(part.digests)
        path = self._folder / f"{store.digest[:32]}-{bytes_digest(part.digests.tobytes())[:32]}.npy"
        if not path.exists():
            rows = StoredRows.of(store, part.digests)
            write_npy(path, rows.shape, (block for _, block in blocks(rows)))
        mapped: Features = np.load(path, mmap_mode="r")
        return mapped


def predict(bundle: ModelBundle, X: Features, tuning: TuningConfig) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """Say of vectors what `ModelBundle.said` does, within `tuning.memory`: block by block where they are on disk.

    X : of shape (n, dim), float32; labels are int64 of shape (n,), or as `Predictions` has them, and probabilities
        float64 of shape (n, width), None where the head has none
    """
    if not on_disk(X):
        left = None if tuning.memory_bytes is None else max(0, tuning.memory_bytes - memory_needed(X.shape))
        with working_memory(left):
            return bundle.said(np.asarray(X))
    labels, probabilities = zip(*(bundle.said(block) for _, block in blocks(X)), strict=True)
    return np.concatenate(labels), None if probabilities[0] is None else np.concatenate(probabilities)


def size(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
