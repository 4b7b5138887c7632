"""The lock of a store: one writer at a time, and the second is told who the first is."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from pipeline.errors import StoreError
from pipeline.io import files

LOCK = "LOCK"


def acquire(folder: Path, patience: float = 0.0) -> int:
    """Take the lock of a store, waiting for so many seconds; give it back with `files.close_alone`.

    Raises
    ------
    StoreError
        When another writer has it: says which process, on which host, since when.
    """
    path, end = folder / LOCK, time.monotonic() + patience
    try:
        descriptor = files.open_alone(path)
    except BlockingIOError:
        if time.monotonic() < end:
            time.sleep(0.05)
            return acquire(folder, end - time.monotonic())
        if files.is_held(path):
            raise StoreError(f"{folder}: this process is writing to it already; close that writer first") from None
        writer = holder(folder) or "another process"
        raise StoreError(f"{folder}: is being written by {writer}; wait until it ends, or stop it") from None
    except OSError as error:
        if error.errno in files.NOT_ORDINARY:
            raise StoreError(f"{path}: is no ordinary file ({error.strerror}); delete it and run again") from None
        if error.errno in files.REMEDIES:
            raise
        raise StoreError(
            f"{folder}: cannot be locked here ({error.strerror}); put the store on a file system that has locks"
        ) from None
    try:
        note = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        files.SYSTEM["ftruncate"](descriptor, 0)
        files.write_all(descriptor, json.dumps(note).encode())
    except BaseException:
        files.close_alone(descriptor)
        raise
    return descriptor


def holder(folder: Path) -> str | None:
    """Say who writes to a store now, or None when nobody does."""
    if files.is_held(folder / LOCK):
        return "this process"
    note = files.locked_elsewhere(folder / LOCK)
    return None if note is None else _describe(note)


def _describe(data: bytes) -> str:
    try:
        note: dict[str, Any] = json.loads(data)
        return f"process {int(note['pid'])} on {str(note['host'])!r} since {str(note['since'])!r}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"
