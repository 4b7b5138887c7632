"""Reading many files to learn what is in them: content digests by a few threads, and JPEGs of which data are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.failures import Failure, noticed
from pipeline.data.index import DatasetIndex
from pipeline.images import ImageProblem, Stat, content_key, decode, kind_of, open_file, read_steadily
from pipeline.io.digests import Digests, digests_to_hex
from pipeline.io.progress import bar
from pipeline.io.remote import CONNECTIONS, address_of

CHUNK = 64
"""Files per task: handing one over costs more than hashing a small image."""

THREADS = 4
FILES_PER_SECOND = 10_000
"""A cautious guess; what takes no longer than that gets no bar."""

T = TypeVar("T")
U = TypeVar("U")


def read_digests(
    root: Path, paths: Sequence[str], listed: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], Digests, NDArray[np.int64], list[Failure]]:
    """Digest the contents of n files below a root, which were listed with these sizes and times: int64 (n, 3).

    Returns
    -------
    which could be read, bool (n,); their digests, uint64 (n, 2), and size and times, int64 (n, 3); a failure for each of the others
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
    threads, chunk = (CONNECTIONS, 1) if address_of(root) else (THREADS, CHUNK)
    for row, result in enumerate(_by_threads(read, range(len(paths)), "reading", threads, chunk)):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            ok[row], digests[row], stats[row] = True, np.frombuffer(result[0], dtype="<u8"), result[1]
    return ok, digests, stats, failures


def incomplete_jpegs(index: DatasetIndex, max_pixels: int) -> list[Failure]:
    """Decode every JPEG of an index, small, and return a failure with its digest for each that is refused.

    An index of version 0.1 did not know those of which data are missing: they were taken for whole.
    """
    digests = digests_to_hex(index.digests)

    def read(row: int) -> Failure | None:
        path = str(index.paths[row])
        try:
            data = open_file(index.root, path)
            kind = kind_of(data)
            if kind is not None and kind.format == "JPEG":
                decode(data, max_pixels=max_pixels, at_least=1)
        except ImageProblem as found:
            return Failure(path, digests[row], found.status, found.reason)
        return None

    rows = np.unique(index.digests, axis=0, return_index=True)[1].tolist()
    return [found for found in _by_threads(read, rows, "looking for JPEGs with data missing") if found is not None]


def _by_threads(
    read: Callable[[T], U], items: Sequence[T], label: str, threads: int = THREADS, size: int = CHUNK
) -> Iterator[U]:
    """Yield what `read` makes of each item, in order; with a bar for work that takes more than a moment."""
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    shown_bar = bar(len(items), "files", label) if len(items) > FILES_PER_SECOND * size // CHUNK else nullcontext()
    with ThreadPoolExecutor(threads) as pool, shown_bar as progress:
        for results in pool.map(lambda chunk: [read(item) for item in chunk], chunks):
            yield from results
            if progress is not None:
                progress.update(len(results))
