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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DatasetError, StoreError
from pipeline.io.digests import Digests, digests_to_hex, fingerprint
from pipeline.io.remote import address_of, forget_listings, list_remote
from pipeline.store.format import SEGMENTS, StoreType, slices
from pipeline.store.opener import StoreFile, map_file, open_file

log = logging.getLogger(__name__)

MAX_IDENTITY_BYTES = 1 << 16
COPY_BYTES = 16 << 20
GATHER_BYTES = 4 << 20
PACKED = (".h5", ".hdf5")
"""What the address of a packed file ends with; that of a store does not."""
ATTEMPTS = 10
"""How often a store is looked at anew that a writer has changed meanwhile."""


# ---- the table: where each content is


@dataclass(frozen=True)
class Table:
    """Content digests in order, and the place of each: `lines`, uint64 of shape (4, n), are both halves of the digests, segment, row."""

    lines: NDArray[np.uint64]

    @staticmethod
    def of(contents: Sequence[Digests]) -> Table:
        """Return the table of some segments, by the content of each one's rows in order, uint64 of shape (rows, 2)."""
        content = np.concatenate([np.zeros((0, 2), np.uint64), *contents])
        segment = np.repeat(np.arange(len(contents)), [len(each) for each in contents])
        row = np.concatenate([np.zeros(0, np.int64), *(np.arange(len(each)) for each in contents)])
        # By the first half alone, which is as good as always enough.
        order = np.argsort(content[:, 0], kind="stable")
        first = content[order, 0]
        if (first[1:] == first[:-1]).any():
            order = np.lexsort((content[:, 1], content[:, 0]))
        return Table(np.stack([line[order].astype("<u8") for line in (*content.T, segment, row)]))

    def problem(self, sizes: Sequence[int]) -> str | None:
        """Say what is wrong with a table of segments of so many rows, which a stranger may have made; None where nothing is."""
        first, second, segment, row = self.lines
        if not ((first[:-1] < first[1:]) | ((first[:-1] == first[1:]) & (second[:-1] < second[1:]))).all():
            return "its table is not sorted, or names a content twice"
        most = np.array([*sizes, 0], np.uint64)
        return (
            "its table names rows that do not exist" if (row >= most[np.minimum(segment, len(sizes))]).any() else None
        )

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """Return the position of each of k digests, uint64 of shape (k, 2), int64 of shape (k,), -1 for none."""
        wanted = np.ascontiguousarray(digests, np.uint64).reshape(-1, 2)
        if not self.lines.size:
            return np.full(len(wanted), -1, np.int64)
        # In the order of the table, neighbours share pages: many times faster in a large one.
        order = np.argsort(wanted[:, 0], kind="stable")
        (first, second), (left, right) = self.lines[:2], wanted[order].T
        at = np.minimum(np.searchsorted(first, left), len(first) - 1)
        # Two contents hardly ever share their first half, but all of a stranger's may.
        if (several := (first[at] == left) & (second[at] != right)).any():
            pairs, asked = (
                np.ascontiguousarray(each.T).view("u8,u8").ravel()
                for each in (self.lines[:2], wanted[order[several]].T)
            )
            at[several] = np.minimum(np.searchsorted(pairs, asked), len(first) - 1)
        positions = np.empty(len(wanted), np.int64)
        positions[order] = np.where((first[at] == left) & (second[at] == right), at, -1)
        return positions

    def in_file_order(self) -> Digests:
        """Return every digest, uint64 of shape (n, 2), in the order of segments and rows."""
        return self.lines[:2].T[np.lexsort((self.lines[3], self.lines[2]))]


def open_segment(
    path: Path, store_type: StoreType, digest: str | None = None, data: mmap.mmap | None = None
) -> StoreFile:
    """Open a segment or a group of the journal, which has the same form, and check that it belongs to this store."""
    file = open_file(path, "segment", digest, data)
    if file.store_type != store_type:
        raise StoreError(f"{path}: belongs to another store: it has {file.store_type}, expected {store_type}")
    return file


# ---- the store


