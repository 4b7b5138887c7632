"""What a run finds when it is not the first: leftovers of one that was killed, damaged files, a disk that refuses.

Before a writer adds anything, the folder is brought into a known state; nothing that could be of use is destroyed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.store import journal
from pipeline.store.opener import StoreFile, open_file
from pipeline.store.segment import SEGMENTS, StoreType, open_segment
from pipeline.store.snapshot import Snapshot, generations, snapshot_path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def explained(store: Path) -> Iterator[None]:
    """Turn the file system's errors into one line that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some of your quota",
            errno.EROFS: "choose an output folder that can be written to",
            errno.EACCES: "choose an output folder that can be written to",
            errno.EIO: "check the disk",
        }.get(error.errno or 0, "check the disk and its mount")
        raise StoreError(
            f"{store}: cannot be written: {reason}; all rows committed before are safe; {advice} and run again"
        ) from error


def set_aside_damaged_snapshots(store: Path) -> bool:
    """Move snapshots newer than the newest valid one away, so that the next number is free; True when there were any."""
    damaged = False
    for generation in generations(store):
        path = snapshot_path(store, generation)
        try:
            file = open_file(path, "snapshot")
            if bad := file.bad_blocks(file.all_blocks()):
                raise StoreError(f"{path}: {len(bad)} block(s) are damaged")
        except StoreError as error:
            log.warning("%s; set aside", error)
            journal.quarantine(store, path)
            damaged = True
            continue
        break
    return damaged


def orphans(store: Path, store_type: StoreType, snapshot: Snapshot) -> list[StoreFile]:
    """Open the segments that a valid snapshot does not name: those of a newer one that was damaged."""
    named = {entry.digest for entry in snapshot.segments}
    found = []
    for path in sorted((store / SEGMENTS).glob("*.h5")):
        if path.stem in named:
            continue
        with contextlib.suppress(StoreError):
            file = open_segment(path, store_type, path.stem)
            if not file.bad_blocks(file.all_blocks()):
                found.append(file)
    return found
