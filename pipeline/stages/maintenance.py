"""Maintenance of an experiment's feature stores: status, verify, repair, gc, pack, export, merge.

Stores contain contents, the index contains images; this module combines them, so that damage is reported as image paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.data import DatasetIndex, failed_digests, read_failures
from pipeline.data.index import Texts
from pipeline.data.scan import described, scan
from pipeline.data.sources import needs_download
from pipeline.embed.published import about_stand_in
from pipeline.embed.records import EmbeddingRecord, read_records, require_index
from pipeline.errors import PipelineError, StoreError, first, number_of
from pipeline.experiment import Artifacts, bundle_file, parse_arrays, require_whole, without_digest
from pipeline.images import HASH_STORE, policy_key
from pipeline.io.digests import Digests, digest_keys, digests_to_hex
from pipeline.io.files import read_file
from pipeline.io.process import size_text
from pipeline.stages.extract.stores import alone, contents_of_others, take_parts, write_entry
from pipeline.stages.load import open_images
from pipeline.store import FeatureStore, lock, maintain, share
from pipeline.store.reader import open_segment
from pipeline.store.writer import groups

EXAMPLES = 10
"""Number of image paths listed per store; the count is always complete."""

SAME_COSINE = 0.9999
"""Two embeddings of an image on the same kind of machine differ by rounding only; the probe vectors use the same bound."""


@dataclass(frozen=True)
class Experiment:
    """The results of stage one: its records and the index."""

    config: Config
    files: Artifacts
    records: tuple[EmbeddingRecord, ...]
    index: DatasetIndex

    @staticmethod
    def open(config: Config) -> Experiment:
        """Read the records and the index; PipelineError if stage one has not been run."""
        files = Artifacts(config.output, config.store)
        return Experiment(config, files, read_records(files.features), DatasetIndex.read(files.dataset))

    def path(self, record: EmbeddingRecord) -> Path:
        """Return the path of an embedding's store."""
        return self.files.find_store(record.store)

    def own(self, path: Path) -> Path:
        """Return the path of a store if it may be changed: it must be in this experiment's folders, also after resolving symbolic links."""
        real = path.resolve()
        if not any(real.is_relative_to(folder.resolve()) for folder in (self.files.root, self.files.stores)):
            raise StoreError(
                f"{path}: leads to {real}, outside of this experiment and of {self.files.stores}, and stays as it is; `manyheads "
                "features` takes its vectors over"
            )
        return path

    def paths_of(self, digests: Digests) -> tuple[str, ...]:
        """Return the paths of the images with one of k contents, uint64 of shape (k, 2)."""
        return _names_of(self.index.paths, self.index.digests, digests)


def _names_of(names: Texts, contents: Digests, digests: Digests) -> tuple[str, ...]:
    """Return those of n names whose content, uint64 of shape (n, 2), is one of k digests, uint64 of shape (k, 2)."""
    return tuple(map(str, names[np.isin(digest_keys(contents), digest_keys(digests))].tolist()))


def _named(what: str, paths: Sequence[str]) -> Iterator[str]:
    if paths:
        yield f"  {len(paths):,} {what}:"
        yield from (f"    {path}" for path in first(paths, EXAMPLES))


# ---- status


def status(config: Config) -> list[str]:
    """Return lines on what is cached, missing, changed, stale and failed, and where. The images are scanned as they are now."""
    here = Experiment.open(config)
    index, changes = _as_of_now(here)
    failed = failed_digests(here.files.dataset, policy_key(config.dataset.max_pixels))
    is_failed = np.isin(digest_keys(index.digests), digest_keys(failed))
    live = np.unique(index.digests[~is_failed], axis=0)
    lines = [f"{described(index, config.dataset.kinds)}, {len(live):,} distinct contents that decode", *changes]
    if is_failed.any():
        ledger = here.files.dataset / "failures.csv"
        lines.append(f"{number_of(int(is_failed.sum()), 'image')} could not be read; {ledger} names each")
    sections = [record.asked for record in here.records]
    lines += [
        f"{section.name} ({section.weights}): not embedded as the config says now: run `manyheads features`"
        for section in config.sections
        if section not in sections
    ]
    asked = [record.instead_of for record in here.records if record.instead_of is not None]
    lines += dict.fromkeys(f"warning: {about_stand_in(section)}" for section in asked)
    others, problems = contents_of_others(here.files)
    used = None if problems else np.unique(np.concatenate([live, others]), axis=0)  # else not known
    remedy = "`manyheads store gc`" + (" after `manyheads features`" if changes else "")
    for record in here.records:
        name = f"{record.name}{' (untrained)' if record.untrained else ''}"
        lines += store_lines(name, here.path(record), live, used, remedy)
    return lines + [f"warning: {problem}" for problem in problems]


