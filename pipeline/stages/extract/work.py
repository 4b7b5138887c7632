"""Embedding what is missing: finished batches into the stores, committed whatever happens."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data import DatasetIndex, Failure, record_failures
from pipeline.embed.engines import choose_batch_size
from pipeline.embed.loader import Batch, Item, Lane, Part, threads
from pipeline.embed.loader import embed as embedded
from pipeline.embed.spec import Embedder
from pipeline.errors import first, number_of
from pipeline.experiment import Artifacts
from pipeline.images import HASH_BYTES, HASH_IDENTITY, HASH_STORE, policy_key
from pipeline.io.digests import Digests, digests_to_hex
from pipeline.io.files import STOPS
from pipeline.io.process import bar, keep_freed_memory
from pipeline.stages.extract.targets import Contents, Target
from pipeline.store import lock
from pipeline.store.parts import PartWriter
from pipeline.store.writer import StoreWriter, storable

logger = logging.getLogger(__name__)

EXAMPLES = 3
SUMMED_OVER_THREADS = ("read", "decode")


@dataclass
class Work:
    """What was done, and where the time went."""

    images: int = 0
    """Distinct contents that went through at least one network or recipe."""
    vectors: Counter[str] = field(default_factory=Counter)
    """Embedding -> vectors that are new in its store."""
    failures: list[Failure] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    """Images that could not be read this time, with the reason: gone, or changed since the scan."""
    loop_seconds: float = 0.0
    workers: int = 1
    """Threads that read and decoded."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("start-up", "read", "decode", "network", "write"), 0.0)
    )
    """Per kind of work; reading and decoding are summed over threads and go on beside the network."""
    network_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Embedding -> seconds in its network."""
    network_images: Counter[str] = field(default_factory=Counter)
    """Embedding -> images that went through its network."""

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.loop_seconds if self.loop_seconds else 0.0

    def problem_lines(self) -> Iterator[str]:
        """Say which images could not be used or read."""
        if self.failures:
            yield f"{number_of(len(self.failures), 'image')} could not be used; dataset/failures.csv names each with its reason:"
            reasons = [f"{entry.path}: {entry.reason}" for entry in self.failures]
            yield from (f"  {line}" for line in first(reasons, EXAMPLES))
        if self.unavailable:
            yield f"warning: {number_of(len(self.unavailable), 'image')} could not be read this time; run again:"
            yield from (f"  {line}" for line in first(self.unavailable, EXAMPLES))

    def add(self, other: Work) -> None:
        """Count what another process did as well; the start-up and the time of the loop stay those of this one."""
        self.images += other.images
        self.failures += other.failures
        self.unavailable += other.unavailable
        self.vectors.update(other.vectors)
        self.network_images.update(other.network_images)
        for name, seconds in other.network_seconds.items():
            self.network_seconds[name] += seconds
        for name in self.seconds.keys() - {"start-up"}:
            self.seconds[name] += other.seconds[name]


@dataclass(frozen=True, eq=False)
class Images:
    """n distinct images to embed: digests, uint64 of shape (n, 2), and where each is, text of shape (n,), under `root`."""

    digests: Digests
    paths: NDArray[np.object_]
    root: Path

    @staticmethod
    def of(contents: Contents, index: DatasetIndex, chosen: NDArray[np.bool_]) -> Images:
        """Take those of the n contents that are chosen, bool of shape (n,)."""
        return Images(contents.digests[chosen], index.paths[contents.rows[chosen]], index.root)

    def part(self, places: NDArray[np.int64]) -> Images:
        """Return some of them, int64 of shape (k,)."""
        return Images(self.digests[places], self.paths[places], self.root)


@dataclass(frozen=True)
class Output:
    """One embedding on its way into its store."""

    target: Target
    writer: StoreWriter | PartWriter
    missing: NDArray[np.bool_]
    """Images that it has no vectors of, shape (n,)."""


Outputs = Sequence[Sequence[Output]]
"""Per source those of its outputs that are kept."""


def embed(
    targets: Sequence[Target],
    images: Images,
    config: Config,
    hashes: Path,
    opened: Callable[..., AbstractContextManager[StoreWriter | PartWriter]],
    noted: Callable[[Sequence[Failure]], None],
    stopped: Callable[[], None],
) -> Work:
    """Embed what some targets miss of n images: digests and paths in, immutable files of vectors out.

    This is what a run does, a shard, and each worker of an engine; they differ in what writes the vectors, and who is told.

    opened : `StoreWriter.open`, or a `PartWriter`; what is not `pending` is left to the first to find out
    hashes : the store of perceptual hashes
    noted : told the images that cannot be used, whatever happens
    stopped : raises when the work is to end, after the batch in hand

    Raises
    ------
    KeyboardInterrupt
        What `stopped` raises; its argument is the signal's number.
    StoreError, BackboneError, DatasetError
        With all finished rows committed as well.
    """
    began = time.perf_counter()
    keep_freed_memory()
    with ExitStack() as stack:
        by_source: dict[int, list[Target]] = {}
        for target in targets:
            by_source.setdefault(id(target.source), []).append(target)
        loaded = [(own, own[0].source.load()) for own in by_source.values()]
        size = config.extraction.batch_size
        lanes = [Lane(embedder, choose_batch_size(size, str(embedder.device))) for _, embedder in loaded]

        def output(target: Target, embedder: Embedder) -> Output:
            identity, probe = target.spec.identity(), embedder.probe[target.output]
            writer = stack.enter_context(opened(target.path, identity, target.spec.dim, probe=probe))
            # A store's writer knows more than was known when the target was found: rows of a run that was killed, damaged files.
            missing = writer.missing(images.digests)
            return Output(target, writer, missing & target.pending if isinstance(writer, PartWriter) else missing)

        outputs = [[output(each, embedder) for each in own] for own, embedder in loaded]
        # A byte is exact in float16.
        hashed = stack.enter_context(opened(hashes, HASH_IDENTITY, HASH_BYTES, "float16"))
        count, items = _items(outputs, images)
        work = Work(workers=threads(config.extraction.workers))
        work.seconds["start-up"] = time.perf_counter() - began
        began = time.perf_counter()
        everything = [hashed, *(output.writer for own in outputs for output in own)]
        try:
            stopped()
            with bar(count, "images", "embedding") as progress:
                made = embedded(lanes, items, images.root, config.dataset.max_pixels, work.workers, hashed=True)
                for batch, parts in made:
                    batch.store_hashes(hashed, images.digests)
                    _store(batch, parts, outputs, images, work)
                    if any(writer.due for writer in everything):
                        _commit(everything, work)
                    progress.update(len(batch.items))
                    stopped()
        finally:
            # Also after an error or a signal: what was embedded is not to be embedded again.
            _commit(everything, work)
            noted(work.failures)
        write_began = time.perf_counter()
        stack.close()  # compacts
        work.seconds["write"] += time.perf_counter() - write_began
        work.loop_seconds = time.perf_counter() - began
        stopped()
    return work


def noted_in(files: Artifacts, config: Config) -> Callable[[Sequence[Failure]], None]:
    """Return what writes failures into the list beside the index."""
    return partial(record_failures, files.dataset, policy=policy_key(config.dataset.max_pixels))


def _commit(writers: Sequence[StoreWriter | PartWriter], work: Work) -> None:
    """Keep what was made so far; of an image the hash first, as one that has its vectors is not decoded again."""
    began = time.perf_counter()
    for writer in writers:
        writer.commit()
    work.seconds["write"] += time.perf_counter() - began


def hash_store(files: Artifacts) -> Path:
    """Where to write perceptual hashes: where another experiment writes them now, beside the index, until the next run."""
    shared = files.stores / HASH_STORE
    return files.dataset / HASH_STORE if lock.holder(shared) else shared


def _items(outputs: Outputs, images: Images) -> tuple[int, Iterator[Item]]:
    """The images to read, each once, with the sources that want it: their number, and one at a time."""
    # Of shape (sources, images).
    wanting = np.array([np.any([output.missing for output in own], axis=0) for own in outputs])
    needed = np.flatnonzero(wanting.any(axis=0))
    return len(needed), (
        Item(
            content,
            str(images.paths[content]),
            images.digests[content].tobytes(),
            tuple(np.flatnonzero(wanting[:, content]).tolist()),
        )
        for content in map(int, needed)
    )


def _store(batch: Batch, parts: Sequence[Part | None], outputs: Outputs, images: Images, work: Work) -> None:
    """Store what the networks made of one batch, and note what could not be read."""
    items = batch.items
    work.seconds["read"] += batch.read_seconds
    work.seconds["decode"] += batch.decode_seconds
    for row, problem in sorted(batch.problems.items()):
        item = items[row]
        if problem.status == "unavailable":
            work.unavailable.append(f"{item.path}: {problem.reason}")
        else:
            work.failures.append(_failure(item.path, images.digests[item.content], problem.status, problem.reason))
    work.images += len(items) - len(batch.problems)
    began = time.perf_counter()
    for part, own in zip(parts, outputs, strict=True):
        if part is None:
            continue
        work.seconds["network"] += part.seconds
        numbers = np.array([items[row].content for row in part.rows])
        paths = [items[row].path for row in part.rows]
        for output in own:
            name = output.target.spec.name
            work.network_seconds[name] += part.seconds
            work.network_images[name] += len(numbers)
            _append(output, numbers, part.vectors[output.target.output], paths, images, work)
    work.seconds["write"] += time.perf_counter() - began


def _append(
    output: Output,
    numbers: NDArray[np.int64],
    vectors: NDArray[np.float32],
    paths: Sequence[str],
    images: Images,
    work: Work,
) -> None:
    """Store those of n vectors, float32 of shape (n, dim), that an output misses; one that is not finite is a failure of its image.

    `numbers`, int64 of shape (n,), say which contents they are of.
    """
    wanted = output.missing[numbers]
    finite = storable(vectors, output.writer.store_type)
    for place in np.flatnonzero(wanted & ~finite).tolist():
        reason = f"{output.target.spec.name} gives it a vector that is not finite"
        work.failures.append(_failure(paths[place], images.digests[numbers[place]], "not_finite", reason))
    keep = wanted & finite
    work.vectors[output.target.spec.name] += output.writer.append(images.digests[numbers[keep]], vectors[keep])


def _failure(path: str, digest: Digests, status: str, reason: str) -> Failure:
    return Failure(path, digests_to_hex(digest.reshape(1, 2))[0], status, reason)


@contextmanager
def stop_requested() -> Iterator[Callable[[], None]]:
    """Turn the first SIGINT or SIGTERM into a request to stop, which the yielded function meets; a second one stops at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt(number)
        logger.info("stopping after the batch in hand ...")

    def meet() -> None:
        if received:
            raise KeyboardInterrupt(received[0])

    if threading.current_thread() is not threading.main_thread():
        yield meet
        return
    before = {number: signal.signal(number, handle) for number in STOPS}
    try:
        yield meet
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
