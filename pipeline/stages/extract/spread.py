"""Stage one on many machines: shards of a data set, or the workers of a Ray cluster; both write parts, which are merged later.

An image's shard depends only on its content digest, not on its path or on the other images, so adding
images moves none. A shard can be killed and run again, or run twice at once: parts are never changed, and their readers take each
content once.

A worker on Ray loads the networks once and receives digests and paths. No pixels or vectors pass through Ray, so its object store
stays empty; images and parts must be accessible to all nodes. Workers get a new piece of work when they finish one. Ray restarts
workers that die, and manages the number of nodes.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.scan import scan
from pipeline.embed.engines import choose_batch_size
from pipeline.errors import BackboneError, PipelineError, number_of
from pipeline.experiment import Artifacts
from pipeline.images import HASH_STORE
from pipeline.io.digests import Digests
from pipeline.io.files import make_folder
from pipeline.io.process import bar, look_in
from pipeline.io.remote import Engine, connected
from pipeline.stages.extract.targets import Contents, EmbeddingTarget, find_targets, require_permitted, resolve
from pipeline.stages.extract.work import Work, embed, hash_store, note_failures
from pipeline.store import differences, lock
from pipeline.store.share import PartWriter

PATIENCE = 24 * 3600.0
"""Seconds to wait while another shard reads the images for the shared index."""

CORES = 4
"""Cores per worker, if neither GPUs nor a number of workers determine it."""

MOST_IMAGES = 4096
"""Largest number of images in a piece of work, which is the most that a dying worker loses."""

RETRIES = 3
"""How often a piece of work is retried after its worker died."""


# ---- shards


@dataclass(frozen=True)
class Shard:
    """The `number`-th of `count` shards, from 1."""

    number: int
    count: int

    @staticmethod
    def parse(text: str) -> Shard:
        """Read `3/16`; PipelineError for anything else."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise PipelineError(
                f"--shard {text}: expected the shard's number, from 1, and how many there are, such as 3/16"
            )
        return Shard(int(found[1]), int(found[2]))

    def has(self, digests: Digests) -> NDArray[np.bool_]:
        """Return which of n digests, uint64 of shape (n, 2), are in this shard: bool of shape (n,)."""
        return np.asarray(digests[:, 0] % np.uint64(self.count) == self.number - 1)


@dataclass(frozen=True)
class ShardRun:
    """The result of a shard."""

    shard: Shard
    images: int
    """Number of distinct images in the shard."""
    work: Work
    place: str
    next: str
    """The command that merges the parts."""
    seconds: float

    def summary_lines(self) -> Iterator[str]:
        """Return the work done, and the next step."""
        work, shard = self.work, self.shard
        yield (
            f"shard {shard.number}/{shard.count}: {number_of(self.images, 'image')}, {work.images:,} embedded ({work.rate:,.0f} images/s), "
            f"the others done before; {self.seconds:.1f} s"
        )
        yield from work.problem_lines()
        yield f"parts in {self.place}; when all shards are done: {self.next}"


def run_shard(config: Config, shard: Shard, place: str | None = None, *, rehash: bool = False) -> ShardRun:
    """Embed the images of one shard that are missing in the stores and in the parts in `place`, a folder or an address.

    Shards with the same output folder share its index: the first reads the images, the others wait for it. Raises as `extract.run`
    does; finished vectors are kept, after a signal also those of the current part.
    """
    began = time.perf_counter()
    require_permitted(config)
    files = Artifacts(config.output, config.store)
    where = place or str(files.parts)
    make_folder(files.dataset)
    with lock.held(files.dataset, PATIENCE):
        contents = Contents.of(scan(config.dataset, config.seed, files.dataset, rehash=rehash).index, files, config)
        sources = resolve(config, files, contents.digests)
    mine = contents.part(shard.has(contents.digests) & ~contents.failed)
    pending = [target for target in find_targets(sources, mine, files) if target.pending.any()]
    work = Work()
    if pending:
        work = embed(pending, mine, config, hash_store(files), partial(PartWriter, where))
        with lock.held(files.dataset, PATIENCE):
            note_failures(work, files, config)
    merge = f"manyheads store merge {quote(str(files.stores))} {quote(where)}, then " if place else ""
    following = f"{merge}manyheads features{' here' if not place else ''}"
    return ShardRun(shard, len(mine.digests), work, where, following, time.perf_counter() - began)


# ---- workers on Ray


