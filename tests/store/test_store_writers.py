"""One writer, many readers: who gets the lock, what a forked child may do, what a reader sees meanwhile."""

import os
import signal
from itertools import count

import numpy as np
import pytest

from pipeline.errors import StoreError
from pipeline.store import FeatureStore, lock, maintain
from pipeline.store import format as format_module
from pipeline.store.maintain import collect, verify
from pipeline.store.reader import newest_snapshot
from pipeline.store.writer import StoreWriter, storable
from store.harness import DIGESTS, DIM, FEATURES, IDENTITY, PROBE, Faults, exact, rounds, small_segments, system


def child_of(function):
    """Run a function in a forked child; return its process id. The child ends with 0 when it returns."""
    child = os.fork()
    if child:
        return child
    try:
        function()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def ended_well(child):
    return os.waitpid(child, 0)[1] == 0


def test_the_second_writer_is_told_who_the_first_is(place):
    started, stop = os.pipe(), os.pipe()

    def hold():
        StoreWriter.open(place / "s", IDENTITY, DIM)
        os.write(started[1], b"x")
        os.read(stop[0], 1)

    child = child_of(hold)
    os.read(started[0], 1)
    with pytest.raises(StoreError, match=rf"is being written by process {child} on '.+' since '.+'; wait until"):
        StoreWriter.open(place / "s", IDENTITY, DIM)
    assert f"process {child} on" in lock.holder(place / "s")
    os.write(stop[1], b"x")
    assert ended_well(child)
    StoreWriter.open(place / "s", IDENTITY, DIM).close()
    assert lock.holder(place / "s") is None


def test_one_process_cannot_open_a_store_twice(place):
    writer = StoreWriter.open(place / "s", IDENTITY, DIM)
    with pytest.raises(StoreError, match="is being written by this process"):
        StoreWriter.open(place / "s", IDENTITY, DIM)
    assert lock.holder(place / "s") == "this process"
    # The refusal must not have given up the lock, as closing any descriptor of the file would.
    child = child_of(lambda: _refused(place / "s"))
    assert ended_well(child)
    writer.close()


def _refused(path):
    with pytest.raises(StoreError, match="is being written by"):
        StoreWriter.open(path, IDENTITY, DIM)


def test_writers_racing_leave_one_store_with_all_rows(place):
    for turn in range(rounds(5, 1000)):
        path = place / f"s{turn}"

        def insist(part, path=path):
            while True:
                try:
                    with system(Faults()), StoreWriter.open(path, IDENTITY, DIM) as writer:
                        writer.append(DIGESTS[part::3], FEATURES[part::3])
                    return
                except StoreError as error:
                    assert "is being written by" in str(error), error  # noqa: PT017

        children = [child_of(lambda part=part: insist(part)) for part in range(3)]
        assert all(ended_well(child) for child in children)
        exact(path, set(range(len(DIGESTS))))


def test_the_lock_of_a_dead_writer_is_free_though_its_forked_child_lives(place):
    ready, stop = os.pipe(), os.pipe()

    def hold_and_fork():
        writer = StoreWriter.open(place / "s", IDENTITY, DIM)
        if os.fork() == 0:
            try:
                writer.append(DIGESTS[:1], FEATURES[:1])
                os.write(ready[1], b"?")
            except RuntimeError:
                os.write(ready[1], b"x")
            writer.close()
            os.read(stop[0], 1)
            os._exit(0)
        signal.pause()

    parent = child_of(hold_and_fork)
    assert os.read(ready[0], 1) == b"x", "a forked child must not write to its parent's store"
    _refused(place / "s")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    with StoreWriter.open(place / "s", IDENTITY, DIM) as writer:
        writer.append(DIGESTS[:2], FEATURES[:2])
    os.write(stop[1], b"x")
    exact(place / "s", {0, 1})


