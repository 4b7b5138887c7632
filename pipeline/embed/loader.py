"""From files to vectors: threads read, decode and prepare batches of images ahead of the networks.

The threads fill preallocated batches, a fixed number of which is in progress, so memory does not depend on the number of
images. An image is decoded once for all networks (with `decode: fast`, once for each required size). All stages embed
images with `embed`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.embed.engines import LayerFeatures
from pipeline.embed.spec import EmbeddingModel
from pipeline.errors import BackboneError
from pipeline.images import ImageProblem, Preprocessing, decode, open_file, perceptual_hash, prepare
from pipeline.images.reading import Pixels, rgb
from pipeline.io.digests import Digests
from pipeline.io.process import is_out_of_memory
from pipeline.store.share import PartWriter
from pipeline.store.writer import StoreWriter

logger = logging.getLogger(__name__)

CHUNK = 8
"""Images per task of a thread: one task per image would cost 0.1 to 0.2 ms each."""

AHEAD = 3
"""Batches in progress: one in the network, one ready, one being filled."""

MOST_THREADS = 16
"""Default limit on the number of threads that read and decode."""


def threads(asked: int | str = "auto") -> int:
    """Return the number of threads that read and decode."""
    return min(os.cpu_count() or 1, MOST_THREADS) if asked == "auto" else int(asked)


@dataclass(frozen=True)
class Item:
    """One image to read: the number of its content, its path, and the expected digest of its bytes, if any."""

    content: int
    path: str
    digest: bytes | None
    wanted: tuple[int, ...]
    """The consumers of the image, as indices of `Loader.preprocessings`."""
    pixels: Pixels | None = None
    """The image itself, if it is not a file."""


@dataclass
class Batch:
    """Images on their way to the networks."""

    items: Sequence[Item]
    pixels: list[NDArray[np.uint8]]
    """For each consumer uint8 of shape (size, height, width, 3): a row is filled if the consumer needs the item and it has no problem."""
    problems: dict[int, ImageProblem] = field(default_factory=dict)
    hashes: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    """Row -> perceptual hash, if requested."""
    read_seconds: float = 0.0
    decode_seconds: float = 0.0

    def store_hashes(self, writer: StoreWriter | PartWriter, digests: Digests) -> None:
        """Store the hashes under their digests, where `digests` has those of all contents, uint64 of shape (n, 2)."""
        if self.hashes:
            rows = sorted(self.hashes)  # threads finish in any order
            numbers = [self.items[row].content for row in rows]
            writer.append(digests[numbers], np.stack([self.hashes[row] for row in rows]).astype(np.float32))


@dataclass(frozen=True)
class Loader:
    """Settings for reading images: their root, the limit on their size, the preprocessings, and the number of threads."""

    root: Path
    max_pixels: int
    preprocessings: tuple[Preprocessing, ...]
    """One per consumer; equal ones are computed once."""
    batch_size: int
    workers: int = field(default_factory=threads)
    hashed: bool = False
    """Whether to compute perceptual hashes too."""

    def batches(self, items: Iterable[Item]) -> Iterator[Batch]:
        """Yield the items in order as filled batches; a batch's memory is reused after the next one is requested."""
        free: list[list[NDArray[np.uint8]]] = []
        under_way: deque[tuple[Batch, list[Future[tuple[float, float]]]]] = deque()
        rest = iter(items)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            while True:
                while len(under_way) < AHEAD and (chunk := list(islice(rest, self.batch_size))):
                    n, ways = len(chunk), self.preprocessings
                    distinct = {} if free else {way: np.zeros((n, *way.size, 3), np.uint8) for way in set(ways)}
                    batch = Batch(chunk, free.pop() if free else [distinct[way] for way in ways])
                    size = max(1, min(CHUNK, -(-n // self.workers)))
                    rows = [range(start, min(start + size, n)) for start in range(0, n, size)]
                    under_way.append((batch, [pool.submit(self._fill, batch, some) for some in rows]))
                if not under_way:
                    return
                batch, parts = under_way.popleft()
                for part in parts:
                    read, decoded = part.result()
                    batch.read_seconds += read
                    batch.decode_seconds += decoded
                yield batch
                free.append(batch.pixels)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fill(self, batch: Batch, rows: range) -> tuple[float, float]:
        """Fill some rows of a batch; return the seconds spent reading and decoding."""
        reading = decoding = 0.0
        for row in rows:
            item, began = batch.items[row], time.perf_counter()
            read = began
            try:
                data = open_file(self.root, item.path, item.digest) if item.pixels is None else b""
                read = time.perf_counter()
                self._decode(batch, row, data)
            except ImageProblem as problem:
                batch.problems[row] = problem
            reading += read - began
            decoding += time.perf_counter() - read
        return reading, decoding

    def _decode(self, batch: Batch, row: int, data: bytes) -> None:
        given = batch.items[row].pixels
        decoded: dict[int | None, NDArray[np.uint8]] = {}
        # Consumers with equal preprocessing share pixels.
        ways = {self.preprocessings[number]: number for number in batch.items[row].wanted}
        for preprocessing, number in ways.items():
            at_least, most = preprocessing.at_least, self.max_pixels
            if at_least not in decoded:
                read = decode(data, max_pixels=most, at_least=at_least) if given is None else rgb(given, most)
                decoded[at_least] = read
            batch.pixels[number][row] = prepare(decoded[at_least], preprocessing)
        if self.hashed:
            batch.hashes[row] = perceptual_hash(next(iter(decoded.values())))


@dataclass
class Lane:
    """An embedder and its maximal batch size, which is halved when memory runs out."""

    embedder: EmbeddingModel
    limit: int


@dataclass(frozen=True)
class Part:
    """The vectors of one lane for a batch."""

    rows: NDArray[np.int64]
    """Indices of the batch's items, shape (n,)."""
    vectors: LayerFeatures
    seconds: float


def embed(
    lanes: Sequence[Lane],
    items: Iterable[Item],
    root: Path,
    max_pixels: int,
    workers: int | str = "auto",
    hashed: bool = False,
) -> Iterator[tuple[Batch, list[Part | None]]]:
    """Read images and run them through the networks; yield the batches in order, each with one `Part` per lane.

    A part is None if the lane needs none of the images, or none could be read. BackboneError if not even one image fits into memory.
    """
    preprocessings = tuple(lane.embedder.preprocessing for lane in lanes)
    loader = Loader(root, max_pixels, preprocessings, max(lane.limit for lane in lanes), threads(workers), hashed)
    for batch in loader.batches(items):
        made: list[Part | None] = []
        for number, lane in enumerate(lanes):
            rows = [row for row, item in enumerate(batch.items) if row not in batch.problems and number in item.wanted]
            if not rows:
                made.append(None)
                continue
            began, pixels = time.perf_counter(), batch.pixels[number]
            vectors = in_passes(lane, pixels[: len(rows)] if len(rows) == len(batch.items) else pixels[rows])
            made.append(Part(np.array(rows), vectors, time.perf_counter() - began))
        yield batch, made


def in_passes(lane: Lane, pixels: NDArray[np.uint8]) -> LayerFeatures:
    """Embed uint8 (n, height, width, 3) in passes of at most the lane's limit, which halves when memory runs out."""
    passes: list[LayerFeatures] = []
    done = 0
    while done < len(pixels):
        try:
            passes.append(lane.embedder.embed(pixels[done : done + lane.limit]))
            done += min(lane.limit, len(pixels) - done)
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, as the traceback still references the memory.
        if lane.limit == 1:
            raise BackboneError("not even one image fits into memory; use a smaller network or preprocessing.crop")
        lane.limit = max(1, min(lane.limit, len(pixels)) // 2)
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()  # otherwise freed blocks keep the size of the larger batch
        logger.warning("memory ran out; continuing with %d images at a time", lane.limit)
    return tuple(np.concatenate(arrays) for arrays in zip(*passes, strict=True))
