"""A run that dies: at random, before or half-way through each of its system calls; or is told of errors by them."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.store import FeatureStore
from pipeline.store.maintain import verify
from pipeline.store.writer import StoreWriter
from store.harness import (
    DIGESTS,
    DIM,
    FEATURES,
    IDENTITY,
    LIVE,
    ROWS,
    Died,
    Faults,
    add,
    calls,
    drop_stale,
    exact,
    generator,
    prepared,
    promised,
    rounds,
    small_segments,
    system,
    tree,
    two_runs,
)


@pytest.fixture(autouse=True)
def _small():
    with small_segments():
        yield


@pytest.fixture
def finished(place):
    """The files of a run that nothing interrupted."""
    with system(Faults()):
        two_runs(place / "finished.store", set())
    return tree(place / "finished.store")


def test_a_run_leaves_what_it_was_given(place, finished):
    two_runs(place / "s", set())  # with the real fsync
    exact(place / "s", set(range(ROWS)))
    assert tree(place / "s") == finished
    assert sum(name.startswith("segments/") for name in finished) > 2, "the run should make several segments"


def where(names, kind):
    """The calls worth breaking: only a write can be done by half, and after any other the next call is the place."""
    return [at for at, name in enumerate(names) if kind == "die" or name == "write"]


@pytest.mark.parametrize("kind", ["die", "torn"])
def test_die_at_every_call_of_two_runs(place, finished, kind):
    names = calls(two_runs, place / "count")
    assert len(names) > 60
    for at in where(names, kind):
        path, acked = place / "s", set()
        with system(Faults(at, kind)), pytest.raises(Died):
            two_runs(path, acked)
        if path.exists():
            promised(path, acked)
        with system(Faults()):
            two_runs(path, set())
        assert tree(path) == finished, f"call {at}"
        shutil.rmtree(path)


@pytest.mark.parametrize("kind", ["die", "torn"])
def test_die_at_every_call_of_collecting(place, kind):
    start = place / "start"
    with system(Faults()):
        prepared(start)
        shutil.copytree(start, place / "end")
        names = calls(drop_stale, place / "end")
    for at in where(names, kind):
        path, acked = place / "s", set()
        shutil.copytree(start, path)
        with system(Faults(at, kind)), pytest.raises(Died):
            drop_stale(path, acked)
        promised(path, acked)
        with system(Faults()):
            drop_stale(path, set())
        assert tree(path) == tree(place / "end"), f"call {at}"
        assert FeatureStore.open(path).rows == len(LIVE)
        shutil.rmtree(path)


FAULTS = [
    ("error", errno.ENOSPC),
    ("errors", errno.ENOSPC),
    ("error", errno.EIO),
    ("errors", errno.EIO),
    ("error", errno.EDQUOT),
    ("errors", errno.EDQUOT),
]


@pytest.mark.parametrize("work", [two_runs, drop_stale])
def test_an_error_at_every_call(place, work):
    start = place / "start"
    with system(Faults()):
        if work is drop_stale:
            prepared(start)
            shutil.copytree(start, place / "count")
        names = calls(work, place / "count")
        wanted = tree(place / "count")
    for at in range(len(names)):
        # The short count takes turns.
        for kind, number in FAULTS if rounds(0, 1) else FAULTS[at % 6 : at % 6 + 1]:
            path, acked = place / "s", set()
            if start.exists():
                shutil.copytree(start, path)
            with system(Faults(at, kind, number)):
                try:
                    work(path, acked)
                except StoreError as error:
                    said = str(error)
                else:
                    said = None
            assert said is None or (os.strerror(number) in said and "all rows committed before are safe" in said)
            if acked:
                promised(path, acked)
            assert not path.exists() or kind == "errors" or not list((path / "tmp").glob("*"))
            with system(Faults()):
                work(path, set())
            assert tree(path) == wanted, f"call {at}, {kind} {number}"
            shutil.rmtree(path)


def test_a_short_write_at_every_call_changes_nothing(place, finished):
    for at in where(calls(two_runs, place / "count"), "short"):
        with system(Faults(at, "short")):
            two_runs(place / "s", set())
        assert tree(place / "s") == finished
        shutil.rmtree(place / "s")


def test_kill_at_random_and_resume(place, finished):
    """In a process of its own: forked from one that holds gigabytes, a child would be killed before it has begun."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        alone.submit(_kill_and_resume, place / "s", rounds(50, 2000), finished).result()


MOST_KILLS = 8
"""Of one run: the next start is left alone, so that every run ends, however fast the machine is."""


def _kill_and_resume(path, total, finished):
    """Kill the two runs after a random share of the time that they take when nobody does, and start them again."""
    random = generator("kill")
    with small_segments():
        undisturbed = _seconds_of_a_run(path)
        kills = 0
        while kills < total:
            shutil.rmtree(path)
            for _ in range(MOST_KILLS):
                if not _killed(path, random.uniform(0, undisturbed)):
                    break
                kills += 1
                if list(path.glob("snapshot-*.h5")):
                    assert verify(path, full=True).ok
                    exact(path)
            else:
                _seconds_of_a_run(path)
            assert tree(path) == finished


def _seconds_of_a_run(path):
    """Let a child do both runs to their end."""
    start = time.monotonic()
    child = os.fork() or _quiet_child(path)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return time.monotonic() - start


def _killed(path, seconds):
    """Kill a child that does both runs; whether it was killed before it had ended."""
    child = os.fork() or _quiet_child(path)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _quiet_child(path):
    try:
        with system(Faults()):
            two_runs(path, set())
        os._exit(0)
    except BaseException:
        os._exit(3)


def test_a_failed_sync_is_not_tried_again(place):
    """The kernel may drop the pages and call the second sync a success."""
    synced = []
    real = files.SYSTEM["fsync"]

    def fail(descriptor):
        synced.append(descriptor)
        raise OSError(errno.EIO, "Input/output error")

    files.SYSTEM["fsync"] = fail
    try:
        with pytest.raises(OSError, match="Input/output"):
            files.write_atomic(place / "x", b"abc")
    finally:
        files.SYSTEM["fsync"] = real
    assert len(synced) == 1
    assert list(place.iterdir()) == []


def test_leaving_by_an_error_keeps_what_was_committed(place):
    acked: set[int] = set()

    def interrupted():
        with StoreWriter.open(place / "s", IDENTITY, DIM) as writer:
            writer.append(DIGESTS[:4], FEATURES[:4])
            writer.commit()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    add(place / "s", acked)
    assert acked == set(range(ROWS))
    exact(place / "s", acked)
