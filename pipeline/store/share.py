"""Vectors in stand-alone files: packed files to share (docs/promises.md has their datasets), parts, `.npy` and `.parquet`.

Parts are packed files, immutable and written without a lock, on a disk or in an object store:

    PLACE/NAME.parts/<digest>.h5      some vectors of one embedding; `maintain.copy_rows` combines them into PLACE/NAME.store

A file appears as a whole or not at all. A killed process leaves its finished files, and duplicate vectors do no harm, because
readers take each content once.
"""

from __future__ import annotations

import io
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, digest_keys, digests_to_hex, fingerprint
from pipeline.io.remote import address_of, write_remote
from pipeline.store.format import StoreType, compose, origin
from pipeline.store.lock import explained
from pipeline.store.opener import MAX_TEXT, StoreFile, fetch, open_file
from pipeline.store.reader import FeatureStore, listed

log = logging.getLogger(__name__)

Columns = Mapping[str, Sequence[str] | NDArray[np.object_]]
"""Columns of the dataset index by name, such as `paths`, with a text for each of m images."""

COLUMNS = {"paths": "path", "labels": "label", "splits": "split", "groups": "group"}
"""Column of the dataset index -> dataset of the packed file."""


# ---- packed files


def pack(
    store: FeatureStore,
    path: Path,
    digests: Digests,
    columns: Columns | None = None,
    anonymous: bool = False,
) -> FeatureStore:
    """Write the vectors of m images, uint64 of shape (m, 2), which may share contents, into one file and open it.

    `columns` : `paths`, `labels`, `splits`, `groups` of these images; `anonymous` leaves out the paths.
    """
    _, first, inverse = np.unique(digests, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    content = digests[first[order]]
    others = origin(store.identity, store.probe, store.dim)
    others["row"] = np.argsort(order)[inverse.reshape(-1)].astype("<u8")
    for name, values in (columns or {}).items():
        if name != "paths" or not anonymous:
            encoded = [str(value).encode("utf-8") for value in values]
            if (longest := max(map(len, encoded), default=0)) > MAX_TEXT:
                raise StoreError(f"{name}: a text has {longest} bytes, at most {MAX_TEXT} can be packed")
            others[COLUMNS[name]] = np.array(encoded, f"S{max(1, longest)}")
    _, parts = compose(
        "pack",
        store.store_type,
        len(content),
        {"content": content, **others},
        lambda: (features.astype(store.dtype) for _, features in store.pieces(content)),
    )
    _write(path, parts)
    return FeatureStore.open(path)


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    with explained(path):
        files.make_folder(path.parent)
        files.rename(files.write_temporary(path.parent, parts, f".{path.name}"), path)


@dataclass(frozen=True, eq=False)
class ImageTable:
    """m images: their digests, uint64 of shape (m, 2), and their `paths`, `labels`, ... each `str` of shape (m,), by name."""

    digests: Digests
    columns: dict[str, NDArray[np.object_]]


def read_packed_index(path: str | Path) -> ImageTable:
    """Return the digests and the columns (`paths`, `labels`, ...), if any, of a packed file.

    StoreError when a text is not UTF-8, or an image points at a row that does not exist.
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


# ---- .npy and .parquet


def export(store: FeatureStore, path: Path, digests: Digests, columns: Columns) -> None:
    """Write the float32 features of n images, uint64 of shape (n, 2), as `.npy` or `.parquet`.

    A `.npy` holds only the features; a `.parquet` also has `content` (hex digest) and the given columns.
    """
    if path.suffix == ".npy":
        write_npy(path, (len(digests), store.dim), (features for _, features in store.pieces(digests)))
    elif path.suffix == ".parquet":
        with explained(path):
            _write_parquet(store, path, digests, columns)
    else:
        raise StoreError(f"{path}: cannot export to {path.suffix or 'a file without ending'!r}; use .npy or .parquet")


def read_vectors(path: Path) -> tuple[NDArray[np.object_] | None, NDArray[np.float32]]:
    """Return the image paths in a file, object (str) of shape (n,) or None, and its vectors, float32 of shape (n, dim).

    It reads files that `export` writes, and others: in Parquet the vectors are the only column of lists, or else all numeric
    columns, and `path` or `paths` names the images. StoreError when the file is missing or holds no vectors.
    """
    import pyarrow
    import pyarrow.parquet as pq

    try:
        if path.suffix != ".parquet":
            paths, found = None, np.load(path, allow_pickle=False)
        else:
            frame = pq.read_table(path).to_pandas(ignore_metadata=True)  # read pandas' index as a column
            named = [name for name in ("path", "paths") if name in frame]
            paths = frame[named[0]].astype(str).to_numpy(object) if named else None
            lists = [name for name, column in frame.items() if isinstance(column.iat[0], np.ndarray)]
            numbers = frame.select_dtypes("number")
            found = np.stack(frame[lists[0]].tolist()) if len(lists) == 1 else numbers.to_numpy()
        if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiu":
            raise ValueError(f"it holds {found.dtype} of shape {found.shape}")
        vectors = found.astype(np.float32)
        if bad := int((~np.isfinite(vectors)).any(axis=1).sum()):
            raise ValueError(f"{bad:,} vectors have numbers that are not finite")
    except (OSError, ValueError, IndexError, pyarrow.ArrowException) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise StoreError(
            f"{path}: cannot be read as vectors ({why}); expected numbers of shape (images, dim)"
        ) from None
    return paths, vectors


def write_npy(path: Path, shape: tuple[int, int], pieces: Iterable[NDArray[np.float32]]) -> None:
    """Write a float32 array of this shape as `.npy`, from pieces of float32, shape (k, dim)."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    _write(path, itertools.chain([header.getvalue()], (np.ascontiguousarray(piece).data.cast("B") for piece in pieces)))


def _write_parquet(store: FeatureStore, path: Path, digests: Digests, columns: Columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), store.dim)
    schema = pa.schema([("content", pa.string()), *((name, pa.string()) for name in columns), ("features", vector)])
    files.make_folder(path.parent)
    with (
        files.growing(path) as grown,
        open(grown.descriptor, "wb", closefd=False) as out,
        pq.ParquetWriter(out, schema) as writer,
    ):
        for part, features in store.pieces(digests):
            texts = [list(map(str, values[part])) for values in columns.values()]
            rows = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), store.dim)
            writer.write_table(pa.table([digests_to_hex(digests[part]), *texts, rows], schema=schema))