def _as_of_now(here: Experiment) -> tuple[DatasetIndex, list[str]]:
    """Return the index of the current images, and the changes since the last run of stage one."""
    config = here.config
    if needs_download(config.dataset):
        return here.index, ["the images are not looked at, because that means a download"]
    try:
        found = scan(config.dataset, config.seed, here.files.dataset, write=False)
    except PipelineError as error:
        return here.index, [f"warning: the images cannot be used as they are now: {error.message}"]
    changes = []
    if not found.unchanged:
        what = str(found.difference or "") or "labels, splits, groups or the folder changed"
        changes.append(f"since the last `manyheads features`: {what}; run it again")
    if found.failures:
        changes.append(f"{len(found.failures):,} files cannot be used; `manyheads check` says why")
    return found.index, changes


def store_lines(
    name: str, path: Path, live: Digests | None = None, used: Digests | None = None, remedy: str = ""
) -> Iterator[str]:
    """Describe a store or a packed file.

    live : distinct contents that it should contain, uint64 of shape (n, 2)
    used : contents used by any experiment, uint64 of shape (m, 2); `remedy` is the command that removes the others
    """
    store = FeatureStore.open(path)
    missing = 0 if live is None else int(store.missing(live).sum())
    yield f"{name}: " + (f"{missing:,} missing: run `manyheads features`" if missing else "complete")
    vectors, size = number_of(store.rows, "vector"), _size(path)
    yield f"  {vectors} of {store.dim} {store.dtype.name} in {number_of(len(store.segments), 'segment')}, {size}"
    yield f"  {path}  digest {store.digest[:16]}"
    if used is not None and (stale := store.rows - int((~store.missing(used)).sum())):
        yield f"  {number_of(stale, 'vector')} of no image; {remedy} removes them"
    if waiting := sum(len(open_segment(group, store.store_type).bulk) for group in groups(path)):
        yield f"  {number_of(waiting, 'vector')} of an interrupted run, which the next `manyheads features` will take over"
    if writer := lock.holder(path):
        yield f"  being written by {writer}"


def status_of_pack(path: Path) -> list[str]:
    """Describe a packed file."""
    images = share.read_packed_index(path)
    first_line = f"{number_of(len(images.digests), 'image')} with {', '.join(images.columns) or 'no columns'}"
    return [first_line, *store_lines(path.name, path)]


# ---- verify


@dataclass(frozen=True)
class Check:
    """The verification of one store: its files, and optionally a sample of images embedded again."""

    name: str
    """Name of the embedding or of the packed file."""
    report: maintain.VerifyReport
    damaged_images: tuple[str, ...]
    sampled: int = 0
    deviating_images: tuple[str, ...] = ()
    """Sampled images whose vector differs from the stored one."""

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return self.report.ok and not self.deviating_images

    def lines(self) -> Iterator[str]:
        """Return the result as plain lines."""
        report = self.report
        depth = "every byte" if report.full else "file heads, sizes and structure"
        found = "ok" if self.ok else "DAMAGED" if not report.ok else "DEVIATES"
        yield f"{self.name}: {found}; {number_of(report.rows, 'vector')}; checked {depth}"
        yield from (f"  {problem}" for problem in report.problems)
        yield from _named("images without a usable vector", self.damaged_images)
        if self.sampled:
            same = self.sampled - len(self.deviating_images)
            yield f"  embedded {self.sampled} images anew: {same} give the stored vector"
            yield from _named("images that give another vector", self.deviating_images)
        if not report.ok and report.generation:  # a packed file has none
            yield "  run `manyheads store repair`: it keeps every good vector and embeds just these images again"


