"""Embedding what is missing: batches through the networks into the stores, committed whatever happens."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.dataset import DatasetIndex, LedgerEntry, record_failures
from pipeline.digests import Digests, digests_to_hex
from pipeline.embedders import Embedder
from pipeline.errors import BackboneError
from pipeline.extract_features.sources import Source
from pipeline.extract_features.targets import Contents, Target
from pipeline.feed import Batch, Feeder, Item
from pipeline.images import Preprocessing, policy_key
from pipeline.memory import is_out_of_memory, keep_freed_memory
from pipeline.progress import bar
from pipeline.store import StoreWriter

logger = logging.getLogger(__name__)

BATCH_SIZES = {"cpu": 32, "mps": 64, "cuda": 256}
"""`auto`: on a processor the activations of 16 to 32 images still fit its cache, a GPU wants many at once."""

MAX_WORKERS = 16

SUMMED_OVER_THREADS = ("read", "decode")


@dataclass
class Work:
    """What was done, and where the time went."""

    images: int = 0
    """Distinct contents that went through at least one network or recipe."""
    vectors: dict[str, int] = field(default_factory=dict)
    """Embedding -> vectors that are new in its store."""
    failures: list[LedgerEntry] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    """Images that could not be read this time, with the reason: gone, or changed since the scan."""
    loop_seconds: float = 0.0
    workers: int = 1
    """Threads that read and decoded."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("start-up", "read", "decode", "network", "write"), 0.0)
    )
    """Per kind of work; reading and decoding are summed over threads and go on beside the network."""
    network_seconds: dict[str, float] = field(default_factory=dict)
    """Embedding -> seconds per image in its network."""

    def add_vectors(self, embedding: str, count: int) -> None:
        """Count new vectors of an embedding."""
        self.vectors[embedding] = self.vectors.get(embedding, 0) + count


@dataclass
class Output:
    """One output of a source on its way into its store."""

    number: int
    name: str
    writer: StoreWriter
    missing: NDArray[np.bool_]
    """Contents the store does not have, shape (n,)."""


@dataclass
class Lane:
    """A source at work: its live embedder and the outputs that are kept."""

    embedder: Embedder
    outputs: list[Output]
    preprocessing: int
    limit: int
    """Images in one forward pass; halves when memory runs out."""
    seconds: float = 0.0
    images: int = 0

    def wants(self, content: int) -> bool:
        """Whether any of its stores misses a content."""
        return any(output.missing[content] for output in self.outputs)


def embed(
    targets: Sequence[Target], contents: Contents, index: DatasetIndex, config: Config, ledger_folder: Path
) -> Work:
    """Embed the pending contents of some targets into their stores.

    A signal to stop ends the run after the batch in hand, with all finished rows committed.

    Raises
    ------
    KeyboardInterrupt
        After such a stop; its argument is the signal's number.
    StoreError, BackboneError, DatasetError
        With all finished rows committed as well.
    """
    work = Work(workers=_workers(config))
    began = time.perf_counter()
    keep_freed_memory()
    with ExitStack() as stack:
        lanes, preprocessings = _open_lanes(targets, contents, config, stack)
        count, items = _items(lanes, contents, index)
        size = max(lane.limit for lane in lanes)
        feeder = Feeder(index.root, config.dataset.max_pixels, preprocessings, size, work.workers)
        work.seconds["start-up"] = time.perf_counter() - began
        began = time.perf_counter()
        try:
            with bar(count, "images", "embedding") as progress, _stop_requested() as stopped:
                for batch in feeder.batches(items):
                    _embed_batch(batch, lanes, contents, work)
                    progress.update(len(batch.items))
                    if (number := stopped()) is not None:
                        raise KeyboardInterrupt(number)
        finally:
            # Also after an error or a signal: what was embedded is not to be embedded again.
            write_began = time.perf_counter()
            for output in (output for lane in lanes for output in lane.outputs):
                output.writer.commit()
            policy = policy_key(config.dataset.max_pixels)
            record_failures(ledger_folder, [entry._replace(policy=policy) for entry in work.failures])
            work.seconds["write"] += time.perf_counter() - write_began
        write_began = time.perf_counter()
        stack.close()  # seals
        work.seconds["write"] += time.perf_counter() - write_began
        work.loop_seconds = time.perf_counter() - began
    for lane in lanes:
        work.seconds["network"] += lane.seconds
        work.network_seconds |= {output.name: lane.seconds / lane.images for output in lane.outputs if lane.images}
    return work