@dataclass(frozen=True)
class FeatureStore:
    """Content digest -> feature vector, for one identity, as it was when it was opened."""

    path: Path
    file: StoreFile
    """The snapshot, or the packed file."""
    identity: dict[str, Any]
    segments: tuple[Path, ...]
    """The file of each segment, which is called as the digest of its head."""
    _files: dict[int, StoreFile] = field(default_factory=dict, repr=False)
    """Segment number -> its file; opened and checked when first read."""
    _mapped: dict[int, mmap.mmap] = field(default_factory=dict, repr=False)
    """Segment number -> its bytes, held so that they outlive their name."""

    @staticmethod
    def open(path: str | Path, fingerprint: str | None = None) -> FeatureStore:
        """Open a store's newest valid snapshot, or a packed file.

        `path` may also be an address that fsspec understands, such as `s3://bucket/features.h5`; then the files are fetched now.
        StoreError when there is none, it is damaged, or its identity is not the one of this fingerprint.
        """
        path = Path(path)
        try:
            if path.is_file() if address_of(path) is None else path.suffix in PACKED:
                file = open_file(path, "pack")
                store = FeatureStore(path, file, _identity(file), (path,), {0: file})
            else:
                store = _open_folder(path)
        except FileNotFoundError:
            raise StoreError(f"{path}: is not there") from None
        if fingerprint not in (None, found := store.store_type.fingerprint):
            raise StoreError(
                f"{path}: its features were made differently than asked for (identity {found[:16]}…, expected {fingerprint[:16]}…); "
                "run 'manyheads features' again"
            )
        return store

    @cached_property
    def table(self) -> Table:
        """Where each content is, checked as a whole when it is first asked for; StoreError for damage."""
        if self.file.attributes["kind"] == "pack":
            return Table.of([self.file.arrays["content"]])
        self.file.require_whole()
        table = Table(self.file.bulk)
        if problem := table.problem(self.file.arrays["segment_rows"].tolist()):
            raise StoreError(f"{self.file.path}: not a valid feature store file: {problem}")
        return table

    @property
    def store_type(self) -> StoreType:
        """What all its files share."""
        return self.file.store_type

    @property
    def digest(self) -> str:
        """Names the state of the whole store."""
        return self.file.digest

    @property
    def generation(self) -> int:
        """The number of the snapshot; 0 for a packed file."""
        return int(self.file.attributes.get("generation", 0))

    @property
    def probe(self) -> NDArray[np.float32]:
        """Vectors of the built-in probe images, of shape (k, dim)."""
        return self.file.arrays["canary"]

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
        return int(self.file.attributes["rows"])

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether the store has no vector for it: bool of shape (n,)."""
        return self.table.find(digests) < 0

    def locate(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of each of n digests, int64 of shape (n,); StoreError when some are missing."""
        positions = self.table.find(digests)
        if (positions < 0).any():
            absent = digests_to_hex(np.asarray(digests).reshape(-1, 2)[positions < 0][:1])
            raise StoreError(
                f"{self.path}: has no features for {int((positions < 0).sum())} of {len(positions)} images "
                f"(the first has content {absent[0]}); run 'manyheads features' first"
            )
        segments, rows = (line[positions].astype(np.int64) for line in self.table.lines[2:])
        return segments, rows

    def read(self, digests: Digests) -> NDArray[np.float32]:
        """Return the vectors of n digests, uint64 of shape (n, 2), in the order asked, float32 of shape (n, dim), checked.

        StoreError when some are missing (how many, and the first), or a segment is missing or damaged.
        """
        return self.read_at(*self.locate(digests), digests)

    def read_at(
        self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests, view: bool = False
    ) -> NDArray[np.float32]:
        """Like `read`, for n digests that were located before: `segments` and `rows` are int64 of shape (n,).

        With `view` a read-only view of the mapped file, where they lie one behind the other in a float32 segment.
        """
        if (
            view
            and self.dtype == np.float32
            and len(rows)
            and (segments == segments[0]).all()
            and (np.diff(rows) == 1).all()
        ):
            found: NDArray[np.float32] = self._segment(int(segments[0]), rows, digests).bulk[rows[0] : rows[-1] + 1]
            return found
        result = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(segments).tolist():
            here = np.flatnonzero(segments == number)
            source = self._segment(number, rows[here], digests[here]).bulk
            for part in slices(len(here), 4 * self.dim, GATHER_BYTES):
                result[here[part]] = source[rows[here[part]]]
        return result

    def pieces(self, digests: Digests) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Yield the vectors of n digests, uint64 of shape (n, 2), as float32 of shape (k, dim), each with its place among the n."""
        return ((part, self.read(digests[part])) for part in slices(len(digests), 4 * self.dim, COPY_BYTES))

    def whereabouts(self, digests: Digests) -> Iterator[tuple[StoreFile, NDArray[np.int64]]]:
        """Yield each file that has some of n digests, uint64 of shape (n, 2), with their rows there, int64 of shape (k,), checked."""
        segments, rows = self.locate(digests)
        for number in np.unique(segments).tolist():
            here = segments == number
            yield self._segment(number, rows[here], digests[here]), rows[here]

    def open_segment(self, number: int) -> StoreFile:
        """Open a segment of the snapshot; StoreError when it is missing, or another."""
        path = self.segments[number]
        try:
            return open_segment(path, self.store_type, path.stem, self._mapped.get(number))
        except FileNotFoundError:
            rows = self.file.arrays["segment_rows"][number]
            raise StoreError(
                f"{path}: is missing with {rows} features; put it back, or run 'manyheads store repair'"
            ) from None

    def _segment(self, number: int, rows: NDArray[np.int64], digests: Digests) -> StoreFile:
        """Return a segment in which these k rows, int64, are those digests, uint64 of shape (k, 2), and whole."""
        if number not in self._files:
            self._files[number] = self.open_segment(number)
        file = self._files[number]
        content = file.arrays["content"]
        if (rows >= len(content)).any() or not np.array_equal(content[rows], digests):
            raise StoreError(
                f"{file.path}: does not hold the images that the snapshot says; run 'manyheads store verify --full'"
            )
        file.check_rows(rows)
        return file


# ---- opening


def _open_folder(path: Path) -> FeatureStore:
    """Open the newest snapshot and map all its segments while they have a name; a writer may remove them later."""
    for _ in range(ATTEMPTS):
        store = newest_snapshot(path)
        for number, segment in enumerate(store.segments):
            with contextlib.suppress(FileNotFoundError, StoreError):  # an error when it is read
                store._mapped[number] = map_file(segment)
        if len(store._mapped) == len(store.segments) or newest_snapshot(path).digest == store.digest:
            break
        # Segments went while we opened: a writer has published a newer snapshot, so take that one.
    return store


def open_snapshot(path: Path) -> FeatureStore:
    """Open one snapshot and check everything about it but its table, which is checked when it is first used."""
    file = open_file(path, "snapshot")
    if path.name != snapshot_path(path.parent, file.attributes["generation"]).name:
        raise StoreError(f"{path}: is of generation {file.attributes['generation']}; it was renamed")
    names = [digest.tobytes().hex() for digest in file.arrays["segment_digest"]]
    if len(set(names)) != len(names):
        raise StoreError(f"{path}: not a valid feature store file: a segment is named twice")
    segments = tuple(path.parent / SEGMENTS / f"{name}.h5" for name in names)
    return FeatureStore(path.parent, file, _identity(file), segments)


def _identity(file: StoreFile) -> dict[str, Any]:
    """Return the identity that a file carries, checked against its fingerprint."""
    raw = file.arrays["identity_json"].tobytes()
    try:
        identity = json.loads(raw if len(raw) <= MAX_IDENTITY_BYTES else b"")
        if not isinstance(identity, dict) or fingerprint(identity) != file.store_type.fingerprint:
            raise ValueError("the digest of its identity is another")
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file.path}: not a valid feature store file: {error}") from None
    return identity


def snapshot_path(store: Path, generation: int) -> Path:
    """Where the snapshot of a generation is."""
    return store / f"snapshot-{generation:08d}.h5"


def generations(store: Path) -> list[int]:
    """Return the generations that have a file, newest first; none where there is no store."""
    found = [re.fullmatch(r"snapshot-([0-9]{8})\.h5", name) for name in listed(store)]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def require_generations(store: Path) -> list[int]:
    """Like `generations`; StoreError when there are none."""
    if not (found := generations(store)):
        raise StoreError(f"{store}: there is no feature store; run 'manyheads features' first")
    return found


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


def newest_snapshot(store: Path) -> FeatureStore:
    """Open the newest valid snapshot, without its segments; a damaged one is passed over with a warning.

    StoreError when there is no store, or none of its snapshots is valid.
    """
    for _ in range(ATTEMPTS):
        try:
            for generation in require_generations(store):
                try:
                    return open_snapshot(snapshot_path(store, generation))
                except StoreError as error:
                    log.warning("%s; the one before is used", error)
            break
        except FileNotFoundError:
            pass  # a writer has removed it meanwhile, and published a newer one
    raise no_valid_snapshot(store)


def no_valid_snapshot(store: Path, problems: Sequence[str] = ()) -> StoreError:
    """Return the error of a store that is damaged beyond use."""
    return StoreError(f"{store}: no valid snapshot; delete the store and run 'manyheads features' again", problems)