def test_readers_see_whole_states_while_a_writer_appends_compacts_and_collects(place):
    path = place / "s"
    with small_segments():
        with StoreWriter.open(path, IDENTITY, DIM) as writer:
            writer.append(DIGESTS[:3], FEATURES[:3])
        done = os.pipe()
        os.set_blocking(done[0], False)

        def read():
            while True:
                try:
                    finished = os.read(done[0], 1)
                except BlockingIOError:
                    finished = b""
                exact(path, {0, 1, 2})
                if finished:
                    return

        readers = [child_of(read) for _ in range(2)]
        kept = FeatureStore.open(path)
        with system(Faults()):
            for _ in range(rounds(6, 500)):
                for start in range(3, len(DIGESTS), 5):
                    with StoreWriter.open(path, IDENTITY, DIM) as writer:
                        writer.append(DIGESTS[start : start + 5], FEATURES[start : start + 5])
                collect(path, DIGESTS[:3])
        os.write(done[1], b"xx")
        assert all(ended_well(reader) for reader in readers)
    # A reader keeps what it opened, although the files have lost their names since.
    assert kept.read(DIGESTS[:3]).tobytes() == FEATURES[:3].tobytes()


def fields(value, prefix=()):
    for key, item in value.items():
        yield from fields(item, (*prefix, key)) if isinstance(item, dict) else [(*prefix, key)]


@pytest.mark.parametrize("path", list(fields(IDENTITY)), ids=".".join)
def test_each_field_of_the_identity_is_refused_when_it_changes(place, path):
    import copy

    StoreWriter.open(place / "s", IDENTITY, DIM).close()
    other = copy.deepcopy(IDENTITY)
    section = other
    for key in path[:-1]:
        section = section[key]
    old, section[path[-1]] = section[path[-1]], "other"
    line = f"{'.'.join(path)}: the store has {old!r}, this run has 'other'"
    with pytest.raises(StoreError) as caught:
        StoreWriter.open(place / "s", other, DIM)
    assert caught.value.problems == (line,)


def test_dim_dtype_and_an_added_field_are_refused_together(place):
    StoreWriter.open(place / "s", IDENTITY, DIM).close()
    with pytest.raises(StoreError) as caught:
        StoreWriter.open(place / "s", {**IDENTITY, "layer": "x"}, DIM + 1, "float16")
    assert caught.value.problems == (
        "layer: the store has nothing, this run has 'x'",
        f"dim: the store has {DIM}, this run has {DIM + 1}",
        "dtype: the store has '<f4', this run has '<f2'",
    )


def test_probe_vectors_allow_rounding_and_no_drift(place):
    StoreWriter.open(place / "s", IDENTITY, DIM, probe=PROBE).close()
    StoreWriter.open(place / "s", IDENTITY, DIM, probe=PROBE * np.float32(1 + 1e-5)).close()
    with pytest.raises(StoreError, match=r"probe image 0: cosine 1\.000000 .*, largest difference 0\.\d+ of the root"):
        StoreWriter.open(place / "s", IDENTITY, DIM, probe=PROBE * np.float32(1.05))
    with pytest.raises(StoreError, match=r"probe image 1: cosine -0\.2"):
        StoreWriter.open(place / "s", IDENTITY, DIM, probe=PROBE[[0, 0]])


def test_numbers_that_are_not_finite_are_refused_by_name(place):
    features = FEATURES[:4].copy()
    features[1, 2], features[3, 0] = np.nan, np.inf
    with StoreWriter.open(place / "s", IDENTITY, DIM) as writer:
        assert storable(features, writer.store_type).tolist() == [True, False, True, False]
        with pytest.raises(StoreError, match="2 of 4 feature vectors hold numbers that are not finite") as caught:
            writer.append(DIGESTS[:4], features)
        from pipeline.io.digests import digests_to_hex

        assert caught.value.problems == tuple(f"content {text}" for text in digests_to_hex(DIGESTS[[1, 3]]))
    assert FeatureStore.open(place / "s").rows == 0


def test_float16_overflow_is_not_finite(place):
    with StoreWriter.open(place / "s", IDENTITY, DIM, "float16") as writer:
        assert storable(np.full((1, DIM), 1e6), writer.store_type).tolist() == [False]
        assert writer.append(DIGESTS[:1], FEATURES[:1]) == 1
    read = FeatureStore.open(place / "s").read(DIGESTS[:1])
    assert read.dtype == np.float32
    assert np.array_equal(read, FEATURES[:1].astype(np.float16).astype(np.float32))


