"""Stage one: embed the images that the feature stores are missing.

    stores.py      the folder of stores that experiments share
    targets.py     the embeddings of a config, and the images that each store is missing
    work.py        embedding batches (`pipeline.embed.loader`) into the stores, or into parts; the user's own vectors
    spread.py      shards, or workers on Ray, whose parts are merged later

The images are read and decoded once for all networks. A run with nothing to do imports no torch.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pipeline.config import NO_LABELS, BackboneConfig, Config, dump_yaml
from pipeline.data import check_failures
from pipeline.data.index import WrittenIndex
from pipeline.data.scan import ScanResult, scan
from pipeline.embed.published import about_stand_in
from pipeline.embed.records import EmbeddingRecord, find_parts, read_records, write_records
from pipeline.errors import PipelineError, number_of
from pipeline.experiment import Artifacts
from pipeline.io.files import make_folder, write_text_atomic
from pipeline.io.remote import Engine
from pipeline.stages.extract.spread import Pool, Shard, ShardRun, embed_on, pays, run_shard
from pipeline.stages.extract.stores import enter, take_over, take_parts
from pipeline.stages.extract.targets import (
    IDENTITY_DIFFERS,
    Contents,
    EmbeddingTarget,
    find_targets,
    require_permitted,
    resolve,
)
from pipeline.stages.extract.work import (
    SUMMED_OVER_THREADS,
    Work,
    embed,
    fill,
    hash_store,
    note_failures,
)
from pipeline.store import FeatureStore
from pipeline.store.writer import StoreWriter

log = logging.getLogger(__name__)

LONG_SECONDS = 60.0
"""Runs longer than this report when more machines would pay off."""


@dataclass(frozen=True, eq=False)
class FeaturesRun:
    """The findings and results of stage one."""

    scan: ScanResult
    targets: tuple[EmbeddingTarget, ...]
    records: tuple[EmbeddingRecord, ...]
    work: Work | None
    """None if nothing was embedded: a plan, or no images were missing."""
    pool: Pool | None
    """The engine's workers, if one was used."""
    planned: bool
    total_seconds: float

    @property
    def pending(self) -> int:
        """The number of distinct images missing in some store."""
        return max((int(target.pending.sum()) for target in self.targets), default=0)

    def summary_lines(self) -> list[str]:
        """Return lines on the data, the work done or planned, and the time spent."""
        lines = [*self.scan.summary_lines(), *(self._plan_lines() if self.planned else self._work_lines())]
        if any(record.untrained for record in self.records):
            lines.append("note: weights: random is an untrained control, marked `untrained` wherever it shows")
        others = [target.source.instead_of for target in self.targets if target.source.instead_of is not None]
        return [*lines, *dict.fromkeys(f"warning: {about_stand_in(section)}" for section in others)]

    def _plan_lines(self) -> Iterator[str]:
        rates = {record.name: record.seconds_per_image for record in self.records}
        for target in self.targets:
            name, count, rate = target.spec.name, int(target.pending.sum()), rates.get(target.spec.name)
            cost = "time unknown until it has run once"
            if rate:
                cost = f"about {_duration(count * rate)} at the last run's rate"
            yield f"{name}: " + (f"{count:,} to embed, {cost}; {target.why}" if count else "complete")

    def _work_lines(self) -> Iterator[str]:
        work = self.work
        if work is None:
            yield f"nothing to embed: every image has its features ({self.total_seconds:.1f} s)"
            return
        yield f"{number_of(work.images, 'image')} embedded in {_duration(work.loop_seconds)} ({work.rate:,.0f} images/s)"
        anew = {target.spec.name: target.why for target in self.targets if IDENTITY_DIFFERS in target.why}
        for name, count in work.vectors.items():
            yield f"  {name}: {count:,} new vectors" + (f"; {anew[name]}" if name in anew else "")
        told = {name: f"{name} {seconds:.1f}" for name, seconds in work.seconds.items()}
        threads = ", ".join(told.pop(name) for name in SUMMED_OVER_THREADS)
        yield f"seconds: {', '.join(told.values())}; in parallel, summed over threads: {threads}"
        if self.pool is not None:
            yield self.pool.line(work)
        elif work.loop_seconds > LONG_SECONDS:
            yield f"more machines (docs/scale.md): {pays(work.seconds['start-up'], work.loop_seconds / max(work.images, 1), 2)}"
        yield from work.problem_lines()


def asked(
    config: Config,
    *,
    plan: bool = False,
    rehash: bool = False,
    shard: str | None = None,
    parts: str | None = None,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
) -> FeaturesRun | ShardRun:
    """Run `features`: on this machine, with the workers of an engine, or for one shard.

    PipelineError for options that exclude each other, and as raised by the runs.
    """
    chosen = Engine.of(engine, address, workers)
    if (shard and (plan or chosen)) or (parts and not (shard or chosen)):
        raise PipelineError("--shard excludes --plan and --engine, and --parts needs --shard or --engine")
    if shard is not None:
        return run_shard(config, Shard.parse(shard), parts, rehash=rehash)
    return run(config, plan=plan, rehash=rehash, engine=chosen, place=parts)


