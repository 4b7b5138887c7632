"""Care for an experiment's feature stores: status, verify, repair, gc, pack, export.

The store knows contents, the index knows images; here the two are joined, so that damage is told as image paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.data import DatasetIndex, failed_digests, read_failures
from pipeline.data.index import Texts
from pipeline.data.reading import CACHE_FILE
from pipeline.data.scan import described, scan
from pipeline.data.sources import needs_download
from pipeline.embed.loader import Item, Lane, embed
from pipeline.embed.published import about_stand_in
from pipeline.embed.records import EmbeddingRecord, open_record, read_records, require_index
from pipeline.errors import PipelineError, StoreError, first, number_of
from pipeline.evaluation.audit import read_findings
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.experiment import (
    ADVICE,
    BUDGET,
    FEWSHOT,
    FINETUNING,
    LAYERS,
    REFIT,
    REPORT,
    SPECS,
    TARGETS,
    TRIALS,
    USER,
    Artifacts,
    Kind,
    bundle_file,
    parse_arrays,
    read_document,
    read_lines,
    without_digest,
)
from pipeline.export import bundle as bundles
from pipeline.images import HASH_STORE, policy_key
from pipeline.io.digests import Digests, digest_keys, digests_to_hex
from pipeline.io.files import read_file
from pipeline.stages.extract.stores import alone, contents_of_others, others, take_parts, write_entry
from pipeline.stages.load import open_images
from pipeline.store import FeatureStore, maintain, share

EXAMPLES = 10
"""Image paths named per store; the count is always told in full."""

SAME_COSINE = 0.9999
"""Two embeddings of one image on one kind of machine differ by rounding only; the probe vectors use the same bound."""


@dataclass(frozen=True)
class Check:
    """One store's verification: the files, and where asked a sample of images embedded anew."""

    name: str
    """The embedding's, or the packed file's."""
    report: maintain.VerifyReport
    damaged_images: tuple[str, ...]
    sampled: int = 0
    deviating_images: tuple[str, ...] = ()
    """Sampled images whose vector is not the stored one."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.report.ok and not self.deviating_images

    def lines(self) -> Iterator[str]:
        """The outcome in plain lines."""
        report = self.report
        depth = f"every byte of {_size(report.bytes_read)}" if report.full else "file heads, sizes and structure"
        found = "ok" if self.ok else "DAMAGED" if not report.ok else "DEVIATES"
        yield f"{self.name}: {found}; {number_of(report.rows, 'vector')} in {number_of(report.segments, 'segment')}; checked {depth}"
        for problem in report.problems:
            yield f"  {problem.file}: {problem.found}" + (
                f" ({number_of(problem.rows, 'vector')})" if problem.rows else ""
            )
        yield from _named("images without a usable vector", self.damaged_images)
        if self.sampled:
            same = self.sampled - len(self.deviating_images)
            yield f"  embedded {self.sampled} images anew: {same} give the stored vector"
            yield from _named("images that give another vector", self.deviating_images)
        if not report.ok and report.generation:  # a packed file has none
            yield "  run `manyheads store repair`: it keeps every good vector and embeds just these images again"


@dataclass(frozen=True)
class Experiment:
    """What stage one left behind: its records and the index."""

    config: Config
    files: Artifacts
    records: tuple[EmbeddingRecord, ...]
    index: DatasetIndex

    @staticmethod
    def open(config: Config) -> Experiment:
        """Read the records and the index; PipelineError when stage one has not been run."""
        files = Artifacts(config.output, config.store)
        return Experiment(config, files, read_records(files.features), DatasetIndex.read(files.dataset))

    def path(self, record: EmbeddingRecord) -> Path:
        """The store of an embedding."""
        return self.files.find_store(record.store)

    def paths_of(self, digests: Digests) -> tuple[str, ...]:
        """The images that have one of k contents, uint64 of shape (k, 2)."""
        return _names_of(self.index.paths, self.index.digests, digests)


def _own(path: Path, files: Artifacts) -> Path:
    """A store that may be changed, as it lies where this config has its stores, and no symbolic link leads elsewhere."""
    real = path.resolve()
    if not any(real.is_relative_to(folder.resolve()) for folder in (files.root, files.stores)):
        what = f"is a link to {real}" if path.is_symlink() else "lies"
        raise StoreError(
            f"{path}: {what}, outside of this experiment and of {files.stores}, and stays as it is; `manyheads features` takes "
            "its vectors over"
        )
    return path


def _names_of(names: Texts, contents: Digests, digests: Digests) -> tuple[str, ...]:
    """Those of n names whose content, uint64 of shape (n, 2), is one of k digests, uint64 of shape (k, 2)."""
    return tuple(map(str, names[np.isin(digest_keys(contents), digest_keys(digests))].tolist()))


def status(config: Config) -> list[str]:
    """Say what is cached, missing, changed, stale and failed, and where. The images are looked at as they are now."""
    before = Experiment.open(config)
    here, lines = _as_of_now(before)
    remedy = "`manyheads store gc`" + (" after `manyheads features`" if lines else "")
    failed = failed_digests(here.files.dataset, policy_key(config.dataset.max_pixels))
    live = here.index.digests[~np.isin(digest_keys(here.index.digests), digest_keys(failed))]
    contents = len(np.unique(live, axis=0))
    lines.insert(0, f"{described(here.index, config.dataset.kinds)}, {contents:,} distinct contents that decode")
    if len(failed):
        lines.append(
            f"{number_of(len(here.paths_of(failed)), 'image')} could not be read; {here.files.dataset / 'failures.csv'} names each"
        )
    sections = [record.asked for record in here.records]
    lines += [
        f"{section.name} ({section.weights}): not embedded as the config says now: run `manyheads features`"
        for section in config.sections
        if section not in sections
    ]
    asked = [record.instead_of for record in here.records if record.instead_of is not None]
    lines += dict.fromkeys(f"warning: {about_stand_in(section)}" for section in asked)
    used_elsewhere, problems = contents_of_others(here.files)
    for record in here.records:
        found = maintain.status(here.path(record), live, used_elsewhere)
        if problems:  # nobody can say what is stale
            found = replace(found, stale_rows=None)
        lines += _status_lines(f"{record.name}{' (untrained)' if record.untrained else ''}", found, remedy)
    lines += [f"warning: {problem}" for problem in problems]
    return lines + [
        f"{path}: {_size(maintain.disk_bytes(path))}, used by no embedding of the last `manyheads features`; it serves again "
        "when the config asks for it again, else delete the folder"
        for path in _unused_stores(here)
    ]


def _as_of_now(before: Experiment) -> tuple[Experiment, list[str]]:
    """The experiment with the images that there are now, and what is different from the last run of stage one."""
    config = before.config
    if needs_download(config.dataset):
        return before, ["the images are not looked at, because that means a download"]
    try:
        found = scan(config.dataset, config.seed, before.files.dataset, write=False)
    except PipelineError as error:
        return before, [
            f"warning: the images cannot be used as they are now: {line}" for line in str(error).splitlines()[:1]
        ]
    changes = []
    if not found.unchanged:
        what = str(found.difference or "") or "labels, splits, groups or the folder changed"
        changes.append(f"since the last `manyheads features`: {what}; run it again")
    if found.failures:
        changes.append(f"{len(found.failures):,} files cannot be used; `manyheads check` says why")
    return replace(before, index=found.index), changes


def _unused_stores(here: Experiment) -> list[Path]:
    """Stores of identities that were asked for once: another precision, layer, or file of weights."""
    users, problems = others(here.files)
    used = {here.files.stores / HASH_STORE, *map(here.path, here.records)}
    for user in users:
        try:
            used |= {user.find_store(record.store) for record in read_records(user.features)}
        except (PipelineError, OSError) as error:
            problems.append(str(error))
    folders = () if problems else (here.files.stores, here.files.root / "features")  # nobody can say what is used
    found = (path for folder in folders for path in folder.glob("*.store*"))
    return [path for path in sorted(found) if path.is_dir() and path not in used]


def _status_lines(name: str, found: maintain.StoreStatus, remedy: str = "`manyheads store gc`") -> Iterator[str]:
    """One store in plain lines; `remedy` is what removes stale vectors, which goes by the last run's index."""
    missing, its = found.missing_rows or 0, found.store
    yield f"{name}: " + ("complete" if not missing else f"{missing:,} missing: run `manyheads features`")
    yield (
        f"  {number_of(its.rows, 'vector')} of {its.dim} {its.dtype.name} in {number_of(len(its.segments), 'segment')}, {_size(found.disk_bytes)}, "
        + (f"generation {its.generation}" if its.generation else "a packed file")
    )
    yield f"  {its.path}  digest {its.digest[:16]}"
    if found.stale_rows:
        yield f"  {number_of(found.stale_rows, 'vector')} of no image any more; {remedy} removes them"
    if found.journal_rows:
        yield f"  {number_of(found.journal_rows, 'vector')} of a run that was stopped, for the next `manyheads features`"
    if found.quarantined:
        yield f"  {found.quarantined} damaged files are set aside in {its.path / 'quarantine'}; delete them when you like"
    if found.writer:
        yield f"  being written by {found.writer}"


