"""Strangers' files: nineteen kinds of trap, each with a correct trailer, and random mutations in a process with limits."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import FeatureStore
from pipeline.store.format import block_digests, make_trailer
from pipeline.store.opener import open_file
from pipeline.store.writer import StoreWriter
from store.harness import rounds

ROWS, DIM = 40, 16
ATTRIBUTES = {
    "format": "manyheads features", "kind": "segment", "identity": "a" * 64, "dtype": "<f4",
    "version_major": 1, "version_minor": 0, "rows": ROWS, "dim": DIM,
}  # fmt: skip
FEATURES = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype("<f4")


def craft(path, change=lambda file: None, attributes=None, skip=(), late=None):
    """Write a segment with plain h5py, as anyone could, break it, and give it a proper trailer."""
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for name, value in {**ATTRIBUTES, **(attributes or {})}.items():
            file.attrs[name] = np.bytes_(value) if isinstance(value, str) else value
        datasets = {
            "content": np.arange(ROWS * 2, dtype="<u8").reshape(ROWS, 2),
            "block_digest": block_digests([FEATURES.reshape(-1).view(np.uint8)]),
            "features": FEATURES,
        }
        for name, data in datasets.items():
            if name not in skip:
                file.create_dataset(name, data=data)
        change(file)
    close_file(path)
    return path


def close_file(path):
    data = path.read_bytes()
    try:
        with h5py.File(path) as file:
            head = file["features"].id.get_offset() or len(data)
    except Exception:
        head = len(data)
    path.write_bytes(data + make_trailer(data[:head]))


def replace(name, make):
    def change(file):
        del file[name]
        make(file)

    return change


def low_level(name, layout=None, external=None, dtype=None, shape=(ROWS, DIM), early=False):
    def change(file):
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if external:
            settings.set_external(external.encode(), 0, ROWS * DIM * 4)
        if layout is not None:
            settings.set_layout(layout)
        if early:
            settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        kind = h5py.h5t.py_create(np.dtype(dtype or "<f4"))
        h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), settings)

    return change


def virtual(file):
    layout = h5py.VirtualLayout((ROWS, DIM), "<f4")
    layout[:] = h5py.VirtualSource("secret.h5", "features", (ROWS, DIM))
    file.create_virtual_dataset("features", layout)


def deep(file):
    group = file
    for _ in range(2000):
        group = group.create_group("g")


KINDS = {
    "external link": ({"skip": ["features"], "change": lambda f: f.__setitem__("features", h5py.ExternalLink("secret.h5", "/features"))}, "link to elsewhere"),
    "soft link": ({"skip": ["features"], "change": lambda f: f.__setitem__("features", h5py.SoftLink("/content"))}, "link to elsewhere"),
    "link loop": ({"skip": ["features"], "change": lambda f: f.__setitem__("features", h5py.SoftLink("/features"))}, "link to elsewhere"),
    "external storage": ({"skip": ["features"], "change": low_level("features", external="/etc/passwd")}, "has external storage or a filter"),
    "virtual dataset": ({"skip": ["features"], "change": virtual}, "not stored in one piece"),
    "absurd shape": ({"skip": ["features"], "change": low_level("features", shape=(1 << 40, DIM))}, "not fully stored|out of range|expected 40"),
    "gzip bomb": ({"skip": ["features"], "change": lambda f: f.create_dataset("features", shape=(1 << 20, DIM), dtype="<f4", compression="gzip")}, "has external storage or a filter"),
    "shuffle filter": ({"skip": ["features"], "change": lambda f: f.create_dataset("features", data=FEATURES, chunks=(8, 8), shuffle=True)}, "has external storage or a filter"),
    "chunks": ({"skip": ["features"], "change": lambda f: f.create_dataset("features", data=FEATURES, chunks=(8, 8))}, "not stored in one piece"),
    "compact": ({"skip": ["features"], "change": low_level("features", layout=h5py.h5d.COMPACT)}, "not stored in one piece"),
    "variable-length text": ({"skip": ["content"], "change": lambda f: f.create_dataset("content", data=["a"] * ROWS, dtype=h5py.string_dtype())}, "wrong number of axes|unexpected type"),
    "object references": ({"skip": ["content"], "change": lambda f: f.create_dataset("content", (ROWS, 2), dtype=h5py.ref_dtype)}, "unexpected type"),
    "big-endian double": ({"skip": ["features"], "change": lambda f: f.create_dataset("features", data=FEATURES.astype(">f8"))}, "unexpected type"),
    "unallocated": ({"skip": ["features"], "change": low_level("features")}, "not fully stored"),
    "row count": ({"attributes": {"rows": ROWS + 1}}, "expected 41"),
    "extra group": ({"change": lambda f: f.create_group("more")}, "has 4 objects, expected 3"),
    "2,000 levels": ({"change": deep}, "has 4 objects, expected 3"),
    "same dataset twice": ({"skip": ["features"], "change": lambda f: f.__setitem__("features", f["content"])}, "axis|unexpected type|overlap"),
    "cycle": ({"skip": ["features"], "change": lambda f: f.__setitem__("features", f["/"])}, "not a dataset"),
    "extra attribute": ({"attributes": {"pickle": np.void(b"cos\nsystem\n")}}, "has 9 attributes, expected 8"),
    "attribute on a dataset": ({"change": lambda f: f["content"].attrs.__setitem__("x", 1)}, "'content' has attributes"),
    "long attribute": ({"attributes": {"identity": "a" * 5000}}, "no fixed text"),
    "variable-length attribute": ({"change": lambda f: f.attrs.__setitem__("kind", "segment")}, "no fixed text"),
    "missing dataset": ({"skip": ["content"]}, "no dataset 'content'"),
    "newer version": ({"attributes": {"version_major": 2}}, "format version 2, this program reads version 1"),
    "other format": ({"attributes": {"format": "something"}}, "its format is 'something'"),
    "negative rows": ({"attributes": {"rows": -1}}, "negative"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_trap_is_refused_in_words(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with h5py.File("secret.h5", "w") as file:
        file["features"] = np.ones((ROWS, DIM), "<f4")
    arguments, said = KINDS[kind]
    with pytest.raises(StoreError, match=said):
        open_file(craft(tmp_path / "x.h5", **arguments))


def test_the_same_file_without_a_trap_is_refused_only_for_its_order(tmp_path):
    """The traps above are refused for their own reason: an honest file of h5py's opens, or falls at the last check."""
    path = craft(tmp_path / "x.h5")
    assert np.array_equal(open_file(path, "segment").bulk, FEATURES)


