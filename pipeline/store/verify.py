"""Verify: is everything there, and is every byte what was written? Names the images whose features are damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StoreError
from pipeline.io.digests import Digests
from pipeline.store import journal
from pipeline.store.lock import LOCK, holder
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.reader import (
    ATTEMPTS,
    FeatureStore,
    generations,
    no_valid_snapshot,
    open_snapshot,
    require_generations,
    snapshot_path,
)
from pipeline.store.segment import SEGMENTS, TEMPORARY, damaged_rows, open_entry, open_segment

KNOWN_FOLDERS = {SEGMENTS, journal.JOURNAL, journal.QUARANTINE, TEMPORARY}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, what was found, and how many features of the newest snapshot it costs."""

    file: str
    found: str
    rows: int


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found."""

    full: bool
    generation: int
    rows: int
    segments: int
    bytes_read: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """Harmless: leftovers that the next run takes over or removes."""
    damaged: Digests
    """Contents whose features cannot be used, shape (n, 2); `repair` forgets these, so that they are embedded again."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: str | Path, full: bool = False) -> VerifyReport:
    """Check a store or a packed file: quick checks every file's head, size and structure; full reads every byte.

    Raises
    ------
    StoreError
        When there is no store, or no valid snapshot to start from.
    """
    path = Path(path)
    if path.is_file():
        return _verify_pack(path, full)
    for _ in range(ATTEMPTS):
        numbers = require_generations(path)
        try:
            report = _verify_once(path, full, numbers)
        except FileNotFoundError:
            continue  # a writer has removed it meanwhile, and published a newer state
        if report.ok or generations(path) == numbers:
            return report
    raise StoreError(
        f"{path}: changes faster than it can be checked; run again when {holder(path) or 'its writer'} has ended"
    )


def _verify_once(path: Path, full: bool, numbers: Sequence[int]) -> VerifyReport:
    problems: list[Problem] = []
    snapshots: list[FeatureStore] = []
    for generation in numbers:
        try:
            snapshot = open_snapshot(snapshot_path(path, generation))
            if full:
                _check_table(snapshot)
            snapshots.append(snapshot)
        except StoreError as error:
            problems.append(_problem(path, snapshot_path(path, generation), error, 0))
    if not snapshots:
        raise no_valid_snapshot(path, [f"{problem.file}: {problem.found}" for problem in problems])
    newest = snapshots[0]
    damaged, bytes_read = _check_segments(path, newest, full, problems)
    _check_what_else(path, snapshots, full, problems)
    notes = tuple(_leftovers(path, snapshots))
    bytes_read += sum(snapshot.file.size for snapshot in snapshots)
    rows, count = newest.rows, len(newest.segments)
    return VerifyReport(full, newest.generation, rows, count, bytes_read, tuple(problems), notes, damaged)


def _problem(store: Path, path: Path, error: StoreError, rows: int) -> Problem:
    found = error.message.removeprefix(f"{path}: ")
    return Problem(str(path.relative_to(store)), found, rows)


def _check_table(snapshot: FeatureStore) -> None:
    """Check every block of the table, its order, and that it names only rows that exist."""
    snapshot.file.require_whole()
    first, second, segment, row = snapshot.table.lines
    ordered = (first[:-1] < first[1:]) | ((first[:-1] == first[1:]) & (second[:-1] < second[1:]))
    if not ordered.all():
        raise StoreError(f"{snapshot.file.path}: its table is not sorted, or names a content twice")
    sizes = np.array([entry.rows for entry in snapshot.segments], np.uint64)
    if (segment >= len(sizes)).any() or (row >= sizes[segment.astype(np.intp)]).any():
        raise StoreError(f"{snapshot.file.path}: its table names rows that do not exist")


