"""The journal of a search: one JSON line per event, on disk before the search goes on.

The first line names the search by everything that determines its results. A journal of another search is set aside as
`.old`, and one that is damaged as `.damaged`, so nothing measured is ever lost; a line torn by a kill is cut off. One
process at a time has a journal: a lock that dies with the process keeps others out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import HeadError
from pipeline.experiment import MADE_BY, TRIALS, Lines, made_by, parse_lines, to_lines
from pipeline.io import files
from pipeline.io.digests import fingerprint

log = logging.getLogger(__name__)


class Journal:
    """An open journal: the events of earlier runs, and a place for new ones."""

    def __init__(self, path: Path, descriptor: int, lines: Lines) -> None:
        self._path, self._descriptor, self._digest = path, descriptor, lines.digest
        self.events: tuple[Mapping[str, Any], ...] = lines.records[1:]

    @staticmethod
    def open(path: Path, identity: Mapping[str, Any]) -> Journal:
        """Open the journal of the search that `identity` names, or begin it.

        Raises
        ------
        HeadError
            When the file cannot be written, or another process is writing it.
        """
        header = {"format": TRIALS.format, "version": TRIALS.version, MADE_BY: made_by()}
        header |= {"digest": fingerprint(identity), "identity": identity}
        try:
            files.make_folder(path.parent)
            descriptor = _open_alone(path)
            lines = _read(descriptor)
            ours = bool(lines.records) and _is_of(lines.records[0], header)
            if lines.damaged or (lines.records and not ours):
                why = None if ours or not lines.records else _why(lines.records[0], header)
                descriptor = _set_aside(path, descriptor, why, lines)
            elif lines.rest:
                files.SYSTEM["ftruncate"](descriptor, lines.length)
        except OSError as error:
            raise _unwritable(path, error) from error
        kept = lines if ours else Lines()
        journal = Journal(path, descriptor, kept)
        if not kept.records:
            journal.append([header])
        elif lines.damaged:
            journal._begin_again(kept)
        return journal

    def _begin_again(self, lines: Lines) -> None:
        """Write the good lines of a damaged journal into the new one."""
        self._digest = ""
        self.append(lines.records)

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Write events in one piece and wait until they are on disk.

        Raises
        ------
        HeadError
            When they cannot be written, for instance on a full disk.
        """
        data, digest = to_lines(events, self._digest)
        try:
            files.write_all(self._descriptor, data)
            files.sync(self._descriptor)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._digest = digest

    def close(self) -> None:
        """Close the file."""
        files.close_alone(self._descriptor)


def _unwritable(path: Path, error: OSError) -> HeadError:
    return HeadError(
        f"{path}: the trials cannot be written down there ({error.strerror}); make room or choose another output folder, "
        "and run again: what is written is kept"
    )


def _open_alone(path: Path) -> int:
    try:
        return files.open_alone(path, os.O_APPEND)
    except BlockingIOError:
        raise HeadError(
            f"{path}: another process is tuning with this file; wait until it ends, or choose another output folder"
        ) from None


def _read(descriptor: int) -> Lines:
    with open(descriptor, "rb", closefd=False) as file:
        return parse_lines(file.read())


def _is_of(found: Mapping[str, Any], header: Mapping[str, Any]) -> bool:
    return all(found.get(key) == header[key] for key in ("format", "version", "digest"))


def _set_aside(path: Path, descriptor: int, why: str | None, lines: Lines) -> int:
    """Rename a journal that is another's, or damaged (`why` is None), and open a new one."""
    if why is None:
        aside = path.with_name(f"{path.name}.damaged")
        good = len(lines.records)
        log.warning(
            "%s: line %d is not the one that was written; the search goes on from the %d before it, and the file as it was is "
            "kept in %s",
            path,
            good + 1,
            good,
            aside.name,
        )
    else:
        aside = path.with_name(f"{path.name}.old")
        log.info("%s: a new search begins, because %s; the old trials are kept in %s", path, why, aside.name)
    files.SYSTEM["rename"](path, aside)
    fresh = _open_alone(path)
    files.close_alone(descriptor)
    return fresh


def _why(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    before, now = old.get("identity"), new["identity"]
    if (old.get("format"), old.get("version")) != (TRIALS.format, TRIALS.version) or not isinstance(before, dict):
        return "the file has another format"
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return f"{', '.join(changed)} changed"
