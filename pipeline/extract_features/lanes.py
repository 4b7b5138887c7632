"""From images to vectors: every network of a run has a lane, and a batch goes through those that want some of it.

This is the one way; nothing here knows of stores.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import backbone
from pipeline.config import ExtractionConfig
from pipeline.embedders import Embedder
from pipeline.errors import BackboneError
from pipeline.extract_features.sources import Source
from pipeline.feed import Batch, Feeder, Item
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
    """A batch that has been through the lanes."""

    items: Sequence[Item]
    problems: Mapping[int, tuple[str, str]]
    """Item -> status and reason of an image that cannot be used, as in `ImageProblem`."""
    parts: Sequence[Part | None]
    """One per lane; None where it wanted nothing of the batch."""
    read_seconds: float
    decode_seconds: float


def open_lanes(job: Job) -> list[Lane]:
    """Load the networks of a job; BackboneError where one is not to be had."""
    embedders = [source.load() for source in job.sources]
    asked = job.sources[0].config.extraction.batch_size
    return [Lane(embedder, backbone.choose_batch_size(asked, str(embedder.device))) for embedder in embedders]


def workers(extraction: ExtractionConfig) -> int:
    """Return how many threads read and decode."""
    return min(os.cpu_count() or 1, MAX_WORKERS) if extraction.workers == "auto" else extraction.workers


def embed(job: Job, lanes: Sequence[Lane], items: Iterable[Item]) -> Iterator[Finished]:
    """Yield the items in order as finished batches.

    Raises
    ------
    BackboneError
        When not even one image fits into memory.
    """
    config = job.sources[0].config
    preprocessings = tuple(lane.embedder.preprocessing for lane in lanes)
    size = max(lane.limit for lane in lanes)
    feeder = Feeder(job.root, config.dataset.max_pixels, preprocessings, size, job.workers)
    for batch in feeder.batches(items):
        problems = {row: (problem.status, problem.reason) for row, problem in sorted(batch.problems.items())}
        parts = [_part(batch, number, lane) for number, lane in enumerate(lanes)]
        yield Finished(batch.items, problems, parts, batch.read_seconds, batch.decode_seconds)


def _part(batch: Batch, number: int, lane: Lane) -> Part | None:
    """Send what a lane wants of a batch through its network; None where that is nothing."""
    rows = [row for row, item in enumerate(batch.items) if row not in batch.problems and number in item.wanted]
    if not rows:
        return None
    pixels = batch.pixels[number]
    began = time.perf_counter()
    vectors = in_passes(lane, pixels[: len(rows)] if len(rows) == len(batch.items) else pixels[rows])
    return Part(np.array(rows), vectors, time.perf_counter() - began)


def in_passes(lane: Lane, pixels: NDArray[np.uint8]) -> Vectors:
    """Embed in passes of at most the lane's limit, which halves when memory runs out.

    Raises
    ------
    BackboneError
        When not even one image fits.
    """
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
        _halve(lane, len(pixels))  # outside the handler, whose traceback still holds the memory
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