def _check_segments(path: Path, snapshot: FeatureStore, full: bool, problems: list[Problem]) -> tuple[Digests, int]:
    """Check the newest snapshot's segments; return the contents whose features cannot be used, and the bytes read."""
    if snapshot.file.bad_blocks():
        problems.append(Problem(snapshot.file.path.name, "its table is damaged; run again with --full", 0))
        return np.zeros((0, 2), np.uint64), 0
    content, segments, rows = snapshot.table.all()
    bad = np.zeros(len(content), np.bool_)
    bytes_read = 0
    for number, entry in enumerate(snapshot.segments):
        mine = np.flatnonzero(segments == number)
        try:
            file = open_entry(path, entry, snapshot.store_type)
            bytes_read += file.size if full else len(file.arrays["content"]) * 16
            if not np.array_equal(file.arrays["content"][rows[mine]], content[mine]):
                raise StoreError(f"{file.path}: does not hold the images that the snapshot says")
        except StoreError as error:
            bad[mine] = True
            problems.append(_problem(path, entry.path(path), error, len(mine)))
            continue
        wrong = damaged_rows(file) if full else np.zeros(0, np.intp)
        if len(wrong):
            here = mine[np.isin(rows[mine], wrong)]
            bad[here] = True
            text = f"{len(wrong)} of its {entry.rows} features are damaged or not finite"
            problems.append(Problem(str(entry.path(path).relative_to(path)), text, len(here)))
    return content[bad], bytes_read


def _check_what_else(path: Path, snapshots: list[FeatureStore], full: bool, problems: list[Problem]) -> None:
    """Check what the newest snapshot does not need: damage costs the way back, or rows of a run that has not ended."""
    newest = snapshots[0]
    older = dict.fromkeys(entry for snapshot in snapshots[1:] for entry in snapshot.segments)
    checks: list[tuple[Path, Callable[[], StoreFile]]] = [
        (entry.path(path), partial(open_entry, path, entry, newest.store_type))
        for entry in older
        if entry not in newest.segments
    ]
    checks += [(group, partial(open_segment, group, newest.store_type)) for group in journal.groups(path)]
    for place, opened in checks:
        try:
            file = opened()
            if full and len(damaged_rows(file)):
                raise StoreError(f"{place}: is damaged; only the previous snapshot or the next run needs it")
        except FileNotFoundError:
            continue  # sealed meanwhile
        except StoreError as error:
            problems.append(_problem(path, place, error, 0))


def _leftovers(path: Path, snapshots: list[FeatureStore]) -> Iterator[str]:
    if (writer := holder(path)) is not None:
        yield f"being written by {writer}"
        return  # what lies there besides is its work
    named = {entry.digest for snapshot in snapshots for entry in snapshot.segments}
    for segment in sorted((path / SEGMENTS).iterdir()):
        if segment.stem not in named:
            yield f"{SEGMENTS}/{segment.name}: no snapshot names it; the next run removes it"
    groups = journal.groups(path)
    if groups:
        yield f"{journal.JOURNAL}/: {len(groups)} group(s) of a run that has not ended; the next run takes them over"
    for folder, fate in ((TEMPORARY, "the next run removes them"), (journal.QUARANTINE, "delete them when you like")):
        count = len(list((path / folder).iterdir())) if (path / folder).is_dir() else 0
        if count:
            yield f"{folder}/: {count} file(s); {fate}"
    known = {LOCK, *KNOWN_FOLDERS, *(snapshot_path(path, number).name for number in generations(path))}
    for entry in sorted(path.iterdir()):
        if entry.name not in known:
            yield f"{entry.name}: not a file of the store"


def _verify_pack(path: Path, full: bool) -> VerifyReport:
    file = open_file(path, "pack")
    content = file.arrays["content"]
    wrong: NDArray[np.intp] = damaged_rows(file) if full else np.zeros(0, np.intp)
    problems = []
    if len(wrong):
        problems.append(Problem(path.name, f"{len(wrong)} of its features are damaged or not finite", len(wrong)))
    if len(np.unique(content, axis=0)) != len(content):
        problems.append(Problem(path.name, "it names a content twice", 0))
    return VerifyReport(full, 0, len(content), 1, file.size, tuple(problems), (), content[wrong])