@dataclass
class Pool:
    """The workers of a run: their number, their cores and GPUs, the seconds until ready, and the largest memory of one, in bytes."""

    workers: int
    cores: int
    gpus: int
    ready_seconds: float = 0.0
    bytes: int = 0

    @staticmethod
    def of(resources: dict[str, float], asked: int | None) -> Pool:
        """Choose the number of workers, which share the cores: one per GPU, or else one per `CORES` of the available cores."""
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        workers = asked or gpus or max(1, cpus // CORES)
        return Pool(workers, max(1, cpus // workers), min(gpus, 1))

    def line(self, work: Work) -> str:
        """Return the engine's cost, and the number of these networks' images from which it pays off."""
        per_image = work.loop_seconds * self.workers / max(work.images, 1)
        kind = "1 GPU" if self.gpus else number_of(self.cores, "core")
        return (
            f"engine: {number_of(self.workers, 'worker')} of {kind}, ready after {self.ready_seconds:.1f} s, {self.bytes / 1e9:.2f} GB "
            f"each; {pays(self.ready_seconds, per_image, self.workers)}"
        )


def pays(start_up: float, per_image: float, workers: int) -> str:
    """Return the number of images from which several workers are faster than one without start-up: n t = s + n t / w."""
    if workers < 2:
        return "one worker is no quicker than a run without an engine"
    images = start_up / (per_image * (1 - 1 / workers))
    return (
        f"at {1000 * per_image:.1f} ms an image and {start_up:.1f} s to start, {workers} workers are quicker than one of them alone from "
        f"about {int(np.ceil(images)):,} images of these networks on"
    )


class Worker:
    """A Ray actor with the networks, loaded once."""

    def __init__(self, targets: Sequence[EmbeddingTarget], config: Config, place: str, working: str) -> None:
        sources = {id(target.source): replace(target.source, load=cache(target.source.load)) for target in targets}
        self._targets = [replace(target, source=sources[id(target.source)]) for target in targets]
        self._config, self._place = config, place
        os.chdir(working)  # paths in a config may be relative
        look_in(Path(working))

    def load(self) -> None:
        """Load the networks, once; BackboneError if their vectors would differ from those of the driver's machine."""
        for target in self._targets:
            for spec, own in zip(target.source.specs, target.source.load().specs, strict=True):
                if spec.fingerprint() != own.fingerprint():
                    raise BackboneError(
                        f"{spec.name}: a worker's vectors would differ from those of the driver's machine; give all nodes the same versions and "
                        "kind of processor, or set extraction.engine, precision and device",
                        differences(spec.identity(), own.identity(), "the driver", "the worker"),
                    )

    def embed(self, images: Contents, pending: NDArray[np.bool_]) -> tuple[int, Work, int]:
        """Embed k images for t targets, where pending, bool of shape (t, k).

        Returns the number of images, the work done, and the peak memory of this process in bytes.
        """
        self.load()  # needed in a restarted worker
        targets = [replace(target, pending=own) for target, own in zip(self._targets, pending, strict=True)]
        work = embed(targets, images, self._config, Path(HASH_STORE), partial(PartWriter, self._place, look=False))
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return len(images.digests), work, most


def embed_on(
    targets: Sequence[EmbeddingTarget], images: Contents, config: Config, place: str, engine: Engine
) -> tuple[Work, Pool]:
    """Embed the pending images of n into parts in `place`, on all machines of a cluster.

    Ray restarts a worker that died, and retries its piece. PipelineError if there is no cluster, the workers cannot load
    the networks, or workers keep dying on the same piece. Finished parts are kept.
    """
    began = time.perf_counter()
    with connected(engine.address) as ray:
        from ray.util import ActorPool

        pool = Pool.of(ray.cluster_resources(), engine.workers)
        if config.extraction.workers == "auto":
            extraction = config.extraction.model_copy(update={"workers": pool.cores})
            config = config.model_copy(update={"extraction": extraction})
        sources = {id(target.source): target.source.elsewhere(config) for target in targets}
        light = [replace(each, source=sources[id(each.source)], pending=np.zeros(0, np.bool_)) for each in targets]
        needs = {"num_cpus": pool.cores, "num_gpus": pool.gpus, "max_restarts": -1, "max_task_retries": RETRIES}
        actor = ray.remote(**needs)(Worker)
        pending = np.stack([target.pending for target in targets])
        needed = np.flatnonzero(pending.any(axis=0))
        batch = choose_batch_size(config.extraction.batch_size, "cuda" if pool.gpus else "cpu")
        size = max(min(MOST_IMAGES, len(needed) // (8 * pool.workers)) // batch * batch, batch)
        pieces = np.array_split(needed, range(size, len(needed), size))
        work = Work(workers=pool.workers * pool.cores)

        def give(worker: Any, piece: NDArray[np.int64]) -> Any:
            return worker.embed.remote(images.part(piece), pending[:, piece])

        workers = [actor.remote(light, config, place, os.getcwd()) for _ in pieces[: pool.workers]]
        try:
            ray.get(ray.wait([worker.load.remote() for worker in workers])[0])  # the others may still wait for a node
            pool.ready_seconds = time.perf_counter() - began
            with bar(len(needed), "images", f"embedding on {pool.workers} workers") as progress:
                for count, done, size in ActorPool(workers).map_unordered(give, pieces):
                    work.add(done)
                    pool.bytes = max(pool.bytes, size)
                    progress.update(count)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PipelineError) else error from None
        except ray.exceptions.RayError as error:
            found = " ".join(str(error).split())[:300]
            raise BackboneError(f"the engine's workers keep dying on the same images: {found}") from None
        work.loop_seconds = time.perf_counter() - began - pool.ready_seconds
        work.seconds["start-up"] = pool.ready_seconds
    return work, pool