def status_of_pack(path: Path) -> list[str]:
    """Describe a packed file."""
    found = maintain.status(path)
    index = share.read_packed_index(path)
    has = ", ".join(index.columns) or "no columns"
    return [
        f"{number_of(len(index.digests), 'image')} with {has}",
        *_status_lines(str(found.store.identity.get("architecture", "")), found),
    ]


def verify_pack(path: Path, *, full: bool = False) -> Check:
    """Check a packed file."""
    report = maintain.verify(path, full=full)
    images: tuple[str, ...] = ()
    try:
        maintain.status(path)
        index = share.read_packed_index(path)
    except StoreError as error:
        problem = maintain.StoreDamage(path.name, error.message.removeprefix(f"{path}: "), 0)
        report = replace(report, problems=(*report.problems, problem))
    else:
        names = index.columns.get("paths", np.array(digests_to_hex(index.digests), dtype=object))
        images = _names_of(names, index.digests, report.damaged)
    return Check(path.name, report, images)


def verify_files(config: Config) -> tuple[bool, list[str]]:
    """Check the digest of every file beside the stores; return whether nothing is wrong, and the outcome in plain lines."""
    files = Artifacts(config.output, config.store)
    experiments = [files]
    with suppress(PipelineError):  # which the check of that file tells
        experiments += [Artifacts(folder, files.stores) for folder in files.each_target().values()]
    checks = [check for each in experiments for check in _file_checks(each)]
    problems = []
    for check in checks:
        try:
            check()
        except PipelineError as error:
            problems += str(error).splitlines()
    found = "ok" if not problems else "DAMAGED"
    lines = [f"other files: {found}; {len(checks):,} documents, journals and files of weights"]
    return not problems, lines + [f"  {problem}" for problem in problems]


