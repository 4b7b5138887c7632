"""Files to share: a packed file, which every command reads and anyone can with plain h5py, `.npy` and `.parquet`.

features (n, d)   one row per distinct image content         content (n, 2)   its digest
row (m,)          image -> row of `features`                 path, label, split, group (m,)   UTF-8, padded
identity_json     how the features were made                 canary (k, d)    vectors of the built-in probe images

with h5py.File("features.h5") as f:
    X, y = f["features"][:][f["row"][:]], f["label"].asstr("utf-8")[:]
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, canonical_json, digests_to_hex
from pipeline.store.format import compose
from pipeline.store.lock import explained
from pipeline.store.opener import MAX_TEXT, open_file
from pipeline.store.reader import FeatureStore

Columns = Mapping[str, Sequence[str] | NDArray[np.object_]]
"""Column of the dataset index, such as `paths` -> a text for each of m images."""

COLUMNS = {"paths": "path", "labels": "label", "splits": "split", "groups": "group"}
"""Column of the dataset index -> dataset of the packed file."""


def pack(
    store: FeatureStore,
    path: Path,
    digests: Digests | None = None,
    columns: Columns | None = None,
    anonymous: bool = False,
) -> FeatureStore:
    """Write a store into one file, and open that.

    `digests` : contents of m images, uint64 of shape (m, 2), may repeat; all rows of the store when not given.
    `columns` : `paths`, `labels`, `splits`, `groups` of these images; `anonymous` leaves out the paths.
    """
    columns = {name: values for name, values in (columns or {}).items() if name != "paths" or not anonymous}
    content, row = _distinct(store.table.in_file_order() if digests is None else digests)
    arrays: dict[str, NDArray[Any]] = {
        "content": content,
        "identity_json": np.frombuffer(canonical_json(store.identity).encode("ascii"), np.uint8),
        "canary": store.probe,
    }
    if digests is not None:
        arrays["row"] = row
        arrays |= {COLUMNS[name]: _text(name, values, len(row)) for name, values in columns.items()}
    elif columns:
        raise ValueError("columns need the digests of their images")
    composed = compose(
        "pack",
        store.store_type.attributes(len(content)),
        arrays,
        (store.store_type.dtype, (len(content), store.dim)),
        lambda: (features.astype(store.dtype) for _, features in store.pieces(content)),
    )
    _write(path, composed.parts())
    return FeatureStore.open(path)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    with explained(path):
        files.make_folder(path.parent)
        files.rename(files.write_temporary(path.parent, parts, f".{path.name}"), path)


def _distinct(digests: Digests) -> tuple[Digests, NDArray[np.uint64]]:
    """Return the distinct ones of m digests, uint64 of shape (k, 2), as they first appear, and of each the position, (m,)."""
    digests = np.ascontiguousarray(digests, "<u8").reshape(-1, 2)
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), "<u8")
    rank[order] = np.arange(len(order))
    return digests[first[order]], rank[inverse.reshape(-1)]


def _text(name: str, values: Iterable[str], count: int) -> NDArray[np.bytes_]:
    """Return some texts as bytes, of shape (count,), as long as the longest."""
    encoded = [str(value).encode("utf-8") for value in values]
    longest = max([1, *map(len, encoded)])
    if longest > MAX_TEXT:
        raise StoreError(f"{name}: a text has {longest} bytes, at most {MAX_TEXT} can be packed")
    if len(encoded) != count:
        raise ValueError(f"{name}: {len(encoded)} texts for {count} images")
    return np.array(encoded, f"S{longest}").reshape(count)


@dataclass(frozen=True, eq=False)
class ImageTable:
    """m images: their digests, uint64 of shape (m, 2), and their `paths`, `labels`, ... each `str` of shape (m,), by name."""

    digests: Digests
    columns: dict[str, NDArray[np.object_]]


def read_packed_index(path: str | Path) -> ImageTable:
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
    return ImageTable(content[row], columns)


def export(store: FeatureStore, path: Path, digests: Digests | None = None, columns: Columns | None = None) -> None:
    """Write the float32 features of n images, uint64 of shape (n, 2), or of all contents, as `.npy` or `.parquet`.

    A `.npy` has room for the features alone; a `.parquet` also has `content` (hex digest) and the given columns.
    """
    digests = store.table.in_file_order() if digests is None else digests
    if path.suffix == ".npy":
        write_npy(path, (len(digests), store.dim), (features for _, features in store.pieces(digests)))
    elif path.suffix == ".parquet":
        with explained(path):
            _write_parquet(store, path, digests, columns or {})
    else:
        raise StoreError(f"{path}: cannot export to {path.suffix or 'a file without ending'!r}; use .npy or .parquet")


def read_vectors(path: Path) -> tuple[NDArray[np.object_] | None, NDArray[np.float32]]:
    """Return the paths that a file names, object (str) of shape (n,) or None, and its vectors, float32 of shape (n, dim).

    The files are those that `export` writes, and others: in Parquet a vector is a list in the one column of lists, or else the
    numbers of all columns of numbers, and `path` or `paths` names images.

    Raises
    ------
    StoreError
        When it is missing or holds no such thing.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        if path.suffix != ".parquet":
            paths, found = None, np.load(path, allow_pickle=False)
        else:
            table = pq.read_table(path)
            kinds = {field.name: field.type for field in table.schema}
            named = next((name for name in ("path", "paths") if name in kinds), None)
            paths = None if named is None else table[named].cast(pa.large_string()).to_numpy()
            lists = [name for name, kind in kinds.items() if pa.types.is_nested(kind)]
            numbers = [name for name, kind in kinds.items() if pa.types.is_floating(kind) or pa.types.is_integer(kind)]
            if len(lists) == 1:
                column = table[lists[0]].combine_chunks()
                lengths = pc.unique(pc.list_value_length(column)).to_pylist()
                if len(lengths) != 1 or not lengths[0]:
                    raise ValueError(f"its lists in {lists[0]!r} are of {len(lengths)} lengths")
                found = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
            else:
                found = np.stack([table[name].to_numpy() for name in numbers], axis=1)
        if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiu":
            raise ValueError(f"it holds {found.dtype} of shape {found.shape}")
        vectors = found.astype(np.float32)
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"{int((~np.isfinite(vectors)).any(axis=1).sum()):,} vectors have numbers that are not finite"
            )
    except (OSError, ValueError, pa.ArrowException) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StoreError(
            f"{path}: cannot be read as vectors ({why}); expected numbers of shape (images, dim)"
        ) from None
    return paths, vectors


def write_npy(path: Path, shape: tuple[int, int], pieces: Iterable[NDArray[np.float32]]) -> None:
    """Write an array of this shape, float32, of pieces that are each float32 of shape (k, dim), as `.npy`."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    _write(path, itertools.chain([header.getvalue()], (np.ascontiguousarray(piece).data.cast("B") for piece in pieces)))


def _write_parquet(store: FeatureStore, path: Path, digests: Digests, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), store.dim)
    schema = pa.schema([("content", pa.string()), *((name, pa.string()) for name in columns), ("features", vector)])
    files.make_folder(path.parent)
    scratch = files.write_temporary(path.parent, [], f".{path.name}")
    try:
        with scratch.open("wb") as out:
            with pq.ParquetWriter(out, schema) as writer:
                for part, features in store.pieces(digests):
                    texts = [list(map(str, values[part])) for values in columns.values()]
                    rows = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
                    writer.write_table(pa.table([digests_to_hex(digests[part]), *texts, rows], schema=schema))
            out.flush()
            files.sync(out.fileno())
    except BaseException:
        files.remove(scratch)
        raise
    files.rename(scratch, path)
