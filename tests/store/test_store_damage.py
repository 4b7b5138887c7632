"""Damage: every flipped bit and every truncation is named by verify, and no damaged row is ever read."""

import mmap
import shutil

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import FeatureStore
from pipeline.store.maintain import repair, verify
from pipeline.store.opener import open_file
from pipeline.store.writer import StoreWriter
from store.harness import (
    DIGESTS,
    DIM,
    FEATURES,
    IDENTITY,
    Faults,
    add,
    exact,
    generator,
    rounds,
    small_segments,
    system,
)


@pytest.fixture
def store(place):
    with small_segments(), system(Faults()):
        add(place / "s", set(), 14)
        writer = StoreWriter.open(place / "s", IDENTITY, DIM)
        writer.append(DIGESTS[14:], FEATURES[14:])
        writer.commit()
        writer.close()  # so that there is a journal as well
    return place / "s"


def data_files(path):
    return sorted(path.rglob("*.h5"))


def damaged(file, data):
    """Whether looking at the bytes of one file alone shows that it is damaged."""
    try:
        opened = open_file(file, data=data)
    except StoreError:
        return True
    return bool(opened.bad_blocks())


def test_every_flipped_bit_is_seen(store):
    """Flipped in a copy in memory, which goes through the same opener as a mapped file."""
    random = generator("flips")
    files = data_files(store)
    assert {file.parent.name for file in files} == {"s", "segments", "journal"}
    copies = {}
    for file in files:
        copies[file] = mmap.mmap(-1, file.stat().st_size)
        copies[file][:] = file.read_bytes()
        assert not damaged(file, copies[file])
    bits = [(file, bit) for file in files for bit in range(file.stat().st_size * 8)]
    for file, bit in random.sample(bits, min(len(bits), rounds(20_000, len(bits)))):
        data = copies[file]
        data[bit // 8] ^= 1 << bit % 8
        assert damaged(file, data), f"{file.name} bit {bit}"
        data[bit // 8] ^= 1 << bit % 8
    assert verify(store, full=True).ok


def test_verify_names_the_file_and_reads_never_return_a_damaged_row(store):
    random = generator("named")
    files = data_files(store)
    healthy = FeatureStore.open(store)
    have = np.flatnonzero(~healthy.missing(DIGESTS))
    for turn in range(rounds(150, 5_000)):
        file = random.choice(files)
        original = file.read_bytes()
        if turn % 3:
            data = bytearray(original)
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        else:
            data = original[: random.randrange(len(original))]
        file.write_bytes(data)
        report = verify(store, full=True)
        assert str(file.relative_to(store)) in [problem.partition(": ")[0] for problem in report.problems]
        opened = FeatureStore.open(store)
        for row in have:
            try:
                vector = opened.read(DIGESTS[row : row + 1])
            except StoreError:
                continue
            assert vector.tobytes() == FEATURES[row].tobytes()
        file.write_bytes(original)


def test_every_truncation_is_refused(store):
    for file in data_files(store):
        original = file.read_bytes()
        for length in range(0, len(original), 1 if rounds(0, 1) else 17):
            file.write_bytes(original[:length])
            with pytest.raises(StoreError, match=r"truncated|damaged"):
                open_file(file)
        file.write_bytes(original)


def test_repair_forgets_exactly_the_damaged_rows(place):
    """Rows of 40 KB, so that one 64 KiB block touches few of them."""
    random = np.random.default_rng(0)
    digests = random.integers(0, 2**64, (20, 2), dtype=np.uint64)
    features = random.normal(size=(20, 10_000)).astype(np.float32)
    with StoreWriter.open(place / "s", {"a": 1}, 10_000) as writer:
        writer.append(digests, features)
    (segment,) = (place / "s" / "segments").iterdir()
    offset = segment.stat().st_size - 48 - features.nbytes + 7 * 40_000 + 20
    with segment.open("r+b") as out:
        out.seek(offset)
        byte = out.read(1)[0]
        out.seek(offset)
        out.write(bytes([byte ^ 1]))
    first, last = (7 * 40_000 + 20) // 65536 * 65536 // 40_000, ((7 * 40_000 + 20) // 65536 * 65536 + 65535) // 40_000
    expected = list(range(first, last + 1))
    report = verify(place / "s", full=True)
    assert verify(place / "s").ok, "the quick check does not read the features"
    assert sorted(map(tuple, report.damaged)) == sorted(map(tuple, digests[expected]))
    assert report.problems[0].endswith(f": {len(expected)} of its 20 features are damaged or not finite")
    fixed = repair(place / "s")
    assert sorted(map(tuple, fixed.damaged)) == sorted(map(tuple, digests[expected]))
    assert [path.name for path in (place / "s" / "quarantine").iterdir()] == [segment.name]
    store = FeatureStore.open(place / "s")
    assert np.flatnonzero(store.missing(digests)).tolist() == expected
    good = np.setdiff1d(np.arange(20), expected)
    assert store.read(digests[good]).tobytes() == features[good].tobytes()
    assert verify(place / "s", full=True).ok
    with StoreWriter.open(place / "s", {"a": 1}, 10_000) as writer:
        assert writer.append(digests, features) == len(expected)
    assert FeatureStore.open(place / "s").read(digests).tobytes() == features.tobytes()


def test_a_lost_segment_costs_its_rows_and_nothing_else(store, caplog):
    first = sorted((store / "segments").iterdir())[0]
    first.unlink()
    report = verify(store)
    assert not report.ok
    assert "is missing with" in report.problems[0]
    with pytest.raises(StoreError, match=r"is missing with .* features; put it back, or run 'manyheads store repair'"):
        FeatureStore.open(store).read(report.damaged)
    with small_segments():
        add(store, set())
    assert "will be embedded again" in caplog.text
    exact(store, set(range(len(DIGESTS))))


def test_a_swapped_segment_is_refused(store):
    one, two = sorted((store / "segments").iterdir())[:2]
    shutil.copy(two, one)
    report = verify(store)
    assert "swapped or renamed" in report.problems[0]


def test_a_damaged_snapshot_falls_back_and_its_rows_come_back_without_embedding(store, caplog):
    newest = sorted(store.glob("snapshot-*.h5"))[-1]
    data = bytearray(newest.read_bytes())
    data[100] ^= 1
    newest.write_bytes(data)
    assert FeatureStore.open(store).rows == 0
    assert "the one before is used" in caplog.text
    with small_segments():
        writer = StoreWriter.open(store, IDENTITY, DIM)
        assert not writer.missing(DIGESTS).any()
        writer.compact()
        writer.close()
    exact(store, set(range(len(DIGESTS))))
