"""Embedding of missing images: finished batches are written to the stores and committed even after an error."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config, names_vectors
from pipeline.data import DatasetIndex, Failure, record_failures
from pipeline.data.index import texts
from pipeline.data.sources import list_source
from pipeline.embed.engines import choose_batch_size
from pipeline.embed.loader import Batch, Item, Lane, Part, threads
from pipeline.embed.loader import embed as embedded
from pipeline.embed.spec import EmbeddingModel
from pipeline.errors import StoreError, first, number_of
from pipeline.experiment import Artifacts
from pipeline.images import HASH_BYTES, HASH_IDENTITY, HASH_STORE, policy_key
from pipeline.io.digests import digests_to_hex
from pipeline.io.files import undisturbed
from pipeline.io.process import bar, keep_freed_memory
from pipeline.io.remote import absolute
from pipeline.stages.extract.targets import Contents, EmbeddingTarget
from pipeline.store import lock
from pipeline.store.share import PartWriter, read_vectors
from pipeline.store.writer import StoreWriter, storable

logger = logging.getLogger(__name__)

EXAMPLES = 3
MOST_LACKING = 5
SUMMED_OVER_THREADS = ("read", "decode")


@dataclass
class Work:
    """The work done, and the time spent on each part."""

    images: int = 0
    """Number of distinct contents that went through at least one network or baseline."""
    vectors: Counter[str] = field(default_factory=Counter)
    """Embedding -> number of new vectors in its store."""
    failures: list[Failure] = field(default_factory=list)
    unavailable: list[str] = field(default_factory=list)
    """Images that could not be read this time, with the reason: removed, or changed since the scan."""
    loop_seconds: float = 0.0
    workers: int = 1
    """Threads for reading and decoding."""
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("start-up", "read", "decode", "network", "write"), 0.0)
    )
    """Seconds per kind of work; reading and decoding are summed over threads and run in parallel to the network."""
    network_seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Embedding -> seconds in its network."""

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.loop_seconds if self.loop_seconds else 0.0

    def problem_lines(self) -> Iterator[str]:
        """Return lines on images that could not be used or read."""
        if self.failures:
            yield f"{number_of(len(self.failures), 'image')} could not be used; dataset/failures.csv names each with its reason:"
            reasons = [f"{entry.path}: {entry.reason}" for entry in self.failures]
            yield from (f"  {line}" for line in first(reasons, EXAMPLES))
        if self.unavailable:
            yield f"warning: {number_of(len(self.unavailable), 'image')} could not be read this time; run again:"
            yield from (f"  {line}" for line in first(self.unavailable, EXAMPLES))

    def add(self, other: Work) -> None:
        """Add the work of another process; start-up and loop time stay those of this one."""
        self.images += other.images
        self.failures += other.failures
        self.unavailable += other.unavailable
        self.vectors.update(other.vectors)
        for name, seconds in other.network_seconds.items():
            self.network_seconds[name] += seconds
        for name in self.seconds.keys() - {"start-up"}:
            self.seconds[name] += other.seconds[name]


@dataclass(frozen=True)
class Output:
    """The writer of one embedding's store, and the images that it is missing."""

    target: EmbeddingTarget
    writer: StoreWriter | PartWriter
    missing: NDArray[np.bool_]
    """Images without a vector, shape (n,)."""


def embed(
    targets: Sequence[EmbeddingTarget],
    images: Contents,
    config: Config,
    hashes: Path,
    opened: Callable[..., AbstractContextManager[StoreWriter | PartWriter]],
) -> Work:
    """Embed the images that some targets are missing, of n images: digests and paths in, immutable files of vectors out.

    Runs, shards and workers of an engine all use this function. On any exception, all finished rows are committed first; signals
    are deferred meanwhile.

    opened : `StoreWriter.open`, which determines the missing images itself, or a `PartWriter`, which uses `pending`
    hashes : the store of perceptual hashes
    """
    began = time.perf_counter()
    keep_freed_memory()
    with ExitStack() as stack:
        by_source: dict[int, list[EmbeddingTarget]] = {}
        for target in targets:
            by_source.setdefault(id(target.source), []).append(target)
        loaded = [(own, own[0].source.load()) for own in by_source.values()]
        size = config.extraction.batch_size
        lanes = [Lane(embedder, choose_batch_size(size, str(embedder.device))) for _, embedder in loaded]

        def output(target: EmbeddingTarget, embedder: EmbeddingModel) -> Output:
            identity, probe = target.spec.identity(), embedder.probe[target.output]
            writer = stack.enter_context(opened(target.path, identity, target.spec.dim, probe=probe))
            # A store's writer knows more than the target: rows of a killed run, damaged files.
            missing = writer.missing(images.digests)
            return Output(target, writer, missing & target.pending if isinstance(writer, PartWriter) else missing)

        outputs = [[output(each, embedder) for each in own] for own, embedder in loaded]
        # A byte is exact in float16.
        hashed = stack.enter_context(opened(hashes, HASH_IDENTITY, HASH_BYTES, "float16"))
        wanting = np.array([np.any([output.missing for output in own], axis=0) for own in outputs])  # (sources, images)
        needed = np.flatnonzero(wanting.any(axis=0)).tolist()
        paths, digests = images.paths, images.digests
        items = (
            Item(each, str(paths[each]), digests[each].tobytes(), tuple(np.flatnonzero(wanting[:, each]).tolist()))
            for each in needed
        )
        work = Work(workers=threads(config.extraction.workers))
        work.seconds["start-up"] = time.perf_counter() - began
        began = time.perf_counter()
        # Hashes are committed first, as an image with all its vectors is not decoded again.
        everything = [hashed, *(output.writer for own in outputs for output in own)]

        def commit() -> None:
            began = time.perf_counter()
            for writer in everything:
                writer.commit()
            work.seconds["write"] += time.perf_counter() - began

        try:
            with bar(len(needed), "images", "embedding") as progress:
                made = embedded(lanes, items, images.root, config.dataset.max_pixels, work.workers, hashed=True)
                for batch, parts in made:
                    with undisturbed():
                        batch.store_hashes(hashed, images.digests)
                        _store(batch, parts, outputs, images, work)
                        if any(writer.due for writer in everything):
                            commit()
                    progress.update(len(batch.items))
        finally:
            with undisturbed():  # also after an error or a signal, so that nothing is embedded again
                commit()
        write_began = time.perf_counter()
        with undisturbed():
            stack.close()  # compacts
        work.seconds["write"] += time.perf_counter() - write_began
        work.loop_seconds = time.perf_counter() - began
    return work


