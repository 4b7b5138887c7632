"""What a scan found, and how it is told in a few plain lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import NO_LABELS
from pipeline.data.failures import REMARKS, Failure, shown
from pipeline.data.index import SPLITS, DatasetIndex
from pipeline.data.leaks import Copies, Pair
from pipeline.data.match import Difference, encode
from pipeline.data.targets import TARGETS, countable, kind_of

EXAMPLES = 3
CLASSES_SHOWN = 12


@dataclass(frozen=True, eq=False)
class ScanResult:
    """The index as it is now, and all that a user should know about how it came to be."""

    index: DatasetIndex
    unchanged: bool
    """The index is the one that was there before, row for row."""
    difference: Difference | None
    """Images added, changed, removed and renamed since the last scan; None where there was no index before."""
    read: int
    """Files whose bytes were read."""
    copies: Copies
    leak_policy: str
    kinds: tuple[str, ...]
    """What the columns of labels are, see `DatasetConfig.kinds`."""
    ignored: Mapping[str, int]
    entries: tuple[Failure, ...]
    """Files not used, as the scan found them."""
    remembered: int
    """Images known from earlier runs not to decode."""
    warnings: tuple[str, ...]

    @property
    def failures(self) -> tuple[Failure, ...]:
        """The entries that are failed images, for `check_failures`."""
        return tuple(entry for entry in self.entries if entry.status not in REMARKS)

    @property
    def total(self) -> int:
        """Images found, the failed ones included."""
        return len(self.index) + len(self.failures)

    def summary_lines(self) -> list[str]:
        """Return short plain lines: the whole, what changed, and a few examples of each thing worth a look."""
        lines = [_headline(self.index, self.kinds)]
        for column, kind, part in countable(self.index, self.kinds):
            lines += [f"  {column}{_in_words(self.index.only(column[:-2]), kind)}"] if column else []
            lines += [f"{'  ' * bool(column)}{line}" for line in _class_lines(class_counts(part))]
        if self.unchanged:
            lines.append("nothing changed since the last scan")
        elif self.difference and str(self.difference):
            lines.append(f"since the last scan: {self.difference}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        lines += self._pair_lines(self.copies.leaks, f"in training and in test ({_LEAK_TEXT[self.leak_policy]})")
        lines += self._pair_lines(self.copies.conflicts, "under two labels (kept as they are; mend the labels)")
        if number := self.copies.duplicates:
            lines.append(f"copies of another image on the same side, kept, and never parted by folds: {number:,}")
        if self.remembered:
            lines.append(f"images known not to decode, see failures.csv: {self.remembered:,}")
        return lines + passed_over_lines(self.entries, self.ignored)

    def _pair_lines(self, pairs: Sequence[Pair], what: str) -> list[str]:
        if not pairs:
            return []
        paths = self.index.paths
        lines = [f"{len(pairs):,} {'pair' if len(pairs) == 1 else 'pairs'} of equal images {what}:"]
        for rows in pairs[:EXAMPLES]:
            names = [shown(paths[row]) for row in rows]
            if pairs is self.copies.conflicts:
                names = [f"{name} ({shown(self.index.said(row))})" for name, row in zip(names, rows, strict=True)]
            lines.append("  " + " = ".join(names))
        return lines + _more(len(pairs))


_LEAK_TEXT = {
    "drop_train": "the training copy is left out",
    "drop_test": "the test copy is left out",
    "keep": "kept, so test scores are too good",
    "error": "refused",
}


def class_counts(index: DatasetIndex) -> dict[str, dict[str, int]]:
    """Return the images of each class in each split: class -> split -> number, zeros included."""
    labels, names = encode(index.labels)
    splits, split_names = encode(index.splits)
    table = np.zeros((len(names), len(SPLITS)), dtype=np.int64)
    columns = np.array([SPLITS.index(name) for name in split_names], dtype=np.int64)
    np.add.at(table, (labels, columns[splits]), 1)
    return {
        names[row]: dict(zip(SPLITS, table[row].tolist(), strict=True))
        for row in sorted(range(len(names)), key=names.__getitem__)
    }


def fold_warnings(index: DatasetIndex, folds: int, kinds: Sequence[str] = ("auto",)) -> list[str]:
    """Name the classes that have too few images, or groups of images, on the training side for so many folds.

    One line where the images do not allow so many folds at all: then there are as many as they allow.
    """
    return [f"{column}{line}" for column, _, part in countable(index, kinds) for line in _fold_warnings(part, folds)]


def _fold_warnings(index: DatasetIndex, folds: int) -> list[str]:
    train = index.select("train", "validation")
    codes, names = encode(train.labels)
    pairs = np.unique(np.stack([codes, train.units()], axis=1), axis=0)
    units = np.bincount(pairs[:, 0], minlength=len(names))
    images = np.bincount(codes, minlength=len(names))
    if (possible := _possible_folds(train, images)) < folds:
        return [
            f"tuning.folds is {folds}, and the training images allow {possible}: heads are tuned on as many, some of them without "
            "the smallest classes"
        ]
    lines = []
    for row in sorted(range(len(names)), key=names.__getitem__):
        if images[row] < folds:
            have = "1 training image" if images[row] == 1 else f"{images[row]} training images"
        elif units[row] < folds:
            have = f"training images of only {units[row]} groups or distinct contents"
        else:
            continue
        lines.append(
            f"class {shown(names[row])} has {have}, fewer than the {folds} folds: some folds are without it; add images or set tuning.folds lower"
        )
    return lines


def _possible_folds(train: DatasetIndex, images: NDArray[np.int64]) -> int:
    """As many as the largest class has images, and as there are groups."""
    groups = train.fold_groups()
    largest = int(images.max(initial=0))
    return largest if groups is None else min(largest, len(np.unique(groups)))


def missing_side(index: DatasetIndex, kinds: Sequence[str] = ("auto",)) -> str | None:
    """Say what the data lack so that no head can be tuned, or none can be tested; None when they have both sides.

    A test set that was to be made may be empty: no class had a group, or a content, to spare.
    """
    return next((column + lack for column, _, part in countable(index, kinds) if (lack := _missing_side(part))), None)


def _missing_side(index: DatasetIndex) -> str | None:
    train, test = index.select("train", "validation"), index.select("test")
    if len(test) == 0:
        return f"no image is left for the test, and every leaderboard needs some: {_why_no_test(train)}"
    classes, images = encode(train.labels)[1], np.bincount(encode(train.labels)[0])
    if len(classes) < 2:
        return f"the training images are of {len(classes)} class, and a classifier needs at least 2; {_OTHER_SPLIT}"
    if _possible_folds(train, images) < 2:
        few = "every class has 1 training image" if images.max() < 2 else "all training images are of one group"
        return f"cross-validation is not possible, as {few}; expected at least 2 folds, so give more images"
    return None


_OTHER_SPLIT = "name the images of each side in a manifest's `split` column, or in folders train/ and test/"


def _why_no_test(train: DatasetIndex) -> str:
    units = train.units()
    codes, names = encode(train.labels)
    pairs = np.unique(np.stack([codes, units], axis=1), axis=0)
    most = int(np.bincount(pairs[:, 0], minlength=1).max())
    if train.groups is not None and len(np.unique(units)) < len(np.unique(train.digests, axis=0)):
        have, raised = ("one", "") if most == 1 else (f"at most {most}", "raise dataset.test_fraction, ")
        return (
            f"a group is never parted between training and test, and each of the {len(names)} classes has {have}; "
            f"make the groups smaller, {raised}leave the `group` column out, or {_OTHER_SPLIT}"
        )
    if most < 3:  # two folds and a test
        return f"no class has more than {most} distinct image{'s' * (most > 1)}, expected at least 3; add images"
    return f"no class has more than {most} distinct images; add images, or set dataset.test_fraction above {0.5 / most:.2f}"


def _in_words(index: DatasetIndex, kind: str) -> str:
    return TARGETS[kind_of(kind)].in_words(index.rows(index.has_labels(kind)))


def described(index: DatasetIndex, kinds: Sequence[str]) -> str:
    """Say how many images there are, and what is known of them, such as `1,797 images in 10 classes`."""
    if tuple(kinds) == (NO_LABELS,):
        return f"{len(index):,} images without labels"
    labels = f"with {len(kinds)} labels each" if len(kinds) > 1 else _in_words(index, kinds[0])
    return f"{len(index):,} images {labels}"


def _headline(index: DatasetIndex, kinds: Sequence[str]) -> str:
    codes, names = encode(index.splits)
    counts = dict(zip(names, np.bincount(codes).tolist(), strict=True))
    parts = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts.get(split))
    return described(index, kinds) + f": {parts}" * (tuple(kinds) != (NO_LABELS,))


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
    """Return lines on what a walk passed over: a few examples of each status, and the counts."""
    lines = []
    for status in sorted({entry.status for entry in entries}):
        same = [entry for entry in entries if entry.status == status]
        lines.append(f"{len(same):,} {'file' if len(same) == 1 else 'files'} not used ({status.replace('_', ' ')}):")
        lines += [f"  {entry.path}: {entry.reason}" for entry in same[:EXAMPLES]]
        lines += _more(len(same), where)
    return lines + [f"ignored {what}: {count:,}" for what, count in sorted(ignored.items())]


def _more(count: int, where: str = ", see failures.csv") -> list[str]:
    return [f"  … and {count - EXAMPLES:,} more{where}"] if count > EXAMPLES else []
