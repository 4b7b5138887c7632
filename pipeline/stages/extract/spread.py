"""Stage one on many machines: one shard of a data set, or the workers of a Ray cluster; both write parts, which are merged later.

A shard takes the images whose content digest gives its number, wherever they lie and however many there are besides, so adding
images moves none. It can be killed and run again, and run twice at once: parts are never changed, and who reads them takes each
content once.

A worker on Ray loads the networks once and is given digests and paths. No pixels and no vectors go through Ray, so its object store
stays empty; images and parts must be where all nodes see them. A worker is given work when it asks for it, and a piece that died with
its worker is given to others in halves, so that an image that kills its reader is found. How many nodes there are is Ray's business.
"""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from pipeline.stages.extract.work import Work, embed, hash_store, note_failures, stop_requested
from pipeline.store import differences, lock
from pipeline.store.share import PartWriter

PATIENCE = 24 * 3600.0
"""Seconds to wait while another shard reads the images for the index that they share."""

CORES = 4
"""Per worker, where no GPU and no number of workers says otherwise."""

MOST_IMAGES = 4096
"""In one piece of work: what a worker that dies costs at most."""

DEATHS = 3
"""As often may each worker end before any was ready."""


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
        """Say for each of n digests, uint64 of shape (n, 2), whether it is in this shard: bool of shape (n,)."""
        mine: NDArray[np.bool_] = digests[:, 0] % np.uint64(self.count) == self.number - 1
        return mine


@dataclass(frozen=True)
class ShardRun:
    """What a shard did."""

    shard: Shard
    images: int
    """Distinct images in it."""
    work: Work
    place: str
    next: str
    """The command that takes the parts."""
    seconds: float

    def summary_lines(self) -> Iterator[str]:
        """What was done, and what comes next."""
        work, shard = self.work, self.shard
        yield (
            f"shard {shard.number}/{shard.count}: {number_of(self.images, 'image')}, {work.images:,} embedded ({work.rate:,.0f} images/s), "
            f"the others done before; {self.seconds:.1f} s"
        )
        yield from work.problem_lines()
        yield f"parts in {self.place}; when all shards are done: {self.next}"


def run_shard(config: Config, shard: Shard, place: str | None = None, *, rehash: bool = False) -> ShardRun:
    """Embed the images of one shard that neither the stores nor the parts in `place`, a folder or an address, have yet.

    Shards that share an output folder share its index: the first reads the images, the others wait for it. Raises as `extract.run`
    does; what was finished before stays, after a signal the part in hand too.
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
        with stop_requested() as stopped:
            work = embed(pending, mine, config, hash_store(files), partial(PartWriter, where), stopped)
        with lock.held(files.dataset, PATIENCE):
            note_failures(work, files, config)
    merge = f"manyheads store merge {quote(str(files.stores))} {quote(where)}, then " if place else ""
    following = f"{merge}manyheads features{' here' if not place else ''}"
    return ShardRun(shard, len(mine.digests), work, where, following, time.perf_counter() - began)


# ---- workers on Ray


@dataclass
class Pool:
    """What a run had: how many workers, of how many cores, ready after so many seconds, the most bytes one of them took."""

    workers: int
    cores: int
    gpus: int
    ready_seconds: float = 0.0
    bytes: int = 0

    @staticmethod
    def of(resources: dict[str, float], asked: int | None) -> Pool:
        """Decide on workers, which share the cores: one per GPU, else one per `CORES` of what there is now."""
        cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
        workers = asked or gpus or max(1, cpus // CORES)
        return Pool(workers, max(1, cpus // workers), min(gpus, 1))

    def line(self, work: Work) -> str:
        """Say what the engine cost, and from how many images of these networks on it pays."""
        per_image = work.loop_seconds * self.workers / max(work.images, 1)
        kind = "1 GPU" if self.gpus else number_of(self.cores, "core")
        return (
            f"engine: {number_of(self.workers, 'worker')} of {kind}, ready after {self.ready_seconds:.1f} s, {self.bytes / 1e9:.2f} GB "
            f"each; {pays(self.ready_seconds, per_image, self.workers)}"
        )


def pays(start_up: float, per_image: float, workers: int) -> str:
    """Say from how many images on several workers take less time than one that needs no start-up: n t = s + n t / w."""
    if workers < 2:
        return "one worker is no quicker than a run without an engine"
    images = start_up / (per_image * (1 - 1 / workers))
    return (
        f"at {1000 * per_image:.1f} ms an image and {start_up:.1f} s to start, {workers} workers are quicker than one of them alone from "
        f"about {int(np.ceil(images)):,} images of these networks on"
    )


class Worker:
    """What runs in each of Ray's actors: the networks, loaded once."""

    def __init__(self, targets: Sequence[EmbeddingTarget], config: Config, place: str, working: str) -> None:
        self._targets, self._config, self._place = list(targets), config, place
        os.chdir(working)  # paths of a config may be relative
        look_in(Path(working))

    def ready(self) -> int:
        """Load the networks; return the bytes that this process takes. BackboneError when they are not those of the driver's machine."""
        loaded = {}
        for source in {id(target.source): target.source for target in self._targets}.values():
            loaded[id(source)] = replace(source, load=cache(source.load))
            for spec, own in zip(source.specs, loaded[id(source)].load().specs, strict=True):
                if spec.fingerprint() != own.fingerprint():
                    raise BackboneError(
                        f"{spec.name}: a worker makes other vectors than the driver's machine would; give all nodes the same versions and "
                        "kind of processor, or set extraction.engine, precision and device",
                        differences(spec.identity(), own.identity(), "the driver", "the worker"),
                    )
        self._targets = [replace(target, source=loaded[id(target.source)]) for target in self._targets]
        return _most_bytes()

    def embed(self, images: Contents, pending: NDArray[np.bool_]) -> tuple[Work, int]:
        """Embed k images, for each of t targets those that are pending, bool of shape (t, k); return what was done, and the most bytes."""
        targets = [replace(target, pending=own) for target, own in zip(self._targets, pending, strict=True)]
        opened = partial(PartWriter, self._place, look=False)
        work = embed(targets, images, self._config, Path(HASH_STORE), opened, lambda: None)  # Ray stops its workers
        return work, _most_bytes()


