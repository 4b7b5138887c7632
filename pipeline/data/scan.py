"""The scan: bring the index up to date with the files, reading only those that may have changed."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import NO_LABELS, DatasetConfig, unknown
from pipeline.data.failures import Failure, noticed, read_failures, record_failures, remembered, shown, write_failures
from pipeline.data.index import INDEX_FILE, SEPARATOR, DatasetIndex, SplitPlan, WrittenIndex, read_record
from pipeline.data.leaks import Copies, apply_leaks, find_copies
from pipeline.data.listing import Listing
from pipeline.data.match import Texts, difference, texts
from pipeline.data.reading import incomplete_jpegs, read_digests
from pipeline.data.sources import list_source
from pipeline.data.splits import make_test_split, prior_sides
from pipeline.data.statcache import StatCache, read_cache
from pipeline.data.summary import ScanResult, class_counts, missing_side
from pipeline.data.targets import TARGETS, countable
from pipeline.errors import DatasetError, first
from pipeline.images import inside, policy_key
from pipeline.io.remote import address_of

MANY_CLASSES, FEW_IMAGES = 20, 5
"""More labels than these are asked about where they are numbers with fewer images each than those."""

IF_CLASSES = "If they are classes, set dataset.target: classification"

MOST_PROBLEMS = 20
"""Lines of one error; more help nobody."""

EDITED = (
    f"{INDEX_FILE} is not the one that was written: it was edited, or is damaged; its splits are kept, delete it to have them "
    "made anew"
)


def scan(config: DatasetConfig, seed: int, folder: Path, *, rehash: bool = False, write: bool = True) -> ScanResult:
    """List the images, read those that are new or may have changed, and bring the index in `folder` up to date.

    `rehash` trusts no file time and reads every file. A scan that finds everything as it was reads no image and writes
    nothing; without `write` the index stays as it is, and two scans say the same.

    Raises
    ------
    DatasetError
        When the data cannot be used as they are.
    """
    began = time.time_ns()
    listing = list_source(config, folder)
    listing.sort()
    cache, before = read_cache(folder), WrittenIndex.read(folder)
    require_its_own(listing.root, folder, config)
    found, stats, failures, read = _read_changed(listing, cache, rehash)
    if cache.is_old and before.index is not None:
        record_failures(folder, incomplete_jpegs(found, config.max_pixels), policy_key(config.max_pixels))
    _require_classes(found, listing, failures, config)
    base, plan = _split(found, before, config, seed)
    copies = find_copies(replace(found, splits=base))
    if config.leaks == "error" and copies.leaks:
        raise _leak_error(found, copies)
    index = replace(found, splits=apply_leaks(base, copies.leaking, config.leaks))
    entries = sorted([*listing.entries, *failures])
    known = remembered(read_failures(folder), index.paths.tolist(), index.digests)
    unchanged = before.index is not None and index.root == before.index.root and index.fingerprint() == before.digest
    if write:
        write_failures(folder, [*entries, *_remarks(index, copies, config.leaks), *known])
        if not unchanged or plan != before.plan or before.edited:
            index.write(folder, plan, config.source)
        if read or not unchanged:
            StatCache(index.paths, stats, index.digests, began, time.time_ns()).write(folder)
    return ScanResult(
        index=index,
        unchanged=unchanged,
        difference=None
        if (old := before.index) is None
        else difference(old.paths, old.digests, index.paths, index.digests),
        read=read,
        copies=copies,
        leak_policy=config.leaks,
        kinds=config.kinds,
        ignored=dict(listing.ignored),
        entries=tuple(entries),
        remembered=len(known),
        warnings=(
            *listing.warnings,
            *_label_warnings(index, config.kinds),
            *_split_warnings(index, config.kinds),
            *_kept_split(plan, config, seed),
            *([EDITED] if before.edited else []),
        ),
    )


def require_its_own(root: Path, folder: Path, config: DatasetConfig) -> None:
    """See that the index in `folder` is not of other data, whose experiment would be written over.

    Data that were moved are the same data: nothing is in their old place.

    Raises
    ------
    DatasetError
    """
    record = read_record(folder) or {}
    there = Path(record.get("root", root))
    if not _is_there(there) or _is_same(there, root) or record.get("source") == config.source == "digits":
        return
    raise DatasetError(
        f"the output folder holds an experiment on the images in {there}, and this config is about those in {root}; set output to "
        "another folder (--set output=FOLDER; of `fit` --output FOLDER). To go on in this one, delete dataset/index.json there: "
        "its splits and features are kept"
    )


def _is_there(root: Path) -> bool:
    """Whether the images of before may still be where they were; of remote ones it is not asked."""
    return address_of(root) is not None or root.is_dir() or inside(str(root)) is not None


def _is_same(one: Path, other: Path) -> bool:
    if one.is_dir() and other.is_dir():
        return one.samefile(other)
    return os.path.realpath(one) == os.path.realpath(other)


def _read_changed(
    listing: Listing, cache: StatCache, rehash: bool
) -> tuple[DatasetIndex, NDArray[np.int64], list[Failure], int]:
    """Take digests from the cache where the file is as it was, and read the others.

    Returns
    -------
    index of the n readable images with the user's splits ('' where there are none)
    their files' sizes and times : int64 of shape (n, 3)
    the files that could not be read, and how many were
    """
    paths, stats = texts(listing.paths), listing.stat_array()
    known, digests = cache.known(paths, stats)
    if rehash:
        known[:] = False
    pending = np.flatnonzero(~known)
    known[pending], digests[pending], stats[pending], failures = read_digests(
        listing.root, paths[pending].tolist(), stats[pending]
    )
    splits = texts(listing.splits if listing.splits is not None else [""] * len(paths))
    groups = texts(listing.groups) if listing.groups is not None else None
    domains = texts(listing.domains) if listing.domains is not None else None
    labels = texts(listing.labels) if len(listing.names) == 1 else np.array(listing.labels, dtype=object)
    index = DatasetIndex(listing.root, paths, labels, splits, groups, digests, stats[:, 0], listing.names, domains)
    index = index.rows(known)
    return index, stats[known], failures, len(pending)


def _split(
    index: DatasetIndex, before: WrittenIndex, config: DatasetConfig, seed: int
) -> tuple[Texts, SplitPlan | None]:
    """Return the splits before leaks, and the plan they were made by; None for the user's own."""
    if (index.splits == "test").any():
        return index.splits, None
    sides = replace(index, splits=np.where(index.splits == "", "train", index.splits).astype(object))
    if config.target == NO_LABELS:
        return sides.splits, None
    plan, prior = SplitPlan(seed, config.test_fraction), np.full(len(index), -1, dtype=np.int8)
    if before.index is not None and (before.plan is not None or before.record is None):
        plan, prior = before.plan or plan, prior_sides(before.index, index)
    return make_test_split(sides, plan, prior, config.kinds), plan


