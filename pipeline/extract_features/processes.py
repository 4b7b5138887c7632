"""Several processes that embed and one that writes: how `extraction.processes` is carried out.

    parent   deals batches of items round robin, takes the results in the same order, and alone writes to the stores
    worker   a process with networks of its own: reads, decodes, embeds its batches, and sends the vectors back

A worker is a fresh interpreter at the other end of a socket. The socket is the only bond: a worker whose parent is gone, in
whatever way, reads its end and leaves; a parent whose worker is gone reads its end and says so.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from logging.handlers import QueueHandler
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

from pipeline import backbone
from pipeline.errors import BackboneError, PipelineError, StoreError
from pipeline.extract_features import lanes
from pipeline.extract_features.lanes import Finished, Job, Loaded, Networks
from pipeline.extract_features.sources import Source
from pipeline.feed import AHEAD, Item
from pipeline.memory import keep_freed_memory
from pipeline.store import check_canary, differences

logger = logging.getLogger(__name__)

DEALT = AHEAD + 2
"""Batches a worker has been dealt and not yet delivered: what it reads ahead, and some so that it need not wait for more."""

GRACE_SECONDS = 10.0
"""How long a worker that has hung up may take to end."""

CODE = "import sys; sys.path[:] = {path}; from pipeline.extract_features.processes import work; work({socket})"


@dataclass(frozen=True)
class Share:
    """A worker's first message: its job, its share of the processor, and what of its log is shown."""

    job: Job
    processes: int
    log_level: int


@dataclass(frozen=True)
class Failure:
    """Instead of a result: an error the user can solve, or the traceback of any other."""

    error: PipelineError | str


@dataclass(frozen=True)
class Worker:
    """A worker as its parent sees it."""

    name: str
    process: subprocess.Popen[bytes]
    connection: Connection


def how_many(sources: Sequence[Source], images: int) -> int:
    """Return how many processes are to embed some images: what is asked for, but at least a batch for each.

    `auto` is one per GPU that can be seen, where no single one is named, and else one.
    """
    extraction = sources[0].config.extraction
    asked = extraction.processes
    if asked == 1 or (asked == "auto" and extraction.device not in {"auto", "cuda"}):
        return 1
    devices = _devices(sources)
    if asked == "auto":
        asked = len(devices)
    return max(1, min(asked, math.ceil(images / backbone.choose_batch_size(extraction.batch_size, devices[0]))))


def _devices(sources: Sequence[Source]) -> list[str]:
    """Every GPU where any will do, else the one device."""
    if all(source.section is None for source in sources):
        return ["cpu"]  # baselines need no torch, and asking for a device would import it
    return backbone.devices(sources[0].config.extraction.device)


# ---- the parent


@contextmanager
def spread(sources: Sequence[Source], root: Path, count: int) -> Iterator[Networks]:
    """Load the networks of some sources into that many new processes; they end with the context.

    Raises
    ------
    BackboneError
        When a network is not to be had, or is another one in another process.
    PipelineError
        When a process has died.
    """
    threads = lanes.workers(sources[0].config.extraction, count)
    level = logging.getLogger("pipeline").getEffectiveLevel()
    devices = _devices(sources)
    for source in sources:
        source.embedder = None  # what was loaded here to learn its specs only takes memory from now on
    lanes.free_memory()
    team: list[Worker] = []
    try:
        for number in range(count):
            device = devices[number % len(devices)]
            own = tuple(_on(device, source) for source in sources)
            team.append(_begin(f"process {number + 1} of {count} on {device}"))
            _send(team[-1], Share(Job(own, root, threads), count, level))
        loaded = [_receive(worker) for worker in team]
        _require_the_same(team, loaded)
        size = loaded[0].batch_size
        for worker in team:
            _send(worker, size)
        yield Networks(loaded[0].canaries, lambda items: _deal(team, items, size), threads * count, count)
    finally:
        for worker in team:  # they own nothing that could be lost
            worker.process.kill()
            worker.connection.close()
        for worker in team:
            worker.process.wait()


def _on(device: str, source: Source) -> Source:
    """The source for another process: its network, if it has one, on a device."""
    extraction = source.config.extraction.model_copy(update={"device": device})
    return replace(source, config=source.config.model_copy(update={"extraction": extraction}), embedder=None)


