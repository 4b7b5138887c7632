"""`StoreWriter`: the one process that adds rows. Append, commit groups to the journal, compact into a snapshot.

    append -> memory -> commit: one synced journal file every 4 MB or 10 s -> compact: segments, then the next snapshot

A group of the journal is there for good once its name is there. Compaction makes segments of the groups, and of their places the
table of the next snapshot; then what nobody needs any more goes. A kill at any moment leaves the last snapshot valid and the journal
for the next run to take over. The order of the rows is the order of appending, across kills, so a resumed run gives the same bytes as
one that was never interrupted. Damaged files are set aside: nothing that could be of use is destroyed.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, digest_keys, digests_to_hex, fingerprint
from pipeline.store import lock
from pipeline.store.format import (
    JOURNAL,
    QUARANTINE,
    SEGMENTS,
    TEMPORARY,
    StoreType,
    compose,
    differences,
    origin,
    slices,
)
from pipeline.store.lock import explained
from pipeline.store.opener import StoreFile
from pipeline.store.reader import (
    FeatureStore,
    Table,
    generations,
    no_valid_snapshot,
    open_segment,
    open_snapshot,
    snapshot_path,
)

log = logging.getLogger(__name__)

GROUP_BYTES = 4 << 20
GROUP_SECONDS = 10.0
SEGMENT_BYTES = 1 << 30
"""Most bytes of features in one segment."""
SMALL_BYTES = SEGMENT_BYTES // 16
MAX_SMALL = 16
"""As many segments below `SMALL_BYTES` may pile up before a run merges them."""
COPY_BYTES = 4 << 20

MIN_COSINE = 0.9999
MAX_DEVIATION = 1e-2
"""Largest difference of a probe vector's number, relative to the root mean square of the recorded row."""


# ---- what may be added


def storable(features: NDArray[Any], store_type: StoreType) -> NDArray[np.bool_]:
    """Say for each row, float of shape (n, dim), whether all its numbers are finite as they would be stored: bool of shape (n,)."""
    with np.errstate(over="ignore"):
        finite: NDArray[np.bool_] = np.isfinite(np.asarray(features).astype(store_type.dtype)).all(axis=1)
    return finite


def check_probe(stored: NDArray[np.float32], found: NDArray[np.float32], where: str) -> None:
    """Compare the vectors of the built-in probe images, float32 of shape (k, dim), with those recorded when the store was made.

    They catch what no list of fields can: a driver, a patched library, a network left in training mode. StoreError when a row's
    cosine is below 0.9999 or a number is off by more than 1 % of the row's root mean square.
    """
    if stored.shape != found.shape:
        raise StoreError(f"{where}: has probe features of shape {stored.shape}, this run has {found.shape}")
    left, right = stored.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    equal = (left == right).all(axis=1)
    cosine = np.where(equal, 1.0, (left * right).sum(axis=1) / np.where(norms > 0, norms, 1.0))
    scale = np.sqrt((left**2).mean(axis=1))
    deviation = np.abs(left - right).max(axis=1, initial=0.0) / np.where(scale > 0, scale, 1.0)
    problems = [
        f"probe image {row}: cosine {cosine[row]:.6f} (expected at least {MIN_COSINE}), "
        f"largest difference {deviation[row]:.2g} of the root mean square (expected at most {MAX_DEVIATION})"
        for row in np.flatnonzero(~((cosine >= MIN_COSINE) & (deviation <= MAX_DEVIATION)))  # also where one is NaN
    ]
    if problems:
        raise StoreError(
            f"{where}: the network does not give the features it gave when this store was made, although nothing in its "
            "identity has changed (a library, a driver, a device?); use a new output folder, or the old environment",
            problems,
        )


# ---- the folders of a store


def groups(store: Path) -> list[Path]:
    """Return the files of the journal in the order they were committed."""
    return sorted((store / JOURNAL).glob(f"{'[0-9]' * 8}.h5"))


def _write(store: Path, parts: Iterable[bytes | memoryview], path: Path) -> None:
    """Write a file under its name; when this returns, a power loss cannot take it away."""
    files.rename(files.write_temporary(store / TEMPORARY, parts), path)


