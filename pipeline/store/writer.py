"""`StoreWriter`: the one process that adds rows. Append, commit groups to the journal, seal into a snapshot.

    append -> memory -> commit: one synced journal file every 4 MB or 10 s -> seal: segments, then the next snapshot

A kill at any moment leaves the last snapshot valid and the journal for the next run to adopt. The order of the rows is
the order of appending, across kills, so a resumed run gives the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, digest_keys, digests_to_hex, fingerprint
from pipeline.store import journal, lock, recovery
from pipeline.store.format import StoreType
from pipeline.store.identity import check_canary, differences
from pipeline.store.opener import StoreFile
from pipeline.store.reader import FeatureStore, generations, newest_snapshot, no_valid_snapshot
from pipeline.store.recovery import explained
from pipeline.store.seal import Rows, compaction, next_table, publish, sweep, write_segments
from pipeline.store.segment import SEGMENTS, TEMPORARY, SegmentEntry, compose_segment, open_entry, open_segment

log = logging.getLogger(__name__)

GROUP_BYTES = 4 << 20
GROUP_SECONDS = 10.0

DTYPES = {"float32": "<f4", "float16": "<f2", "<f4": "<f4", "<f2": "<f2"}


class StoreWriter:
    """A store opened for writing. Use `StoreWriter.open`, and `with`: leaving normally seals, an error only unlocks."""

    def __init__(self, path: Path, identity: dict[str, Any], store_type: StoreType, held: int) -> None:
        self.path = path
        self.identity = identity
        self.store_type = store_type
        self._lock = held
        self._process = os.getpid()
        self._snapshot: FeatureStore
        self._entries: dict[SegmentEntry, StoreFile] = {}
        """The segments of the snapshot in order, opened and checked; without those that are lost."""
        self._sources: list[Rows] = []
        """Rows of the journal, in the order they were appended."""
        self._new: set[bytes] = set()
        self._waiting: list[tuple[Digests, NDArray[Any]]] = []
        self._waiting_bytes = 0
        self._last_commit = time.monotonic()
        self._next_group = 1
        self._canary: NDArray[np.float32] | None = None

    @staticmethod
    def open(
        path: str | Path,
        identity: Mapping[str, Any],
        dim: int,
        dtype: str = "float32",
        canary: NDArray[np.float32] | None = None,
    ) -> StoreWriter:
        """Create a store or open one for writing; adopts the journal of a killed run.

        `canary` : features of the built-in probe images, shape (k, dim), compared with those recorded at first.

        Raises
        ------
        StoreError
            When another writer has the lock, the identity, dim or dtype differ (shows both sides), or the canary does.
        """
        path, identity = Path(path), dict(identity)
        if dtype not in DTYPES:
            raise StoreError(f"dtype {dtype!r}: expected one of float32, float16")
        store_type = StoreType(fingerprint(identity), dim, DTYPES[dtype])
        with explained(path):
            for folder in (path / SEGMENTS, path / journal.JOURNAL, path / TEMPORARY, path / journal.QUARANTINE):
                # What a link leads to is not ours to clear.
                if folder.is_symlink():
                    raise StoreError(
                        f"{folder}: is a symbolic link, expected a folder of the store; nothing was changed"
                    )
            for folder in (path, path / SEGMENTS, path / journal.JOURNAL, path / TEMPORARY):
                files.make_folder(folder)
            held = lock.acquire(path)
            writer = StoreWriter(path, identity, store_type, held)
            try:
                writer._begin(None if canary is None else np.asarray(canary, np.float32))
            except BaseException:
                files.close_alone(held)
                raise
        return writer

    def _begin(self, canary: NDArray[np.float32] | None) -> None:
        """Bring the folder into a known state: no partial files, a valid newest snapshot, the journal adopted."""
        for leftover in (self.path / TEMPORARY).iterdir():
            files.remove(leftover)
        orphans = False
        if not generations(self.path):
            publish(self.path, None, self.identity, self.store_type, [], canary, np.zeros((4, 0), "<u8"))
        else:
            orphans = recovery.set_aside_damaged_snapshots(self.path)
            if not generations(self.path):
                raise no_valid_snapshot(self.path)
        self._snapshot = newest_snapshot(self.path)
        self._check_identity()
        stored = self._snapshot.canary
        if canary is not None and len(stored):
            check_canary(stored, canary, str(self.path))
        elif canary is not None and len(canary):
            self._canary = canary
        lost = self._drop_lost_segments()
        if orphans:
            self._adopt(recovery.orphans(self.path, self.store_type, self._snapshot))
        self._adopt(journal.adopt(self.path, self.store_type))
        if not self._sources:
            # A kill fell between publishing and clearing: the snapshot has all that the journal has.
            journal.clear(self.path)
        numbers = [int(path.stem) for path in journal.groups(self.path)]
        self._next_group = max(numbers, default=0) + 1
        if lost:
            self._publish_rows(list(self._entries), keep_journal=True)

    def _check_identity(self) -> None:
        snapshot, wanted = self._snapshot, self.store_type
        problems = differences(snapshot.identity, self.identity)
        found = snapshot.store_type
        if found.dim != wanted.dim:
            problems.append(f"dim: the store has {found.dim}, this run has {wanted.dim}")
        if found.dtype != wanted.dtype:
            problems.append(f"dtype: the store has {found.dtype}, this run has {wanted.dtype}")
        if problems:
            raise StoreError(
                f"{self.path}: its features were made differently and cannot be mixed with new ones; "
                "use another store, or delete this one",
                problems,
            )

    def _drop_lost_segments(self) -> bool:
        """Warn of segments that are missing or were cut; their rows count as missing from now on."""
        self._entries = {}
        for entry in self._snapshot.segments:
            try:
                self._entries[entry] = open_entry(self.path, entry, self.store_type)
            except StoreError as error:
                log.warning("%s; its %d images will be embedded again", error, entry.rows)
                if entry.path(self.path).exists():
                    journal.quarantine(self.path, entry.path(self.path))
        return len(self._entries) < len(self._snapshot.segments)

    def _adopt(self, opened: Sequence[StoreFile]) -> None:
        """Take over rows that the snapshot does not have."""
        for file in opened:
            content = file.arrays["content"]
            rows = np.flatnonzero(self._fresh(content))
            if len(rows):
                self._sources.append(Rows(file, rows))
                self._new.update(digest_keys(content[rows]).tolist())
        if self._new:
            log.info("%s: taking over %d rows of a run that did not end", self.path, len(self._new))

    def missing(self, digests: Digests) -> NDArray[np.bool_]:
        """Say for each of n digests, shape (n, 2), whether neither the store nor this run has its vector."""
        digests = np.ascontiguousarray(digests, np.uint64).reshape(-1, 2)
        positions = self._snapshot.table.find(digests)
        absent: NDArray[np.bool_] = positions < 0
        if len(self._entries) < len(self._snapshot.segments) and (~absent).any():
            segments, _ = self._snapshot.table.place(positions[~absent])
            there = [entry in self._entries for entry in self._snapshot.segments]
            absent[~absent] = ~np.isin(segments, np.flatnonzero(there))
        if self._new:
            fresh = [key not in self._new for key in digest_keys(digests).tolist()]
            absent &= np.array(fresh, np.bool_)
        return absent

    def _fresh(self, digests: Digests) -> NDArray[np.bool_]:
        """Like `missing`, but of equal digests only the first counts."""
        fresh = self.missing(digests)
        _, first = np.unique(np.asarray(digests).reshape(-1, 2), axis=0, return_index=True)
        fresh[np.setdiff1d(np.arange(len(fresh)), first)] = False
        return fresh

    def storable(self, features: NDArray[Any]) -> NDArray[np.bool_]:
        """Say for each row, shape (n, dim), whether all its numbers are finite as they would be stored."""
        with np.errstate(over="ignore"):
            stored = np.asarray(features).astype(self.store_type.dtype)
        finite: NDArray[np.bool_] = np.isfinite(stored).all(axis=1)
        return finite

    def append(self, digests: Digests, features: NDArray[Any]) -> int:
        """Add vectors, shape (n, dim), for n digests; those the store has already are passed over. Return how many were new.

        They are safe once a group is committed, which happens by itself every 4 MB or 10 s.

        Raises
        ------
        StoreError
            When a number is not finite, naming the contents; then nothing of this call was added. When the disk is full.
        """
        self._require_open()
        digests = np.ascontiguousarray(digests, np.uint64).reshape(-1, 2)
        features = np.asarray(features)
        if features.shape != (len(digests), self.store_type.dim):
            raise ValueError(
                f"features of shape {features.shape} for {len(digests)} digests of dim {self.store_type.dim}"
            )
        bad = ~self.storable(features)
        if bad.any():
            raise StoreError(
                f"{self.path}: {int(bad.sum())} of {len(bad)} feature vectors hold numbers that are not finite as "
                f"{self.store_type.dtype}; nothing of this batch was added; check the backbone and its precision",
                [f"content {text}" for text in digests_to_hex(digests[bad])],
            )
        fresh = self._fresh(digests)
        if fresh.any():
            kept, vectors = digests[fresh], np.ascontiguousarray(features[fresh], self.store_type.dtype)
            self._waiting.append((kept, vectors))
            self._waiting_bytes += vectors.nbytes
            self._new.update(digest_keys(kept).tolist())
        if self._waiting_bytes >= GROUP_BYTES or time.monotonic() - self._last_commit >= GROUP_SECONDS:
            self.commit()
        return int(fresh.sum())

    def commit(self) -> None:
        """Make everything appended so far safe from a kill and a power loss."""
        self._require_open()
        self._last_commit = time.monotonic()
        if not self._waiting:
            return
        content = np.concatenate([digests for digests, _ in self._waiting])
        vectors = [features for _, features in self._waiting]
        composed = compose_segment(self.store_type, content, lambda: vectors)
        with explained(self.path):
            path = journal.commit(self.path, self._next_group, composed)
        self._next_group += 1
        self._waiting, self._waiting_bytes = [], 0
        self._sources.append(Rows(open_segment(path, self.store_type, composed.digest), np.arange(len(content))))

    def seal(self) -> bool:
        """Publish everything appended as the next snapshot and clear the journal; False when there was nothing new."""
        self.commit()
        with explained(self.path):
            if self._sources or self._canary is not None:
                self._publish_rows(list(self._entries))
                return True
            sweep(self.path, keep=2)
        return False

    def rewrite(self, keep: Callable[[StoreFile], NDArray[np.bool_]], set_aside: bool = False) -> None:
        """Publish a state that has only the rows `keep` says yes to, and remove every older state.

        `keep` : opened segment -> one boolean per row; `set_aside` keeps what is replaced in `quarantine/`.
        """
        self.commit()
        old: list[SegmentEntry | Rows] = []
        changed = []
        for entry, file in self._entries.items():
            rows = np.flatnonzero(keep(file))
            if len(rows) == entry.rows:
                old.append(entry)
                continue
            changed.append(entry)
            if len(rows):
                old.append(Rows(file, rows))
        with explained(self.path):
            if changed or self._sources or self._canary is not None:
                self._publish_rows(old)
            for entry in changed if set_aside else []:
                journal.quarantine(self.path, entry.path(self.path))
            sweep(self.path, keep=1)

    def _publish_rows(self, old: Sequence[SegmentEntry | Rows], keep_journal: bool = False) -> None:
        """Write the segments of the next state, publish it, and clean up behind it.

        `old` : segments that stay as they are, and rows of segments that are written anew.
        """
        new = [] if keep_journal else list(self._sources)
        kept, rewritten = compaction([item for item in old if isinstance(item, SegmentEntry)], bool(new))
        merged = [Rows(self._entries[entry], np.arange(entry.rows)) for entry in rewritten]
        merged += [item for item in old if isinstance(item, Rows)]
        opened = {entry: self._entries[entry] for entry in kept}
        for entry in write_segments(self.path, self.store_type, merged + new):
            opened[entry] = self._entries.get(entry) or open_entry(self.path, entry, self.store_type)
        lines = next_table(self._snapshot, opened)
        canary = self._snapshot.canary if self._canary is None else self._canary
        publish(self.path, self._snapshot, self.identity, self.store_type, list(opened), canary, lines)
        self._canary = None
        if not keep_journal:
            journal.clear(self.path)
            self._sources, self._new, self._next_group = [], set(), 1
        self._snapshot = newest_snapshot(self.path)
        self._entries = opened
        sweep(self.path, keep=2)

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
                self.seal()
        finally:
            self.close()