def _open_lanes(
    targets: Sequence[Target], contents: Contents, config: Config, stack: ExitStack
) -> tuple[list[Lane], tuple[Preprocessing, ...]]:
    """Load the networks and open their stores for writing; also return the distinct preprocessings."""
    by_source: dict[int, tuple[Source, list[Target]]] = {}
    for target in targets:
        by_source.setdefault(id(target.source), (target.source, []))[1].append(target)
    lanes: list[Lane] = []
    preprocessings: dict[Preprocessing, int] = {}
    for source, own in by_source.values():
        embedder = source.load()
        place = preprocessings.setdefault(embedder.preprocessing, len(preprocessings))
        outputs = []
        for target in own:
            canary = embedder.canary[target.output]
            writer = StoreWriter.open(target.path, target.spec.identity(), target.spec.dim, canary=canary)
            stack.enter_context(writer)
            # The writer also knows the rows of a run that was killed before it could seal them.
            missing = writer.missing(contents.digests) & ~contents.failed
            outputs.append(Output(target.output, target.spec.name, writer, missing))
        lanes.append(Lane(embedder, outputs, place, _batch_size(config, embedder)))
    return lanes, tuple(preprocessings)


def _items(lanes: Sequence[Lane], contents: Contents, index: DatasetIndex) -> tuple[int, Iterator[Item]]:
    """The images to read, each once, with the preprocessings it has to go through: their number, and one at a time."""
    needed = np.zeros(len(contents.rows), dtype=bool)
    for output in (output for lane in lanes for output in lane.outputs):
        needed |= output.missing

    def items() -> Iterator[Item]:
        for content in map(int, np.flatnonzero(needed)):
            wanted = tuple(sorted({lane.preprocessing for lane in lanes if lane.wants(content)}))
            digest = contents.digests[content].tobytes()
            yield Item(content, str(index.paths[contents.rows[content]]), digest, wanted)

    return int(needed.sum()), items()


def _embed_batch(batch: Batch, lanes: Sequence[Lane], contents: Contents, work: Work) -> None:
    """Put one batch through every lane that wants some of it, and note what could not be read."""
    work.seconds["read"] += batch.read_seconds
    work.seconds["decode"] += batch.decode_seconds
    for row, problem in sorted(batch.problems.items()):
        item = batch.items[row]
        if problem.status == "unavailable":
            work.unavailable.append(f"{item.path}: {problem.reason}")
        else:
            work.failures.append(_failure(item.path, contents.digests[item.content], problem.status, problem.reason))
    work.images += len(batch.items) - len(batch.problems)
    for lane in lanes:
        chosen = [row for row, item in enumerate(batch.items) if row not in batch.problems and lane.wants(item.content)]
        if not chosen:
            continue
        began = time.perf_counter()
        pixels = batch.pixels[lane.preprocessing]
        vectors = _embed(lane, pixels[: len(chosen)] if len(chosen) == len(batch.items) else pixels[chosen])
        lane.seconds += time.perf_counter() - began
        lane.images += len(chosen)
        began = time.perf_counter()
        numbers = np.array([batch.items[row].content for row in chosen])
        for output in lane.outputs:
            _append(output, numbers, vectors[output.number], [batch.items[row].path for row in chosen], contents, work)
        work.seconds["write"] += time.perf_counter() - began


def _append(
    output: Output,
    numbers: NDArray[np.int64],
    vectors: NDArray[np.float32],
    paths: Sequence[str],
    contents: Contents,
    work: Work,
) -> None:
    """Store the vectors an output misses; one that is not finite is a failure of its image."""
    wanted = output.missing[numbers]
    storable = output.writer.storable(vectors)
    for place in np.flatnonzero(wanted & ~storable).tolist():
        reason = f"{output.name} gives it a vector that is not finite"
        work.failures.append(_failure(paths[place], contents.digests[numbers[place]], "not_finite", reason))
    keep = wanted & storable
    work.add_vectors(output.name, output.writer.append(contents.digests[numbers[keep]], vectors[keep]))


def _failure(path: str, digest: Digests, status: str, reason: str) -> LedgerEntry:
    return LedgerEntry(path, digests_to_hex(digest.reshape(1, 2))[0], status, reason)


def _embed(lane: Lane, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], ...]:
    """Embed in passes of at most the lane's limit, which halves when memory runs out.

    Raises
    ------
    BackboneError
        When not even one image fits.
    """
    parts: list[tuple[NDArray[np.float32], ...]] = []
    done = 0
    while done < len(pixels):
        try:
            parts.append(lane.embedder.embed(pixels[done : done + lane.limit]))
            done += min(lane.limit, len(pixels) - done)
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback still holds the memory.
        if lane.limit == 1:
            raise BackboneError("not even one image fits into memory; use a smaller network or preprocessing.crop")
        lane.limit = max(1, min(lane.limit, len(pixels)) // 2)
        _free_memory()
        logger.warning("memory ran out; going on with %d images at a time", lane.limit)
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def _batch_size(config: Config, embedder: Embedder) -> int:
    asked = config.extraction.batch_size
    return BATCH_SIZES.get(str(getattr(embedder, "device", "cpu")).partition(":")[0], 32) if asked == "auto" else asked


def _workers(config: Config) -> int:
    asked = config.extraction.workers
    return min(os.cpu_count() or 1, MAX_WORKERS) if asked == "auto" else asked


@contextmanager
def _stop_requested() -> Iterator[Callable[[], int | None]]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the batch in hand; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt(number)
        received.append(number)
        logger.info("stopping after the batch in hand ...")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