def _file_checks(files: Artifacts) -> Iterator[Callable[[], object]]:
    """One call for each file: its reader, which raises what is wrong."""
    yield lambda: read_records(files.features)
    yield lambda: require_index(files.features, DatasetIndex.read(files.dataset).fingerprint())
    yield lambda: read_failures(files.dataset)
    yield from (partial(_check_store, path) for path in files.stores.glob(HASH_STORE))
    yield from (partial(read_document, path, USER) for path in sorted(files.stores.glob("experiments/*.json")))
    for pattern, check in _FILES.items():
        for path in sorted(files.root.glob(pattern)):
            if not isinstance(check, Kind):
                yield partial(check, path)
                continue
            older = tuple(range(check.version))  # what is made anew where it is of an earlier version is not damaged
            yield partial(read_lines if path.suffix == ".jsonl" else read_document, path, replace(check, older=older))


def _check_store(path: Path) -> None:
    report = maintain.verify(path, full=True)
    if not report.ok:
        raise StoreError(
            f"{path}: is damaged: {report.problems[0].file}: {report.problems[0].found}; delete it to have it made anew"
        )


def _parsed(check: Callable[[bytes], object], remedy: str) -> Callable[[Path], None]:
    """Return what checks a file by what parses its bytes."""

    def checked(path: Path) -> None:
        try:
            check(read_file(path))
        except ValueError as error:
            raise PipelineError(f"{path}: is damaged: {error}; {remedy}") from None

    return checked


def _check_weights(path: Path) -> None:
    from pipeline.embed.weights import read_weights  # loads torch

    read_weights(path)


