"""What an index of an earlier version did not know: JPEGs of which data are missing, which were taken for whole."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.data.failures import LedgerEntry
from pipeline.data.index import DatasetIndex
from pipeline.data.reading import THREADS
from pipeline.images import ImageProblem, decode, kind_of, open_file
from pipeline.io.digests import digests_to_hex
from pipeline.io.progress import bar


def incomplete_jpegs(index: DatasetIndex, max_pixels: int) -> list[LedgerEntry]:
    """Decode every JPEG of an index, small, and return an entry with its digest for each that is refused."""
    rows = np.unique(index.digests, axis=0, return_index=True)[1].tolist()
    digests = digests_to_hex(index.digests)

    def problem(row: int) -> LedgerEntry | None:
        path = str(index.paths[row])
        try:
            data = open_file(index.root, path)
            kind = kind_of(data)
            if kind is not None and kind.format == "JPEG":
                decode(data, max_pixels=max_pixels, at_least=1)
        except ImageProblem as found:
            return LedgerEntry(path, digests[row], found.status, found.reason)
        return None

    found = []
    with (
        ThreadPoolExecutor(THREADS) as threads,
        bar(len(rows), "images", "looking for JPEGs with data missing") as progress,
    ):
        for entry in threads.map(problem, rows):
            progress.update(1)
            if entry is not None:
                found.append(entry)
    return found