def verify(config: Config, *, full: bool = False, sample: int = 0) -> list[Check]:
    """Check every store; `sample` images per store are embedded again and compared."""
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
    """Embed random images again; return their number, and those whose vector differs from the stored one."""
    from pipeline.stages.estimators import embedder_of

    stored = FeatureStore.open(here.path(record), record.fingerprint)
    rows = np.flatnonzero(~stored.missing(here.index.digests))
    chosen = np.random.default_rng(here.config.seed).permutation(rows)[:sample]
    trusted = record.section in here.config.sections
    embedder = embedder_of(record, None, here.config.extraction.device, trusted)
    again, problems = embedder.embed([str(here.index.root / path) for path in here.index.paths[chosen]])
    deviating = [f"{here.index.paths[chosen[n]]} (not compared: {why.reason})" for n, why in problems.items()]
    compared = np.delete(chosen, [*problems])
    before = stored.read(here.index.digests[compared])
    lengths = np.linalg.norm(again, axis=1) * np.linalg.norm(before, axis=1)
    cosines = (again * before).sum(axis=1) / np.maximum(lengths, 1e-30)
    for row, cosine in zip(compared.tolist(), cosines.tolist(), strict=True):
        if cosine < SAME_COSINE:
            deviating.append(f"{here.index.paths[row]} (cosine {cosine:.6f}, expected at least {SAME_COSINE})")
    return len(chosen), tuple(deviating)


def verify_pack(path: Path, *, full: bool = False) -> Check:
    """Check a packed file."""
    report = maintain.verify(path, full=full)
    try:
        FeatureStore.open(path)
        images = share.read_packed_index(path)
    except StoreError as error:
        problem = f"{path.name}: {error.message.removeprefix(f'{path}: ')}"
        return Check(path.name, replace(report, problems=(*report.problems, problem)), ())
    names = images.columns.get("paths", np.array(digests_to_hex(images.digests), dtype=object))
    return Check(path.name, report, _names_of(names, images.digests, report.damaged))


def verify_files(config: Config) -> tuple[bool, list[str]]:
    """Check the digests of all files outside the stores; return whether all are intact, and the result as plain lines."""
    files = Artifacts(config.output, config.store)
    found = [(path, check) for pattern, check in _CHECKS.items() for path in sorted(files.root.rglob(pattern))]
    found += [(path, require_whole) for path in sorted(files.stores.glob("experiments/*.json"))]
    found += [(path, _check_store) for path in files.stores.glob(HASH_STORE)]
    problems = []
    for path, check in found:
        try:
            check(path)
        except PipelineError as error:
            problems += str(error).splitlines()
        except ValueError as error:
            problems.append(f"{path}: is damaged: {error}; delete it to have it made anew")
    told = "ok" if not problems else "DAMAGED"
    lines = [f"other files: {told}; {len(found):,} documents, journals and files of weights"]
    return not problems, lines + [f"  {problem}" for problem in problems]


def _check_index(path: Path) -> None:
    index = DatasetIndex.read(path.parent)
    if (features := Artifacts(path.parents[1]).features).exists():
        require_index(features, index.fingerprint())


def _check_store(path: Path) -> None:
    report = maintain.verify(path, full=True)
    if not report.ok:
        raise StoreError(f"{path}: is damaged: {report.problems[0]}; delete it to have it made anew")


def _check_bundled(path: Path) -> bytes:
    return bundle_file(path.parent, path.name)


def _check_weights(path: Path) -> None:
    from pipeline.embed.weights import read_weights  # loads torch

    read_weights(path)


_CHECKS: dict[str, Callable[[Path], object]] = {
    "*.json": require_whole,
    "*.jsonl": require_whole,
    "index.csv": _check_index,
    "failures.csv": lambda path: read_failures(path.parent),
    "head.*": _check_bundled,
    "*.npz": lambda path: parse_arrays(_check_bundled(path)),
    "checkpoint.pt": lambda path: without_digest(read_file(path)),
    "*.safetensors": _check_weights,
    HASH_STORE: _check_store,
}
"""Patterns of files anywhere below the output folder -> their checks, which raise PipelineError or ValueError for damage."""