def run(
    config: Config,
    *,
    plan: bool = False,
    rehash: bool = False,
    engine: Engine | None = None,
    place: str | None = None,
) -> FeaturesRun:
    """Update the index and every store, or with `plan` only report what is missing.

    With an `engine` its workers embed, and write parts to `place`, a folder or an address that all of them can access.

    PipelineError for unusable data, unavailable networks or weights, a store that cannot be written, too many failed
    images; KeyboardInterrupt after a signal to stop. Vectors embedded before are kept.
    """
    began = time.perf_counter()
    require_permitted(config)
    files = Artifacts(config.output, config.store)
    scanned = scan(config.dataset, config.seed, files.dataset, rehash=rehash, write=not plan)
    contents = Contents.of(scanned.index, files, config)
    _check_failures(scanned, contents, config, files)
    if not plan:
        enter(files)
    start = time.perf_counter()
    sources = resolve(config, files, contents.digests)  # loads networks whose embeddings are not yet known
    find_parts(config.concat, {spec.name: source for source in sources for spec in source.specs})
    resolving = time.perf_counter() - start
    if not plan:
        take_over([spec for source in sources for spec in source.specs], files, contents.digests)
        take_parts(files.parts, files.stores, remove=True)
    targets = find_targets(sources, contents, files, files.stores_before() if plan else ())
    if not plan:
        targets = fill(targets, contents, scanned.index, config, files)
    pending = [target for target in targets if target.pending.any()]
    known: Sequence[EmbeddingRecord] = ()
    with suppress(PipelineError):
        known = read_records(files.features)
    rates = {record.name: record.seconds_per_image for record in known if record.seconds_per_image}
    work = pool = None
    if pending and not plan:
        work, pool = _embed(pending, contents, config, files, engine, place)
        work.seconds["start-up"] += resolving
        # The time per image is that of reading and decoding, and of the embedding's own network.
        shared = (work.seconds["read"] + work.seconds["decode"]) / work.workers / max(work.images, 1)
        rates |= {name: shared + work.network_seconds[name] / count for name, count in work.vectors.items() if count}
        contents = Contents.of(scanned.index, files, config)
    records = known if plan else _write(config, files, scanned, targets, rates)
    if work is not None:
        _check_failures(scanned, contents, config, files)
    seconds = time.perf_counter() - began
    return FeaturesRun(scanned, tuple(targets), tuple(records), work, pool, plan, seconds)


def _embed(
    pending: Sequence[EmbeddingTarget],
    contents: Contents,
    config: Config,
    files: Artifacts,
    engine: Engine | None = None,
    place: str | None = None,
) -> tuple[Work, Pool | None]:
    """Embed into the stores, here or with an engine's workers, whose parts are merged even after an error."""
    images = contents.part(~contents.failed)
    pending = [replace(target, pending=target.pending[~contents.failed]) for target in pending]
    pool = None
    if engine is None:
        work = embed(pending, images, config, hash_store(files), StoreWriter.open)
    else:
        try:
            work, pool = embed_on(pending, images, config, place or os.path.abspath(files.parts), engine)
        finally:
            take_parts(place or files.parts, files.stores, remove=place is None)
    note_failures(work, files, config)
    return work, pool


def without_labels(config: Config) -> FeaturesRun:
    """Like `run`, for images without labels, or whose labels are ignored.

    PipelineError if the output folder has an experiment with labels, which would be lost.
    """
    files = Artifacts(config.output, config.store)
    before = WrittenIndex.read(files.dataset).index
    if before is not None and (before.labels != "").any():
        raise PipelineError(
            f"{files.root}: has an experiment with labels; `manyheads features` embeds what is new in it, or set another folder with "
            "--set output=FOLDER"
        )
    return run(config.model_copy(update={"dataset": config.dataset.model_copy(update={"target": NO_LABELS})}))


def embed_some(
    config: Config, by: BackboneConfig | str, contents: Contents, some: Contents
) -> list[tuple[EmbeddingTarget, FeatureStore]]:
    """Embed part of a data set with one section of a config, or a baseline, as far as the stores are missing it.

    The embeddings are the same as those of `run` for all `contents`, which later reuses them; no experiment is written.
    """
    files = Artifacts(config.output, config.store)
    sections, floors = ((), (by,)) if isinstance(by, str) else ((by,), ())
    asked = config.model_copy(update={"backbones": sections, "baselines": floors})
    sources = resolve(asked, files, contents.digests)
    take_over([spec for source in sources for spec in source.specs], files, contents.digests)
    targets = find_targets(sources, some, files)
    pending = [target for target in targets if target.pending.any()]
    if pending:
        _embed(pending, some, asked, files)
    return [(target, FeatureStore.open(target.path, target.spec.fingerprint())) for target in targets]


def _check_failures(scanned: ScanResult, contents: Contents, config: Config, files: Artifacts) -> None:
    failed = len(scanned.failures) + int(contents.failed.sum())
    check_failures(failed, scanned.total, config.dataset.max_failures, files.dataset / "failures.csv")


def _write(
    config: Config,
    files: Artifacts,
    scanned: ScanResult,
    targets: Sequence[EmbeddingTarget],
    rates: Mapping[str, float],
) -> list[EmbeddingRecord]:
    """Write features.json, and the config as read."""
    records = [
        EmbeddingRecord(
            name=target.spec.name,
            spec=target.spec,
            store=target.path.name,
            digest=FeatureStore.open(target.path).digest,
            section=target.source.section,
            instead_of=target.source.instead_of,
            seed=config.seed,
            seconds_per_image=rates.get(target.spec.name),
            max_pixels=config.dataset.max_pixels,
        )
        for target in targets
    ]
    make_folder(files.root)
    write_records(files.features, records, config, scanned.index.fingerprint())
    write_text_atomic(files.config, dump_yaml(config, files.root))
    if len(config.dataset.kinds) > 1 or files.targets.exists():
        from pipeline.stages.targets import write_experiments  # imports scikit-learn, which workers do not need

        write_experiments(config, scanned.index, records)
    return records


def _duration(seconds: float) -> str:
    """Return a duration in seconds as text with a suitable unit."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