def note_failures(work: Work, files: Artifacts, config: Config) -> None:
    """Add images that could not be used to the list of failures."""
    record_failures(files.dataset, work.failures, policy_key(config.dataset.max_pixels))


def hash_store(files: Artifacts) -> Path:
    """Return the store for perceptual hashes; one next to the index while another experiment writes the shared one."""
    shared = files.stores / HASH_STORE
    return files.dataset / HASH_STORE if lock.holder(shared) else shared


def _store(
    batch: Batch, parts: Sequence[Part | None], outputs: Sequence[Sequence[Output]], images: Contents, work: Work
) -> None:
    """Store the vectors of one batch, and record images that could not be read; a vector that is not finite fails its image."""

    def failed(item: Item, status: str, reason: str) -> None:
        digest = digests_to_hex(images.digests[item.content : item.content + 1])[0]
        work.failures.append(Failure(item.path, digest, status, reason))

    items = batch.items
    work.seconds["read"] += batch.read_seconds
    work.seconds["decode"] += batch.decode_seconds
    for row, problem in sorted(batch.problems.items()):
        if problem.status == "unavailable":
            work.unavailable.append(f"{items[row].path}: {problem.reason}")
        else:
            failed(items[row], problem.status, problem.reason)
    work.images += len(items) - len(batch.problems)
    began = time.perf_counter()
    for part, own in zip(parts, outputs, strict=True):
        if part is None:
            continue
        work.seconds["network"] += part.seconds
        made = [items[row] for row in part.rows]
        numbers = np.array([item.content for item in made])
        for output in own:
            name, vectors = output.target.spec.name, part.vectors[output.target.output]
            work.network_seconds[name] += part.seconds
            wanted, finite = output.missing[numbers], storable(vectors, output.writer.store_type)
            for place in np.flatnonzero(wanted & ~finite).tolist():
                failed(made[place], "not_finite", f"{name} gives it a vector that is not finite")
            keep = wanted & finite
            work.vectors[name] += output.writer.append(images.digests[numbers[keep]], vectors[keep])
    work.seconds["write"] += time.perf_counter() - began


# ---- the user's own vectors, by the paths of the images or in the order of the manifest


def fill(
    targets: Sequence[EmbeddingTarget], contents: Contents, index: DatasetIndex, config: Config, files: Artifacts
) -> list[EmbeddingTarget]:
    """Write vectors from the user's own files to stores that are missing them; return the updated targets.

    StoreError if a file has no vector for some images, or the length of a `.npy` is not the number of images.
    """
    return [
        _filled(target, Path(target.source.section.name), contents, index, config, files)
        if target.source.section is not None and names_vectors(target.source.section.name) and target.pending.any()
        else target
        for target in targets
    ]


def _filled(
    target: EmbeddingTarget, path: Path, contents: Contents, index: DatasetIndex, config: Config, files: Artifacts
) -> EmbeddingTarget:
    paths, X = read_vectors(path)
    if paths is None:
        listing = list_source(config.dataset, files.dataset)
        in_order = [path for path, *_ in listing.images]
        in_order = in_order if config.dataset.source == "manifest" else sorted(in_order)
        if len(in_order) != len(X):
            raise StoreError(
                f"{path}: has {len(X):,} vectors, and the data set names {number_of(len(in_order), 'image')} that are there; a .npy "
                "file needs one for each, in the order of the manifest or else of the paths; a .parquet file may name them in a column `path`"
            )
        paths = texts(in_order)
    root = f"{absolute(index.root)}/"
    rows = {str(name).removeprefix(root).removeprefix("./"): row for row, name in enumerate(paths.tolist())}
    places = np.array([rows.get(name, -1) for name in index.paths.tolist()])
    lacking = index.paths[places < 0].tolist()
    if lacking:
        raise StoreError(f"{path}: has no vector for {number_of(len(lacking), 'image')}", first(lacking, MOST_LACKING))
    pending = np.flatnonzero(target.pending)
    with StoreWriter.open(target.path, target.spec.identity(), target.spec.dim) as writer:
        new = writer.append(contents.digests[pending], X[places[contents.rows[pending]]])
    logger.info("%s: %s taken from %s", target.spec.name, number_of(new, "vector"), path)
    return replace(target, pending=np.zeros_like(target.pending), why="")
