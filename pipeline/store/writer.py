"""`StoreWriter`: the one process that adds rows. Append, commit groups to the journal, compact into a snapshot.

    append -> memory -> commit: one synced journal file every 4 MB or 10 s -> compact: segments, then the next snapshot

A kill at any moment leaves the last snapshot valid and the journal for the next run to take over. The order of the rows is
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
from pipeline.store import commits, lock
from pipeline.store.commits import Rows, compose_segment, next_table, pieces, publish, sweep, write_segments
from pipeline.store.format import JOURNAL, QUARANTINE, SEGMENTS, TEMPORARY, StoreType
from pipeline.store.identity import check_probe, differences
from pipeline.store.lock import explained
from pipeline.store.opener import StoreFile
from pipeline.store.reader import FeatureStore, generations, newest_snapshot, no_valid_snapshot
from pipeline.store.table import SegmentEntry, open_entry, open_segment

log = logging.getLogger(__name__)

GROUP_BYTES = 4 << 20
GROUP_SECONDS = 10.0


def storable(features: NDArray[Any], store_type: StoreType) -> NDArray[np.bool_]:
    """Say for each row, float of shape (n, dim), whether all its numbers are finite as they would be stored: bool of shape (n,)."""
    with np.errstate(over="ignore"):
        finite: NDArray[np.bool_] = np.isfinite(np.asarray(features).astype(store_type.dtype)).all(axis=1)
    return finite


class StoreWriter:
    """A store opened for writing. Use `StoreWriter.open`, and `with`: leaving normally compacts, an error only unlocks."""

    def __init__(self, path: Path, identity: dict[str, Any], store_type: StoreType, held: int) -> None:
        self.path = path
        self.identity = identity
        self.store_type = store_type
        self._lock = held
        self._process = os.getpid()
        self._snapshot: FeatureStore
        self._entries: dict[SegmentEntry, StoreFile] = {}
        """The segments of the snapshot in order, opened and checked."""
        self._sources: list[Rows] = []
        """Rows of the journal, in the order they were appended."""
        self._new: set[bytes] = set()
        self._waiting: list[tuple[Digests, NDArray[Any]]] = []
        self._waiting_bytes = 0
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

        Raises
        ------
        StoreError
            When another writer has the lock, the identity, dim or dtype differ (shows both sides), or the probe vectors do.
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
            held = lock.acquire(path, patience)
            writer = StoreWriter(path, identity, store_type, held)
            try:
                writer._begin(None if probe is None else np.asarray(probe, np.float32))
            except BaseException:
                files.close_alone(held)
                raise
        return writer

    def _begin(self, probe: NDArray[np.float32] | None) -> None:
        """Bring the folder into a known state: no partial files, a valid newest snapshot, the journal taken over.

        `probe` : the probe vectors, float32 of shape (k, dim).
        """
        for leftover in (self.path / TEMPORARY).iterdir():
            files.remove(leftover)
        if not generations(self.path):
            publish(self.path, None, self.identity, self.store_type, [], probe, np.zeros((4, 0), "<u8"))
        fell_back = commits.set_aside_damaged_snapshots(self.path)
        if not generations(self.path):
            raise no_valid_snapshot(self.path)
        self._snapshot = newest_snapshot(self.path)
        self._require_same(self.identity, self.store_type)
        if probe is not None and len(self._snapshot.probe):
            check_probe(self._snapshot.probe, probe, str(self.path))
        found = commits.unnamed(self.path, self._snapshot) if fell_back else []
        opened = commits.whole(self.path, self.store_type, [*found, *commits.groups(self.path)])
        self._open_segments()
        if len(self._entries) < len(self._snapshot.segments):
            self._publish(list(self._entries))
        self._take_over(opened)
        if not self._sources:
            # A kill fell between publishing and clearing: the snapshot has all that the journal has.
            commits.clear_journal(self.path)
        self._next_group = max((int(path.stem) for path in commits.groups(self.path)), default=0) + 1

    def _require_same(self, identity: Mapping[str, Any], wanted: StoreType) -> None:
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

    def _open_segments(self) -> None:
        """Open the snapshot's segments; of one that is missing or was cut the rows count as missing from now on."""
        for entry in self._snapshot.segments:
            try:
                self._entries[entry] = open_entry(self.path, entry, self.store_type)
            except StoreError as error:
                log.warning("%s; its %d images will be embedded again", error, entry.rows)
                if entry.path(self.path).exists():
                    commits.set_aside(self.path, entry.path(self.path))

    def _take_over(self, opened: Sequence[StoreFile]) -> None:
        """Take over the rows of a run before that the snapshot does not have."""
        for file in opened:
            self._take(file, np.flatnonzero(self.fresh(file.arrays["content"])))
        if self._new:
            log.info("%s: taking over %d rows of a run that did not end", self.path, len(self._new))

    def _take(self, file: StoreFile, rows: NDArray[np.int64]) -> None:
        """Let some rows of an opened file, int64 of shape (k,), belong to the next state."""
        if len(rows):
            self._sources.append(Rows(file, rows))
            self._new.update(digest_keys(file.arrays["content"][rows]).tolist())

    def adopt(self, store: FeatureStore, content: Digests | None = None) -> int:
        """Add vectors of another store, of some contents, uint64 of shape (n, 2), or all; return how many were new.

        They are checked now, and copied or linked when this store is compacted; until then its files must stay. The probe vectors
        of both must agree.

        Raises
        ------
        StoreError
            When one is missing there, damaged, or not finite.
        """
        self.commit()
        self._require_same(store.identity, store.store_type)
        if len(store.probe) and len(self._snapshot.probe):
            check_probe(self._snapshot.probe, store.probe, str(store.path))
        content = store.table.in_file_order() if content is None else content
        content = content[self.fresh(content)]
        for file, rows in store.whereabouts(content):
            if not all(storable(file.bulk[part], self.store_type).all() for part in pieces(rows, self.store_type)):
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
            self._waiting_bytes += vectors.nbytes
            self._new.update(digest_keys(kept).tolist())
        if self.due:
            self.commit()
        return int(fresh.sum())

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return self._waiting_bytes >= GROUP_BYTES or time.monotonic() - self._last_commit >= GROUP_SECONDS

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
            path = commits.commit_group(self.path, self._next_group, composed)
        self._next_group += 1
        self._waiting, self._waiting_bytes = [], 0
        self._sources.append(Rows(open_segment(path, self.store_type, composed.digest), np.arange(len(content))))

    def compact(self) -> None:
        """Publish everything appended as the next snapshot and clear the journal."""
        self._finish(list(self._entries), keep=2)

    def rewrite(self, wanted: Callable[[StoreFile], NDArray[np.bool_]], set_aside: bool = False) -> None:
        """Publish a state that has only the rows `wanted` says yes to, and remove every older state.

        `wanted` : opened segment -> bool of shape (its rows,); `set_aside` keeps what is replaced in `quarantine`.
        """
        rows = {entry: np.flatnonzero(wanted(file)) for entry, file in self._entries.items()}
        changed = [entry for entry in rows if len(rows[entry]) < entry.rows]
        old = [Rows(self._entries[entry], rows[entry]) if entry in changed else entry for entry in rows]
        self._finish(old, keep=1, replaced=changed if set_aside else ())

    def _finish(self, old: Sequence[SegmentEntry | Rows], keep: int, replaced: Sequence[SegmentEntry] = ()) -> None:
        self.commit()
        with explained(self.path):
            if old != list(self._entries) or self._sources:
                self._publish(old)
            for entry in replaced:
                commits.set_aside(self.path, entry.path(self.path))
            sweep(self.path, keep)

    def _publish(self, old: Sequence[SegmentEntry | Rows]) -> None:
        """Write the segments of the next state, publish it, and clean up behind it.

        `old` : segments that stay as they are, and rows of segments that are written anew. Small ones are merged when too many
        have piled up.
        """
        kept = [item for item in old if isinstance(item, SegmentEntry)]
        small = [entry for entry in kept if entry.bytes < commits.SMALL_BYTES]
        if not self._sources or len(small) < commits.MAX_SMALL:
            small = []
        merged = [Rows(self._entries[entry], np.arange(entry.rows)) for entry in small]
        merged += [item for item in old if isinstance(item, Rows) and len(item.rows)]
        opened = {entry: self._entries[entry] for entry in kept if entry not in small}
        linked = [entry for source in self._sources if (entry := commits.link_segment(self.path, source))]
        digests = {entry.digest for entry in linked}
        copied = [source for source in self._sources if source.file.digest not in digests]
        for entry in [*linked, *write_segments(self.path, self.store_type, merged + copied)]:
            opened[entry] = self._entries.get(entry) or open_entry(self.path, entry, self.store_type)
        lines = next_table(self._snapshot, opened)
        publish(self.path, self._snapshot, self.identity, self.store_type, list(opened), self._snapshot.probe, lines)
        if self._sources:
            commits.clear_journal(self.path)
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
                self.compact()
        finally:
            self.close()
