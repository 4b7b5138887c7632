"""How time and memory grow: stores of up to a million vectors of 512, indexes of up to ten million paths, and heads on the vectors.

`python tests/benchmarks/bench_scale.py [--rows 1000000] [--paths 10000000] [--heads 1000000] [--output bench_scale]` makes synthetic
data in a temporary folder, runs every step at three sizes in a process of its own, and writes a table (Markdown), a picture and
the figures (JSON, which has seconds of the wall too). Seconds are the processor's, of all threads; memory is the most that was resident,
in which mapped pages of the features are counted though the system may drop them. A million vectors take 2 GB, the heads' run 4 GB of disk.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline import config as configuration
from pipeline.data import DatasetIndex
from pipeline.data.index import difference, texts
from pipeline.data.reading import StatCache, read_cache
from pipeline.embed.records import EmbeddingRecord, write_records
from pipeline.embed.spec import EmbeddingSpec
from pipeline.experiment import Artifacts
from pipeline.stages.maintenance import store_lines
from pipeline.store import FeatureStore
from pipeline.store.maintain import collect, verify
from pipeline.store.rows import Nearest
from pipeline.store.share import PartWriter
from pipeline.store.writer import StoreWriter

DIM, CLASSES, BATCH = 512, 10, 4096
IDENTITY = {"architecture": "synthetic"}


def digests_of(rows):
    return np.random.default_rng(1).integers(0, 2**64, (rows, 2), dtype=np.uint64)


def vectors(rows, seed=0):
    """Yield batches of float32 (k, DIM) around ten centres, with their classes; a linear head gets about nine in ten right."""
    random = np.random.default_rng(seed)
    centres = random.normal(0, 0.11, (CLASSES, DIM))
    for start in range(0, rows, BATCH):
        y = random.integers(0, CLASSES, min(BATCH, rows - start))
        yield y, (random.standard_normal((len(y), DIM), np.float32) + centres[y]).astype(np.float32)


# ---- steps on a store of n vectors


def write(folder, rows):
    digests = digests_of(rows)
    with StoreWriter.open(folder / "s.store", IDENTITY, DIM) as writer:
        for place, (_, batch) in enumerate(vectors(rows)):
            writer.append(digests[place * BATCH :][: len(batch)], batch)


def open_one(folder, rows):
    FeatureStore.open(folder / "s.store").read(digests_of(rows)[rows // 2 : rows // 2 + 1])


def look_up(folder, rows):
    assert not FeatureStore.open(folder / "s.store").missing(digests_of(rows)).any()


def read_all(folder, rows):
    store, total = FeatureStore.open(folder / "s.store"), 0.0
    for _, features in store.pieces(store.table.in_file_order()):
        total += float(features[:, 0].sum())


def nearest(folder, rows):
    """What `similar` does for one image, from a store that was not read before."""
    store, digests = FeatureStore.open(folder / "s.store"), digests_of(rows)
    found, _ = Nearest.of(store, digests).find(store.read(digests[:1]), 10)
    assert found[0, 0] == 0


def status_of(folder, rows):
    digests = digests_of(rows)
    list(store_lines("s", folder / "s.store", digests, digests))


def verify_quick(folder, rows):
    assert verify(folder / "s.store").ok


def gc(folder, rows):
    """Remove one row of ten."""
    collect(folder / "s.store", digests_of(rows)[: rows - rows // 10])


def merge_parts(folder, rows):
    """Write the parts of 16 shards, and merge them."""
    from pipeline.stages.extract.stores import take_parts

    digests = digests_of(rows)
    writers = [PartWriter(folder / "parts", Path("m.store"), IDENTITY, DIM, look=False) for _ in range(16)]
    for place, (_, batch) in enumerate(vectors(rows)):
        writers[place % 16].append(digests[place * BATCH :][: len(batch)], batch)
        if writers[place % 16].due:
            writers[place % 16].commit()
    for writer in writers:
        writer.commit()
    assert take_parts(folder / "parts", folder, remove=True) == {"m": rows}


# ---- steps on an index of n paths


def paths_of(rows):
    return [f"class{number % 1000:03d}/photo-{number:09d}.jpg" for number in range(rows)]


def index_of(rows):
    paths = sorted(paths_of(rows))
    words = texts([f"class{number:03d}" for number in range(1000)])
    labels = words[[int(path[5:8]) for path in paths]]
    splits = texts(["test", "train"])[np.minimum(np.arange(rows) % 5, 1)]
    return DatasetIndex(Path("/data"), texts(paths), labels, splits, None, digests_of(rows), np.full(rows, 100_000))


def index_write(folder, rows):
    index = index_of(rows)
    index.write(folder / "dataset")
    stats = np.tile(np.arange(rows)[:, None], 3)
    StatCache(index.paths, stats, index.digests, 0, 0).write(folder / "dataset")


def index_open(folder, rows):
    assert len(DatasetIndex.read(folder / "dataset")) == rows


def cache_open(folder, rows):
    assert len(read_cache(folder / "dataset").paths) == rows


def index_diff(folder, rows):
    """Compare with a state in which one image of a hundred is new, one gone and one changed."""
    index, each = DatasetIndex.read(folder / "dataset"), max(1, rows // 100)
    digests = index.digests.copy()
    digests[rows // 2 : rows // 2 + each] += np.uint64(1)
    paths = texts([*index.paths[:-each], *(f"zzz/{number:09d}.jpg" for number in range(each))])
    digests[-each:] += np.uint64(7)
    found = difference(index.paths, index.digests, paths, digests)
    assert (found.added, found.removed, found.changed) == (each, each, each)


# ---- a run of heads on n vectors


def make_experiment(folder, rows):
    config = heads_config(folder)
    files = Artifacts(config.output, config.store)
    spec = EmbeddingSpec(
        "synthetic", "backbone", "none", "synthetic", {}, "none", "0", "x", "none", DIM, {}, "fp32", "torch"
    )
    index = index_of(rows)
    with StoreWriter.open(files.store(spec.name, spec.fingerprint()), spec.identity(), DIM) as writer:
        labels = []
        for place, (y, batch) in enumerate(vectors(rows)):
            writer.append(index.digests[place * BATCH :][: len(batch)], batch)
            labels += y.tolist()
    names = texts([f"class{number}" for number in range(CLASSES)])
    index = DatasetIndex(index.root, index.paths, names[labels], index.splits, None, index.digests, index.sizes)
    index.write(files.dataset)
    store = files.store(spec.name, spec.fingerprint())
    record = EmbeddingRecord("synthetic", spec, store.name, FeatureStore.open(store).digest, config.backbones[0], 0)
    write_records(files.features, [record], config, index.fingerprint())


def heads_config(folder):
    raw = {
        "output": str(folder / "out"),
        "dataset": {"source": "folder", "path": "/data"},
        "backbones": [{"name": "squeezenet1_1", "weights": "random"}],
        "baselines": [],
        "heads": ["ridge", "logistic_regression"],
        "tuning": {"memory": os.environ.get("BENCH_MEMORY", "8GB"), "trials": 8, "folds": 3},
    }
    return configuration.parse(raw, "bench")


def heads(folder, rows):
    from pipeline.stages import train_heads

    found = train_heads.run(heads_config(folder))
    print(
        [(row.head, round(row.cv_mean, 4), round(row.search_seconds, 1)) for row in found.leaderboard.rows],
        file=sys.stderr,
    )


STORE = (write, open_one, look_up, read_all, nearest, status_of, verify_quick, gc, merge_parts)
PATHS = (index_write, index_open, cache_open, index_diff)
HEADS = (make_experiment, heads)
STEPS = {step.__name__: step for step in (*STORE, *PATHS, *HEADS)}
ABOUT = {
    "write": "draw vectors and write the store",
    "open_one": "open it and read one vector",
    "look_up": "look up all contents",
    "read_all": "read and check all vectors",
    "nearest": "`similar`: ten nearest of one",
    "status_of": "`store status` of one store",
    "verify_quick": "`store verify`",
    "gc": "`store gc`, a tenth goes",
    "merge_parts": "draw vectors, write 16 shards' parts, merge",
    "index_write": "make and write index and stat cache",
    "index_open": "open the index",
    "cache_open": "open the stat cache",
    "index_diff": "open the index, compare with another state",
    "heads": "`heads`: ridge and logistic regression",
}


def measured(step, folder, rows):
    done = subprocess.run(
        [sys.executable, __file__, "--step", step.__name__, "--rows", str(rows), "--folder", str(folder)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{step.__name__:>16} {rows:>11,}  {found['seconds']:9.3f} s  {found['cpu']:9.3f} s cpu  {found['mb']:8.0f} MB",
        flush=True,
    )
    return {"step": step.__name__, "rows": rows, **found}


def run_step(name, folder, rows):
    began, cpu = time.perf_counter(), time.process_time()
    STEPS[name](folder, rows)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "cpu": time.process_time() - cpu, "mb": peak}))


def table(found):
    sizes = {step: sorted({one["rows"] for one in found if one["step"] == step}) for step in ABOUT}
    lines = []
    for step, about in ABOUT.items():
        cells = [one for size in sizes[step] for one in found if (one["step"], one["rows"]) == (step, size)]
        if cells:
            lines.append(
                f"| {about} | "
                + " | ".join(f"{one['rows']:,}: {one['cpu']:.2f} s, {one['mb']:,.0f} MB" for one in cells)
                + " |"
            )
    return "\n".join(["| | small | middle | large |", "|---|---:|---:|---:|", *lines])


def draw(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for step, about in ABOUT.items():
        line = [(one["rows"], one["cpu"], one["mb"]) for one in found if one["step"] == step]
        if line:
            rows, seconds, mb = zip(*sorted(line), strict=True)
            style = "--" if STEPS[step] in PATHS else "-"
            axes[0].plot(rows, seconds, style, marker="o", markersize=3, label=about)
            axes[1].plot(rows, mb, style, marker="o", markersize=3)
    for one, label in zip(axes, ("processor seconds", "MB resident at most"), strict=True):
        one.set(xscale="log", yscale="log", xlabel="vectors (lines) or paths (dashes)", ylabel=label)
        one.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--paths", type=int, default=10_000_000)
    parser.add_argument("--heads", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path("bench_scale"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step")
    given = parser.parse_args()
    if given.step:
        run_step(given.step, given.folder, given.rows)
        return
    found = []
    for steps, most in ((STORE, given.rows), (PATHS, given.paths), (HEADS, given.heads)):
        for rows in (most // 100, most // 10, most) if most else ():
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                found += [measured(step, Path(folder), rows) for step in steps]
    given.output.with_suffix(".json").write_text(json.dumps(found, indent=1))
    given.output.with_suffix(".md").write_text(table(found) + "\n")
    draw(found, given.output.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
