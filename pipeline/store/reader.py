"""`FeatureStore`: the reader of one snapshot or one packed file. No lock; a run that writes meanwhile is not seen."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io.digests import Digests, digests_to_hex
from pipeline.store.identity import differences
from pipeline.store.opener import StoreFile, map_file, open_file
from pipeline.store.segment import SegmentEntry, StoreType, open_entry
from pipeline.store.snapshot import Snapshot, Table, newest_snapshot, read_identity, sorted_table, table_of


@dataclass(frozen=True)
class FeatureStore:
    """Content digest -> feature vector, for one identity, as it was when it was opened."""

    path: Path
    identity: dict[str, Any]
    store_type: StoreType
    digest: str
    """Names the state of the whole store."""
    generation: int
    segments: tuple[SegmentEntry, ...]
    canary: NDArray[np.float32]
    table: Table = field(repr=False)
    _mapped: dict[int, mmap.mmap] = field(repr=False)
    """Segment number -> its bytes, held so that they outlive their name."""
    _files: dict[int, StoreFile] = field(repr=False)
    """Segment number -> its file; opened and checked when first read."""

    @staticmethod
    def open(
        path: str | Path, fingerprint: str | None = None, identity: Mapping[str, Any] | None = None
    ) -> FeatureStore:
        """Open a store's newest valid snapshot, or a packed file.

        Raises
        ------
        StoreError
            When there is none, it is damaged, or its identity is not the one expected: shows both sides.
        """
        path = Path(path)
        store = _open_pack(path) if path.is_file() else _open_folder(path)
        if identity is not None and (problems := differences(store.identity, identity)):
            raise StoreError(f"{path}: its features were made differently than asked for", problems)
        if fingerprint is not None and fingerprint != store.fingerprint:
            raise StoreError(
                f"{path}: its features were made differently than asked for: "
                f"identity {store.fingerprint[:16]}…, expected {fingerprint[:16]}…; run 'manyheads features' again"
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
        return len(self.table.first)

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, shape (n, 2), whether the store has no vector for it."""
        return self.table.find(digests) < 0

    def read(self, digests: Digests) -> NDArray[np.float32]:
        """Return the vectors of n digests in the order asked, shape (n, dim); every block read is checked first.

        Raises
        ------
        StoreError
            When some are missing (how many, and the first), or a segment is missing or damaged.
        """
        return self.read_at(*self.locate(digests), digests)

    def read_at(self, segments: NDArray[np.int64], rows: NDArray[np.int64], digests: Digests) -> NDArray[np.float32]:
        """Like `read`, for digests that were located before."""
        result = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(segments).tolist():
            here = np.flatnonzero(segments == number)
            file = self.segment(number, rows[here], digests[here])
            file.check_items(rows[here], self.dim)
            _gather(file.bulk, rows[here], here, result)
        return result

    def load(self, digests: Digests) -> NDArray[np.float32]:
        """Like `read`, but without a copy where the rows lie one behind the other in a float32 segment.

        Then the result is a read-only view of the mapped file, whose blocks have been checked.
        """
        segments, rows = self.locate(digests)
        one_run = len(rows) > 0 and (segments == segments[0]).all() and (np.diff(rows) == 1).all()
        if not one_run or self.store_type.dtype != "<f4":
            return self.read(digests)
        file = self.segment(int(segments[0]), rows, digests)
        file.check_items(rows, self.dim)
        view: NDArray[np.float32] = file.bulk[rows[0] : rows[-1] + 1]
        return view

    def locate(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of each digest; StoreError when some are missing."""
        positions = self.table.find(digests)
        if (positions < 0).any():
            absent = digests_to_hex(np.asarray(digests).reshape(-1, 2)[positions < 0][:1])
            raise StoreError(
                f"{self.path}: has no features for {int((positions < 0).sum())} of {len(positions)} images "
                f"(the first has content {absent[0]}); run 'manyheads features' first"
            )
        return self.table.place(positions)

    def segment(self, number: int, rows: NDArray[np.int64], digests: Digests) -> StoreFile:
        """Return an opened segment after checking that these rows of it are those digests."""
        if number >= len(self.segments):
            raise StoreError(
                f"{self.path}: not a valid feature store: it names segment {number} of {len(self.segments)}"
            )
        if number not in self._files:
            self._files[number] = open_entry(
                self.path, self.segments[number], self.store_type, self._mapped.get(number)
            )
        file = self._files[number]
        content = file.arrays["content"]
        if (rows >= len(content)).any() or not np.array_equal(content[rows], digests):
            raise StoreError(
                f"{file.path}: does not hold the images that the snapshot says; run 'manyheads store verify --full'"
            )
        return file


def _gather(source: NDArray[Any], rows: NDArray[np.int64], here: NDArray[np.intp], out: NDArray[np.float32]) -> None:
    """Copy rows, a few megabytes at a time, as slices where they lie one behind the other."""
    if (np.diff(rows) == 1).all() and (np.diff(here) == 1).all():
        out[here[0] : here[-1] + 1] = source[rows[0] : rows[-1] + 1]
        return
    step = max(1, (4 << 20) // max(1, source.shape[1] * 4))
    for start in range(0, len(rows), step):
        out[here[start : start + step]] = source[rows[start : start + step]]


def _open_folder(path: Path) -> FeatureStore:
    for _ in range(10):
        snapshot = newest_snapshot(path)
        store = from_snapshot(path, snapshot)
        if len(store._mapped) == len(snapshot.segments) or newest_snapshot(path).digest == snapshot.digest:
            break
        # Segments went while we opened: a writer has published a newer snapshot, so take that one.
    return store


def from_snapshot(path: Path, snapshot: Snapshot) -> FeatureStore:
    """Make a reader of one opened snapshot.

    All its segments are mapped now, while they have a name; a writer may remove them later. A missing one is an error
    when it is read.
    """
    mapped: dict[int, mmap.mmap] = {}
    for number, entry in enumerate(snapshot.segments):
        with contextlib.suppress(FileNotFoundError, StoreError):
            mapped[number] = map_file(entry.path(path))
    return FeatureStore(
        path,
        snapshot.identity,
        snapshot.store_type,
        snapshot.digest,
        snapshot.generation,
        snapshot.segments,
        snapshot.canary,
        snapshot.table,
        mapped,
        {},
    )


def _open_pack(path: Path) -> FeatureStore:
    file = open_file(path, "pack")
    identity = read_identity(file)
    store_type = StoreType(file.text("identity"), file.number("dim"), file.text("dtype"))
    content = file.arrays["content"]
    lines = sorted_table(content, np.zeros(len(content)), np.arange(len(content)))
    entry = SegmentEntry(file.digest, len(content), file.size)
    table = table_of(lines, lambda line, positions: None)
    return FeatureStore(
        path, identity, store_type, file.digest, 0, (entry,), file.arrays["canary"], table, {}, {0: file}
    )


def load(store: str | Path | FeatureStore, digests: Digests) -> NDArray[np.float32]:
    """Return X of shape (n, dim) for n digests, memory-mapped where the layout permits."""
    return (store if isinstance(store, FeatureStore) else FeatureStore.open(store)).load(digests)