def test_a_lock_is_never_taken_through_a_link_and_no_pipe_is_waited_for(place, tmp_path):
    diary = tmp_path / "diary.txt"
    diary.write_text("not yours")
    (place / "s").mkdir()
    (place / "s" / "LOCK").symlink_to(diary)
    with pytest.raises(
        StoreError, match=r"s/LOCK: is no ordinary file \(Too many levels of symbolic links\); delete it"
    ):
        StoreWriter.open(place / "s", IDENTITY, DIM)
    assert diary.read_text() == "not yours"
    (place / "s" / "LOCK").unlink()
    os.mkfifo(place / "s" / "LOCK")
    with pytest.raises(StoreError, match=r"s/LOCK: is no ordinary file \(It is not an ordinary file\); delete it"):
        StoreWriter.open(place / "s", IDENTITY, DIM)
    assert lock.holder(place / "s") is None


@pytest.mark.parametrize("name", ["segments", "journal", "tmp", "quarantine"])
def test_a_store_whose_folders_are_links_is_not_written(place, tmp_path, name):
    other = tmp_path / "photos"
    other.mkdir()
    (other / "00000001.h5").write_bytes(b"not yours")
    (place / "s").mkdir()
    (place / "s" / name).symlink_to(other)
    with pytest.raises(
        StoreError, match=f"s/{name}: is a symbolic link, expected a folder of the store; nothing was changed"
    ):
        StoreWriter.open(place / "s", IDENTITY, DIM)
    assert (other / "00000001.h5").read_bytes() == b"not yours"


@pytest.mark.parametrize("step", ["grow", "shrink"])
def test_verify_beside_a_writer_finds_no_damage(place, monkeypatch, step):
    """Whenever verify opens a file, the writer has published a newer state since it looked, for the first three times."""
    with small_segments(), StoreWriter.open(place / "s", IDENTITY, DIM) as writer:
        writer.append(DIGESTS, FEATURES)
    turns = iter(range(3))
    real = maintain.open_snapshot

    def behind_a_writer(path):
        if (turn := next(turns, None)) is not None:
            with small_segments(), StoreWriter.open(place / "s", IDENTITY, DIM) as writer:
                if step == "shrink":
                    writer.rewrite(lambda file: np.arange(len(file.bulk)) % 2 == turn % 2)
                else:
                    writer.append(DIGESTS[:1] + np.uint64(turn + 1), FEATURES[:1])
                    writer.compact()
                    writer.append(DIGESTS[:1] + np.uint64(turn + 100), FEATURES[:1])
        return real(path)

    monkeypatch.setattr(maintain, "open_snapshot", behind_a_writer)
    report = verify(place / "s", full=True)
    assert report.problems == ()
    assert report.generation == newest_snapshot(place / "s").generation


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libhdf5_writes_or_reads_waits_until_it_has_done(place, monkeypatch, number):
    """The signal comes at every call that libhdf5 makes back into Python, one after the other; none is lost or trips it."""

    def handle(number, frame):
        raise KeyboardInterrupt(number)

    before = signal.signal(number, handle)
    calls, wanted = iter(()), 0
    real = format_module.HeadFile.write

    def interrupted(self, data):
        if next(calls) == wanted:
            os.kill(os.getpid(), number)
        return real(self, data)

    monkeypatch.setattr(format_module.HeadFile, "write", interrupted)

    def compose():
        nonlocal calls
        calls = count()
        format_module._head("rows", {"rows": 1}, {"canary": FEATURES[:2]}, "<u8", (4, 3))

    try:
        wanted = -1
        compose()
        total = next(calls)
        assert total > 3
        for turn in range(total):
            wanted = turn
            with pytest.raises(KeyboardInterrupt) as caught:
                compose()
            assert caught.value.args == (number,)
            assert next(calls) == total  # libhdf5 ended its work first
    finally:
        signal.signal(number, before)
