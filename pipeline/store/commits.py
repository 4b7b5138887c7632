"""What a writer puts on disk, and what it finds there: groups of the journal, segments, snapshots.

A run commits rows as groups of the journal, one file each, in order; a group is there for good once its name is there. Compaction
makes segments of them, and of their places the table of the next snapshot; then what nobody needs any more goes. A run that was
killed leaves its journal to the next one. Damaged files are set aside: nothing that could be of use is destroyed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, canonical_json
from pipeline.store.format import JOURNAL, QUARANTINE, SEGMENTS, TEMPORARY, Chunks, Composed, StoreType, compose
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.reader import FeatureStore, generations, snapshot_path
from pipeline.store.table import SegmentEntry, open_segment, sorted_table

log = logging.getLogger(__name__)

SEGMENT_BYTES = 1 << 30
"""Most bytes of features in one segment."""
SMALL_BYTES = SEGMENT_BYTES // 16
MAX_SMALL = 16
"""As many segments below `SMALL_BYTES` may pile up before a run merges them."""
COPY_BYTES = 4 << 20


# ---- the journal


def compose_segment(store_type: StoreType, content: Digests, chunks: Chunks) -> Composed:
    """Lay out a segment, or a group of the journal: n contents, uint64 of shape (n, 2), and in their order the features."""
    rows = len(content)
    arrays = {"content": np.ascontiguousarray(content, "<u8").reshape(rows, 2)}
    bulk = (store_type.dtype, (rows, store_type.dim))
    return compose("segment", store_type.attributes(rows), arrays, bulk, chunks)


def groups(store: Path) -> list[Path]:
    """Return the files of the journal in the order they were committed."""
    try:
        return sorted(path for path in (store / JOURNAL).iterdir() if re.fullmatch(r"[0-9]{8}\.h5", path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def commit_group(store: Path, number: int, composed: Composed) -> Path:
    """Write one group; when this returns, a power loss cannot take it away."""
    path = store / JOURNAL / f"{number:08d}.h5"
    files.rename(files.write_temporary(store / TEMPORARY, composed.parts()), path)
    return path


def clear_journal(store: Path) -> None:
    """Remove all groups; call it when a snapshot has their rows."""
    for path in groups(store):
        files.remove(path)


def whole(store: Path, store_type: StoreType, paths: Iterable[Path]) -> list[StoreFile]:
    """Open groups or segments of a store, in order; one that is damaged in any place is set aside with a warning."""
    found = []
    for path in paths:
        try:
            file = open_segment(path, store_type)
            file.require_whole()
            found.append(file)
        except StoreError as error:
            log.warning("%s; set aside, its images will be embedded again", error)
            set_aside(store, path)
    return found


def unnamed(store: Path, snapshot: FeatureStore) -> list[Path]:
    """Return the segments that a snapshot does not name: where a newer one was damaged, those of that."""
    named = {entry.path(store) for entry in snapshot.segments}
    return sorted({*(store / SEGMENTS).glob("*.h5")} - named)


def set_aside_damaged_snapshots(store: Path) -> bool:
    """Move snapshots newer than the newest valid one away, so that the next number is free; True when there were any."""
    damaged = False
    for generation in generations(store):
        path = snapshot_path(store, generation)
        try:
            open_file(path, "snapshot").require_whole()
            break
        except StoreError as error:
            log.warning("%s; set aside", error)
            set_aside(store, path)
            damaged = True
    return damaged


def set_aside(store: Path, path: Path) -> None:
    """Move a damaged file into `quarantine`."""
    folder = store / QUARANTINE
    files.make_folder(folder)
    target = folder / path.name
    for attempt in range(1, 1000):
        if not target.exists():
            break
        target = folder / f"{path.name}.{attempt}"
    files.SYSTEM["rename"](path, target)
    files.sync_folder(folder)
    files.sync_folder(path.parent)


# ---- compaction


@dataclass(frozen=True)
class Rows:
    """Rows of one opened file, int64 of shape (n,), that belong to the store's next state, in the order they have there."""

    file: StoreFile
    rows: NDArray[np.int64]

    @property
    def content(self) -> Digests:
        """Their digests, uint64 of shape (n, 2)."""
        content: Digests = self.file.arrays["content"][self.rows]
        return content


