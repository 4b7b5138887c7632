"""Stage one: embed what the feature stores do not have yet.

    advice.py      what would have made a run faster
    stores.py      the folder of stores that experiments share
    sources.py     what a config asks to embed, known without loading a network where it was loaded before
    targets.py     what each store is missing, and why
    work.py        batches through the networks (`pipeline.embed.loader`) and into the stores

The images are read and decoded once for all networks. A run with nothing to do imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline import data as dataset
from pipeline.config import Config, ExtractionConfig, dump_yaml
from pipeline.data import DatasetIndex, ScanResult
from pipeline.embed.installed import about_stand_in
from pipeline.embed.records import EmbeddingRecord, read_records, write_records
from pipeline.errors import DatasetError, PipelineError, first, number_of
from pipeline.experiment import Artifacts
from pipeline.images import policy_key
from pipeline.io.digests import digests_to_hex
from pipeline.io.files import make_folder, write_text_atomic
from pipeline.stages.extract.advice import advise
from pipeline.stages.extract.sources import require_permitted, resolve
from pipeline.stages.extract.stores import enter, take_over
from pipeline.stages.extract.targets import IDENTITY_DIFFERS, Contents, Target, find_targets, reasons
from pipeline.stages.extract.work import SUMMED_OVER_THREADS, Work, embed
from pipeline.stages.targets import write_experiments
from pipeline.store import FeatureStore

log = logging.getLogger(__name__)

WHY_SHOWN = 20
EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class FeaturesRun:
    """What stage one found and did."""

    scan: ScanResult
    targets: tuple[Target, ...]
    records: tuple[EmbeddingRecord, ...]
    failed: int
    """Images of the index that do not decode."""
    work: Work | None
    """None when nothing was embedded: a plan, or nothing to do."""
    planned: bool
    reasons: tuple[str, ...]
    stand_ins: tuple[str, ...]
    """Lines on networks that stand in for others, or did until now."""
    total_seconds: float
    extraction: ExtractionConfig

    @property
    def pending(self) -> int:
        """Distinct images that some store is missing."""
        return max((int(target.pending.sum()) for target in self.targets), default=0)

    def summary_lines(self, *, why: bool = False) -> list[str]:
        """What the data are, what was done or would be, and where the time went."""
        lines = self.scan.summary_lines()
        lines += list(self._plan_lines()) if self.planned else list(self._work_lines())
        if why and self.planned:
            lines += first(self.reasons, WHY_SHOWN)
        if any(record.untrained for record in self.records):
            lines.append("note: weights: random is an untrained control, marked `untrained` wherever it shows")
        return [*lines, *self.stand_ins]

    def _plan_lines(self) -> Iterator[str]:
        rates = {record.name: record.seconds_per_image for record in self.records}
        for target in self.targets:
            count = int(target.pending.sum())
            if not count:
                yield f"{target.spec.name}: complete, {target.rows:,} vectors"
                continue
            rate = rates.get(target.spec.name)
            cost = (
                f"about {_duration(count * rate)} at the last run's rate"
                if rate
                else "time unknown until it has run once"
            )
            yield f"{target.spec.name}: {count:,} to embed, {cost}; {target.why}"

    def _work_lines(self) -> Iterator[str]:
        work = self.work
        if work is None:
            yield f"nothing to embed: every image has its features ({self.total_seconds:.1f} s)"
            return
        rate = work.images / work.loop_seconds if work.loop_seconds else 0.0
        yield f"{number_of(work.images, 'image')} embedded in {_duration(work.loop_seconds)} ({rate:,.0f} images/s)"
        anew = {target.spec.name: target.why for target in self.targets if IDENTITY_DIFFERS in target.why}
        for name, count in work.vectors.items():
            yield f"  {name}: {count:,} new vectors" + (f"; {anew[name]}" if name in anew else "")
        threads = [f"{name} {work.seconds[name]:.1f}" for name in SUMMED_OVER_THREADS]
        others = [f"{name} {seconds:.1f}" for name, seconds in work.seconds.items() if name not in SUMMED_OVER_THREADS]
        told = ", ".join(others).replace("network ", "network and baselines ")
        yield f"seconds: {told}; beside them, summed over threads: {', '.join(threads)}"
        yield advise(work, [target.spec for target in self.targets], self.extraction)
        if work.failures:
            yield f"{number_of(len(work.failures), 'image')} could not be used; dataset/failures.csv names each with its reason:"
            reasons = [f"{entry.path}: {entry.reason}" for entry in work.failures]
            yield from (f"  {line}" for line in first(reasons, EXAMPLES))
        if work.unavailable:
            yield f"warning: {number_of(len(work.unavailable), 'image')} could not be read this time; run again:"
            yield from (f"  {line}" for line in first(work.unavailable, EXAMPLES))


def run(config: Config, *, plan: bool = False, rehash: bool = False) -> FeaturesRun:
    """Bring the index and every store up to date, or with `plan` only say what that would take.

    Raises
    ------
    PipelineError
        For unusable data, a network or weights that are not to be had, a store that cannot be written, too many failed
        images. What was embedded before stays.
    KeyboardInterrupt
        After a signal to stop, with every finished row committed.
    """
    began = time.perf_counter()
    require_permitted(config)
    files = Artifacts(config.output, config.store)
    before = _index_before(files) if plan else {}
    scanned = dataset.scan(config.dataset, config.seed, files.dataset, rehash=rehash, write=not plan)
    policy = policy_key(config.dataset.max_pixels)
    contents = Contents.of(scanned.index, dataset.failed_digests(files.dataset, policy))
    _check_failures(scanned, contents, config, files)
    if not plan:
        enter(files)
    start = time.perf_counter()
    sources = resolve(config, files, contents.digests)  # loads the networks whose embeddings are not known yet
    resolving = time.perf_counter() - start
    if not plan:
        take_over([spec for source in sources for spec in source.specs], files, contents.digests)
    targets = find_targets(sources, contents, files, files.stores_before() if plan else ())
    pending = [target for target in targets if target.pending.any()]
    known = _records_before(files)
    rates = {record.name: record.seconds_per_image for record in known if record.seconds_per_image is not None}
    work = None
    if pending and not plan:
        work = embed(pending, contents, scanned.index, config, files)
        work.seconds["start-up"] += resolving
        rates |= _rates(work)
        contents = Contents.of(scanned.index, dataset.failed_digests(files.dataset, policy))
    why = [line for target in pending for line in reasons(scanned.index, before, contents, target)] if plan else []
    records = known if plan else _write(config, files, scanned, targets, rates)
    if work is not None:
        _check_failures(scanned, contents, config, files)
    return FeaturesRun(
        scan=scanned,
        targets=tuple(targets),
        records=tuple(records),
        failed=int(contents.failed.sum()),
        work=work,
        planned=plan,
        reasons=tuple(dict.fromkeys(why)),
        stand_ins=tuple(dict.fromkeys(_about_stand_ins(targets, known))),
        total_seconds=time.perf_counter() - began,
        extraction=config.extraction,
    )


def _index_before(files: Artifacts) -> dict[str, str]:
    """Path -> hex digest of the index as the last run left it."""
    try:
        index = DatasetIndex.read(files.dataset)
    except DatasetError:
        return {}
    return dict(zip(index.paths.tolist(), digests_to_hex(index.digests), strict=True))


def _check_failures(scanned: ScanResult, contents: Contents, config: Config, files: Artifacts) -> None:
    failed = len(scanned.failures) + int(contents.failed.sum())
    dataset.check_failures(failed, scanned.total, config.dataset.max_failures, files.dataset / "failures.csv")


def _records_before(files: Artifacts) -> Sequence[EmbeddingRecord]:
    try:
        return read_records(files.features)
    except PipelineError:
        return ()


def _about_stand_ins(targets: Sequence[Target], before: Sequence[EmbeddingRecord]) -> Iterator[str]:
    """What is embedded in another's place, and what is embedded at last where another stood in."""
    for target in targets:
        if target.source.instead_of is not None:
            yield f"warning: {about_stand_in(target.source.instead_of)}"
    sections = [target.source.section for target in targets]
    for record in before:
        if (asked := record.instead_of) is not None and asked in sections:
            yield (f"{asked.title} is installed now: its features take the place of {record.name}, which stood in")


def _rates(work: Work) -> dict[str, float]:
    """What one image costs per embedding: reading and decoding, and its own network."""
    shared = (work.seconds["read"] + work.seconds["decode"]) / work.workers / max(work.images, 1)
    return {name: shared + seconds / work.network_images[name] for name, seconds in work.network_seconds.items()}


def _write(
    config: Config, files: Artifacts, scanned: ScanResult, targets: Sequence[Target], rates: Mapping[str, float]
) -> list[EmbeddingRecord]:
    """Write features.json, and the config as it was read."""
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
    write_experiments(config, scanned.index, records)
    return records


def _duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