# ---- repair, gc, pack, export, merge


def repair(config: Config) -> list[str]:
    """Drop exactly the damaged vectors of every store; the next run of stage one embeds them again."""
    here = Experiment.open(config)
    lines = []
    for record in here.records:
        report = maintain.repair(here.own(here.path(record)))
        done = f"{number_of(len(report.damaged), 'vector')} dropped; the damaged files are set aside in quarantine/"
        lines.append(f"{record.name}: {'nothing to repair' if report.ok else done}")
        lines += _named("images to be embedded again", here.paths_of(report.damaged))
    return lines


def gc(config: Config) -> list[str]:
    """Remove vectors that are no longer used by any image of any experiment.

    StoreError if an experiment that uses the stores cannot be read; then nothing is removed.
    """
    here = Experiment.open(config)
    require_index(here.files.features, here.index.fingerprint())
    names = {here.own(here.path(record)): record.name for record in here.records}
    lines = []
    with alone(here.files):
        write_entry(here.files)
        contents, problems = contents_of_others(here.files)
        if problems:
            raise StoreError(
                f"{here.files.stores}: nothing is removed until it is known what all experiments use", problems
            )
        live = np.concatenate([here.index.digests, contents])
        for path in dict.fromkeys([*names, *sorted(here.files.stores.glob("*.store"))]):
            what = "is a packed file, which stays as it is; pack the store again instead"
            if not path.is_file():
                gone, kept = maintain.collect(here.own(path), live)
                what = f"{number_of(gone, 'vector')} removed, {kept:,} kept"
            lines.append(f"{names.get(path, path.name)}: {what}")
    return lines


def pack(config: Config, output: Path, *, embedding: str | None = None, anonymous: bool = False) -> str:
    """Write one embedding with its paths, labels, splits and groups to a single HDF5 file."""
    images, opened = open_images(Artifacts(config.output, config.store), embedding, "--embedding")
    if "labels" not in images.columns:
        raise StoreError(
            f"{output}: a packed file has room for one column of labels; give the config.yaml of one target, in the folder "
            "targets of the output, or export to .parquet"
        )
    packed = share.pack(opened, output, images.digests, images.columns, anonymous)
    what = f"{number_of(packed.rows, 'vector')} of {number_of(len(images.digests), 'image')}"
    return f"{what} in {output} ({_size(output)}), digest {packed.digest[:16]}"


def export(source: Config | Path, output: Path, *, embedding: str | None = None) -> str:
    """Write one embedding of every image as `.npy` or `.parquet`, with rows in the order of the index.

    `source` : an experiment, or a packed file.
    """
    place = source if isinstance(source, Path) else Artifacts(source.output, source.store)
    images, opened = open_images(place, embedding, "--embedding")
    share.export(opened, output, images.digests, images.columns)
    return f"{len(images.digests):,} x {opened.dim} float32 in {output} ({_size(output)})"


def merge(target: Path, sources: Sequence[str]) -> list[str]:
    """Merge other stores or packed files of the same identity into a store, or parts into the stores in a folder."""
    of_parts = [source for source in sources if share.part_folders(source)]
    is_folder = target.suffix != ".store" and not any(target.glob("snapshot-*.h5"))
    if of_parts and is_folder and len(of_parts) == len(sources):
        return [
            f"{source}: {count:,} new vectors of {name}"
            for source in of_parts
            for name, count in take_parts(source, target).items()
        ]
    if of_parts or any(target.glob("*.store")):
        raise StoreError(
            f"{target}: parts, such as `features --shard` writes, are merged alone and into the folder of the stores; stores and "
            "packed files into one store"
        )
    lines = [f"{path}: {count:,} new vectors" for path, count in maintain.merge(target, sources).items()]
    return [*lines, f"{target} has {number_of(FeatureStore.open(target).rows, 'vector')}"]


def _size(path: Path) -> str:
    """Return the size of a file, or of all files in a folder, as text."""
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    return size_text(size)
