"""A packed store: one ordinary HDF5 file to share, which every command reads, and anyone can with plain h5py.

features (n, d)   one row per distinct image content         content (n, 2)   its digest
row (m,)          image -> row of `features`                 path, label, split, group (m,)   UTF-8, padded
identity_json     how the features were made                 canary (k, d)    features of the built-in probe images

with h5py.File("features.h5") as f:
    X, y = f["features"][:][f["row"][:]], f["label"].asstr("utf-8")[:]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, canonical_json
from pipeline.store.format import compose
from pipeline.store.opener import MAX_TEXT, open_file
from pipeline.store.reader import FeatureStore
from pipeline.store.recovery import explained

COLUMNS = {"paths": "path", "labels": "label", "splits": "split", "groups": "group"}
"""Column of the dataset index -> dataset of the packed file."""


def pack(
    store: str | Path | FeatureStore,
    path: str | Path,
    digests: Digests | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
    anonymous: bool = False,
) -> FeatureStore:
    """Write a store into one file, and open that.

    `digests` : contents of m images, shape (m, 2), may repeat; all rows of the store when not given.
    `columns` : `paths`, `labels`, `splits`, `groups` of these images; `anonymous` leaves out the paths.
    """
    store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
    path, columns = Path(path), dict(columns or {})
    if anonymous:
        columns.pop("paths", None)
    content, row = _distinct(store.table.in_file_order() if digests is None else digests)
    arrays: dict[str, NDArray[Any]] = {
        "content": content,
        "identity_json": np.frombuffer(canonical_json(store.identity).encode("ascii"), np.uint8),
        "canary": store.canary,
    }
    if digests is not None:
        arrays["row"] = row
        arrays |= {COLUMNS[name]: _text(name, values, len(row)) for name, values in columns.items()}
    elif columns:
        raise ValueError("columns need the digests of their images")
    shape = (len(content), store.dim)
    attributes = store.store_type.attributes(len(content))
    composed = compose(
        "pack",
        attributes,
        arrays,
        (store.store_type.dtype, shape),
        lambda: (features.astype(store.dtype) for _, features in store.pieces(content)),
    )
    with explained(path):
        files.make_folder(path.parent)
        files.rename(files.write_temporary(path.parent, composed.parts(), f".{path.name}"), path)
    return FeatureStore.open(path)


def _distinct(digests: Digests) -> tuple[Digests, NDArray[np.uint64]]:
    """Return the distinct digests in the order they first appear, and for each digest its position among them."""
    digests = np.ascontiguousarray(digests, "<u8").reshape(-1, 2)
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), "<u8")
    rank[order] = np.arange(len(order))
    return digests[first[order]], rank[inverse.reshape(-1)]


def _text(name: str, values: Iterable[str], count: int) -> NDArray[np.bytes_]:
    encoded = [str(value).encode("utf-8") for value in values]
    longest = max([1, *map(len, encoded)])
    if longest > MAX_TEXT:
        raise StoreError(f"{name}: a text has {longest} bytes, at most {MAX_TEXT} can be packed")
    if len(encoded) != count:
        raise ValueError(f"{name}: {len(encoded)} texts for {count} images")
    return np.array(encoded, f"S{longest}").reshape(count)


@dataclass(frozen=True)
class PackedIndex:
    """The images of a packed file: their digests, shape (m, 2), and the columns it has."""

    digests: Digests
    columns: dict[str, NDArray[np.object_]]


def read_packed_index(path: str | Path) -> PackedIndex:
    """Return digests and columns (`paths`, `labels`, ...) of a packed file; no columns when it was packed without.

    Raises
    ------
    StoreError
        When a text is not UTF-8, or an image points at a row that does not exist.
    """
    file = open_file(Path(path), "pack")
    content = file.arrays["content"]
    row = file.arrays.get("row", np.arange(len(content)))
    if (row >= len(content)).any():
        raise StoreError(f"{path}: not a valid feature store file: 'row' points outside")
    columns = {}
    for name, dataset in COLUMNS.items():
        if dataset in file.arrays:
            try:
                texts = [value.decode("utf-8") for value in file.arrays[dataset].tolist()]
            except UnicodeDecodeError:
                raise StoreError(f"{path}: not a valid feature store file: {dataset!r} is not UTF-8") from None
            columns[name] = np.array(texts, dtype=object)
    return PackedIndex(content[row], columns)
