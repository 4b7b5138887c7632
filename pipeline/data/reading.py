"""The content digest of each file, read by a few threads, or known from an earlier scan.

A file with the size and times in the stat cache is trusted, unless its times are within two seconds of the scan that recorded
it: then it may have changed again within the clock's resolution. After deleting the cache, every file is read again.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.failures import Failure, noticed
from pipeline.data.index import Texts, match_texts, texts
from pipeline.experiment import parse_arrays
from pipeline.images import ImageProblem, Stat, content_key, read_steadily
from pipeline.io.digests import Digests
from pipeline.io.files import read_file, write_atomic
from pipeline.io.process import bar
from pipeline.io.remote import CONNECTIONS, address_of

CHUNK = 64
"""Files per task: scheduling a task costs more than hashing a small image."""

THREADS = 4

CACHE_FILE = "stat-cache.npz"
VERSION = 2
"""Version 1 has other digests for files that are decoded differently since; with such a cache every file is read again."""

RACY_NS = 2_000_000_000

log = logging.getLogger(__name__)


def read_digests(
    root: Path, paths: Sequence[str], listed: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], Digests, NDArray[np.int64], list[Failure]]:
    """Compute the content digests of n files below a root; `listed`, int64 (n, 3), holds the sizes and times from the listing.

    Returns which files could be read, bool (n,); their digests, uint64 (n, 2), and size and times, int64 (n, 3); a failure for each of
    the others.
    """

    def read(row: int) -> tuple[bytes, Stat] | Failure:
        try:
            data, stats = read_steadily(f"{root}/{paths[row]}")
        except ImageProblem as problem:
            return noticed(paths[row], problem.status, problem.reason)
        if not data:
            return noticed(paths[row], "empty", "the file is empty")
        return content_key(data), stats or (len(data), *listed[row, 1:])

    ok = np.zeros(len(paths), dtype=bool)
    digests = np.zeros((len(paths), 2), dtype=np.uint64)
    stats = np.zeros((len(paths), 3), dtype=np.int64)
    failures = []
    threads, size = (CONNECTIONS, 1) if address_of(root) else (THREADS, CHUNK)
    chunks = [range(len(paths))[start : start + size] for start in range(0, len(paths), size)]
    with ThreadPoolExecutor(threads) as pool, bar(len(paths), "files", "reading", delay=1.0) as progress:
        for rows, results in zip(chunks, pool.map(lambda rows: list(map(read, rows)), chunks), strict=True):
            for row, result in zip(rows, results, strict=True):
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    ok[row], digests[row], stats[row] = True, np.frombuffer(result[0], dtype="<u8"), result[1]
            progress.update(len(rows))
    return ok, digests, stats, failures


@dataclass(frozen=True, eq=False)
class StatCache:
    """The digests of n files: `stats` is int64 of shape (n, 3) (size, mtime_ns, ctime_ns), `began` and `ended` bound the scan, in ns."""

    paths: Texts
    stats: NDArray[np.int64]
    digests: Digests
    began: int
    ended: int

    def racy(self) -> NDArray[np.bool_]:
        """Return the rows whose file may have changed undetectably: bool of shape (n,)."""
        newest = self.stats[:, 1:].max(axis=1, initial=0)
        racy: NDArray[np.bool_] = (newest >= self.began - RACY_NS) & (newest <= self.ended + RACY_NS)
        return racy

    def known(self, paths: Texts, stats: NDArray[np.int64]) -> tuple[NDArray[np.bool_], Digests]:
        """Return which files are unchanged, bool of shape (n,), and their digests, uint64 of shape (n, 2), 0 for the others.

        paths : of shape (n,), object (str). stats : of shape (n, 3), int64, size and times; a size of -1, unknown until the
            file is read, is replaced by the cached size
        """
        digests: Digests = np.zeros((len(paths), 2), dtype=np.uint64)
        rows = match_texts(self.paths, paths)
        same = rows >= 0
        sized = stats[:, 0] >= 0
        same[same] = (
            (self.stats[rows[same], 1:] == stats[same, 1:]).all(axis=1)
            & ((self.stats[rows[same], 0] == stats[same, 0]) | ~sized[same])
            & ~self.racy()[rows[same]]
        )
        stats[same, 0] = self.stats[rows[same], 0]
        digests[same] = self.digests[rows[same]]
        return same, digests

    def write(self, folder: Path) -> None:
        """Write the cache into a folder."""
        sink = io.BytesIO()
        np.savez(
            sink,
            version=np.array(VERSION),
            paths=np.frombuffer("\0".join(self.paths).encode(), dtype=np.uint8),
            stats=self.stats,
            digests=self.digests,
            scan_times=np.array([self.began, self.ended]),
        )
        write_atomic(folder / CACHE_FILE, sink.getvalue())


def read_cache(folder: Path) -> StatCache:
    """Read a folder's cache; empty if there is none or it is damaged, which only costs time."""
    try:
        file = parse_arrays(read_file(folder / CACHE_FILE))
        if int(file["version"]) != VERSION:
            raise ValueError(f"version {int(file['version'])}")
        blob = file["paths"].tobytes().decode()
        paths = texts(blob.split("\0") if blob else [])
        stats, digests = file["stats"], file["digests"]
        began, ended = (int(value) for value in file["scan_times"])
        if stats.shape != (len(paths), 3) or digests.shape != (len(paths), 2):
            raise ValueError("its columns differ in length")
        return StatCache(paths, stats.astype(np.int64), digests.astype(np.uint64), began, ended)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("%s is not used (%s); every image is read again", folder / CACHE_FILE, error)
    return StatCache(texts([]), np.zeros((0, 3), dtype=np.int64), np.zeros((0, 2), dtype=np.uint64), 0, 0)
