"""Leaks: the same content on both sides of the test, or under two labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.index import DatasetIndex, Texts, encode
from pipeline.data.units import content_codes


@dataclass(frozen=True)
class Pair:
    """Two images of one content: on the two sides of a leak (training first), or under two labels."""

    first: str
    second: str
    first_label: str
    second_label: str


@dataclass(frozen=True)
class Copies:
    """What is there more than once."""

    leaks: tuple[Pair, ...]
    conflicts: tuple[Pair, ...]
    duplicates: int
    """Images whose content is there before on the same side; they are kept, and share a fold."""
    leaking: NDArray[np.bool_]
    """Rows of the training side whose content is in the test set, and the reverse; shape (n,)."""


def find_copies(index: DatasetIndex) -> Copies:
    """Find copies among the images; splits are the ones before anything was excluded."""
    codes = content_codes(index.digests)
    n_contents = int(codes.max()) + 1 if len(codes) else 0
    test = np.asarray(index.splits == "test", dtype=bool)
    leaking = (np.bincount(codes[test], minlength=n_contents) > 0) & (
        np.bincount(codes[~test], minlength=n_contents) > 0
    )
    label_codes, _ = encode(index.labels)
    leaks = _pairs(index, codes, leaking[codes] & ~test, leaking[codes] & test)
    conflicts = _pairs(index, codes, *_conflicting(codes, label_codes, n_contents))
    sides = np.unique(codes * 2 + test)
    return Copies(leaks, conflicts, len(codes) - len(sides), leaking[codes])


def _conflicting(
    codes: NDArray[np.int64], labels: NDArray[np.int64], n_contents: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows that are the first of a content, and rows of the same content under another label."""
    first = np.full(n_contents, -1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    other = labels != labels[first[codes]]
    contents = np.unique(codes[other])
    firsts = np.zeros(len(codes), dtype=bool)
    firsts[first[contents]] = True
    return firsts, other


def _pairs(
    index: DatasetIndex, codes: NDArray[np.int64], first: NDArray[np.bool_], second: NDArray[np.bool_]
) -> tuple[Pair, ...]:
    """Pair each row of the one side with the first row of the same content on the other, so that every row is named."""
    ones, others = np.flatnonzero(first), np.flatnonzero(second)
    partner_of: dict[int, int] = {}
    for row in others[::-1].tolist():
        partner_of[int(codes[row])] = row
    pairs = [(row, partner_of[int(codes[row])]) for row in ones.tolist()]
    named = {partner for _, partner in pairs}
    first_of = {int(codes[row]): row for row in ones[::-1].tolist()}
    pairs += [(first_of[int(codes[row])], row) for row in others.tolist() if row not in named]
    paths, labels = index.paths, index.labels
    return tuple(Pair(paths[a], paths[b], labels[a], labels[b]) for a, b in sorted(pairs))


def apply_leaks(splits: Texts, leaking: NDArray[np.bool_], policy: str) -> Texts:
    """Mark the copies that go as 'excluded': those of the training side, those of the test, or none ('keep')."""
    result = splits.copy()
    if policy == "drop_train":
        result[leaking & (splits != "test")] = "excluded"
    elif policy == "drop_test":
        result[leaking & (splits == "test")] = "excluded"
    return result