def _begin(name: str) -> Worker:
    """Start an interpreter that imports nothing of the caller's, in a session of its own: Ctrl-C is for the parent."""
    mine, its = Pipe()
    with its:
        code = CODE.format(path=sys.path, socket=its.fileno())
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, pass_fds=(its.fileno(),), stdin=subprocess.DEVNULL, start_new_session=True)
    return Worker(name, process, mine)


def _deal(team: Sequence[Worker], items: Iterable[Item], size: int) -> Iterator[Finished]:
    """Deal batches round robin, some ahead, and yield what becomes of them in that order."""
    rest = iter(items)
    batches = iter(lambda: list(islice(rest, size)), [])
    owed: deque[Worker] = deque()

    def deal(worker: Worker) -> None:
        batch = next(batches, None)
        _send(worker, batch)  # None ends its work
        if batch is not None:
            owed.append(worker)

    for _ in range(DEALT):
        for worker in team:
            deal(worker)
    while owed:
        worker = owed.popleft()
        finished = cast(Finished, _receive(worker))
        deal(worker)
        yield finished


def _send(worker: Worker, message: object) -> None:
    with suppress(OSError):  # it has died: what it said last, or its exit code, tells more, and is asked for next
        worker.connection.send(message)


def _receive(worker: Worker) -> Any:
    """Wait for a worker's next result, and show what it logs meanwhile."""
    while True:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            raise _death(worker) from None
        if isinstance(message, Failure):
            if isinstance(message.error, PipelineError):
                raise message.error
            raise RuntimeError(f"{worker.name} failed:\n{message.error}")
        if not isinstance(message, logging.LogRecord):
            return message
        if (log := logging.getLogger(message.name)).isEnabledFor(message.levelno):
            log.handle(message)


def _death(worker: Worker) -> PipelineError:
    try:
        code = worker.process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return PipelineError(f"{worker.name} hung up without ending; run again, with extraction.processes: 1")
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}, most often because memory ran out"
    else:
        how = f"ended with exit code {code}; what it said last is above"
    return PipelineError(
        f"{worker.name} {how}; the features that were finished are kept: run again, with fewer extraction.processes or a "
        "smaller extraction.batch_size"
    )


def _require_the_same(team: Sequence[Worker], loaded: Sequence[Loaded]) -> None:
    """See that all processes make the same vectors: two kinds of GPU may not.

    Raises
    ------
    BackboneError
    """
    first, specs, canaries = team[0], chain(*loaded[0].specs), chain(*loaded[0].canaries)
    references = list(zip(specs, canaries, strict=True))
    for worker, own in zip(team[1:], loaded[1:], strict=True):
        for (spec, canary), mine, vectors in zip(references, chain(*own.specs), chain(*own.canaries), strict=True):
            problems = tuple(differences(spec.identity(), mine.identity(), first.name, worker.name))
            if not problems:
                try:
                    check_canary(canary, vectors, worker.name)
                except StoreError as error:
                    problems = error.problems or (error.message,)
            if problems:
                raise BackboneError(
                    f"{worker.name} makes other vectors than {first.name}; name one device with extraction.device, such as "
                    "cuda:0, or what both compute in with extraction.precision",
                    problems,
                )


# ---- a worker


def work(socket: int) -> None:
    """Do a parent's bidding at the other end of a socket until it has no more."""
    connection = Connection(socket)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            connection.send(message)

    share: Share = inbox.get()
    _log_to(send, share.log_level)
    try:
        keep_freed_memory()
        if any(source.section is not None for source in share.job.sources):
            backbone.divide_threads(share.processes)
        embedders, loaded = lanes.open_lanes(share.job)
        send(loaded)
        size: int = inbox.get()
        items = (item for batch in iter(inbox.get, None) for item in batch)
        for finished in lanes.embed(share.job, embedders, size, items):
            send(finished)
    except PipelineError as error:
        send(Failure(error))
    except Exception:
        send(Failure(traceback.format_exc()))


def _listen(connection: Connection, inbox: SimpleQueue[Any]) -> None:
    """Always read, so that the parent's writing never waits for this process; without a parent there is nothing to do."""
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)


def _log_to(send: Any, level: int) -> None:
    logger = logging.getLogger("pipeline")
    logger.handlers[:] = [QueueHandler(cast(Any, SimpleNamespace(put_nowait=send)))]
    logger.setLevel(level)
    logger.propagate = False
