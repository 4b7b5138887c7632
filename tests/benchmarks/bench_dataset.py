"""How long the index takes: a scan that finds nothing new, and the comparison of two large states.

Run `python tests/benchmarks/bench_dataset.py [--files 100000] [--rows 10000000]`. The scan needs a folder of many small
files, which is written to a temporary folder first. CPU seconds are given beside wall seconds, because the two differ on a
busy machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.config import DatasetConfig
from pipeline.data import DatasetIndex, reading
from pipeline.data.index import difference, texts
from pipeline.data.reading import StatCache
from pipeline.data.scan import scan


@contextmanager
def timed(what: str) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    print(f"{what:58} {time.perf_counter() - wall:8.2f} s wall {time.process_time() - cpu:8.2f} s CPU", flush=True)


def bench_scan(files: int) -> None:
    reading.RACY_NS = 0  # the files are new, and nobody changes them meanwhile
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "photos"
        for number in range(files):
            path = root / f"class_{number % 200:03d}" / f"image_{number:08d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"%d" % number * 100)
        config = DatasetConfig(source="folder", path=str(root))
        with timed(f"first scan of {files:,} files"):
            assert scan(config, 0, Path(folder) / "dataset").read == files
        for _ in range(3):
            with timed(f"scan of {files:,} unchanged files"):
                assert scan(config, 0, Path(folder) / "dataset").read == 0
        path.write_bytes(b"changed")
        with timed(f"scan of {files:,} files, one changed"):
            assert scan(config, 0, Path(folder) / "dataset").difference.changed == 1


def bench_difference(rows: int) -> None:
    generator = np.random.default_rng(0)
    old_paths = texts([f"class_{row // 1000:05d}/image_{row:08d}.jpg" for row in range(rows)])
    old_digests = generator.integers(0, 2**63, (rows, 2), dtype=np.uint64)
    part = rows // 1000
    new_paths, new_digests = old_paths.copy(), old_digests.copy()
    new_paths[:part] = [f"class_{row // 1000:05d}/renamed_{row:08d}.jpg" for row in range(part)]
    new_digests[part : 2 * part] = generator.integers(0, 2**63, (part, 2), dtype=np.uint64)
    new_paths, new_digests = new_paths[: rows - part], new_digests[: rows - part]
    with timed(f"difference of two states of {rows:,} images"):
        found = difference(old_paths, old_digests, new_paths, new_digests)
    assert (found.added, found.changed, found.removed, found.renamed) == (0, part, part, part)
    stats = generator.integers(0, 2**60, (rows, 3))
    cache = StatCache(old_paths, stats, old_digests, 0, 0)
    with timed(f"digests of {rows:,} files from the stat cache"):
        known, _ = cache.known(new_paths, stats[: rows - part])
    assert known.sum() == rows - 2 * part


def bench_index(rows: int) -> None:
    generator = np.random.default_rng(0)
    paths = texts([f"class_{row // 1000:05d}/image_{row:08d}.jpg" for row in range(rows)])
    labels = texts([f"class_{row // 1000:05d}" for row in range(rows)])
    splits = texts(["train", "test"])[generator.integers(0, 2, rows)]
    digests = generator.integers(0, 2**63, (rows, 2), dtype=np.uint64)
    index = DatasetIndex(Path("photos"), paths, labels, splits, None, digests, np.ones(rows, dtype=np.int64))
    with tempfile.TemporaryDirectory() as folder:
        with timed(f"index.csv of {rows:,} images written"):
            index.write(Path(folder))
        with timed(f"index.csv of {rows:,} images read"):
            assert len(DatasetIndex.read(Path(folder))) == rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    bench_scan(arguments.files)
    bench_difference(arguments.rows)
    bench_index(arguments.rows)