# ---- parts

PART_BYTES = 32 << 20
PART_SECONDS = 60.0
"""A part is finished at this size or age, which bounds what a kill can lose."""

PARTS = ".parts"


def part_folders(place: str | Path) -> list[str]:
    """Return the names of the embeddings with parts in a place, without `.parts`."""
    return [name.removesuffix(PARTS) for name in listed(place) if name.endswith(PARTS)]


def part_files(place: str | Path, name: str) -> list[str]:
    """Return the paths or addresses of an embedding's parts."""
    folder = f"{place}/{name}{PARTS}"
    return [f"{folder}/{file}" for file in listed(folder) if file.endswith(".h5")]


class PartWriter:
    """Writes vectors of one embedding as parts; `due` says when to `commit` one, and leaving the block normally commits the last."""

    def __init__(
        self,
        place: str | Path,
        store: Path,
        identity: Mapping[str, Any],
        dim: int,
        dtype: str = "float32",
        probe: NDArray[np.float32] | None = None,
        look: bool = True,
    ) -> None:
        """Read the existing parts, unless `look` is False.

        store : path of the store that the parts are for
        probe : probe vectors, float32 of shape (k, dim)
        """
        self.folder = f"{place}/{store.stem}{PARTS}"
        self.store_type = StoreType(fingerprint(dict(identity)), dim, np.dtype(dtype).str)
        self._origin = origin(identity, probe, dim)
        self._waiting: list[tuple[Digests, NDArray[Any]]] = []
        self._since = time.monotonic()
        heads = map(self._head, part_files(place, store.stem) if look else ())
        found = [file.arrays["content"] for file in heads if file is not None]
        self._known = digest_keys(np.concatenate([np.zeros((0, 2), np.uint64), *found]))

    def _head(self, path: str) -> StoreFile | None:
        """Open a part's head to list its contents; a damaged part counts as missing."""
        try:
            data = fetch(path, head_only=True) if address_of(path) else None
            file = open_file(Path(path), "pack", data=data)
        except StoreError as error:
            log.warning("%s; its images are embedded again", error)
            return None
        if file.store_type != self.store_type:
            raise StoreError(f"{path}: is of another embedding than its folder's; move it away")
        return file

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether the parts read at the start lack its vector: bool of shape (n,)."""
        return ~np.isin(digest_keys(digests), self._known)

    def append(self, digests: Digests, features: NDArray[Any]) -> int:
        """Add vectors, float of shape (n, dim), of n distinct digests, uint64 of shape (n, 2); return n."""
        if len(digests):
            self._waiting.append((digests, np.ascontiguousarray(features, self.store_type.dtype)))
        return len(digests)

    @property
    def due(self) -> bool:
        """Whether it is time to commit a part."""
        waiting = sum(vectors.nbytes for _, vectors in self._waiting)
        return waiting >= PART_BYTES or time.monotonic() - self._since >= PART_SECONDS

    def commit(self) -> None:
        """Write everything appended since the last commit as a part."""
        self._since = time.monotonic()
        if not self._waiting:
            return
        content, vectors = zip(*self._waiting, strict=True)
        arrays = {"content": np.concatenate(content), **self._origin}
        digest, parts = compose("pack", self.store_type, len(arrays["content"]), arrays, lambda: vectors)
        path = f"{self.folder}/{digest}.h5"
        if address_of(path):
            with explained(Path(self.folder)):
                write_remote(path, b"".join(parts))
        else:
            _write(Path(path), parts)
        self._waiting = []

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.commit()
