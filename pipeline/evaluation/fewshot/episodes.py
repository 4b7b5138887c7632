"""Episodes: N classes, K labelled images of each to learn from (support), and others of them to be judged by (queries)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]

LEAST_BASE = 4
"""Classes that meta-learning needs beside those it is tested on: two to learn from, two to say when to stop."""
SPLITS = 4
"""Divisions of the classes among which the episodes are shared out, so that no one division decides."""
DRAWS = 20
"""Times that groups are dealt to the two sides before there are held to be too few of them."""


@dataclass(frozen=True)
class Plan:
    """What is drawn: `ways` classes with `shots` support images and `queries` each, in so many episodes."""

    ways: int
    queries: int
    episodes: int
    seed: int


@dataclass(frozen=True, eq=False)
class Images:
    """n images to draw from.

    X : float32 of shape (n, dim); y : the class of each, int64 of shape (n,); units : images that may not be parted between
    support and queries have one number, int64 of shape (n,), None where each stands alone
    """

    X: NDArray[np.float32]
    y: Rows
    units: Rows | None = None

    def classes_of(self, least: int) -> Rows:
        """Return the classes with so many images at least."""
        return np.flatnonzero(np.bincount(self.y) >= least)


@dataclass(frozen=True)
class Episodes:
    """Rows of support, shape (n, ways * shots), and queries, (n, ways * queries), class by class."""

    support: Rows
    query: Rows
    ways: int


@dataclass(frozen=True)
class Division:
    """Classes that are met before the test (`base` to learn from, `held_out` to say when to stop) and only in it (`novel`)."""

    base: Rows
    held_out: Rows
    novel: Rows


def divide(classes: Rows, ways: int, rng: np.random.Generator) -> list[Division]:
    """Return divisions of the classes in which each is novel about equally often; one without a base where they are too few."""
    novel = max(ways, len(classes) // 2)
    if len(classes) - novel < LEAST_BASE:
        nothing = np.empty(0, dtype=np.int64)
        return [Division(nothing, nothing, classes)]
    held_out = novel + max(2, 2 * (len(classes) - novel) // 5)
    found, order = [], classes
    for number in range(SPLITS):
        order = order[::-1] if number % 2 else rng.permutation(classes)
        found.append(Division(order[held_out:], order[novel:held_out], order[:novel]))
    return found


def draw(
    images: Images, classes: Rows, ways: int, shots: int, queries: int, count: int, rng: np.random.Generator
) -> Episodes | None:
    """Draw episodes without replacement; None where a class has its images in too few groups for both sides."""
    rows = {label: np.flatnonzero(images.y == label) for label in classes.tolist()}
    drawn = np.empty((count, ways, shots + queries), dtype=np.int64)
    for episode in drawn:
        chosen = rng.choice(classes, ways, replace=False).tolist()  # once: those that are hard to deal count as well
        for _ in range(DRAWS):
            mixed = [rng.permutation(rows[label]) for label in chosen]
            found = _dealt(mixed, images.units, shots, queries, rng)
            if found is not None:
                episode[:] = found
                break
        else:
            return None
    return Episodes(drawn[:, :, :shots].reshape(count, -1), drawn[:, :, shots:].reshape(count, -1), ways)


def _dealt(
    mixed: Sequence[Rows], units: Rows | None, shots: int, queries: int, rng: np.random.Generator
) -> list[Rows] | None:
    """Return the first rows of each class, support before queries, every group on one side; None where they do not suffice."""
    if units is None:
        return [rows[: shots + queries] for rows in mixed]
    supports, dealt = rng.random(units.max() + 1) < 0.5, []
    for rows in mixed:
        support = supports[units[rows]]
        dealt.append(np.concatenate([rows[support][:shots], rows[~support][:queries]]))
    return dealt if all(len(rows) == shots + queries for rows in dealt) else None
