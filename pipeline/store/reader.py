"""`FeatureStore`: the reader of one snapshot or one packed file. No lock; a run that writes meanwhile is not seen.

A snapshot is a store's table of contents at one moment, immutable and numbered; the highest valid number counts. Its digest
covers its table and the digests of all segments, so it names the state of the whole store. The one before is kept, as a way
back should the newest be damaged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from pipeline.errors import DatasetError, StoreError
from pipeline.io.digests import Digests, digests_to_hex, fingerprint
from pipeline.io.remote import address_of, forget_listings, list_remote
from pipeline.store.format import StoreType
from pipeline.store.identity import differences
from pipeline.store.opener import StoreFile, map_file, open_file
from pipeline.store.table import SegmentEntry, Table, open_entry, sorted_table

log = logging.getLogger(__name__)

MAX_IDENTITY_BYTES = 1 << 16
MAX_PROBE_ROWS = 1024
COPY_BYTES = 16 << 20
GATHER_BYTES = 4 << 20
PACKED = (".h5", ".hdf5")
"""What the address of a packed file ends with; that of a store does not."""
ATTEMPTS = 10
"""How often a store is looked at anew that a writer has changed meanwhile."""


@dataclass(frozen=True)
class FeatureStore:
    """Content digest -> feature vector, for one identity, as it was when it was opened."""

    path: Path
    file: StoreFile
    """The snapshot, or the packed file."""
    identity: dict[str, Any]
    store_type: StoreType
    digest: str
    """Names the state of the whole store."""
    generation: int
    """0 for a packed file."""
    segments: tuple[SegmentEntry, ...]
    probe: NDArray[np.float32]
    """Vectors of the built-in probe images, of shape (k, dim)."""
    table: Table = field(repr=False)
    _files: dict[int, StoreFile] = field(default_factory=dict, repr=False)
    """Segment number -> its file; opened and checked when first read."""
    _mapped: dict[int, mmap.mmap] = field(default_factory=dict, repr=False)
    """Segment number -> its bytes, held so that they outlive their name."""

    @staticmethod
    def open(
        path: str | Path, fingerprint: str | None = None, identity: Mapping[str, Any] | None = None
    ) -> FeatureStore:
        """Open a store's newest valid snapshot, or a packed file.

        `path` may also be an address that fsspec understands, such as `s3://bucket/features.h5`; then the files are fetched now.

        Raises
        ------
        StoreError
            When there is none, it is damaged, or its identity is not the one expected: shows both sides.
        """
        path = Path(path)
        packed = path.is_file() if address_of(path) is None else path.suffix in PACKED
        try:
            store = _open_pack(path) if packed else _open_folder(path)
        except FileNotFoundError:
            raise StoreError(f"{path}: is not there") from None
        problems = [] if identity is None else differences(store.identity, identity)
        if fingerprint not in (None, store.fingerprint):
            problems = [f"identity {store.fingerprint[:16]}…, expected {fingerprint[:16]}…"]
        if problems:
            raise StoreError(
                f"{path}: its features were made differently than asked for; run 'manyheads features' again", problems
            )
        return store

    @property
    def fingerprint(self) -> str:
        """The digest of the identity."""
        return self.store_type.fingerprint

    @property
    def dim(self) -> int:
        """Numbers in one feature vector."""
        return self.store_type.dim

    @property
    def dtype(self) -> np.dtype[Any]:
        """How the numbers are stored; reads give float32."""
        return np.dtype(self.store_type.dtype)

    @property
    def rows(self) -> int:
        """Number of contents that have a feature vector."""
        return len(self.table)

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether the store has no vector for it: bool of shape (n,)."""
        return self.table.find(digests) < 0

    def read(self, digests: Digests) -> NDArray[np.float32]:
        """Return the vectors of n digests, uint64 of shape (n, 2), in the order asked, float32 of shape (n, dim), checked.

        Raises
        ------
        StoreError
            When some are missing (how many, and the first), or a segment is missing or damaged.
        """
        return self.read_at(*self.locate(digests), digests)

    def read_at(self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests) -> NDArray[np.float32]:
        """Like `read`, for n digests that were located before: `segments` and `rows` are int64 of shape (n,)."""
        result = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(segments).tolist():
            here = np.flatnonzero(segments == number)
            source = self._segment(number, rows[here], digests[here]).bulk
            if (np.diff(rows[here]) == 1).all() and (np.diff(here) == 1).all():
                result[here[0] : here[-1] + 1] = source[rows[here[0]] : rows[here[-1]] + 1]
                continue
            step = max(1, GATHER_BYTES // (4 * self.dim))
            for part in (here[start : start + step] for start in range(0, len(here), step)):
                result[part] = source[rows[part]]
        return result

    def pieces(self, digests: Digests) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield the vectors of n digests, uint64 of shape (n, 2), as float32 of shape (k, dim), each with its place among the n."""
        step = max(1, COPY_BYTES // (self.dim * 4))
        for start in range(0, len(digests), step):
            part = slice(start, start + step)
            yield part, self.read(digests[part])

    def view_at(self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests) -> NDArray[np.float32]:
        """Like `read_at`, but where the rows lie one behind the other in a float32 segment a view of the mapped file, read-only.

        segments, rows : int64 of shape (n,); digests : uint64 of shape (n, 2); returns float32 of shape (n, dim)
        """
        one_run = len(rows) > 0 and (segments == segments[0]).all() and (np.diff(rows) == 1).all()
        if not one_run or self.store_type.dtype != "<f4":
            return self.read_at(segments, rows, digests)
        view: NDArray[np.float32] = self._segment(int(segments[0]), rows, digests).bulk[rows[0] : rows[-1] + 1]
        return view

    def locate(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of each of n digests, int64 of shape (n,); StoreError when some are missing."""
        positions = self.table.find(digests)
        if (positions < 0).any():
            absent = digests_to_hex(np.asarray(digests).reshape(-1, 2)[positions < 0][:1])
            raise StoreError(
                f"{self.path}: has no features for {int((positions < 0).sum())} of {len(positions)} images "
                f"(the first has content {absent[0]}); run 'manyheads features' first"
            )
        return self.table.place(positions)

    def whereabouts(self, digests: Digests) -> Iterator[tuple[StoreFile, NDArray[np.int64]]]:
        """Yield each file that has some of n digests, uint64 of shape (n, 2), with their rows there, int64 of shape (k,), checked."""
        segments, rows = self.locate(digests)
        for number in np.unique(segments).tolist():
            here = segments == number
            yield self._segment(number, rows[here], digests[here]), rows[here]

    def _segment(self, number: int, rows: NDArray[np.int64], digests: Digests) -> StoreFile:
        """Return a segment in which these k rows, int64, are those digests, uint64 of shape (k, 2), and whole."""
        if number >= len(self.segments):
            raise StoreError(
                f"{self.path}: not a valid feature store: it names segment {number} of {len(self.segments)}"
            )
        if number not in self._files:
            mapped = self._mapped.get(number)
            self._files[number] = open_entry(self.path, self.segments[number], self.store_type, mapped)
        file = self._files[number]
        content = file.arrays["content"]
        if (rows >= len(content)).any() or not np.array_equal(content[rows], digests):
            raise StoreError(
                f"{file.path}: does not hold the images that the snapshot says; run 'manyheads store verify --full'"
            )
        file.check_items(rows, self.dim)
        return file


@dataclass(frozen=True)
class JoinedStores:
    """Several stores side by side: content digest -> their vectors in a row. Nothing is copied on disk."""

    stores: tuple[FeatureStore, ...]

    @property
    def dim(self) -> int:
        """Numbers in one vector."""
        return sum(store.dim for store in self.stores)

    @property
    def digest(self) -> str:
        """Names the state of all stores."""
        return fingerprint({"stores": [store.digest for store in self.stores]})

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether one of the stores has no vector for it: bool of shape (n,)."""
        missing: NDArray[np.bool_] = np.any([store.missing(digests) for store in self.stores], axis=0)
        return missing

    def read(self, digests: Digests) -> NDArray[np.float32]:
        """Return the vectors of n digests, uint64 of shape (n, 2), as float32 of shape (n, dim); StoreError as the stores raise it."""
        return self.read_at(*self.locate(digests), digests)

    def locate(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of each of n digests in each of k stores, both int64 of shape (n, k)."""
        segments, rows = zip(*(store.locate(digests) for store in self.stores), strict=True)
        return np.stack(segments, axis=1), np.stack(rows, axis=1)

    def read_at(self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests) -> NDArray[np.float32]:
        """Like `read`, for n digests that were located before: `segments` and `rows` are int64 of shape (n, k)."""
        result = np.empty((len(rows), self.dim), np.float32)
        start = 0
        for number, store in enumerate(self.stores):
            result[:, start : start + store.dim] = store.read_at(segments[:, number], rows[:, number], digests)
            start += store.dim
        return result

    view_at = read_at


@dataclass(frozen=True, eq=False, repr=False)
class StoredRows(NDArrayOperatorsMixin):
    """The vectors of n digests, float32 of shape (n, dim), as an array that is read and checked only where it is indexed.

    NumPy's operators, functions and methods read all of it: `X - X.mean(axis=0)`.

    A slice gives a view of the mapped file, read-only, where the rows lie one behind the other there, and so does `numpy.asarray`
    of all; a mask or row numbers give a copy. `segments` and `rows`, int64 of shape (n,), or (n, k) of k joined stores, say where each
    vector lies.
    """

    store: FeatureStore | JoinedStores
    digests: Digests
    segments: NDArray[np.int64]
    rows: NDArray[np.int64]

    @staticmethod
    def of(store: FeatureStore | JoinedStores, digests: Digests) -> StoredRows:
        """Find n digests, uint64 of shape (n, 2), without reading their vectors; StoreError when some are missing."""
        digests = np.asarray(digests).reshape(-1, 2)
        return StoredRows(store, digests, *store.locate(digests))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"StoredRows of shape {self.shape}, float32, on disk"

    @property
    def shape(self) -> tuple[int, int]:
        """(n, dim)."""
        return len(self.rows), self.store.dim

    @property
    def ndim(self) -> int:
        """Always 2."""
        return 2

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """float32, whatever the store holds."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes the array would take in memory."""
        return 4 * len(self) * self.store.dim

    def __getitem__(self, places: Any) -> NDArray[np.float32]:
        if isinstance(places, tuple):
            first, *rest = places
            return (
                self[first][(..., *rest)] if isinstance(first, (int, np.integer)) else self[first][(slice(None), *rest)]
            )
        if isinstance(places, (int, np.integer)):
            vector: NDArray[np.float32] = self[[places]][0]
            return vector
        read = self.store.view_at if isinstance(places, slice) else self.store.read_at
        return read(self.segments[places], self.rows[places], self.digests[places])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        vectors = self[:]
        return np.array(vectors, dtype) if copy else np.asarray(vectors, dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [each[:] if isinstance(each, StoredRows) else each for each in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self[:], name)

    def part(self, places: NDArray[np.integer]) -> StoredRows:
        """Return some of the rows, of any integer dtype, shape (k,), still unread."""
        return StoredRows(self.store, self.digests[places], self.segments[places], self.rows[places])

    def file_order(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how to sort k places into the order in which their vectors lie on disk: int64 of shape (k,), as `argsort`."""
        rows, segments = (each[places].reshape(len(places), -1)[:, 0] for each in (self.rows, self.segments))
        return np.lexsort((rows, segments))


def _opened(
    path: Path, file: StoreFile, segments: tuple[SegmentEntry, ...], table: Table, files: dict[int, StoreFile]
) -> FeatureStore:
    if len(file.arrays["canary"]) > MAX_PROBE_ROWS:
        raise StoreError(f"{file.path}: not a valid feature store file: it has too many probe vectors")
    generation = file.number("generation") if file.kind == "snapshot" else 0
    identity, probe = _identity(file), file.arrays["canary"]
    return FeatureStore(path, file, identity, file.store_type, file.digest, generation, segments, probe, table, files)


def _open_pack(path: Path) -> FeatureStore:
    file = open_file(path, "pack")
    content = file.arrays["content"]
    table = Table(sorted_table(content, np.zeros(len(content)), np.arange(len(content))))
    return _opened(path, file, (SegmentEntry(file.digest, len(content), file.size),), table, {0: file})


def _open_folder(path: Path) -> FeatureStore:
    """Open the newest snapshot and map all its segments while they have a name; a writer may remove them later."""
    for _ in range(ATTEMPTS):
        store = newest_snapshot(path)
        for number, entry in enumerate(store.segments):
            with contextlib.suppress(FileNotFoundError, StoreError):  # an error when it is read
                store._mapped[number] = map_file(entry.path(path))
        if len(store._mapped) == len(store.segments) or newest_snapshot(path).digest == store.digest:
            break
        # Segments went while we opened: a writer has published a newer snapshot, so take that one.
    return store


def snapshot_path(store: Path, generation: int) -> Path:
    """Where the snapshot of a generation is."""
    return store / f"snapshot-{generation:08d}.h5"


def generations(store: Path) -> list[int]:
    """Return the generations that have a file, newest first; none where there is no store."""
    found = [re.fullmatch(r"snapshot-([0-9]{8})\.h5", name) for name in listed(store)]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def listed(folder: str | Path) -> list[str]:
    """Return the names in a folder, here or remote, in order; none where there is no such folder."""
    address = address_of(folder)
    try:
        if address is None:
            return sorted(path.name for path in Path(folder).iterdir())
        forget_listings(address)
        return sorted(list_remote(address))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except DatasetError as error:
        raise StoreError(error.message) from None


def open_snapshot(path: Path) -> FeatureStore:
    """Open one snapshot and check everything about it but its table, which is checked block by block as it is used."""
    file = open_file(path, "snapshot")
    if path.name != snapshot_path(path.parent, file.number("generation")).name:
        raise StoreError(f"{path}: is of generation {file.number('generation')}; it was renamed")
    names = [digest.tobytes().hex() for digest in file.arrays["segment_digest"]]
    if len(set(names)) != len(names):
        raise StoreError(f"{path}: not a valid feature store file: a segment is named twice")
    sizes = zip(names, file.arrays["segment_rows"], file.arrays["segment_bytes"], strict=True)
    segments = tuple(SegmentEntry(name, int(rows), int(size)) for name, rows, size in sizes)
    count = file.number("rows")
    table = Table(file.bulk, lambda line, positions: file.check_items(positions + line * count))
    return _opened(path.parent, file, segments, table, {})


def _identity(file: StoreFile) -> dict[str, Any]:
    """Return the identity that a file carries, checked against its fingerprint."""
    raw = file.arrays["identity_json"].tobytes()
    try:
        if len(raw) > MAX_IDENTITY_BYTES:
            raise ValueError("too long")
        identity = json.loads(raw)
        if not isinstance(identity, dict) or fingerprint(identity) != file.store_type.fingerprint:
            raise ValueError("its digest is another")
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{file.path}: not a valid feature store file: its identity cannot be read ({error})"
        ) from None
    return identity


def newest_snapshot(store: Path) -> FeatureStore:
    """Open the newest valid snapshot, without its segments; a damaged one is passed over with a warning.

    Raises
    ------
    StoreError
        When there is no store, or none of its snapshots is valid.
    """
    for _ in range(ATTEMPTS):
        problems: list[str] = []
        for generation in require_generations(store):
            try:
                snapshot = open_snapshot(snapshot_path(store, generation))
            except FileNotFoundError:
                break  # a writer has removed it meanwhile, and published a newer one
            except StoreError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                log.warning("%s; using generation %d instead", problem, generation)
            return snapshot
        else:
            break
    raise no_valid_snapshot(store, problems)


def require_generations(store: Path) -> list[int]:
    """Like `generations`; StoreError when there are none."""
    if not (found := generations(store)):
        raise StoreError(f"{store}: there is no feature store; run 'manyheads features' first")
    return found


def no_valid_snapshot(store: Path, problems: Sequence[str] = ()) -> StoreError:
    """Return the error of a store that is damaged beyond use."""
    return StoreError(f"{store}: no valid snapshot; delete the store and run 'manyheads features' again", problems)
