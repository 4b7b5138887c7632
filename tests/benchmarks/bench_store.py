"""The store's figures: opening and one look-up among a million rows, and what the protection costs.

`python tests/benchmarks/bench_store.py [--rows 1000000] [--folder DIR]` prints a table and writes bench_store.json.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.io import files
from pipeline.store import FeatureStore, StoredRows
from pipeline.store.maintain import verify
from pipeline.store.writer import StoreWriter

IDENTITY = {"architecture": "bench"}


def median_ms(function, repeats=15):
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def big_table(folder, rows, random):
    """A store of many short rows: the table is what look-ups cost."""
    path = folder / "big.store"
    digests = random.integers(0, 2**64, (rows, 2), dtype=np.uint64)
    for start in range(0, rows, 1_000_000):
        with StoreWriter.open(path, IDENTITY, 4) as writer:
            part = digests[start : start + 1_000_000]
            writer.append(part, np.zeros((len(part), 4), np.float32))
    return path, digests


def lookups(folder, rows, random):
    path, digests = big_table(folder, rows, random)
    one, thousand = digests[500:501], digests[random.integers(0, rows, 1000)]
    return {
        f"open {rows:,} rows, warm (ms)": median_ms(lambda: FeatureStore.open(path)),
        f"open {rows:,} rows and look up one, warm (ms)": median_ms(lambda: FeatureStore.open(path).missing(one)),
        f"open {rows:,} rows and read one vector, warm (ms)": median_ms(lambda: FeatureStore.open(path).read(one)),
        f"open {rows:,} rows and look up 1,000, warm (ms)": median_ms(
            lambda: FeatureStore.open(path).missing(thousand)
        ),
        f"look up all {rows:,} (ms)": median_ms(lambda: FeatureStore.open(path).missing(digests), 1),
        f"run that adds 1,000 vectors to {rows:,} (ms)": median_ms(lambda: add(path, random), 1),
    }


def add(path, random):
    with StoreWriter.open(path, IDENTITY, 4) as writer:
        writer.append(random.integers(0, 2**64, (1000, 2), dtype=np.uint64), np.zeros((1000, 4), np.float32))


def protection(folder, random, rows=16_384, dim=2048):
    """Store 134 MB of vectors: as we do, and as one plain write without sync, digest or journal."""
    features = random.normal(size=(rows, dim)).astype(np.float32)
    digests = random.integers(0, 2**64, (rows, 2), dtype=np.uint64)

    def plain():
        np.save(folder / "plain.npy", features)

    def ours():
        shutil.rmtree(folder / "s", ignore_errors=True)
        with StoreWriter.open(folder / "s", IDENTITY, dim) as writer:
            for start in range(0, rows, 64):
                writer.append(digests[start : start + 64], features[start : start + 64])

    def unsynced():
        real = files.SYSTEM["fsync"]
        files.SYSTEM["fsync"] = lambda descriptor: None
        try:
            ours()
        finally:
            files.SYSTEM["fsync"] = real

    figures = {
        "write 134 MB, numpy.save (ms)": median_ms(plain, 3),
        "write 134 MB, the store without fsync (ms)": median_ms(unsynced, 3),
        "write 134 MB, the store (ms)": median_ms(ours, 3),
    }
    figures["vectors of 2048 stored per second"] = rows / figures["write 134 MB, the store (ms)"] * 1000
    figures["read 134 MB, numpy.load (ms)"] = median_ms(lambda: np.load(folder / "plain.npy"), 3)
    figures["read 134 MB, checked (ms)"] = median_ms(lambda: FeatureStore.open(folder / "s").read(digests), 3)
    figures["load 134 MB, checked, no copy (ms)"] = median_ms(
        lambda: StoredRows.of(FeatureStore.open(folder / "s"), digests)[:], 3
    )
    store = FeatureStore.open(folder / "s")
    store.read(digests)
    figures["read 134 MB again, checked before (ms)"] = median_ms(lambda: store.read(digests), 3)
    some = digests[random.integers(0, rows, 500)]
    figures["read 500 random vectors, checked (ms)"] = median_ms(lambda: FeatureStore.open(folder / "s").read(some), 5)
    figures["verify --full 134 MB (ms)"] = median_ms(lambda: verify(folder / "s", full=True), 3)

    def nothing_to_do():
        with StoreWriter.open(folder / "s", IDENTITY, dim) as writer:
            writer.missing(digests)

    figures["run with nothing to do (ms)"] = median_ms(nothing_to_do, 5)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where to write about 2 GB; default: a temporary folder")
    parser.add_argument("--json", type=Path, default=Path("bench_store.json"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    random = np.random.default_rng(0)
    try:
        figures = {**lookups(folder, options.rows, random), **protection(folder, random)}
    finally:
        shutil.rmtree(folder)
    print("| what | figure |\n|---|---:|")
    for name, value in figures.items():
        print(f"| {name} | {value:,.1f} |")
    options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
