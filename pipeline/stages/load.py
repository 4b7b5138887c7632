"""Features for your own Python code: `X, y, paths, groups = pipeline.load("artifacts/digits", "train")`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import store
from pipeline.data import DatasetIndex
from pipeline.embed import records as embedders
from pipeline.errors import StoreError
from pipeline.experiment import Artifacts
from pipeline.io.digests import Digests


@dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors of n images, float32 of shape (n, dim), read and checked only where they are indexed.

    `X[rows]` gives an ndarray for a number, a slice, a mask or row numbers: a view of the mapped file where the rows lie
    one behind the other there. `numpy.asarray(X)`, and so scikit-learn, takes all of them.
    """

    digests: Digests
    store: store.FeatureStore

    @property
    def shape(self) -> tuple[int, int]:
        """Images and numbers per vector."""
        return len(self.digests), self.store.dim

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """Always float32."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self.digests)

    def __repr__(self) -> str:
        return f"Vectors of shape {self.shape}, float32, on disk"

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        if isinstance(rows, tuple):
            first, *rest = rows
            return self[first][(..., *rest)] if np.ndim(self.digests[first]) == 1 else self[first][(slice(None), *rest)]
        chosen = self.digests[rows]
        vectors = self.store.load(chosen.reshape(-1, 2))
        return vectors[0] if chosen.ndim == 1 else vectors

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        vectors = self.store.load(self.digests)
        return np.array(vectors, dtype) if copy else np.asarray(vectors, dtype)


class Features(NamedTuple):
    """n images: what a classifier takes, and what they are."""

    X: Vectors
    y: NDArray[np.object_]
    """Labels, shape (n,), `str`."""
    paths: NDArray[np.object_]
    """Relative to the data set's root, with '/'; shape (n,)."""
    groups: NDArray[np.object_] | None

    def __repr__(self) -> str:
        groups = "" if self.groups is None else f", {len(np.unique(self.groups)):,} groups"
        return f"Features(X: {self.X}, y: {len(np.unique(self.y)):,} classes, paths{groups})"


def load(path: str | Path, split: str | None = None, embedding: str | None = None) -> Features:
    """Open the features of an experiment's output folder, or of a packed file alone; nothing is read but the index.

    `split` : 'train', 'validation', 'test' or 'excluded'; all but the excluded images when not given.
    `embedding` : its name; may be left out where there is one backbone. Images without a vector are left out.
    Returns X of shape (n, dim), float32 or float16, and y, paths and groups (or None) of shape (n,), object (str).

    Raises
    ------
    PipelineError
        When there are no features, several embeddings to choose from, or a packed file lacks the column asked for.
    """
    path = Path(path)
    digests, columns, opened = _packed(path) if path.is_file() else _experiment(path, embedding)
    splits = columns.get("splits")
    if splits is None and split is not None:
        raise StoreError(f"{path}: was packed without splits; leave out `split`")
    if "labels" not in columns:
        raise StoreError(f"{path}: was packed without labels; pack an experiment with 'manyheads store pack'")
    chosen = ~opened.missing(digests)
    if splits is not None:
        chosen &= splits != "excluded" if split is None else splits == split
    rows = np.flatnonzero(chosen)
    if not len(rows):
        found = ", ".join(sorted(set(splits.tolist()))) if splits is not None else "no splits"
        raise StoreError(f"{path}: has no images of split {split!r}; there are {found}")
    paths = columns.get("paths", np.full(len(digests), "", dtype=object))
    groups = columns.get("groups")
    return Features(
        Vectors(digests[rows], opened), columns["labels"][rows], paths[rows], None if groups is None else groups[rows]
    )


def _packed(path: Path) -> tuple[Digests, dict[str, NDArray[np.object_]], store.FeatureStore]:
    index = store.read_packed_index(path)
    return index.digests, index.columns, store.FeatureStore.open(path)


def _experiment(
    path: Path, embedding: str | None
) -> tuple[Digests, dict[str, NDArray[np.object_]], store.FeatureStore]:
    files = Artifacts(path)
    record = embedders.choose(embedders.read_records(files.features), embedding)
    index = DatasetIndex.read(files.dataset)
    embedders.require_index(files.features, index.fingerprint())
    columns = {"labels": index.labels, "splits": index.splits, "paths": index.paths}
    if index.groups is not None:
        columns["groups"] = index.groups
    return index.digests, columns, store.FeatureStore.open(files.find_store(record.store), record.fingerprint)
