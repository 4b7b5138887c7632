"""Features for your own Python code: `X, y, paths, groups = load("artifacts/digits", "train")`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DatasetIndex
from pipeline.embed import records as embedders
from pipeline.errors import StoreError
from pipeline.experiment import Artifacts
from pipeline.store import FeatureStore, StoredRows
from pipeline.store.share import ImageTable, read_packed_index

if TYPE_CHECKING:
    import pandas


class Features(NamedTuple):
    """The features of n images, with their labels, paths and groups."""

    X: StoredRows
    """Vectors, float32 of shape (n, dim), read and checked when indexed; accepted by scikit-learn."""
    y: NDArray[np.object_]
    """Labels, `str`, shape (n,), or (n, k) for k columns."""
    paths: NDArray[np.object_]
    """Relative to the data set's root, with '/'; shape (n,)."""
    groups: NDArray[np.object_] | None

    def __repr__(self) -> str:
        groups = "" if self.groups is None else f", {len(np.unique(self.groups)):,} groups"
        return f"Features(X: {self.X}, y: {len(np.unique(self.y)):,} classes, paths{groups})"

    def to_frame(self) -> pandas.DataFrame:
        """Return a table with a row per image, indexed by path: `label` (or `label_0`, ...), `group`, then X."""
        import pandas

        labels = {"label": self.y} if self.y.ndim == 1 else {f"label_{k}": column for k, column in enumerate(self.y.T)}
        about = pandas.DataFrame(labels if self.groups is None else {**labels, "group": self.groups}, index=self.paths)
        names = [f"x{number}" for number in range(self.X.shape[1])]
        vectors = pandas.DataFrame(np.asarray(self.X), index=self.paths, columns=names)
        return pandas.concat([about, vectors], axis=1)


def load(path: str | Path, split: str | None = None, embedding: str | None = None) -> Features:
    """Open the features of an experiment's output folder, or of a packed file alone; only the index is read.

    `split` : 'train', 'validation', 'test' or 'excluded'; by default all but the excluded images.
    `embedding` : its name; optional with a single backbone. Images without a vector are left out.
    Returns X, float32 of shape (n, dim), and y, paths and groups (or None), object (str) of shape (n,).
    """
    path = Path(path)
    images, opened = open_images(path if path.is_file() else Artifacts(path), embedding)
    columns, splits = images.columns, images.columns.get("splits")
    if splits is None and split is not None:
        raise StoreError(f"{path}: was packed without splits; leave out `split`")
    labels = [values for name, values in columns.items() if name.startswith("labels")]
    if not labels:
        raise StoreError(f"{path}: was packed without labels; pack an experiment with 'manyheads store pack'")
    chosen = np.ones(len(images.digests), bool)
    if splits is not None:
        chosen = splits != "excluded" if split is None else splits == split
    rows = np.flatnonzero(chosen)
    if not len(rows):
        found = ", ".join(sorted(set(splits.tolist()))) if splits is not None else "no splits"
        raise StoreError(f"{path}: has no images of split {split!r}; there are {found}")
    paths = columns.get("paths", np.full(len(chosen), "", dtype=object))
    groups = columns["groups"][rows] if "groups" in columns else None
    y = labels[0] if len(labels) == 1 else np.stack(labels, axis=1)
    return Features(StoredRows.of(opened, images.digests[rows]), y[rows], paths[rows], groups)


def open_images(
    source: Path | Artifacts, embedding: str | None = None, option: str = "`embedding`"
) -> tuple[ImageTable, FeatureStore]:
    """Return the images with a vector, of an experiment's embedding or of a packed file, and the open store.

    With several embeddings one must be named; `option` is the name of that option in messages.
    """
    if isinstance(source, Path):
        return read_packed_index(source), FeatureStore.open(source)
    record = embedders.choose(embedders.read_records(source.features), embedding, option)
    index = DatasetIndex.read(source.dataset)
    embedders.require_index(source.features, index.fingerprint())
    opened = FeatureStore.open(source.find_store(record.store), record.fingerprint)
    index = index.rows(~opened.missing(index.digests))
    several = len(index.names) > 1
    labels = {f"labels_{name}" if several else "labels": index.column(name) for name in index.names}
    columns = {"paths": index.paths, **labels, "splits": index.splits}
    if index.groups is not None:
        columns["groups"] = index.groups
    return ImageTable(index.digests, columns), opened
