"""The journal: groups of rows that a run has committed but not sealed yet, one file each, in order.

A group is there for good once its name is there. A run that was killed leaves its journal, and the next run adopts it.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.store.format import Composed, StoreType
from pipeline.store.opener import StoreFile
from pipeline.store.segment import TEMPORARY, open_segment

log = logging.getLogger(__name__)

JOURNAL = "journal"
QUARANTINE = "quarantine"


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


def adopt(store: Path, store_type: StoreType) -> list[StoreFile]:
    """Open the groups a killed run left, in order; one that is damaged in any place is set aside with a warning."""
    adopted = []
    for path in groups(store):
        try:
            file = open_segment(path, store_type)
            file.require_whole()
            adopted.append(file)
        except StoreError as error:
            log.warning("%s; set aside, its images will be embedded again", error)
            quarantine(store, path)
    return adopted


def clear(store: Path) -> None:
    """Remove all groups; call it when a snapshot has their rows."""
    for path in groups(store):
        files.remove(path)


def quarantine(store: Path, path: Path) -> None:
    """Move a damaged file out of the way without destroying it."""
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
