"""What the store's proofs share: a small run, a way to break any of its system calls, and the judge of what is left."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.errors import StoreError
from pipeline.io import files
from pipeline.store import FeatureStore
from pipeline.store import writer as writer_module
from pipeline.store.maintain import collect, verify
from pipeline.store.writer import StoreWriter

DIM = 5
ROWS = 22
IDENTITY = {"architecture": "tiny", "preprocessing": {"resize": 8, "crop": 8}, "precision": "fp32"}
_rng = np.random.default_rng(7)
DIGESTS = _rng.integers(0, 2**64, (ROWS, 2), dtype=np.uint64)
FEATURES = _rng.normal(size=(ROWS, DIM)).astype(np.float32)
PROBE = _rng.normal(size=(2, DIM)).astype(np.float32)
FIRST_RUN = 14
BATCH = 7

Work = Callable[[Path, set[int]], None]


@contextmanager
def small_segments() -> Iterator[None]:
    """Segments of ten rows, merged when three small ones have piled up, so that a tiny run does all there is to do."""
    old = {name: getattr(writer_module, name) for name in ("SEGMENT_BYTES", "SMALL_BYTES", "MAX_SMALL")}
    writer_module.SEGMENT_BYTES, writer_module.SMALL_BYTES, writer_module.MAX_SMALL = 10 * DIM * 4, 1 << 20, 3
    try:
        yield
    finally:
        for name, value in old.items():
            setattr(writer_module, name, value)


def add(path: Path, acked: set[int], rows: int = ROWS) -> None:
    """One run of stage one: embed what is missing, commit each batch, compact. `acked` gets the rows that are promised."""
    with StoreWriter.open(path, IDENTITY, DIM, probe=PROBE) as writer:
        wanted = np.flatnonzero(writer.missing(DIGESTS[:rows]))
        acked.update(set(range(rows)) - set(wanted.tolist()))
        for start in range(0, len(wanted), BATCH):
            batch = wanted[start : start + BATCH]
            writer.append(DIGESTS[batch], FEATURES[batch])
            writer.commit()
            acked.update(batch.tolist())


def two_runs(path: Path, acked: set[int]) -> None:
    """A first run, and a second after images were added; the second merges segments."""
    if not compacted(path, FIRST_RUN):
        add(path, acked, FIRST_RUN)
    add(path, acked)


def compacted(path: Path, rows: int) -> bool:
    """Whether a run over so many rows has ended, so that nobody starts it again."""
    try:
        return not FeatureStore.open(path).missing(DIGESTS[:rows]).any()
    except StoreError:
        return False


def prepared(path: Path) -> None:
    """A store with all rows, ready to be collected."""
    two_runs(path, set())


LIVE = np.r_[2:9, 12:ROWS]


def drop_stale(path: Path, acked: set[int]) -> None:
    """Collect the rows that are not live; the live ones are promised throughout."""
    acked.update(LIVE.tolist())
    collect(path, DIGESTS[LIVE])


class Died(BaseException):
    """The process ended here, as far as the file system can tell."""


@dataclass
class Faults:
    """Replaces `files.SYSTEM`: counts mutating calls, and breaks the n-th in a chosen way."""

    at: int = -1
    kind: str = "none"
    """none, die, torn, error, errors (from then on), short."""
    number: int = errno.ENOSPC
    count: int = 0
    dead: bool = False
    names: list[str] = field(default_factory=list)

    def call(self, name: str, real: Callable[..., object], *arguments: object) -> object:
        if self.dead:
            raise Died
        if name == "close" or (name == "open" and not int(arguments[1]) & os.O_CREAT):  # type: ignore[call-overload]
            return real(*arguments)
        here, self.count = self.count, self.count + 1
        self.names.append(name)
        if here == self.at and self.kind in ("die", "torn"):
            self.dead = True
            if self.kind == "torn":
                _half(name, real, *arguments)
            raise Died
        if (here == self.at and self.kind == "error") or (here >= self.at >= 0 and self.kind == "errors"):
            raise OSError(self.number, os.strerror(self.number))
        if here == self.at and self.kind == "short" and name == "write":
            return real(arguments[0], memoryview(arguments[1])[: max(1, len(arguments[1]) // 2)])  # type: ignore[arg-type]
        # A process that dies does not lose what the kernel has, so syncing for real would only cost time.
        return None if name == "fsync" else real(*arguments)


def _half(name: str, real: Callable[..., object], *arguments: object) -> None:
    """Do half of a write, or all of a call that cannot be halved."""
    if name == "write":
        real(arguments[0], memoryview(arguments[1])[: len(arguments[1]) // 2])  # type: ignore[arg-type]
    elif name != "fsync":
        result = real(*arguments)
        if name == "open":
            os.close(int(result))  # type: ignore[call-overload]


@contextmanager
def system(faults: Faults) -> Iterator[Faults]:
    """Let every call of `files` go through `faults`."""
    real = dict(files.SYSTEM)

    def through(name: str) -> Callable[..., object]:
        return lambda *arguments: faults.call(name, real[name], *arguments)

    files.SYSTEM.update({name: through(name) for name in real})
    try:
        yield faults
    finally:
        files.SYSTEM.update(real)


def calls(work: Work, path: Path) -> list[str]:
    """The mutating calls of a run, in order."""
    with system(Faults()) as faults:
        work(path, set())
    return faults.names


def promised(path: Path, acked: set[int]) -> None:
    """Every row that was promised is there with every bit right, and nothing is damaged."""
    if not acked and not list(path.glob("snapshot-*.h5")):
        return
    report = verify(path, full=True)
    assert report.ok, report.problems
    with system(Faults()):
        writer = StoreWriter.open(path, IDENTITY, DIM)
        lost = writer.missing(DIGESTS[sorted(acked)])
        writer.close()  # without compacting: the run that follows must find what the death left
    assert not lost.any(), "a committed row is gone"
    exact(path)


def exact(path: Path, acked: set[int] | None = None) -> None:
    """Whatever the store says it has, it has with every bit right; `acked` at least."""
    store = FeatureStore.open(path)
    have = np.flatnonzero(~store.missing(DIGESTS))
    assert store.rows == len(have), "a row of nobody"
    assert acked is None or acked <= set(have.tolist())
    assert store.read(DIGESTS[have]).tobytes() == FEATURES[have].tobytes()


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock, with its bytes."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "LOCK"
    }


def rounds(short: int, long: int) -> int:
    """How often a proof is repeated: `MANYHEADS_PROOFS=long` is set by tests/proofs."""
    return long if os.environ.get("MANYHEADS_PROOFS") == "long" else short


def generator(name: str) -> random.Random:
    """Random numbers that are the same in every run of a test."""
    return random.Random(name)
