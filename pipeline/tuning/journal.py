"""The journal of a search: one JSON line per event, on disk before the search goes on.

The first line names the search by everything that determines its results. A journal of another search is set aside as
`.old`, so nothing measured is ever lost; a line torn by a kill is cut off. One process at a time has a journal: a lock
that dies with the process keeps others out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.digests import canonical_json, fingerprint
from pipeline.errors import HeadError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

FORMAT = "manyheads trials"
VERSION = 1


class Journal:
    """An open journal: the events of earlier runs, and a place for new ones."""

    def __init__(self, path: Path, descriptor: int, events: Sequence[Mapping[str, Any]]) -> None:
        self._path, self._descriptor = path, descriptor
        self.events = tuple(events)

    @staticmethod
    def open(path: Path, identity: Mapping[str, Any]) -> Journal:
        """Open the journal of the search that `identity` names, or begin it.

        Raises
        ------
        HeadError
            When the file cannot be written, or another process is writing it.
        """
        header = {"format": FORMAT, "version": VERSION, "digest": fingerprint(identity), "identity": identity}
        try:
            files.make_folder(path.parent)
            descriptor = _open_alone(path)
            events, length = _read(path, descriptor, header)
            if length is None:
                files.SYSTEM["rename"](path, path.with_name(path.name + ".old"))
                stale, descriptor = descriptor, _open_alone(path)
                files.SYSTEM["close"](stale)
            elif os.fstat(descriptor).st_size > length:
                files.SYSTEM["ftruncate"](descriptor, length)
        except OSError as error:
            raise _unwritable(path, error) from error
        journal = Journal(path, descriptor, events)
        if not length:
            journal.append([header])
        return journal

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Write events in one piece and wait until they are on disk.

        Raises
        ------
        HeadError
            When they cannot be written, for instance on a full disk.
        """
        data = "".join(canonical_json(event) + "\n" for event in events).encode("ascii")
        try:
            files.write_all(self._descriptor, data)
            files.sync(self._descriptor)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Close the file."""
        files.SYSTEM["close"](self._descriptor)


def _unwritable(path: Path, error: OSError) -> HeadError:
    return HeadError(
        f"{path}: the trials cannot be written down there ({error.strerror}); make room or choose another output folder, "
        "and run again: what is written is kept"
    )


def _open_alone(path: Path) -> int:
    """Open the file for this process alone. Closing any other descriptor of it would give the lock up."""
    while True:
        descriptor = int(files.SYSTEM["open"](path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666))
        if fcntl is None:
            return descriptor
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            raise HeadError(
                f"{path}: another process is tuning with this file; wait until it ends, or choose another output folder"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # it was set aside between the two calls


def _read(path: Path, descriptor: int, header: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], int | None]:
    """Return the events of the same search and the length of the part that holds them; None where it is another's."""
    with open(descriptor, "rb", closefd=False) as file:
        data = file.read()
    lines: list[Mapping[str, Any]] = []
    length = 0
    for line in data.splitlines(keepends=True):
        try:
            event = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            event = None
        if not isinstance(event, dict):
            break
        lines.append(event)
        length += len(line)
    if lines and lines[0].get("digest") == header["digest"] and lines[0].get("version") == VERSION:
        return lines[1:], length
    if lines:
        why = _why(lines[0], header)
        log.info("%s: a new search begins, because %s; the old trials are kept in %s.old", path, why, path.name)
        return [], None
    return [], 0


def _why(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, now = old.get("identity"), new["identity"]
    if old.get("format") != FORMAT or old.get("version") != VERSION or not isinstance(before, dict):
        return "the file has another format"
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return f"{', '.join(changed)} changed"