def _check_bundle(path: Path) -> None:
    bundles.describe(path.parent)


def _check_bundled(path: Path) -> None:
    bundle_file(path.parent, path.name)


_FILES: dict[str, Kind | Callable[[Path], object]] = {
    f"dataset/{CACHE_FILE}": _parsed(parse_arrays, "delete it, and every image is read again"),
    f"dataset/{HASH_STORE}": _check_store,
    "specs.json": SPECS,
    "targets.json": TARGETS,
    "layers.json": LAYERS,
    "budget.json": BUDGET,
    "leaderboard.json": lambda path: read_leaderboard(path.parent),
    "audit.json": read_findings,
    "report.json": REPORT,
    "fewshot.json": FEWSHOT,
    "advice.json": ADVICE,
    "refit/**/refit.json": REFIT,
    "refit/targets.json": TARGETS,
    "refit/**/bundle.json": _check_bundle,
    "refit/**/head.*": _check_bundled,
    "refit/**/*.npz": _check_bundled,
    "refit/**/*.jsonl": TRIALS,
    "heads/*/*/**/bundle.json": _check_bundle,
    "heads/*/*/**/head.*": _check_bundled,
    "heads/*/*/*.npz": _check_bundled,
    "trials/**/*.jsonl": TRIALS,
    "finetuned/*/result.json": FINETUNING,
    "finetuned/*/checkpoint.pt": _parsed(without_digest, "delete it to train from the start"),
    "finetuned/*/log.jsonl": FINETUNING,
    "finetuned/*/*.safetensors": _check_weights,
}
"""Files below the output folder, and what reads each: the kind of a document, or a function."""


def verify(config: Config, *, full: bool = False, sample: int = 0) -> list[Check]:
    """Check every store; `sample` images per store are embedded anew and compared."""
    here = Experiment.open(config)
    checks = []
    for record in here.records:
        report = maintain.verify(here.path(record), full=full)
        check = Check(record.name, report, here.paths_of(report.damaged))
        if sample and report.ok:
            count, deviating = _embed_again(here, record, sample)
            check = replace(check, sampled=count, deviating_images=deviating)
        checks.append(check)
    return checks


def _embed_again(here: Experiment, record: EmbeddingRecord, sample: int) -> tuple[int, tuple[str, ...]]:
    """Embed random images anew; return how many, and those whose vector differs from the stored one."""
    stored = FeatureStore.open(here.path(record), record.fingerprint)
    rows = np.flatnonzero(~stored.missing(here.index.digests))
    chosen = np.random.default_rng(here.config.seed).permutation(rows)[:sample]
    trusted = record.section in here.config.sections
    embedder, output = open_record(record, here.config.extraction.device, trust_code=trusted)
    items = (Item(row, str(here.index.paths[row]), here.index.digests[row].tobytes(), (0,)) for row in chosen.tolist())
    deviating = []
    for batch, (part,) in embed([Lane(embedder, 1)], items, here.index.root, here.config.dataset.max_pixels):
        (item,) = batch.items
        if part is None:
            deviating.append(f"{item.path} (not compared: {batch.problems[0].reason})")
            continue
        again = part.vectors[output][0]
        before = stored.read(here.index.digests[item.content : item.content + 1])[0]
        cosine = float(again @ before) / max(float(np.linalg.norm(again) * np.linalg.norm(before)), 1e-30)
        if cosine < SAME_COSINE:
            deviating.append(f"{item.path} (cosine {cosine:.6f}, expected at least {SAME_COSINE})")
    return len(chosen), tuple(deviating)


def repair(config: Config) -> list[str]:
    """Drop exactly the damaged vectors of every store; the next run of stage one embeds them again."""
    here = Experiment.open(config)
    lines = []
    for record in here.records:
        report = maintain.repair(_own(here.path(record), here.files))
        if report.ok:
            lines.append(f"{record.name}: nothing to repair")
            continue
        images = here.paths_of(report.damaged)
        lines.append(
            f"{record.name}: {number_of(len(images), 'image')} without a vector now; the damaged files are set aside in quarantine/"
        )
        lines += _named("to be embedded again", images)
        if elsewhere := int((~np.isin(digest_keys(report.damaged), digest_keys(here.index.digests))).sum()):
            lines.append(
                f"  {elsewhere:,} vectors more, of no image here; `manyheads features` of their experiment embeds them"
            )
    return lines


