"""The same photos by one process, by workers on Ray, by workers and a driver that are killed, and by shards: bit for bit the same?

`python tests/benchmarks/bench_engine.py FOLDER [--workers 2] [--shards 4] [--kills 5]` embeds a folder of photos with
the bundled network four times over (minutes), compares every vector with that of one process, and prints seconds and rates.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.store import FeatureStore
from pipeline.store.maintain import verify

CONFIG = """
dataset: {source: folder, path: PHOTOS}
backbones: [{name: regnet_small, weights: bundled}]
baselines: []
"""


def features(folder, *options):
    """Start a run with a folder of its own for output and stores."""
    command = [sys.executable, "-m", "pipeline", "features", str(folder.parent / "config.yaml")]
    return subprocess.Popen(
        [*command, "--set", f"output={folder / 'out'}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )


def finished(process):
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def workers_at_work():
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdecimal() and (process / "cmdline").read_bytes().startswith(b"ray::Worker.embed"):
                yield int(process.name)
        except OSError:
            continue


def kill_workers(process, count, seed):
    """Kill one of the workers at work at random moments."""
    moments, killed = random.Random(seed), 0
    while killed < count and process.poll() is None:
        time.sleep(moments.uniform(0.5, 6.0))
        at_work = list(workers_at_work())
        if at_work:
            os.kill(moments.choice(at_work), signal.SIGKILL)
            killed += 1
    return killed


def stores(folder):
    """Of every store, the contents in order and their vectors; each is checked in full."""
    found = {}
    for path in sorted((folder / "features").glob("*.store")):
        assert verify(path, full=True).ok
        store = FeatureStore.open(path)
        content = np.unique(store.table.in_file_order(), axis=0)
        assert len(content) == store.rows, "a content is there twice"
        found[path.name] = content, store.read(content).view(np.uint32)
    return found


def told(name, began, images, expected, folder):
    seconds = time.perf_counter() - began
    found = stores(folder)
    same = found.keys() == expected.keys() and all(
        np.array_equal(mine, theirs) for key in expected for mine, theirs in zip(found[key], expected[key], strict=True)
    )
    print(f"| {name} | {seconds:.0f} | {images / seconds:,.0f} | {'yes' if same else 'NO'} |", flush=True)
    shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as root:
        root = Path(root)
        (root / "config.yaml").write_text(CONFIG.replace("PHOTOS", str(given.photos.absolute())))
        began = time.perf_counter()
        said = finished(features(root / "one"))
        print(re.search(r"^.*images embedded in.*$", said, re.MULTILINE)[0])
        expected = stores(root / "one")
        images = max(len(content) for content, _ in expected.values())
        print("| way | seconds, start to end | images/s | bit for bit, each once |\n|---|---:|---:|---|")
        told("one process", began, images, expected, root / "one")

        ray = ("--engine", "ray", "--workers", str(given.workers))
        began = time.perf_counter()
        said = finished(features(root / "ray", *ray))
        told(f"Ray, {given.workers} workers", began, images, expected, root / "ray")
        line = re.search(r"^engine: .*$", said, re.MULTILINE)[0]

        began = time.perf_counter()
        process = features(root / "killed", *ray)
        killed = kill_workers(process, given.kills, given.seed)
        time.sleep(random.Random(given.seed).uniform(1, 10))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        parts = len(list((root / "killed" / "out" / "parts").glob("regnet*/*.h5")))
        finished(features(root / "killed", *ray))
        what = f"the same, {killed} workers killed, then the driver at {parts} parts, and run again"
        told(what, began, images, expected, root / "killed")

        began = time.perf_counter()
        shards = [f"{number}/{given.shards}" for number in range(1, given.shards + 1)]
        process = features(root / "shards", "--shard", shards[0])
        time.sleep(random.Random(given.seed).uniform(10, 20))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for shard in shards:
            finished(features(root / "shards", "--shard", shard))
        merge = [sys.executable, "-m", "pipeline", "store", "merge", str(root / "shards" / "features")]
        subprocess.run([*merge, str(root / "shards" / "out" / "parts")], check=True, stdout=subprocess.DEVNULL)
        assert "nothing to embed" in finished(features(root / "shards"))
        told(
            f"{given.shards} shards one after the other, one killed first, merged",
            began,
            images,
            expected,
            root / "shards",
        )
        print(line)


if __name__ == "__main__":
    main()