@pytest.mark.parametrize("make", [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"x" * 47),
    lambda path: path.write_bytes(os.urandom(5000)),
    lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(5000)),
    lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + make_trailer(b"\x89HDF\r\n\x1a\n")),
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to("/etc/passwd"),
])  # fmt: skip
def test_what_is_no_store_file_is_refused(tmp_path, make):
    make(tmp_path / "x.h5")
    with pytest.raises(StoreError):
        open_file(tmp_path / "x.h5")


def test_a_user_block_is_refused(tmp_path):
    path = craft(tmp_path / "x.h5")
    data = b"#!/bin/sh\n".ljust(512, b"\0") + path.read_bytes()[:-48]
    path.write_bytes(data + make_trailer(data))
    with pytest.raises(StoreError, match="not an HDF5 file"):
        open_file(path)


def test_features_that_are_not_finite_are_found_by_verify(tmp_path):
    from pipeline.store.maintain import damaged_rows

    features = FEATURES.copy()
    features[7, 3] = np.nan

    def change(file):
        file["features"][:] = features
        file["block_digest"][:] = block_digests([features.reshape(-1).view(np.uint8)])

    assert damaged_rows(open_file(craft(tmp_path / "x.h5", change))).tolist() == [7]


FUZZ = """
import random, resource, signal, struct, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from pipeline.errors import StoreError
from pipeline.store import FeatureStore
from pipeline.store.maintain import verify
from pipeline.store.share import read_packed_index
from pipeline.store.format import make_trailer
folder, count = Path({folder!r}), {count}
seeds = [Path(name).read_bytes() for name in {seeds!r}]
random.seed(5)
used = int(open('/proc/self/statm').read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
opened = 0
for turn in range(count):
    data = bytearray(random.choice(seeds)[:-48])
    head = struct.unpack('<Q', random.choice(seeds)[-40:-32])[0] if random.random() < 0.02 else None
    for _ in range(random.choice([1, 1, 2, 8])):
        at = random.randrange(min(len(data), 6000))
        data[at] = random.choice([0, 1, 255, random.randrange(256), data[at] ^ 1 << random.randrange(8)])
    original = next(seed for seed in seeds if len(seed) == len(data) + 48)
    head = head or struct.unpack('<Q', original[-40:-32])[0]
    path = folder / 'fuzz.h5'
    path.write_bytes(data + make_trailer(bytes(data[:min(head, len(data))])))
    signal.alarm(5)
    try:
        if b'pack' in data[:6000]:
            store = FeatureStore.open(path)
            store.read(store.table.in_file_order()[:5])
            read_packed_index(path)
            verify(path, full=True)
        else:
            from pipeline.store.reader import open_snapshot
            target = folder / 'snapshot-00000002.h5'
            path.rename(target)
            snapshot = open_snapshot(target)
            snapshot.table.find(snapshot.table.in_file_order())
        opened += 1
    except StoreError:
        pass
    signal.alarm(0)
print(count, opened)
"""