def _set_aside(store: Path, path: Path) -> None:
    """Move a damaged file into `quarantine`."""
    folder = store / QUARANTINE
    files.make_folder(folder)
    target = folder / path.name
    files.SYSTEM["rename"](path, folder / f"{path.name}.{time.time_ns()}" if target.exists() else target)
    files.sync_folder(folder)
    files.sync_folder(path.parent)


def _newest_whole_snapshot(store: Path) -> tuple[FeatureStore, bool]:
    """Open the newest snapshot that is whole; move newer ones away, so that the next number is free, and say whether there were any."""
    numbers = generations(store)
    for generation in numbers:
        path = snapshot_path(store, generation)
        try:
            snapshot = open_snapshot(path)
            snapshot.file.require_whole()
        except StoreError as error:
            log.warning("%s; set aside", error)
            _set_aside(store, path)
        else:
            return snapshot, generation < numbers[0]
    raise no_valid_snapshot(store)


def _whole(store: Path, store_type: StoreType, paths: Iterable[Path]) -> Iterator[StoreFile]:
    """Open groups or segments of a store, in order; one that is damaged in any place is set aside with a warning."""
    for path in paths:
        try:
            file = open_segment(path, store_type)
            file.require_whole()
        except StoreError as error:
            log.warning("%s; set aside, its images will be embedded again", error)
            _set_aside(store, path)
        else:
            yield file


def _sweep(store: Path, newest: FeatureStore, keep: int) -> None:
    """Remove snapshots but the newest `keep`, and segments that none of these names."""
    numbers = generations(store)
    for generation in numbers[keep:]:
        files.remove(snapshot_path(store, generation))
    named = {*newest.segments}
    for generation in numbers[1:keep]:
        try:
            named.update(open_snapshot(snapshot_path(store, generation)).segments)
        except StoreError:
            return  # it cannot say what it needs, so nothing is removed
    for path in [*(store / SEGMENTS).glob("*.h5")]:
        if path not in named:
            files.remove(path)


# ---- rows on their way into segments


