"""The store's lock, which lets in one writer and tells a second one who holds it; and messages for failed writes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import StoreError
from pipeline.io import files

LOCK = "LOCK"


def acquire(folder: Path, patience: float = 0.0) -> int:
    """Take the lock of a store, waiting up to `patience` seconds (may be infinite); release it with `files.close_alone`.

    StoreError when another writer holds it, with its process, host and start time.
    """
    path, end = folder / LOCK, time.monotonic() + patience
    while True:
        try:
            descriptor = files.open_alone(path)
            break
        except BlockingIOError:
            if time.monotonic() < end:
                time.sleep(0.05)
                continue
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


@contextlib.contextmanager
def held(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a folder while the block runs."""
    descriptor = acquire(folder, patience)
    try:
        yield
    finally:
        files.close_alone(descriptor)


def holder(folder: Path) -> str | None:
    """Describe the current writer of a store; None if there is none."""
    if files.is_held(folder / LOCK):
        return "this process"
    data = files.locked_elsewhere(folder / LOCK)
    if data is None:
        return None
    try:
        note = json.loads(data)
        return f"process {int(note['pid'])} on {str(note['host'])!r} since {str(note['since'])!r}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "another process"


@contextlib.contextmanager
def explained(store: Path) -> Iterator[None]:
    """Turn file system errors into a StoreError that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = files.REMEDIES.get(error.errno or 0, "check the disk and its mount")
        raise StoreError(
            f"{store}: cannot be written: {reason}; all rows committed before are safe; {advice}, and run again"
        ) from error
