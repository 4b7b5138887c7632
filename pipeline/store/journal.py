"""The journal: groups of rows that a run has committed and not compacted yet, one file each, in order.

A group is there for good once its name is there. A run that was killed leaves its journal, and the next run takes it over. Before
that one adds anything, damaged files are set aside: nothing that could be of use is destroyed.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.store.format import JOURNAL, QUARANTINE, SEGMENTS, TEMPORARY, Composed, StoreType
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.reader import FeatureStore, generations, snapshot_path
from pipeline.store.table import open_segment

log = logging.getLogger(__name__)


def groups(store: Path) -> list[Path]:
    """Return the files of the journal in the order they were committed."""
    try:
        return sorted(path for path in (store / JOURNAL).iterdir() if re.fullmatch(r"[0-9]{8}\.h5", path.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def commit(store: Path, number: int, composed: Composed) -> Path:
    """Write one group; when this returns, a power loss cannot take it away."""
    path = store / JOURNAL / f"{number:08d}.h5"
    files.rename(files.write_temporary(store / TEMPORARY, composed.parts()), path)
    return path


def clear(store: Path) -> None:
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