def _most_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def embed_on(
    targets: Sequence[EmbeddingTarget], images: Contents, config: Config, place: str, engine: Engine
) -> tuple[Work, Pool]:
    """Embed the pending ones of n images into parts in `place`, on all of a cluster.

    PipelineError when there is no cluster, its workers cannot load the networks, or none stays alive. Finished parts stay.
    """
    began = time.perf_counter()
    with connected(engine.address) as ray, stop_requested() as stopped:  # in this order: Ray has handlers of its own
        pool = Pool.of(ray.cluster_resources(), engine.workers)
        if config.extraction.workers == "auto":
            extraction = config.extraction.model_copy(update={"workers": pool.cores})
            config = config.model_copy(update={"extraction": extraction})
        sources = {id(target.source): target.source.elsewhere(config) for target in targets}
        light = [replace(each, source=sources[id(each.source)], pending=np.zeros(0, np.bool_)) for each in targets]
        actor = ray.remote(num_cpus=pool.cores, num_gpus=pool.gpus, max_restarts=0)(Worker)
        make = partial(actor.remote, light, config, place, os.getcwd())
        pending = np.stack([target.pending for target in targets])
        needed = np.flatnonzero(pending.any(axis=0))
        batch = choose_batch_size(config.extraction.batch_size, "cuda" if pool.gpus else "cpu")
        size = max(min(MOST_IMAGES, len(needed) // (8 * pool.workers)) // batch * batch, batch)
        pieces = deque(np.array_split(needed, range(size, len(needed), size)))
        work = Work(workers=pool.workers * pool.cores)
        driver = _Driver(ray, make, images, pending, pieces, pool, work, began)
        driver.run(stopped)
    return work, pool


@dataclass
class _Driver:
    """Who has what to do: `todo` are pieces, the places of k images, int64 of shape (k,), in the columns of `pending`, (targets, n)."""

    ray: Any
    make: Callable[[], Any]
    images: Contents
    pending: NDArray[np.bool_]
    todo: deque[NDArray[np.int64]]
    pool: Pool
    work: Work
    began: float
    at_work: dict[Any, tuple[Any, NDArray[np.int64] | None]] = field(default_factory=dict)
    """What Ray is to give us -> the worker, and its piece; None while it loads the networks."""
    early_deaths: int = 0

    def run(self, stopped: Callable[[], None]) -> None:
        """Give away all pieces and take what is made of them."""
        count = sum(map(len, self.todo))
        for _ in range(min(self.pool.workers, len(self.todo))):
            self._hire()
        with bar(count, "images", f"embedding on {self.pool.workers} workers") as progress:
            while self.todo or any(piece is not None for _, piece in self.at_work.values()):
                stopped()
                for made in self.ray.wait(list(self.at_work), timeout=1.0)[0]:
                    progress.update(self._met(made))
        self.work.loop_seconds = time.perf_counter() - self.began - self.pool.ready_seconds
        self.work.seconds["start-up"] = self.pool.ready_seconds

    def _hire(self) -> None:
        worker = self.make()
        self.at_work[worker.ready.remote()] = worker, None

    def _met(self, made: Any) -> int:
        """Take what a worker has to say, and give it more to do; return how many images are done with."""
        worker, piece = self.at_work.pop(made)
        try:
            answer = self.ray.get(made)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PipelineError) else error from None
        except self.ray.exceptions.RayError as error:
            return self._lost(piece, error)
        if piece is None:
            self.pool.ready_seconds = self.pool.ready_seconds or time.perf_counter() - self.began
            size = answer
        else:
            done, size = answer
            self.work.add(done)
        self.pool.bytes = max(self.pool.bytes, size)
        if self.todo:
            following = self.todo.popleft()
            made = worker.embed.remote(self.images.part(following), self.pending[:, following])
            self.at_work[made] = worker, following
        return 0 if piece is None else len(piece)

    def _lost(self, piece: NDArray[np.int64] | None, error: Exception) -> int:
        """Hire another worker for one that died, and give away what it had; return how many images are given up."""
        self._hire()
        if piece is None:
            self.early_deaths += 1
            if self.early_deaths >= DEATHS * self.pool.workers and not self.work.images:
                found = " ".join(str(error).split())[:300]
                raise BackboneError(f"the engine's workers end before they are ready: {found}")
        elif len(piece) > 1:
            self.todo.extendleft(np.array_split(piece, 2))
        else:
            self.work.unavailable.append(f"{self.images.paths[piece[0]]}: a worker ended while it embedded it")
            return 1
        return 0
