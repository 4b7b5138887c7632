"""What a run finds when it is not the first: leftovers of one that was killed, damaged files, a disk that refuses.

Before a writer adds anything, the folder is brought into a known state; nothing that could be of use is destroyed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.store import journal
from pipeline.store.format import StoreType
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.reader import FeatureStore, generations, snapshot_path
from pipeline.store.segment import SEGMENTS, open_segment

log = logging.getLogger(__name__)


@contextlib.contextmanager
def explained(store: Path) -> Iterator[None]:
    """Turn the file system's errors into one line that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = files.REMEDIES.get(error.errno or 0, "check the disk and its mount")
        raise StoreError(
            f"{store}: cannot be written: {reason}; all rows committed before are safe; {advice}, and run again"
        ) from error


def set_aside_damaged_snapshots(store: Path) -> bool:
    """Move snapshots newer than the newest valid one away, so that the next number is free; True when there were any."""
    damaged = False
    for generation in generations(store):
        path = snapshot_path(store, generation)
        try:
            open_file(path, "snapshot").require_whole()
        except StoreError as error:
            log.warning("%s; set aside", error)
            journal.quarantine(store, path)
            damaged = True
            continue
        break
    return damaged


def orphans(store: Path, store_type: StoreType, snapshot: FeatureStore) -> list[StoreFile]:
    """Open the segments that a valid snapshot does not name: those of a newer one that was damaged."""
    named = {entry.path(store) for entry in snapshot.segments}
    found = []
    for path in sorted({*(store / SEGMENTS).glob("*.h5")} - named):
        with contextlib.suppress(StoreError):
            file = open_segment(path, store_type, path.stem)
            file.require_whole()
            found.append(file)
    return found