def gc(config: Config) -> list[str]:
    """Remove the vectors that belong to no image of any experiment any more.

    StoreError, and nothing is removed, when an experiment that uses the stores cannot be read.
    """
    here = Experiment.open(config)
    require_index(here.files.features, here.index.fingerprint())
    names = {_own(here.path(record), here.files): record.name for record in here.records}
    with alone(here.files):
        write_entry(here.files)
        contents, problems = contents_of_others(here.files)
        if problems:
            raise StoreError(
                f"{here.files.stores}: nothing is removed until it is known what all experiments use", problems
            )
        live = np.concatenate([here.index.digests, contents])
        shared = [path for path in sorted(here.files.stores.glob("*.store")) if path not in names]
        lines = []
        for path in (*names, *shared):
            what = "is a packed file, which stays as it is; pack the store again instead"
            if not path.is_file():
                gone, kept, freed = maintain.collect(_own(path, here.files), live)
                what = f"{number_of(gone, 'vector')} removed, {kept:,} kept, {_size(freed)} freed"
            lines.append(f"{names.get(path, path.name)}: {what}")
    return lines


def pack(config: Config, output: Path, *, embedding: str | None = None, anonymous: bool = False) -> str:
    """Write one embedding with its paths, labels, splits and groups into a single HDF5 file."""
    images, opened = open_images(Artifacts(config.output, config.store), embedding, "--embedding")
    if "labels" not in images.columns:
        raise StoreError(
            f"{output}: a packed file has room for one column of labels; give the config.yaml of one target, in the folder "
            "targets of the output, or export to .parquet"
        )
    packed = share.pack(opened, output, images.digests, images.columns, anonymous)
    size = _size(maintain.disk_bytes(output))
    return f"{number_of(packed.rows, 'vector')} of {number_of(len(images.digests), 'image')} in {output} ({size}), digest {packed.digest[:16]}"


def export(source: Config | Path, output: Path, *, embedding: str | None = None) -> str:
    """Write one embedding of every image as `.npy` or `.parquet`, rows in the order of the index.

    `source` : an experiment, or a packed file.
    """
    place = source if isinstance(source, Path) else Artifacts(source.output, source.store)
    images, opened = open_images(place, embedding, "--embedding")
    share.export(opened, output, images.digests, images.columns)
    return f"{len(images.digests):,} x {opened.dim} float32 in {output} ({_size(maintain.disk_bytes(output))})"


def merge(target: Path, sources: Sequence[str]) -> list[str]:
    """Add the vectors of other stores or packed files of the same identity to a store, or those of parts to the stores in a folder."""
    of_parts = [source for source in sources if share.part_folders(source)]
    if not of_parts:
        if any(target.glob("*.store")):
            raise StoreError(f"{target}: is a folder of stores; name the one in it that {sources[0]} is to be added to")
        lines = [f"{path}: {count:,} new vectors" for path, count in maintain.merge(target, sources).items()]
        return [*lines, f"{target} has {number_of(FeatureStore.open(target).rows, 'vector')}"]
    if target.suffix == ".store" or any(target.glob("snapshot-*.h5")) or len(of_parts) < len(sources):
        folder = target.parent if target.suffix == ".store" else target
        raise StoreError(
            f"{of_parts[0]}: holds parts of {', '.join(share.part_folders(of_parts[0]))}, which are merged alone, into the folder of the stores: "
            f"manyheads store merge {folder} {' '.join(of_parts)}"
        )
    lines = []
    for source in of_parts:
        for name, count in take_parts(source, target).items():
            rows = FeatureStore.open(target / f"{name}.store").rows
            lines.append(f"{source}: {count:,} new vectors of {name}, which has {rows:,}")
    return lines


def _named(what: str, paths: Sequence[str]) -> Iterator[str]:
    if paths:
        yield f"  {len(paths):,} {what}:"
        yield from (f"    {path}" for path in first(paths, EXAMPLES))


def _size(count: int) -> str:
    """A number of bytes for people."""
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
