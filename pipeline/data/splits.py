"""Splits: a seeded, stratified, stable test set of whole groups; and copies across splits.

Units (a group, or a content with its copies) are visited in the order of a seeded hash; a unit joins the test set if that brings the
classes' test counts closer to their targets. Units that were assigned before keep their side, so new images never move old ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import DatasetIndex, SplitPlan, Texts, content_codes, encode, match_digests, match_texts
from pipeline.data.targets import choose
from pipeline.io.digests import Digests, content_digest

Pair = tuple[int, int]
"""Rows of two images with the same content."""


@dataclass(frozen=True, eq=False)
class Copies:
    """Duplicate contents, as rows of an index.

    leaks : pairs across training and test, training first; every image with such a content is in at least one pair
    conflicts : pairs with different labels
    duplicates : number of images that repeat a content on the same side; they are kept, and share a fold
    leaking : bool of shape (n,): training rows whose content is in the test set, and vice versa
    """

    leaks: tuple[Pair, ...]
    conflicts: tuple[Pair, ...]
    duplicates: int
    leaking: NDArray[np.bool_]


def find_copies(index: DatasetIndex) -> Copies:
    """Find duplicate images; `index.splits` are those before any exclusion."""
    codes = content_codes(index.digests)
    test = np.asarray(index.splits == "test", dtype=bool)
    labels = index.labels
    leaks: list[Pair] = []
    conflicts: list[Pair] = []
    several: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.bincount(codes)[codes] > 1).tolist():
        several[int(codes[row])].append(row)
    for rows in several.values():
        trained, tested = [row for row in rows if not test[row]], [row for row in rows if test[row]]
        if trained and tested:
            leaks += [(row, tested[0]) for row in trained]
            leaks += [(trained[0], row) for row in tested[1:]]
        conflicts += [(rows[0], row) for row in rows if np.any(labels[row] != labels[rows[0]])]
    leaking = np.zeros(len(index), dtype=bool)
    leaking[[row for pair in leaks for row in pair]] = True
    sides = np.unique(codes * 2 + test)
    return Copies(tuple(sorted(leaks)), tuple(sorted(conflicts)), len(codes) - len(sides), leaking)


def apply_leaks(splits: Texts, leaking: NDArray[np.bool_], policy: str) -> Texts:
    """Return splits, object (n,), with 'excluded' for the rows of `leaking`, bool (n,), on the side that the policy drops."""
    if policy not in ("drop_train", "drop_test"):
        return splits
    return np.where(leaking & ((splits == "test") == (policy == "drop_test")), "excluded", splits).astype(object)


def make_test_split(
    index: DatasetIndex, plan: SplitPlan, prior: NDArray[np.int8], kinds: Sequence[str] = ("auto",)
) -> Texts:
    """Move whole units from 'train' to 'test' and return the splits, object array of shape (n,).

    `prior`, int8 of shape (n,), is each image's previous side: 1 test, 0 train, -1 new. Images of split 'validation' stay, and so
    do their units. `kinds` are those of the label columns, see `DatasetConfig.kinds`. No class loses all its training images.
    """
    splits, groups, digests = index.splits, index.groups, index.digests
    units = index.units()
    n_units = int(units.max(initial=-1)) + 1
    fixed = np.zeros(n_units, dtype=bool)
    fixed[units[splits != "train"]] = True
    # If a unit's images were on both sides, the majority decides; ties go to training.
    was_test, was_train = (np.bincount(units, weights=prior == was, minlength=n_units) for was in (1, 0))
    side = np.where(was_test > was_train, 1, np.where(was_train > 0, 0, -1))
    codes = _strata(index, kinds, plan.test_fraction)
    counts = _images_of(codes, splits == "train")
    in_test = side == 1
    in_test[fixed] = False
    held = _images_of(codes, in_test[units])
    starved = ((held >= counts)[codes] & (codes >= 0)).any(axis=1) & in_test[units]
    if starved.any():  # a class has only test images left: its units are assigned again
        side[units[starved]] = -1
        in_test[units[starved]] = False
        held = _images_of(codes, in_test[units])
    fresh = (side == -1) & ~fixed
    order = np.flatnonzero(fresh)
    order = order[np.argsort(_unit_keys(units, n_units, groups, digests, plan.seed)[order], kind="stable")]
    for unit in _joining(order, units, codes, counts, held, plan.test_fraction):
        in_test[unit] = True
    result = splits.copy()
    result[in_test[units]] = "test"
    return result


def _strata(index: DatasetIndex, kinds: Sequence[str], fraction: float) -> NDArray[np.int64]:
    """Return the strata to stratify by: int64 of shape (n, k), the codes of each image's strata, -1 for none.

    These are the strata of each target and, with several targets, their combination if it has enough images for
    at least one in the test set.
    """
    parts = [index] if len(kinds) == 1 else [index.only(name) for name in index.names]
    codes = np.zeros((len(index), 0), dtype=np.int64)
    for part, kind in zip(parts, kinds, strict=True):
        known = part.has_labels(kind)
        target = choose(part.rows(known), kind)
        strata = target.strata(target.encode(part.rows(known)))
        found = np.full((len(index), *strata.shape[1:]), -1, dtype=np.int64)
        found[known] = np.where(strata < 0, -1, strata + codes.max(initial=-1) + 1)
        codes = np.column_stack([codes, found])
    if len(kinds) == 1:
        return codes
    _, together, images = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    enough = (images * fraction >= 0.5)[together]
    return np.column_stack([codes, np.where(enough, together + codes.max(initial=-1) + 1, -1)])


def _images_of(codes: NDArray[np.int64], chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the number of chosen images, `chosen` bool of shape (n,), in each stratum."""
    found = codes[chosen]
    return np.bincount(found[found >= 0], minlength=int(codes.max(initial=-1)) + 1)


