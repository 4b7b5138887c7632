"""One shard of a data set: its images are embedded into parts, beside any number of others that do the same with theirs.

A shard takes the images whose content digest gives its number, wherever they lie and however many there are besides, so adding
images moves none. It can be killed and run again, and run twice at once: parts are never changed, and who reads them takes each
content once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data import Failure, failed_digests
from pipeline.data.scan import scan
from pipeline.errors import PipelineError, number_of
from pipeline.experiment import Artifacts
from pipeline.images import policy_key
from pipeline.io.digests import Digests
from pipeline.io.files import make_folder
from pipeline.stages.extract.targets import Contents, find_targets, require_permitted, resolve
from pipeline.stages.extract.work import Images, Work, embed, hash_store, noted_in, stop_requested
from pipeline.store import lock
from pipeline.store.share import PartWriter

PATIENCE = 24 * 3600.0
"""Seconds to wait while another shard reads the images for the index that they share."""


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

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


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
        work = self.work
        yield (
            f"shard {self.shard}: {number_of(self.images, 'image')}, {work.images:,} embedded ({work.rate:,.0f} images/s), the others "
            f"done before; {self.seconds:.1f} s"
        )
        yield from work.problem_lines()
        yield f"parts in {self.place}; when all shards are done: {self.next}"


def run(config: Config, shard: Shard, place: str | None = None, *, rehash: bool = False) -> ShardRun:
    """Embed the images of one shard that neither the stores nor the parts in `place`, a folder or an address, have yet.

    Shards that share an output folder share its index: the first reads the images, the others wait for it.

    Raises
    ------
    PipelineError
        As `extract.run` does. What was finished before stays.
    KeyboardInterrupt
        After a signal to stop, with the part in hand finished.
    """
    began = time.perf_counter()
    require_permitted(config)
    files = Artifacts(config.output, config.store)
    where = place or str(files.parts)
    make_folder(files.dataset)
    with lock.held(files.dataset, PATIENCE):
        index = scan(config.dataset, config.seed, files.dataset, rehash=rehash).index
        contents = Contents.of(index, failed_digests(files.dataset, policy_key(config.dataset.max_pixels)))
        sources = resolve(config, files, contents.digests)
    mine = shard.has(contents.digests) & ~contents.failed
    targets = [replace(target, pending=target.pending[mine]) for target in find_targets(sources, contents, files)]

    def noted(failures: Sequence[Failure]) -> None:
        with lock.held(files.dataset, PATIENCE):
            noted_in(files, config)(failures)

    pending = [target for target in targets if target.pending.any()]
    work = Work()
    if pending:
        with stop_requested() as stopped:
            images, opened = Images.of(contents, index, mine), partial(PartWriter, where)
            work = embed(pending, images, config, hash_store(files), opened, noted, stopped)
    merge = f"manyheads store merge {quote(str(files.stores))} {quote(where)}, then " if place else ""
    following = f"{merge}manyheads features{' here' if not place else ''}"
    return ShardRun(shard, int(mine.sum()), work, where, following, time.perf_counter() - began)