def _kept_split(plan: SplitPlan | None, config: DatasetConfig, seed: int) -> list[str]:
    if plan is None or plan == SplitPlan(seed, config.test_fraction):
        return []
    return [
        f"the test split made with seed {plan.seed} and test_fraction {plan.test_fraction:g} is kept, though the config now says seed "
        f"{seed} and test_fraction {config.test_fraction:g}; delete {INDEX_FILE} to have it made anew"
    ]


def _require_classes(index: DatasetIndex, listing: Listing, failures: list[Failure], config: DatasetConfig) -> None:
    """Refuse data that nothing can be learned from, with the likely reason."""
    origin = config.path if config.source == "manifest" else address_of(listing.root) or listing.root
    if len(index) == 0:
        problems = [f"{entry.path}: {entry.reason}" for entry in sorted([*listing.entries, *failures])]
        if config.source == "manifest" and not problems:
            raise DatasetError(f"{origin}: names no image; expected a row with path and label for each")
        raise DatasetError(f"{origin}: holds no image that can be read", first(problems, MOST_PROBLEMS))
    parts = index.by_target(config.kinds)
    found = [(name, _class_problem(part, listing, config, kind)) for name, kind, part in parts]
    problems = [f"{name}{problem}" for name, problem in found if problem is not None]
    if problems:
        several = len(config.kinds) > 1
        what = f"{len(problems)} of {len(config.kinds)} label columns cannot be used" if several else problems[0]
        raise DatasetError(f"{origin}: {what}", problems if several else ())
    if not np.isin(index.splits.astype(str), ("", "train", "validation")).any():
        raise DatasetError(f"{origin}: every image is in the test split; expected training images as well")


def _class_problem(index: DatasetIndex, listing: Listing, config: DatasetConfig, kind: str) -> str | None:
    """Say why the labels of a column cannot be classes, or ask whether they are meant as such."""
    if kind not in ("auto", "classification"):
        if kind not in TARGETS:
            return unknown("target", kind, ["auto", *TARGETS])
        try:
            target = TARGETS[kind].of(index)
            return target.problem(target.encode(index))
        except DatasetError as error:
            return "; ".join([error.message, *error.problems])
    classes, images = index.classes, len(index)
    if len(classes) < 2:
        hint = ""
        if config.source == "folder":
            depth = 2 if listing.splits is not None else 1
            below = sorted({parts[depth] for path in index.paths if len(parts := path.split("/")) > depth + 1})
            if len(below) > 1:
                hint = f"; inside it are {_some(below)}: if these are the classes, give {listing.root / classes[0]} as dataset.path"
        label = "".join(map(repr, classes)) or "that of no image"
        return f"all {images:,} images are of one class, {label}; expected at least 2 classes{hint}"
    if kind == "classification":
        return None
    lists = tuple(name for name in classes if sum(map(bool, map(str.strip, name.split(SEPARATOR)))) > 1)
    if lists and config.source == "manifest":
        question = "are these several labels per image? Then set dataset.target: multilabel"
        return f"{_such(lists, images)}: {question}. {IF_CLASSES}"
    if len(classes) <= MANY_CLASSES:
        return None
    try:
        numbers = np.array(classes, dtype=float)
    except ValueError:
        numbers = np.array([])
    if len(numbers) and ((numbers % 1 != 0).any() or images < FEW_IMAGES * len(classes)):
        question = "is this a number to predict? Then set dataset.target: regression."
    elif images < 1.5 * len(classes):
        question = "are these the labels, or names of the images?"
    else:
        return None
    return f"{_such(classes, images)}: {question} {IF_CLASSES}"


def _such(classes: Sequence[str], images: int) -> str:
    return f"{len(classes):,} classes of {images:,} images, such as {', '.join(map(repr, classes[:3]))}"


def _label_warnings(index: DatasetIndex, kinds: Sequence[str]) -> Iterator[str]:
    """Labels that a person would take for one: they differ in case or spaces only."""
    for column, _, part in countable(index, kinds):
        alike: dict[str, list[str]] = defaultdict(list)
        for name in part.classes:
            alike[" ".join(name.casefold().split())].append(name)
        for names in alike.values():
            if len(names) > 1:
                yield f"{column}labels {' and '.join(map(repr, names))} differ only in case or spaces; they are separate classes"


def _split_warnings(index: DatasetIndex, kinds: Sequence[str]) -> Iterator[str]:
    for column, _, part in countable(index, kinds):
        if (empty := len(index) - len(part)) > 0:  # an image of several labels is counted under each
            yield f"{column}{empty:,} images have no label, and are left out where it is learned"
        counts = class_counts(part)
        without = [name for name, count in counts.items() if not count["train"] + count["validation"]]
        if without:
            yield f"{column}no training images in {_some(without)}: no head can learn {'it' if len(without) == 1 else 'them'}"
        untested = [name for name, count in counts.items() if not count["test"]]
        if len(untested) == len(counts):
            yield column + (missing_side(part) or "no image is left for the test")
        elif untested:
            yield f"{column}no test images in {_some(untested)}"
    both = sorted(_groups(index, "train", "validation") & _groups(index, "test"))
    if both:
        yield f"{_some(both, 'group', 'groups')} in training and in test: test scores may be too good"


def _groups(index: DatasetIndex, *splits: str) -> set[str]:
    side = index.select(*splits)
    return set() if side.groups is None else set(side.groups.tolist()) - {""}


def _remarks(index: DatasetIndex, copies: Copies, policy: str) -> list[Failure]:
    """Leaks and conflicts, so that all of them can be looked up."""
    paths = index.paths
    outcome = {"drop_train": "the training copy is excluded", "drop_test": "the test copy is excluded"}.get(
        policy, "both are kept"
    )
    leaks = [
        noticed(paths[one], "leak", f"the same content is in the test as {shown(paths[other])}; {outcome}")
        for one, other in copies.leaks
    ]
    conflicts = [
        noticed(
            paths[other],
            "conflict",
            f"labelled {index.said(other)!r}; the same content is {shown(paths[one])}, labelled {index.said(one)!r}",
        )
        for one, other in copies.conflicts
    ]
    return [*leaks, *conflicts]


def _leak_error(index: DatasetIndex, copies: Copies) -> DatasetError:
    problems = [f"{shown(index.paths[one])} = {shown(index.paths[other])}" for one, other in copies.leaks]
    return DatasetError(
        f"{len(copies.leaks):,} training images are in the test set as well; remove one of each pair, or let dataset.leaks be drop_train",
        first(problems, MOST_PROBLEMS),
    )


def _some(names: list[str], one: str = "class", many: str = "classes") -> str:
    named = ", ".join(repr(name) for name in names[:5])
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{one if len(names) == 1 else many} {named}{more}"
