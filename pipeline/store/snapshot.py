"""The snapshot: a store's table of contents at one moment, immutable and numbered; the highest valid number counts.

It maps content digest -> segment and row. Its digest covers its table and the digests of all segments, so it names the
state of the whole store. The one before is kept, as a way back should the newest be damaged.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.io.digests import Digests, canonical_json, fingerprint
from pipeline.store.format import compose
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.segment import SegmentEntry, StoreType

log = logging.getLogger(__name__)

NO_PARENT = "0" * 64
MAX_IDENTITY_BYTES = 1 << 16
MAX_CANARY_ROWS = 1024


@dataclass(frozen=True)
class Table:
    """Content digests in order, and the place of each: four arrays of shape (n,), uint64, perhaps memory-mapped."""

    first: NDArray[np.uint64]
    second: NDArray[np.uint64]
    segment: NDArray[np.uint64]
    row: NDArray[np.uint64]
    check: Callable[[int, NDArray[Any]], None]
    """Called with the line (0 to 3) and the positions in it before these are used."""

    def find(self, digests: Digests) -> NDArray[np.int64]:
        """Return the position of each digest in the table, -1 where it has none; shape (k,)."""
        wanted = np.ascontiguousarray(digests, np.uint64).reshape(-1, 2)
        # In the order of the table, neighbours share pages: many times faster in a large one.
        order = np.argsort(wanted[:, 0], kind="stable")
        positions = np.empty(len(wanted), np.int64)
        positions[order] = self._find_sorted(wanted[order])
        return positions

    def _find_sorted(self, wanted: Digests) -> NDArray[np.int64]:
        size = len(self.first)
        if not size or not len(wanted):
            return np.full(len(wanted), -1, np.int64)
        everything = np.arange(size) if len(wanted) * 64 > size else None
        if everything is not None:
            self.check(0, everything)
            low = np.searchsorted(self.first, wanted[:, 0])
        else:
            low = self._bisect(0, wanted[:, 0], *self._near(wanted[:, 0]), before=True)
        # Two contents hardly ever share their first half, but a stranger's table may be all one number.
        inside = low < size
        at = np.minimum(low, size - 1)
        self.check(0, at)
        high = np.where(inside & (self.first[at] == wanted[:, 0]), low + 1, low)
        following = np.minimum(low + 1, size - 1)
        self.check(0, following)
        several = (low + 1 < size) & (self.first[following] == wanted[:, 0]) & (high > low)
        if several.any():
            top = np.full(int(several.sum()), size)
            high[several] = self._bisect(0, wanted[several, 0], low[several], top, before=False)
        place = low.astype(np.int64)
        if several.any():
            place[several] = self._bisect(1, wanted[several, 1], low[several], high[several], before=True)
        at = np.minimum(place, size - 1)
        self.check(1, at)
        found = (place < high) & (self.second[at] == wanted[:, 1])
        return np.where(found, place, -1)

    def _near(self, wanted: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ranges that hold the place of each value: narrow, because digests are spread evenly; else everything."""
        size = len(self.first)
        guess = (wanted.astype(np.float64) / 2.0**64 * size).astype(np.int64)
        width = 2 * int(size**0.5) + 1  # four standard deviations of a value's place in the middle of the table
        low, high = np.maximum(guess - width, 0), np.minimum(guess + width, size)
        for end in (np.maximum(low - 1, 0), np.minimum(high, size - 1)):
            self.check(0, end)
        wrong = (low > 0) & (self.first[np.maximum(low - 1, 0)] >= wanted)
        low[wrong] = 0
        wrong = (high < size) & (self.first[np.minimum(high, size - 1)] < wanted)
        high[wrong] = size
        return low, high

    def _bisect(
        self, line: int, wanted: NDArray[np.uint64], low: NDArray[Any], high: NDArray[Any], before: bool
    ) -> NDArray[np.int64]:
        """Binary search of many values at once in ranges of one line, touching only the pages on the way."""
        column = (self.first, self.second)[line]
        low, high = low.astype(np.int64), high.astype(np.int64)
        while (searching := low < high).any():
            middle = (low[searching] + high[searching]) // 2
            self.check(line, middle)
            value = column[middle]
            up = value < wanted[searching] if before else value <= wanted[searching]
            low[searching] = np.where(up, middle + 1, low[searching])
            high[searching] = np.where(up, high[searching], middle)
        return low

    def place(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return segment number and row of the given positions."""
        self.check(2, positions)
        self.check(3, positions)
        return self.segment[positions].astype(np.int64), self.row[positions].astype(np.int64)

    def all(self) -> tuple[Digests, NDArray[np.int64], NDArray[np.int64]]:
        """Return every digest, shape (n, 2), with its segment number and row."""
        everything = np.arange(len(self.first))
        self.check(0, everything)
        self.check(1, everything)
        return np.stack([self.first, self.second], axis=1), *self.place(everything)


def table_of(lines: NDArray[np.uint64], check: Callable[[int, NDArray[Any]], None]) -> Table:
    """Make a table of its four lines, shape (4, n)."""
    return Table(lines[0], lines[1], lines[2], lines[3], check)


def sorted_table(content: Digests, segment: NDArray[Any], row: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the four lines of a table sorted by content, shape (4, n)."""
    # By the first half alone, which is as good as always enough; a stable sort merges parts that are sorted already.
    order = np.argsort(content[:, 0], kind="stable")
    first = content[order, 0]
    if (first[1:] == first[:-1]).any():
        order = np.lexsort((content[:, 1], content[:, 0]))
    lines = (content[:, 0], content[:, 1], segment, row)
    return np.stack([np.asarray(line)[order].astype("<u8") for line in lines])


@dataclass(frozen=True)
class Snapshot:
    """An opened snapshot."""

    path: Path
    generation: int
    digest: str
    parent: str
    identity: dict[str, Any]
    store_type: StoreType
    segments: tuple[SegmentEntry, ...]
    canary: NDArray[np.float32]
    table: Table
    file: StoreFile

    @property
    def rows(self) -> int:
        """Number of contents that have a feature vector."""
        return len(self.table.first)


def snapshot_path(store: Path, generation: int) -> Path:
    """Where the snapshot of a generation is."""
    return store / f"snapshot-{generation:08d}.h5"


def generations(store: Path) -> list[int]:
    """Return the generations that have a file, newest first."""
    try:
        names = [entry.name for entry in store.iterdir()]
    except NotADirectoryError:
        return []
    found = [re.fullmatch(r"snapshot-([0-9]{8})\.h5", name) for name in names]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def open_snapshot(path: Path) -> Snapshot:
    """Open one snapshot and check everything about it but its table, which is checked block by block as it is used."""
    file = open_file(path, "snapshot")
    identity = read_identity(file)
    if path.name != snapshot_path(path.parent, file.number("generation")).name:
        raise StoreError(f"{path}: is of generation {file.number('generation')}; it was renamed")
    arrays = file.arrays
    rows, sizes = arrays["segment_rows"], arrays["segment_bytes"]
    names = [digest.tobytes().hex() for digest in arrays["segment_digest"]]
    if len(set(names)) != len(names) or len(arrays["canary"]) > MAX_CANARY_ROWS:
        raise StoreError(f"{path}: not a valid feature store file: a segment is named twice, or too many canary rows")
    segments = tuple(SegmentEntry(name, int(r), int(b)) for name, r, b in zip(names, rows, sizes, strict=True))
    store_type = StoreType(file.text("identity"), file.number("dim"), file.text("dtype"))
    count = file.number("rows")

    def check(line: int, positions: NDArray[Any]) -> None:
        file.check_items(positions + line * count)

    table = table_of(file.bulk, check)
    parent = file.text("parent")
    generation = file.number("generation")
    return Snapshot(
        path, generation, file.digest, parent, identity, store_type, segments, arrays["canary"], table, file
    )


def read_identity(file: StoreFile) -> dict[str, Any]:
    """Return the identity that a file carries, checked against its fingerprint."""
    raw = file.arrays["identity_json"].tobytes()
    try:
        if len(raw) > MAX_IDENTITY_BYTES:
            raise ValueError("too long")
        identity = json.loads(raw)
        if not isinstance(identity, dict) or fingerprint(identity) != file.text("identity"):
            raise ValueError("its digest is another")
    except (ValueError, RecursionError) as error:
        raise StoreError(
            f"{file.path}: not a valid feature store file: its identity cannot be read ({error})"
        ) from None
    return identity


def newest_snapshot(store: Path) -> Snapshot:
    """Open the newest valid snapshot; a damaged one is passed over with a warning.

    Raises
    ------
    StoreError
        When there is no store, or none of its snapshots is valid.
    """
    problems: list[str] = []
    for _ in range(10):
        try:
            found = generations(store)
        except FileNotFoundError:
            found = []
        if not found:
            raise StoreError(f"{store}: there is no feature store; run 'manyheads features' first")
        problems = []
        for generation in found:
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
    raise StoreError(f"{store}: no valid snapshot; delete the store and run 'manyheads features' again", problems)


def compose_and_publish(
    store: Path,
    temporary: Path,
    generation: int,
    parent: str,
    identity: dict[str, Any],
    store_type: StoreType,
    segments: Sequence[SegmentEntry],
    canary: NDArray[np.float32],
    lines: NDArray[np.uint64],
) -> None:
    """Write the next snapshot; it counts from the moment its name appears."""
    arrays = {
        "segment_digest": np.frombuffer(bytes.fromhex("".join(s.digest for s in segments)), np.uint8).reshape(-1, 32),
        "segment_rows": np.array([entry.rows for entry in segments], "<u8"),
        "segment_bytes": np.array([entry.bytes for entry in segments], "<u8"),
        "identity_json": np.frombuffer(canonical_json(identity).encode("ascii"), np.uint8),
        "canary": np.ascontiguousarray(canary, "<f4"),
    }
    attributes = {**store_type.attributes(lines.shape[1]), "generation": generation, "parent": parent}
    composed = compose("snapshot", attributes, arrays, ("<u8", lines.shape), lambda: [lines])
    scratch = files.write_temporary(temporary, composed.parts())
    try:
        files.publish(scratch, snapshot_path(store, generation))
    except FileExistsError:
        raise StoreError(
            f"{store}: another writer has published generation {generation} meanwhile, so locks do not work here; "
            "make sure that there is one writer, and run again: nothing committed is lost"
        ) from None