def write_segments(store: Path, store_type: StoreType, sources: Sequence[Rows]) -> list[SegmentEntry]:
    """Write rows in order into as few segments as allowed; every block is checked as it is copied."""
    if not sources:
        return []
    content = np.concatenate([source.content for source in sources])
    entries = []
    step = max(1, SEGMENT_BYTES // store_type.row_bytes)
    for start in range(0, len(content), step):
        part = content[start : start + step]
        stop = start + len(part)
        composed = compose_segment(store_type, part, lambda start=start, stop=stop: _chunks(sources, start, stop))  # type: ignore[misc]
        entry = SegmentEntry(composed.digest, len(part), composed.size)
        files.rename(files.write_temporary(store / TEMPORARY, composed.parts()), entry.path(store))
        entries.append(entry)
    return entries


def _chunks(sources: Sequence[Rows], start: int, stop: int) -> Iterator[NDArray[Any]]:
    """Yield the features of rows `start` to `stop` of some sources, (k, dim) at a time, a few megabytes, checked."""
    for source in sources:
        rows = source.rows[max(0, start) : max(0, stop)]
        start, stop = start - len(source.rows), stop - len(source.rows)
        for part in pieces(rows, source.file.store_type):
            source.file.check_items(part, source.file.bulk.shape[1])
            yield source.file.bulk[part]


def pieces(rows: NDArray[np.int64], store_type: StoreType) -> Iterator[NDArray[np.int64]]:
    """Yield rows, int64 of shape (n,), a few megabytes of their vectors at a time: int64 of shape (k,)."""
    step = max(1, COPY_BYTES // store_type.row_bytes)
    return (rows[first : first + step] for first in range(0, len(rows), step))


def link_segment(store: Path, source: Rows) -> SegmentEntry | None:
    """Give a large segment of another store, which is wanted as a whole, a second name here; None where it is to be copied."""
    file = source.file
    if file.kind != "segment" or file.size < SMALL_BYTES or len(source.rows) < len(file.bulk):
        return None
    entry = SegmentEntry(file.digest, len(file.bulk), file.size)
    try:
        files.SYSTEM["link"](file.path, entry.path(store))
        files.sync_folder(entry.path(store).parent)
    except FileExistsError:  # of a run before that was killed
        pass
    except OSError:  # another file system, or one that has no links
        return None
    return entry


def next_table(before: FeatureStore, entries: Mapping[SegmentEntry, StoreFile]) -> NDArray[np.uint64]:
    """Return the sorted table of the next snapshot, of some opened segments in order; uint64 of shape (4, n).

    What stays is taken from the table before, which is sorted already, so that only what is new has to be put in its place.
    """
    old = {entry: number for number, entry in enumerate(before.segments)}
    renumber = np.full(len(before.segments), -1, np.int64)
    for number, entry in enumerate(entries):
        if entry in old:
            renumber[old[entry]] = number
    content, segment, row = before.table.all()
    if (segment >= len(renumber)).any() or (segment < 0).any():
        raise StoreError(
            f"{before.file.path}: not a valid feature store file: its table names segments that do not exist"
        )
    stays = renumber[segment] >= 0 if len(segment) else np.zeros(0, np.bool_)
    parts = [(content[stays], renumber[segment[stays]], row[stays])]
    for number, (entry, file) in enumerate(entries.items()):
        if entry not in old:
            parts.append((file.arrays["content"], np.full(entry.rows, number), np.arange(entry.rows)))
    contents, segments, rows = zip(*parts, strict=True)
    return sorted_table(np.concatenate(contents), np.concatenate(segments), np.concatenate(rows))


NO_PARENT = "0" * 64


def publish(
    store: Path,
    before: FeatureStore | None,
    identity: dict[str, Any],
    store_type: StoreType,
    segments: Sequence[SegmentEntry],
    probe: NDArray[np.float32] | None,
    lines: NDArray[np.uint64],
) -> None:
    """Write the snapshot that follows another one, or the first; it counts from the moment its name appears.

    `probe` are the probe vectors, float32 of shape (k, dim), and `lines` the table, uint64 of shape (4, n).
    """
    generation, parent = (1, NO_PARENT) if before is None else (before.generation + 1, before.digest)
    arrays = {
        "segment_digest": np.frombuffer(bytes.fromhex("".join(s.digest for s in segments)), np.uint8).reshape(-1, 32),
        "segment_rows": np.array([entry.rows for entry in segments], "<u8"),
        "segment_bytes": np.array([entry.bytes for entry in segments], "<u8"),
        "identity_json": np.frombuffer(canonical_json(identity).encode("ascii"), np.uint8),
        "canary": np.ascontiguousarray(np.zeros((0, store_type.dim)) if probe is None else probe, "<f4"),
    }
    attributes = {**store_type.attributes(lines.shape[1]), "generation": generation, "parent": parent}
    composed = compose("snapshot", attributes, arrays, ("<u8", lines.shape), lambda: [lines])
    scratch = files.write_temporary(store / TEMPORARY, composed.parts())
    try:
        files.publish(scratch, snapshot_path(store, generation))
    except FileExistsError:
        raise StoreError(
            f"{store}: another writer has published generation {generation} meanwhile, so locks do not work here; "
            "make sure that there is one writer, and run again: nothing committed is lost"
        ) from None


def sweep(store: Path, keep: int) -> None:
    """Remove snapshots but the newest `keep`, and segments that none of these names."""
    numbers = generations(store)
    for generation in numbers[keep:]:
        files.remove(snapshot_path(store, generation))
    named: set[str] = set()
    for generation in numbers[:keep]:
        try:
            file = open_file(snapshot_path(store, generation), "snapshot")
        except StoreError:
            return  # it cannot say what it needs, so nothing is removed
        named.update(digest.tobytes().hex() for digest in file.arrays["segment_digest"])
    for path in (store / SEGMENTS).iterdir():
        if path.suffix == ".h5" and path.stem not in named:
            files.remove(path)
