"""Reading files to learn what is in them: content digests, by a few threads, of files that hold still."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.failures import LedgerEntry
from pipeline.data.listing import Stat, shown
from pipeline.images import MAY_BE_READ_OTHERWISE, START_BYTES, content_key, is_read_otherwise, kind_of
from pipeline.io.digests import CONTENT_BYTES, Digests
from pipeline.io.progress import Progress, bar

BLOCK = 1 << 20
CHUNK = 64
"""Files per task: handing one over costs more than hashing a small image."""

THREADS = 4
FILES_PER_SECOND = 10_000
"""A cautious guess."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read of n files: `ok` of shape (n,), `digests` uint64 (n, 2) and `stats` int64 (n, 3), valid where ok."""

    ok: NDArray[np.bool_]
    digests: Digests
    stats: NDArray[np.int64]
    entries: list[LedgerEntry]


def read_digests(root: Path, paths: Sequence[str]) -> Reading:
    """Digest the contents of files below a root; a file that cannot be read becomes a ledger entry."""
    chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
    ok = np.zeros(len(paths), dtype=bool)
    stats = np.zeros((len(paths), 3), dtype=np.int64)
    digests = np.zeros((len(paths), 2), dtype=np.uint64)
    entries = []
    row = 0
    with ThreadPoolExecutor(THREADS) as threads, _bar(len(paths)) as progress:
        for chunk, results in zip(
            chunks, threads.map(lambda chunk: [_read(root, path) for path in chunk], chunks), strict=True
        ):
            for path, result in zip(chunk, results, strict=True):
                if isinstance(result, LedgerEntry):
                    entries.append(result._replace(path=shown(path)))
                else:
                    ok[row] = True
                    digests[row] = np.frombuffer(result[0], dtype="<u8")
                    stats[row] = result[1]
                row += 1
            if progress is not None:
                progress.update(len(chunk))
    return Reading(ok, digests, stats, entries)


def _bar(count: int) -> AbstractContextManager[Progress | None]:
    """A bar for work that takes more than a moment."""
    return bar(count, "files", "reading") if count > FILES_PER_SECOND else nullcontext()


def _read(root: Path, path: str) -> tuple[bytes, Stat] | LedgerEntry:
    """Digest one file; once more when it changes meanwhile."""
    for _ in range(2):
        try:
            # O_NONBLOCK: a pipe put in the file's place after the walk must not make the scan wait for ever.
            descriptor = os.open(f"{root}/{path}", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            return LedgerEntry(path, "", "unreadable", f"it cannot be read: {error.strerror}")
        try:
            before = _stat(descriptor)
            digest, size = _content_key(descriptor)
            after = _stat(descriptor)
        except OSError as error:
            return LedgerEntry(path, "", "unreadable", f"it cannot be read: {error.strerror}")
        finally:
            os.close(descriptor)
        if before == after and size == after[0]:
            return (digest, after) if size else LedgerEntry(path, "", "empty", "the file is empty")
    return LedgerEntry(path, "", "changing", "it changes while it is read")


def _content_key(descriptor: int) -> tuple[bytes, int]:
    """Return the content key of an open file and its size; only of few kinds the whole file has to be in memory."""
    block = os.read(descriptor, BLOCK)
    kind = kind_of(block[:START_BYTES])
    kept = [block] if kind is not None and kind.format in MAY_BE_READ_OTHERWISE else []
    digest, size = hashlib.blake2b(digest_size=CONTENT_BYTES), 0
    while block:
        digest.update(block)
        size += len(block)
        block = os.read(descriptor, BLOCK)
        if kept:
            kept.append(block)
    if kept and is_read_otherwise(data := b"".join(kept)):
        return content_key(data), size
    return digest.digest(), size


def _stat(descriptor: int) -> Stat:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns
