"""The scan: update the index from the files, reading only those that may have changed, and report what was found."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import NO_LABELS, DatasetConfig, unknown
from pipeline.data.failures import REMARKS, Failure, noticed, read_failures, remembered, shown, write_failures
from pipeline.data.folder import Listing
from pipeline.data.index import (
    INDEX_FILE,
    SEPARATOR,
    SPLITS,
    Changes,
    DatasetIndex,
    SplitPlan,
    Texts,
    WrittenIndex,
    difference,
    encode,
    read_index_record,
    texts,
)
from pipeline.data.reading import StatCache, read_cache, read_digests
from pipeline.data.sources import list_source
from pipeline.data.splits import Copies, apply_leaks, find_copies, make_test_split, prior_sides
from pipeline.data.targets import TARGETS, as_number, countable, kind_of
from pipeline.errors import DatasetError, first, number_of
from pipeline.images import inside
from pipeline.io.remote import address_of

EXAMPLES = 3
CLASSES_SHOWN = 12

MANY_CLASSES, FEW_IMAGES = 20, 5
"""Above this number of labels, numeric labels with fewer images each than the second number are queried."""

IF_CLASSES = "If they are classes, set dataset.target: classification"

MOST_PROBLEMS = 20
"""Number of lines of one error."""

_LEAKS = {
    "drop_train": "the training copy is left out",
    "drop_test": "the test copy is left out",
    "keep": "kept, so test scores are too good",
}
"""How each policy handles a leak."""

_OTHER_SPLIT = "name the images of each side in a manifest's `split` column, or in folders train/ and test/"


def scan(config: DatasetConfig, seed: int, folder: Path, *, rehash: bool = False, write: bool = True) -> ScanResult:
    """List the images, read those that are new or may have changed, and update the index in `folder`.

    `rehash` ignores file times and reads every file. A scan that finds no change reads no image and writes
    nothing; without `write` the index is not changed, and repeated scans report the same. DatasetError if the data cannot be used as
    they are.
    """
    began = time.time_ns()
    listing = list_source(config, folder)
    before = WrittenIndex.read(folder)
    require_its_own(listing.root, folder, config)
    found, stats, failures, read = _read_changed(listing, read_cache(folder), rehash)
    _require_classes(found, listing, failures, config)
    base, plan = _split(found, before, config, seed)
    copies = find_copies(replace(found, splits=base))
    if config.leaks == "error" and copies.leaks:
        pairs = [f"{shown(found.paths[one])} = {shown(found.paths[other])}" for one, other in copies.leaks]
        raise DatasetError(
            f"{len(pairs):,} training images are in the test set as well; remove one of each pair, or set dataset.leaks: drop_train",
            first(pairs, MOST_PROBLEMS),
        )
    index = replace(found, splits=apply_leaks(base, copies.leaking, config.leaks))
    entries = sorted([*listing.entries, *failures, *_remarks(index, copies, config.leaks)])
    known = remembered(read_failures(folder), index.paths.tolist(), index.digests)
    old = before.index
    unchanged = old is not None and index.root == old.root and index.fingerprint() == before.digest
    if write:
        write_failures(folder, [*entries, *known])
        if not unchanged or plan != before.plan or before.edited:
            index.write(folder, plan, config.source)
        if read or not unchanged:
            StatCache(index.paths, stats, index.digests, began, time.time_ns()).write(folder)
    warnings = [*listing.warnings, *_split_warnings(index, config.kinds)]
    asked = SplitPlan(seed, config.test_fraction)
    if plan not in (None, asked):
        warnings.append(
            f"the test split made with {plan} is kept, though the config now says {asked}; delete {INDEX_FILE} to have it made anew"
        )
    if before.edited:
        warnings.append(
            f"{INDEX_FILE} was edited, or is damaged, since it was written; its splits are kept, delete it to have them "
            "made anew"
        )
    return ScanResult(
        index=index,
        unchanged=unchanged,
        difference=None if old is None else difference(old.paths, old.digests, index.paths, index.digests),
        read=read,
        copies=copies,
        kinds=config.kinds,
        ignored=dict(listing.ignored),
        entries=tuple(entries),
        remembered=len(known),
        warnings=tuple(warnings),
    )


def require_its_own(root: Path, folder: Path, config: DatasetConfig) -> None:
    """Raise DatasetError if the index in `folder` is of other data, whose experiment would be overwritten.

    Moved data are the same data: nothing is left at their old place.
    """
    record = read_index_record(folder) or {}
    there = Path(record.get("root", root))
    is_there = address_of(there) is not None or there.is_dir() or inside(str(there)) is not None  # remote: assumed
    if not is_there or os.path.realpath(there) == os.path.realpath(root):
        return
    if record.get("source") == config.source == "digits" or (there.is_dir() and root.is_dir() and there.samefile(root)):
        return
    raise DatasetError(
        f"the output folder holds an experiment on the images in {there}, and this config is about those in {root}; set output to "
        "another folder, or delete dataset/index.json there to go on in this one, whose splits and features are kept"
    )


def _read_changed(
    listing: Listing, cache: StatCache, rehash: bool
) -> tuple[DatasetIndex, NDArray[np.int64], list[Failure], int]:
    """Take digests of unchanged files from the cache, and read the other files.

    Returns the index of the n readable images with the user's splits, '' if not given, their files' sizes and times, int64
    of shape (n, 3), the files that could not be read, and the number of files read.
    """
    images = sorted(listing.images, key=itemgetter(0))
    columns: list[list[Any]] = [[image[place] for image in images] for place in range(8)]
    names, labels, splits, groups, domains, *touched = columns
    paths, stats = texts(names), np.array(touched, dtype=np.int64).T.copy()
    known, digests = cache.known(paths, stats)
    if rehash:
        known[:] = False
    pending = np.flatnonzero(~known)
    known[pending], digests[pending], stats[pending], failures = read_digests(
        listing.root, paths[pending].tolist(), stats[pending]
    )
    index = DatasetIndex(
        listing.root,
        paths,
        texts(labels) if len(listing.names) == 1 else np.array(labels, dtype=object),
        texts(splits),
        texts(groups) if any(groups) else None,
        digests,
        stats[:, 0],
        listing.names,
        texts(domains) if any(domains) else None,
    )
    index = index.rows(known)
    return index, stats[known], failures, len(pending)


def _split(
    index: DatasetIndex, before: WrittenIndex, config: DatasetConfig, seed: int
) -> tuple[Texts, SplitPlan | None]:
    """Return the splits before leaks are handled, and the plan they were generated by; None if the user gave the splits."""
    if (index.splits == "test").any():
        return index.splits, None
    sides = replace(index, splits=np.where(index.splits == "", "train", index.splits).astype(object))
    if config.target == NO_LABELS:
        return sides.splits, None
    plan, prior = SplitPlan(seed, config.test_fraction), np.full(len(index), -1, dtype=np.int8)
    if before.index is not None and (before.plan is not None or before.record is None):
        plan, prior = before.plan or plan, prior_sides(before.index, index)
    return make_test_split(sides, plan, prior, config.kinds), plan


# ---- errors


def _require_classes(index: DatasetIndex, listing: Listing, failures: list[Failure], config: DatasetConfig) -> None:
    """Raise DatasetError for data that nothing can be learned from, with the likely reason."""
    origin = config.path if config.source == "manifest" else address_of(listing.root) or listing.root
    if len(index) == 0:
        problems = [f"{entry.path}: {entry.reason}" for entry in sorted([*listing.entries, *failures])]
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
    """Return why a column cannot be the target, or a question if its labels look unlike classes; None if it can be used."""
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
        label = "".join(map(repr, classes)) or "that of no image"
        hint = "; if the folders in it are the classes, give it as dataset.path" if config.source == "folder" else ""
        return f"all {images:,} images are of one class, {label}; expected at least 2 classes{hint}"
    return None if kind == "classification" else _doubt(classes, images, config.source)


def _doubt(classes: Sequence[str], images: int, source: str) -> str | None:
    """Return a question about labels that look like several per image, like numbers, or like names; None if there is no doubt."""
    lists = tuple(name for name in classes if sum(map(bool, map(str.strip, name.split(SEPARATOR)))) > 1)
    numbers = np.array(list(map(as_number, classes)))
    if lists and source == "manifest":
        classes, question = lists, "are these several labels per image? Then set dataset.target: multilabel."
    elif len(classes) <= MANY_CLASSES:
        return None
    elif np.isfinite(numbers).all() and ((numbers % 1 != 0).any() or images < FEW_IMAGES * len(classes)):
        question = "is this a number to predict? Then set dataset.target: regression."
    elif images < 1.5 * len(classes):
        question = "are these the labels, or names of the images?"
    else:
        return None
    such = f"{len(classes):,} classes of {images:,} images, such as {', '.join(map(repr, classes[:3]))}"
    return f"{such}: {question} {IF_CLASSES}"


# ---- warnings and remarks


def _split_warnings(index: DatasetIndex, kinds: Sequence[str]) -> Iterator[str]:
    for column, _, part in countable(index, kinds):
        if (empty := len(index) - len(part)) > 0:  # multilabel images are counted once per label
            yield f"{column}{empty:,} images have no label, and are left out of its training"
        counts = class_counts(part)
        without = [name for name, count in counts.items() if not count["train"] + count["validation"]]
        if without:
            yield f"{column}no training images in {_some(without)}: no head can learn {'it' if len(without) == 1 else 'them'}"
        untested = [name for name, count in counts.items() if not count["test"]]
        if len(untested) == len(counts):
            yield column + (_missing_side(part) or "no image is left for the test")
        elif untested:
            yield f"{column}no test images in {_some(untested)}"
    learned, tested = index.select("train", "validation"), index.select("test")
    if index.groups is not None and (both := sorted(({*learned.groups} & {*tested.groups}) - {""})):  # type: ignore[misc]
        yield f"{_some(both, 'group', 'groups')} in training and in test: test scores may be too good"


def _some(names: list[str], one: str = "class", many: str = "classes") -> str:
    return f"{one if len(names) == 1 else many} {', '.join(first([*map(repr, names)], 5))}"


def _remarks(index: DatasetIndex, copies: Copies, policy: str) -> list[Failure]:
    """Return a remark for every leak and conflict, so that all can be looked up."""
    remarks = []
    for one, other in copies.leaks:
        told = f"the same content is in the test as {shown(index.paths[other])}; {_LEAKS[policy]}"
        remarks.append(noticed(index.paths[one], "leak", told))
    for one, other in copies.conflicts:
        same = f"the same content is {shown(index.paths[one])}, labelled {index.said(one)!r}"
        remarks.append(noticed(index.paths[other], "conflict", f"labelled {index.said(other)!r}; {same}"))
    return remarks


def fold_warnings(index: DatasetIndex, folds: int, kinds: Sequence[str] = ("auto",)) -> list[str]:
    """Return warnings for classes with fewer training images, or groups of images, than folds.

    If the images do not allow the requested number of folds, say how many are used instead.
    """
    lines = []
    for column, _, part in countable(index, kinds):
        train = part.select("train", "validation")
        names, images, units = _sizes(train)
        few = sorted(name for name, count in zip(names, units.tolist(), strict=True) if count < folds)
        if (possible := _possible_folds(train, images)) < folds:
            lines.append(
                f"{column}tuning.folds is {folds}, but the training images allow {possible}: heads are tuned with {possible}, and some folds "
                "lack the smallest classes"
            )
        elif few:
            lines.append(
                f"{column}fewer training images, groups or distinct contents than the {folds} folds in {_some(few)}: some folds lack "
                "them; add images or set tuning.folds lower"
            )
    return lines


def _sizes(index: DatasetIndex) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Return the k classes, and for each its number of images and of groups or distinct contents: int64 of shape (k,)."""
    codes, names = encode(index.labels)
    pairs = np.unique(np.stack([codes, index.units()], axis=1), axis=0)
    return names, np.bincount(codes, minlength=len(names)), np.bincount(pairs[:, 0], minlength=len(names))


def _possible_folds(train: DatasetIndex, images: NDArray[np.int64]) -> int:
    """Return the largest number of folds: limited by the images of the largest class, and by the number of groups."""
    groups = train.fold_groups()
    largest = int(images.max(initial=0))
    return largest if groups is None else min(largest, len(np.unique(groups)))


def missing_side(index: DatasetIndex, kinds: Sequence[str] = ("auto",)) -> str | None:
    """Return why no head can be tuned on the data, or none tested; None if both are possible.

    A generated test set may be empty if no class has a group, or a distinct content, to spare.
    """
    return next((column + lack for column, _, part in countable(index, kinds) if (lack := _missing_side(part))), None)


def _missing_side(index: DatasetIndex) -> str | None:
    train = index.select("train", "validation")
    classes, images, units = _sizes(train)
    if not (index.splits == "test").any():
        return (
            f"no image is left for the test, and every leaderboard needs some: no class has more than {units.max(initial=0)} distinct "
            f"images, or groups that must stay together; add images, make groups smaller, raise dataset.test_fraction, or {_OTHER_SPLIT}"
        )
    if len(classes) < 2:
        return f"the training images are of {len(classes)} class, and a classifier needs at least 2; {_OTHER_SPLIT}"
    if _possible_folds(train, images) < 2:
        return "cross-validation is not possible: every class has 1 training image, or all are of one group; give more images"
    return None


# ---- the result


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The updated index, and everything that a user should know about how it was made."""

    index: DatasetIndex
    unchanged: bool
    """Whether the index equals the previous one, row for row."""
    difference: Changes | None
    """Images added, changed, removed and renamed since the last scan; None if there was no index."""
    read: int
    """Files whose bytes were read."""
    copies: Copies
    kinds: tuple[str, ...]
    """The kinds of the label columns, see `DatasetConfig.kinds`."""
    ignored: Mapping[str, int]
    entries: tuple[Failure, ...]
    """The scan's entries for files that are not used, and remarks on others."""
    remembered: int
    """Number of images that failed to decode in earlier runs."""
    warnings: tuple[str, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The entries of failed images, for `check_failures`."""
        return tuple(entry for entry in self.entries if entry.status not in REMARKS)

    @property
    def total(self) -> int:
        """The number of images found, including failed ones."""
        return len(self.index) + len(self.failures)

    def summary_lines(self) -> list[str]:
        """Return a summary as short plain lines: totals, changes, and a few examples of each finding."""
        splits = ((np.count_nonzero(self.index.splits == split), split) for split in SPLITS)
        sides = ", ".join(f"{count:,} {split}" for count, split in splits if count)
        lines = [described(self.index, self.kinds) + f": {sides}" * (self.kinds != (NO_LABELS,))]
        for column, kind, part in countable(self.index, self.kinds):
            lines += [f"  {column}{_in_words(self.index.only(column[:-2]), kind)}"] if column else []
            lines += [f"{'  ' * bool(column)}{line}" for line in _class_lines(class_counts(part))]
        if self.unchanged:
            lines.append("nothing changed since the last scan")
        elif self.difference and str(self.difference):
            lines.append(f"since the last scan: {self.difference}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        if number := self.copies.duplicates:
            lines.append(f"copies of another image on the same side, kept, and never split across folds: {number:,}")
        if self.remembered:
            lines.append(f"images known not to decode, see failures.csv: {self.remembered:,}")
        return lines + passed_over_lines(self.entries, self.ignored)


def class_counts(index: DatasetIndex) -> dict[str, dict[str, int]]:
    """Return the number of images per class and split: class -> split -> number, including zeros."""
    labels, names = encode(index.labels)
    splits, split_names = encode(index.splits)
    table = np.zeros((len(names), len(SPLITS)), dtype=np.int64)
    columns = np.array([SPLITS.index(name) for name in split_names], dtype=np.int64)
    np.add.at(table, (labels, columns[splits]), 1)
    return {
        name: dict(zip(SPLITS, counts, strict=True)) for name, counts in sorted(zip(names, table.tolist(), strict=True))
    }


def _in_words(index: DatasetIndex, kind: str) -> str:
    return TARGETS[kind_of(kind)].in_words(index.rows(index.has_labels(kind)))


def described(index: DatasetIndex, kinds: Sequence[str]) -> str:
    """Return the number of images and a description of their labels, such as `1,797 images in 10 classes`."""
    if tuple(kinds) == (NO_LABELS,):
        return f"{len(index):,} images without labels"
    labels = f"with {len(kinds)} labels each" if len(kinds) > 1 else _in_words(index, kinds[0])
    return f"{len(index):,} images {labels}"


def _class_lines(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    if len(counts) > CLASSES_SHOWN:
        sizes = sorted((sum(count.values()), name) for name, count in counts.items())
        (least, smallest), (most, largest) = sizes[0], sizes[-1]
        return [f"  images per class: {least:,} ({shown(smallest)}) to {most:,} ({shown(largest)})"]
    lines = []
    for name, count in counts.items():
        parts = ", ".join(f"{number:,} {split}" for split, number in count.items() if number)
        lines.append(f"  {shown(name)}: {parts}")
    return lines


def passed_over_lines(
    entries: Sequence[Failure], ignored: Mapping[str, int], where: str = ", see failures.csv"
) -> list[str]:
    """Return lines on files that were passed over or have remarks: a few examples of each status, and the counts."""
    lines = []
    for status in sorted({entry.status for entry in entries}):
        same = [entry for entry in entries if entry.status == status]
        lines.append(f"{status.replace('_', ' ')}: {number_of(len(same), 'file')}")
        lines += [f"  {entry.path}: {entry.reason}" for entry in same[:EXAMPLES]]
        lines += [f"  … and {len(same) - EXAMPLES:,} more{where}"] * (len(same) > EXAMPLES)
    return lines + [f"ignored {what}: {count:,}" for what, count in sorted(ignored.items())]
