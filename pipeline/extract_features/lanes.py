"""From images to vectors: every network of a run has a lane, and a batch goes through those that want some of it.

This is the one way, in whichever process it runs; nothing here knows of stores.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import backbone
from pipeline.config import ExtractionConfig
from pipeline.embedders import Embedder
from pipeline.embedding import EmbeddingSpec
from pipeline.errors import BackboneError
from pipeline.extract_features.sources import Source
from pipeline.feed import Batch, Feeder, Item
from pipeline.images import gpu_decoder
from pipeline.memory import is_out_of_memory

logger = logging.getLogger(__name__)

MAX_WORKERS = 16

Vectors = tuple[NDArray[np.float32], ...]
"""One array of shape (n, dim), float32, per output of a source."""


@dataclass(frozen=True)
class Job:
    """What turns items into vectors: the sources, the folder of the images, and the threads that read and decode."""

    sources: tuple[Source, ...]
    root: Path
    workers: int


@dataclass
class Lane:
    """A live embedder, and how many images it is given at a time; halves when memory runs out."""

    embedder: Embedder
    limit: int


@dataclass(frozen=True)
class Part:
    """What one lane made of a batch."""

    rows: NDArray[np.int64]
    """Which of the batch's items."""
    vectors: Vectors
    seconds: float
    """How long it held up the loop."""


@dataclass(frozen=True)
class Finished:
    """A batch that has been through the lanes; plain data, which can travel between processes."""

    items: Sequence[Item]
    problems: Mapping[int, tuple[str, str]]
    """Item -> status and reason of an image that cannot be used, as in `ImageProblem`."""
    parts: Sequence[Part | None]
    """One per lane; None where it wanted nothing of the batch."""
    hashes: Mapping[int, NDArray[np.uint8]]
    """Item -> perceptual hash."""
    read_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Loaded:
    """What is known of the lanes once their networks are loaded."""

    specs: tuple[tuple[EmbeddingSpec, ...], ...]
    canaries: tuple[Vectors, ...]
    batch_size: int


@dataclass(frozen=True)
class Networks:
    """Networks that are ready, in this process or in others."""

    canaries: tuple[Vectors, ...]
    """Per lane, the vectors of the built-in probe images."""
    embed: Callable[[Iterable[Item]], Iterator[Finished]]
    """The items in order as finished batches."""
    workers: int
    """Threads that read and decode, in all processes together."""
    processes: int = 1


def here(job: Job) -> Networks:
    """Load the networks into this process."""
    lanes, loaded = open_lanes(job)
    return Networks(loaded.canaries, lambda items: embed(job, lanes, loaded.batch_size, items), job.workers)


def open_lanes(job: Job) -> tuple[list[Lane], Loaded]:
    """Load the networks of a job; BackboneError where one is not to be had."""
    embedders = [source.load() for source in job.sources]
    asked = job.sources[0].config.extraction.batch_size
    lanes = [Lane(embedder, backbone.choose_batch_size(asked, str(embedder.device))) for embedder in embedders]
    specs = tuple(tuple(embedder.specs) for embedder in embedders)
    return lanes, Loaded(specs, tuple(embedder.canary for embedder in embedders), max(lane.limit for lane in lanes))


def workers(extraction: ExtractionConfig, processes: int = 1) -> int:
    """Return how many threads read and decode in each of some processes."""
    if extraction.workers == "auto":
        return max(1, min((os.cpu_count() or 1) // processes, MAX_WORKERS))
    return max(1, extraction.workers // processes)


def embed(job: Job, lanes: Sequence[Lane], size: int, items: Iterable[Item]) -> Iterator[Finished]:
    """Yield the items in order as finished batches of a size.

    Where a network works beside this thread (`Embedder.slots`), the next batch is on its way through it before the one
    before is waited for, so that what the caller does with a batch costs the network no time.

    Raises
    ------
    BackboneError
        When not even one image fits into memory, or `decode: gpu` is not to be had.
    """
    config = job.sources[0].config
    preprocessings = tuple(lane.embedder.preprocessing for lane in lanes)
    slots = max(lane.embedder.slots for lane in lanes)
    under_way: deque[Callable[[], Finished]] = deque()
    gpu = gpu_decoder(backbone.devices(config.extraction.device)[0]) if config.extraction.decode == "gpu" else None
    feeder = Feeder(job.root, config.dataset.max_pixels, preprocessings, size, job.workers, gpu, hashed=True)
    for batch in feeder.batches(items):
        under_way.append(_start_batch(batch, lanes))
        if len(under_way) == slots:
            yield under_way.popleft()()
    while under_way:
        yield under_way.popleft()()


def _start_batch(batch: Batch, lanes: Sequence[Lane]) -> Callable[[], Finished]:
    """Send a batch through every lane that wants some of it; the function returned waits for what they make of it."""
    started: list[tuple[NDArray[np.int64], Callable[[], Vectors], float] | None] = []
    for number, lane in enumerate(lanes):
        rows = [row for row, item in enumerate(batch.items) if row not in batch.problems and number in item.wanted]
        if not rows:
            started.append(None)
            continue
        pixels = batch.pixels[number]
        began = time.perf_counter()
        collect = start(lane, pixels[: len(rows)] if len(rows) == len(batch.items) else pixels[rows])
        started.append((np.array(rows), collect, time.perf_counter() - began))

    def finish() -> Finished:
        problems = {row: (problem.status, problem.reason) for row, problem in sorted(batch.problems.items())}
        parts = [None if part is None else _collect(*part) for part in started]
        return Finished(batch.items, problems, parts, batch.hashes, batch.read_seconds, batch.decode_seconds)

    return finish


def _collect(rows: NDArray[np.int64], collect: Callable[[], Vectors], seconds: float) -> Part:
    began = time.perf_counter()
    vectors = collect()
    return Part(rows, vectors, seconds + time.perf_counter() - began)


def start(lane: Lane, pixels: NDArray[np.uint8]) -> Callable[[], Vectors]:
    """Start to embed, in passes of at most the lane's limit, which halves when memory runs out; return what to wait with.

    Raises
    ------
    BackboneError
        When not even one image fits.
    """
    if len(pixels) <= lane.limit:
        try:
            return lane.embedder.start(pixels)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        _halve(lane, len(pixels))  # outside the handler, whose traceback still holds the memory
    vectors = _in_passes(lane, pixels)
    return lambda: vectors


def _in_passes(lane: Lane, pixels: NDArray[np.uint8]) -> Vectors:
    passes: list[Vectors] = []
    done = 0
    while done < len(pixels):
        try:
            passes.append(lane.embedder.embed(pixels[done : done + lane.limit]))
            done += min(lane.limit, len(pixels) - done)
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        _halve(lane, len(pixels))
    return tuple(np.concatenate(arrays) for arrays in zip(*passes, strict=True))


def _halve(lane: Lane, tried: int) -> None:
    if lane.limit == 1:
        raise BackboneError("not even one image fits into memory; use a smaller network or preprocessing.crop")
    lane.limit = max(1, min(lane.limit, tried) // 2)
    free_memory()
    logger.warning("memory ran out; going on with %d images at a time", lane.limit)


def free_memory() -> None:
    """Give back what nobody refers to any more, on the GPU as well."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