@dataclass(frozen=True, eq=False)
class FileRows:
    """Rows of one opened file, int64 of shape (n,), that belong to the store's next state, in the order they have there."""

    file: StoreFile
    rows: NDArray[np.int64]

    @staticmethod
    def all(file: StoreFile) -> FileRows:
        """Take every row of a file."""
        return FileRows(file, np.arange(len(file.bulk)))

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the file."""
        return len(self.rows) == len(self.file.bulk)

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[NDArray[Any]]:
        """Yield the vectors from one of the rows to another, (k, dim) at a time, a few megabytes, each block of the file checked."""
        rows = self.rows[start:stop]
        for part in slices(len(rows), self.file.store_type.row_bytes, COPY_BYTES):
            self.file.check_rows(rows[part])
            yield self.file.bulk[rows[part]]


def _write_segments(store: Path, store_type: StoreType, sources: Sequence[FileRows]) -> Iterator[StoreFile]:
    """Write rows in order into as few segments as allowed."""
    contents = [source.file.arrays["content"][source.rows] for source in sources]
    content = np.concatenate([np.zeros((0, 2), np.uint64), *contents])
    for part in slices(len(content), store_type.row_bytes, SEGMENT_BYTES):
        arrays = {"content": content[part]}
        rows = part.stop - part.start
        digest, parts = compose("segment", store_type, rows, arrays, partial(_pieces, sources, part))
        path = store / SEGMENTS / f"{digest}.h5"
        _write(store, parts, path)
        yield open_segment(path, store_type, digest)


def _pieces(sources: Sequence[FileRows], part: slice) -> Iterator[NDArray[Any]]:
    start, stop = part.start, part.stop
    for source in sources:
        yield from source.pieces(max(0, start), max(0, stop))
        start, stop = start - len(source.rows), stop - len(source.rows)


# ---- the writer


class StoreWriter:
    """A store opened for writing. Use `StoreWriter.open`, and `with`: leaving normally compacts, an error only unlocks."""

    def __init__(self, path: Path, identity: dict[str, Any], store_type: StoreType, held: int) -> None:
        self.path = path
        self.identity = identity
        self.store_type = store_type
        self._lock = held
        self._process = os.getpid()
        self._snapshot: FeatureStore
        self._segments: list[StoreFile] = []
        """Those of the snapshot in order, opened and checked."""
        self._sources: list[FileRows] = []
        """Rows of the journal, in the order they were appended."""
        self._new: set[bytes] = set()
        self._waiting: list[tuple[Digests, NDArray[Any]]] = []
        self._last_commit = time.monotonic()
        self._next_group = 1

    @staticmethod
    def open(
        path: str | Path,
        identity: Mapping[str, Any],
        dim: int,
        dtype: str = "float32",
        probe: NDArray[np.float32] | None = None,
        patience: float = 0.0,
    ) -> StoreWriter:
        """Create a store or open one for writing; takes over the journal of a killed run.

        `dtype` : float32 or float16. `patience` : seconds to wait for another writer.
        `probe` : vectors of the built-in probe images, float32 of shape (k, dim), recorded in a new store and compared with an old one's.

        StoreError when another writer has the lock, the identity, dim or dtype differ (shows both sides), or the probe vectors do.
        """
        path, identity = Path(path), dict(identity)
        store_type = StoreType(fingerprint(identity), dim, np.dtype(dtype).str)
        with explained(path):
            for name in (SEGMENTS, JOURNAL, TEMPORARY, QUARANTINE):
                # What a link leads to is not ours to clear.
                if (path / name).is_symlink():
                    raise StoreError(
                        f"{path / name}: is a symbolic link, expected a folder of the store; nothing was changed"
                    )
            for folder in (path, path / SEGMENTS, path / JOURNAL, path / TEMPORARY):
                files.make_folder(folder)
            writer = StoreWriter(path, identity, store_type, lock.acquire(path, patience))
            try:
                writer._begin(None if probe is None else np.asarray(probe, np.float32))
            except BaseException:
                writer.close()
                raise
        return writer

    def _begin(self, probe: NDArray[np.float32] | None) -> None:
        """Bring the folder into a known state: no partial files, a valid newest snapshot, the journal taken over.

        `probe` : the probe vectors, float32 of shape (k, dim).
        """
        for leftover in (self.path / TEMPORARY).iterdir():
            files.remove(leftover)
        if not generations(self.path):
            self._publish(1, "0" * 64, probe)
        self._snapshot, fell_back = _newest_whole_snapshot(self.path)
        self._require_same(self.identity, self.store_type, probe)
        # Where a newer snapshot was damaged, its segments have rows that no other knows.
        others = {*(self.path / SEGMENTS).glob("*.h5")}.difference(self._snapshot.segments)
        found = sorted(others) if fell_back else []
        opened = [*_whole(self.path, self.store_type, [*found, *groups(self.path)])]
        self._open_segments()
        for file in opened:
            self._take(file, np.flatnonzero(self.fresh(file.arrays["content"])))
        if self._new:
            log.info("%s: taking over %d rows of a run that did not end", self.path, len(self._new))
        if not self._sources:
            # A kill fell between publishing and clearing: the snapshot has all that the journal has.
            self._clear_journal()
        self._next_group = max((int(path.stem) for path in groups(self.path)), default=0) + 1

    def _require_same(
        self, identity: Mapping[str, Any], wanted: StoreType, probe: NDArray[np.float32] | None = None
    ) -> None:
        """See that vectors of an identity may be added; `probe` are its probe vectors, float32 of shape (k, dim), where they are known."""
        found = self._snapshot.store_type
        problems = differences(self._snapshot.identity, identity) + differences(
            {"dim": found.dim, "dtype": found.dtype}, {"dim": wanted.dim, "dtype": wanted.dtype}
        )
        if problems:
            raise StoreError(
                f"{self.path}: its features were made differently and cannot be mixed with new ones; "
                "use another store, or delete this one",
                problems,
            )
        if probe is not None and len(self._snapshot.probe):
            check_probe(self._snapshot.probe, probe, str(self.path))

    def _open_segments(self) -> None:
        """Open the snapshot's segments; of one that is missing or was cut the rows count as missing from now on."""
        for number, path in enumerate(self._snapshot.segments):
            try:
                self._segments.append(self._snapshot.open_segment(number))
            except StoreError as error:
                log.warning("%s; its images will be embedded again", error)
                if path.exists():
                    _set_aside(self.path, path)
        if len(self._segments) < len(self._snapshot.segments):
            self._replace([FileRows.all(file) for file in self._segments])

    def _take(self, file: StoreFile, rows: NDArray[np.int64]) -> None:
        """Let some rows of an opened file, int64 of shape (k,), belong to the next state."""
        if len(rows):
            self._sources.append(FileRows(file, rows))
            self._new.update(digest_keys(file.arrays["content"][rows]).tolist())

    def adopt(self, store: FeatureStore, content: Digests | None = None) -> int:
        """Add vectors of another store, of some contents, uint64 of shape (n, 2), or all; return how many were new.

        They are checked now, and copied when this store is compacted; until then its files must stay. StoreError when one
        is missing there, damaged, or not finite, or the identity or the probe vectors of both differ.
        """
        self.commit()
        self._require_same(store.identity, store.store_type, store.probe if len(store.probe) else None)
        content = store.table.in_file_order() if content is None else content
        content = content[self.fresh(content)]
        for file, rows in store.whereabouts(content):
            if not all(storable(piece, self.store_type).all() for piece in FileRows(file, rows).pieces()):
                raise StoreError(f"{file.path}: has vectors with numbers that are not finite; nothing of it was taken")
            self._take(file, rows)
        return len(content)

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, uint64 of shape (n, 2), whether neither the store nor this run has its vector."""
        absent = self._snapshot.missing(digests)
        if self._new:
            absent &= np.array([key not in self._new for key in digest_keys(digests).tolist()], np.bool_)
        return absent

    def fresh(self, digests: Digests) -> NDArray[np.bool_]:
        """Like `missing`, bool of shape (n,), but of equal digests only the first counts."""
        fresh = self.missing(digests)
        _, first = np.unique(digests, axis=0, return_index=True)
        fresh[np.setdiff1d(np.arange(len(fresh)), first)] = False
        return fresh

    def append(self, digests: Digests, features: NDArray[Any]) -> int:
        """Add vectors, float of shape (n, dim), for n digests, uint64 of shape (n, 2); return how many were new.

        Those the store has already are passed over. They are safe once a group is committed, by itself every 4 MB or 10 s.
        StoreError when a number is not finite, naming the contents, and nothing of this call was added; or when the disk is full.
        """
        self._require_open()
        digests = np.ascontiguousarray(digests, np.uint64).reshape(-1, 2)
        features = np.asarray(features).reshape(len(digests), self.store_type.dim)
        bad = ~storable(features, self.store_type)
        if bad.any():
            raise StoreError(
                f"{self.path}: {int(bad.sum())} of {len(bad)} feature vectors hold numbers that are not finite as "
                f"{self.store_type.dtype}; nothing of this batch was added; check the backbone and its precision",
                [f"content {text}" for text in digests_to_hex(digests[bad])],
            )
        fresh = self.fresh(digests)
        if fresh.any():
            kept, vectors = digests[fresh], np.ascontiguousarray(features[fresh], self.store_type.dtype)
            self._waiting.append((kept, vectors))
            self._new.update(digest_keys(kept).tolist())
        if self.due:
            self.commit()
        return int(fresh.sum())

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        waiting = sum(vectors.nbytes for _, vectors in self._waiting)
        return waiting >= GROUP_BYTES or time.monotonic() - self._last_commit >= GROUP_SECONDS

    def commit(self) -> None:
        """Make everything appended so far safe from a kill and a power loss."""
        self._require_open()
        self._last_commit = time.monotonic()
        if not self._waiting:
            return
        content, vectors = zip(*self._waiting, strict=True)
        digests = np.concatenate(content)
        digest, parts = compose("segment", self.store_type, len(digests), {"content": digests}, lambda: vectors)
        path = self.path / JOURNAL / f"{self._next_group:08d}.h5"
        with explained(self.path):
            _write(self.path, parts, path)
        self._next_group += 1
        self._waiting = []
        self._sources.append(FileRows.all(open_segment(path, self.store_type, digest)))

    def compact(self) -> None:
        """Publish everything appended as the next snapshot and clear the journal."""
        self._finish([FileRows.all(file) for file in self._segments], keep=2)

    def rewrite(self, wanted: Callable[[StoreFile], NDArray[np.bool_]], set_aside: bool = False) -> None:
        """Publish a state that has only the rows `wanted` says yes to, and remove every older state.

        `wanted` : opened segment -> bool of shape (its rows,); `set_aside` keeps what is replaced in `quarantine`.
        """
        self._finish([FileRows(file, np.flatnonzero(wanted(file))) for file in self._segments], 1, set_aside)

    def _finish(self, kept: Sequence[FileRows], keep: int, set_aside: bool = False) -> None:
        self.commit()
        changed = [each.file.path for each in kept if not each.is_whole]
        with explained(self.path):
            if changed or self._sources:
                self._replace(kept)
            for path in changed if set_aside else ():
                _set_aside(self.path, path)
            _sweep(self.path, self._snapshot, keep)

    def _replace(self, kept: Sequence[FileRows]) -> None:
        """Publish the next state, of the rows that are kept and of the journal.

        Segments that are kept as a whole stay as they are, but for small ones when too many have piled up.
        """
        small = [each for each in kept if each.is_whole and each.file.size < SMALL_BYTES]
        merged = small if self._sources and len(small) >= MAX_SMALL else []
        stays = [each.file for each in kept if each.is_whole and each not in merged]
        merged = [*merged, *(each for each in kept if not each.is_whole), *self._sources]
        segments = [*stays, *_write_segments(self.path, self.store_type, merged)]
        generation = self._snapshot.generation + 1
        self._publish(generation, self._snapshot.digest, self._snapshot.probe, segments)
        if self._sources:
            self._clear_journal()
            self._sources, self._new, self._next_group = [], set(), 1
        self._snapshot, self._segments = open_snapshot(snapshot_path(self.path, generation)), segments

    def _publish(
        self, generation: int, parent: str, probe: NDArray[np.float32] | None, segments: Sequence[StoreFile] = ()
    ) -> None:
        """Write a snapshot; it counts from the moment its name appears. `probe` : float32 of shape (k, dim)."""
        names = bytes.fromhex("".join(file.digest for file in segments))
        arrays: dict[str, NDArray[Any]] = {
            "segment_digest": np.frombuffer(names, np.uint8).reshape(-1, 32),
            "segment_rows": np.array([len(file.bulk) for file in segments], "<u8"),
            "segment_bytes": np.array([file.size for file in segments], "<u8"),
            **origin(self.identity, probe, self.store_type.dim),
        }
        lines = Table.of([file.arrays["content"] for file in segments]).lines
        others: dict[str, Any] = {"generation": generation, "parent": parent}
        _, parts = compose("snapshot", self.store_type, lines.shape[1], arrays, lambda: [lines], **others)
        scratch = files.write_temporary(self.path / TEMPORARY, parts)
        try:
            files.publish(scratch, snapshot_path(self.path, generation))
        except FileExistsError:
            raise StoreError(
                f"{self.path}: another writer has published generation {generation} meanwhile, so locks do not work here; "
                "make sure that there is one writer, and run again: nothing committed is lost"
            ) from None

    def _clear_journal(self) -> None:
        for path in groups(self.path):
            files.remove(path)

    def close(self) -> None:
        """Give up the lock; what was appended but not committed is lost. A forked child has none to give up."""
        if self._lock >= 0 and self._process == os.getpid():
            files.close_alone(self._lock)
            self._lock = -1

    def _require_open(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError("a forked child must not write to its parent's store; open a store of its own")
        if self._lock < 0:
            raise RuntimeError("the store is closed")

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.compact()
        finally:
            self.close()
