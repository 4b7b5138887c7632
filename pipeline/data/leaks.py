"""Leaks: the same content on both sides of the test, or under two labels."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import DatasetIndex
from pipeline.data.match import Texts, content_codes

Pair = tuple[int, int]
"""Rows of two images of one content."""


@dataclass(frozen=True, eq=False)
class Copies:
    """What is there more than once, as rows of an index.

    leaks : pairs on the two sides of the test, training first; every image of such a content is in one
    conflicts : pairs under two labels
    duplicates : how many images have a content that is there before on the same side; they are kept, and share a fold
    leaking : bool of shape (n,): rows of the training side whose content is in the test set, and the reverse
    """

    leaks: tuple[Pair, ...]
    conflicts: tuple[Pair, ...]
    duplicates: int
    leaking: NDArray[np.bool_]


def find_copies(index: DatasetIndex) -> Copies:
    """Find copies among the images; splits are the ones before anything was excluded."""
    codes = content_codes(index.digests)
    test = np.asarray(index.splits == "test", dtype=bool)
    labels = index.labels
    leaks: list[Pair] = []
    conflicts: list[Pair] = []
    for rows in _of_one_content(codes):
        trained, tested = [row for row in rows if not test[row]], [row for row in rows if test[row]]
        if trained and tested:
            leaks += [(row, tested[0]) for row in trained]
            leaks += [(trained[0], row) for row in tested[1:]]
        conflicts += [(rows[0], row) for row in rows if np.any(labels[row] != labels[rows[0]])]
    leaking = np.zeros(len(index), dtype=bool)
    leaking[[row for pair in leaks for row in pair]] = True
    sides = np.unique(codes * 2 + test)
    return Copies(tuple(sorted(leaks)), tuple(sorted(conflicts)), len(codes) - len(sides), leaking)


def _of_one_content(codes: NDArray[np.int64]) -> list[list[int]]:
    """Return the rows of each content that is there more than once."""
    several: dict[int, list[int]] = defaultdict(list)
    for row in np.flatnonzero(np.bincount(codes)[codes] > 1).tolist():
        several[int(codes[row])].append(row)
    return list(several.values())


def apply_leaks(splits: Texts, leaking: NDArray[np.bool_], policy: str) -> Texts:
    """Mark the copies that go as 'excluded': those of the training side, those of the test, or none ('keep').

    splits : object array of shape (n,); leaking : bool of shape (n,)
    """
    result = splits.copy()
    if policy in {"drop_train", "drop_test"}:
        result[leaking & ((splits == "test") == (policy == "drop_test"))] = "excluded"
    return result