def test_random_mutations_raise_only_our_errors_in_bounded_time_and_memory(place):
    from pipeline.store.share import pack

    digests = np.random.default_rng(1).integers(0, 2**64, (ROWS, 2), dtype=np.uint64)
    with StoreWriter.open(place / "s", {"a": 1}, DIM, probe=FEATURES[:2]) as writer:
        writer.append(digests, FEATURES)
    names = [f"class/{number}.png" for number in range(ROWS)]
    pack(FeatureStore.open(place / "s"), place / "p.h5", digests, {"paths": names, "labels": names})
    root = Path(__file__).parents[2]
    seeds = [str(place / "p.h5"), str(place / "s" / "snapshot-00000002.h5")]
    program = FUZZ.format(
        root=str(root), tests=str(root / "tests"), folder=str(place), count=rounds(2_000, 200_000), seeds=seeds
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, f"ended with {result.returncode}: {result.stderr[-2000:]}"
    count, opened = map(int, result.stdout.split())
    assert count == rounds(2_000, 200_000)
    assert 0 < opened < count, "some mutations are harmless (padding), most are not"


def test_a_table_of_one_repeated_number_is_searched_in_time(place):
    """A stranger's table may hold a million equal halves; the search must stay logarithmic."""
    from pipeline.store.reader import Table

    size = 200_000
    content = np.stack([np.full(size, 7, np.uint64), np.arange(size, dtype=np.uint64)], axis=1)
    table = Table.of([content])
    asked = np.array([[7, 5], [7, size - 1], [7, size], [8, 0], [6, 5]], np.uint64)
    assert table.find(asked).tolist() == [5, size - 1, -1, -1, -1]
    assert table.find(content).tolist() == list(range(size))


def test_a_garbage_length_of_the_head_is_refused(tmp_path):
    path = craft(tmp_path / "x.h5")
    data = path.read_bytes()
    path.write_bytes(data[:-40] + struct.pack("<Q", 1 << 62) + data[-32:])
    with pytest.raises(StoreError, match="truncated or damaged"):
        open_file(path)