def prior_sides(before: DatasetIndex, index: DatasetIndex) -> NDArray[np.int8]:
    """Return each image's side in an earlier index, matched by content or else by path: int8 (n,), 1 test, 0 train, -1 new."""
    rows = match_digests(before.digests, index.digests)
    if before.root == index.root:  # with another root, the same path is another image
        by_path = match_texts(before.paths, index.paths)
        # If the old content now has another path, the image at its old path is new, not changed.
        moved = match_digests(index.digests, before.digests) >= 0
        by_path[by_path >= 0] = np.where(moved[by_path[by_path >= 0]], -1, by_path[by_path >= 0])
        rows = np.where(rows >= 0, rows, by_path)
    sides = np.full(len(index), -1, dtype=np.int8)
    sides[rows >= 0] = before.splits[rows[rows >= 0]] == "test"
    return sides


def _joining(
    order: NDArray[np.int64],
    units: NDArray[np.int64],
    codes: NDArray[np.int64],
    counts: NDArray[np.int64],
    held: NDArray[np.int64],
    fraction: float,
) -> list[int]:
    """Return the units that join the test set, visited in `order`."""
    rows = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[rows], np.arange(len(units) + 1))
    row_codes = codes[rows].tolist()
    total, test = counts.tolist(), held.tolist()
    wanted = [fraction * count for count in total]
    open_classes = {code for code in range(len(total)) if test[code] + 0.5 < wanted[code]}
    joined = []
    for unit in order.tolist():
        if not open_classes:
            break
        gain: dict[int, int] = {}
        for code in chain.from_iterable(row_codes[starts[unit] : starts[unit + 1]]):
            gain[code] = gain.get(code, 0) + 1
        gain.pop(-1, None)
        if any(test[code] + count >= total[code] for code, count in gain.items()):
            continue
        nearer = sum(
            abs(test[code] - wanted[code]) - abs(test[code] + count - wanted[code]) for code, count in gain.items()
        )
        if nearer <= 0:
            continue
        joined.append(unit)
        for code, count in gain.items():
            test[code] += count
            if test[code] + 0.5 >= wanted[code]:
                open_classes.discard(code)
    return joined


def _unit_keys(
    units: NDArray[np.int64], n_units: int, groups: Texts | None, digests: Digests, seed: int
) -> NDArray[np.uint64]:
    """Return a pseudo-random number per unit, derived from its group's name or its content and the seed, not from its position."""
    keys = digests[:, 0]
    if groups is not None:
        codes, names = encode(groups)
        named = np.array([np.frombuffer(content_digest(name.encode())[:8], "<u8")[0] for name in names], np.uint64)
        keys = np.where(groups != "", named[codes], keys)
    mixed = _splitmix(keys ^ _splitmix(np.array([seed], dtype=np.uint64)))
    smallest = np.full(n_units, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, units, mixed)
    return smallest


def _splitmix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): a bijection of 64 bits that mixes them well."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
