"""The data doctor: labels that look wrong, pictures that are there twice, pictures that are like no other.

Works on what stages one and two leave behind, out-of-fold probabilities and features, and gives tables of image paths.
Nothing is removed: a person looks and decides. Sources: confident learning, Northcutt, Jiang, Chuang 2021; outliers by the
distance to the k-th neighbour, Ramaswamy, Rastogi, Shim 2000.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

BLOCK = 1024
"""Rows compared at once: memory is BLOCK x n_images float32."""
COMPONENTS = 64
"""Principal components kept for distances: enough to tell pictures apart, few enough to be quick."""
DOUBT = 0.25
"""A label is doubted below this share of its class's usual probability. Among digits with 5 % of the labels flipped 0.25
found 76 to 100 % of them at a precision of 0.54 to 0.95; the original rule (another class reaches its own usual
probability) found 54 to 72 % at 0.63 to 0.95."""
DUPLICATE_RATIO = 0.35
"""Near-duplicates lie closer than this share of the usual distance to a nearest neighbour."""
OUTLIER_DEVIATIONS = 4.0
"""An outlier's distance to its neighbours lies this many robust standard deviations above the median, on a log scale."""


@dataclass(frozen=True)
class SuspiciousLabel:
    """An image whose label the heads do not believe: `score` from 0 to 1 is how sure they are of `suggested` over it."""

    path: str
    label: str
    suggested: str
    score: float
    row: int


@dataclass(frozen=True)
class NearDuplicate:
    """Two images that are nearly the same; `ratio` is their distance over the usual distance to a nearest neighbour."""

    path: str
    other: str
    ratio: float
    split: str
    other_split: str
    label: str
    other_label: str

    @property
    def across(self) -> bool:
        """Whether the two lie in different splits, so that the test sees what was trained on."""
        return self.split != self.other_split


@dataclass(frozen=True)
class Outlier:
    """An image far from every other; `score` is in robust standard deviations above the median."""

    path: str
    label: str
    score: float
    row: int


@dataclass(frozen=True)
class Findings:
    """What the doctor found, worst first."""

    suspicious: tuple[SuspiciousLabel, ...] = ()
    duplicates: tuple[NearDuplicate, ...] = ()
    outliers: tuple[Outlier, ...] = ()

    def to_csv(self) -> dict[str, str]:
        """Return one CSV text per kind of finding, by file name."""
        return {
            "suspicious_labels.csv": _csv(SuspiciousLabel, [asdict(row) for row in self.suspicious]),
            "near_duplicates.csv": _csv(NearDuplicate, [asdict(row) for row in self.duplicates]),
            "outliers.csv": _csv(Outlier, [asdict(row) for row in self.outliers]),
        }


def suspicious_labels(
    probabilities: NDArray[np.floating], y: NDArray[np.integer], classes: Sequence[str], paths: Sequence[str]
) -> tuple[SuspiciousLabel, ...]:
    """Find labels that confident learning takes for wrong, most certain first.

    probabilities : ndarray of shape (n, n_classes), out of fold; y : column of each given label, shape (n,). An image is
    suspicious when another class is likelier and its own label gets less than `DOUBT` of what that label usually gets, so
    a head that is unsure of a class as a whole does not accuse it.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    rows = np.arange(len(y))
    usual = np.array([p[y == column, column].mean() if np.any(y == column) else 0.0 for column in range(p.shape[1])])
    suggested = p.argmax(axis=1)
    wrong = (suggested != y) & (p[rows, y] < DOUBT * usual[y])
    margin = p[rows, suggested] - p[rows, y]
    found = sorted(np.flatnonzero(wrong).tolist(), key=lambda row: (-margin[row], paths[row]))
    return tuple(
        SuspiciousLabel(str(paths[row]), classes[y[row]], classes[suggested[row]], float(margin[row]), int(row))
        for row in found
    )


@dataclass(frozen=True)
class Neighbours:
    """The k nearest other rows of every row: `rows` and `distances` of shape (n, k), nearest first."""

    rows: NDArray[np.intp]
    distances: NDArray[np.float32]


def project(features: NDArray[np.floating], components: int = COMPONENTS) -> NDArray[np.float32]:
    """Return features on their first principal components, shape (n, at most `components`), float32.

    Deterministic: an eigendecomposition, each component's largest loading positive.
    """
    X = np.asarray(features, dtype=np.float32)
    X = X - X.mean(axis=0)
    wide = X.shape[1] > len(X)
    gram = X @ X.T if wide else X.T @ X
    last = len(gram) - 1
    values, vectors = scipy.linalg.eigh(
        gram.astype(np.float64), subset_by_index=(max(0, last + 1 - components), last), overwrite_a=True
    )
    keep = values[::-1] > max(values[-1], 1e-12) * 1e-6
    axes = vectors[:, ::-1][:, keep]
    if wide:
        axes = X.T @ axes
        axes /= np.linalg.norm(axes, axis=0)
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    projected: NDArray[np.float32] = (X @ (axes * signs)).astype(np.float32)
    return projected


def neighbours(features: NDArray[np.floating], k: int = 10) -> Neighbours:
    """Find the k nearest other rows of every row by Euclidean distance, a block of rows at a time."""
    X = np.asarray(features, dtype=np.float32)
    n, k = len(X), min(k, len(X) - 1)
    squares = np.einsum("ij,ij->i", X, X)
    rows, distances = np.empty((n, k), dtype=np.intp), np.empty((n, k), dtype=np.float32)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        block = squares[start:stop, None] + squares[None, :] - 2.0 * (X[start:stop] @ X.T)
        block[np.arange(stop - start), np.arange(start, stop)] = np.inf
        near = np.argpartition(block, k - 1, axis=1)[:, :k]
        # Differences anew: the shortcut above loses the digits that matter between near-duplicates.
        exact = np.sqrt(((X[start:stop, None, :] - X[near]) ** 2).sum(axis=2))
        order = np.lexsort((near, exact), axis=1)
        rows[start:stop] = np.take_along_axis(near, order, axis=1)
        distances[start:stop] = np.take_along_axis(exact, order, axis=1)
    return Neighbours(rows, distances)


def near_duplicates(
    near: Neighbours, paths: Sequence[str], labels: Sequence[str], splits: Sequence[str], ratio: float = DUPLICATE_RATIO
) -> tuple[NearDuplicate, ...]:
    """Find pairs much closer than neighbours usually are, closest first, those across splits before the rest.

    The yardstick is the median distance to the nearest neighbour, so it fits any embedding. Within a set of more than two
    alike only each image's closest pair is named.
    """
    if near.distances.shape[1] == 0:
        return ()
    usual = float(np.median(near.distances[:, 0])) or 1.0
    close = near.distances <= ratio * usual
    left = np.repeat(np.arange(len(close)), close.sum(axis=1))
    right = near.rows[close]
    lengths = near.distances[close] / usual
    pairs: dict[tuple[int, int], float] = {}
    for a, b, length in sorted(
        zip(left.tolist(), right.tolist(), lengths.tolist(), strict=True), key=lambda item: item[2]
    ):
        pairs.setdefault((min(a, b), max(a, b)), float(length))
    kept = _spanning(pairs, len(close), splits)
    found = [
        NearDuplicate(
            str(paths[a]), str(paths[b]), length, str(splits[a]), str(splits[b]), str(labels[a]), str(labels[b])
        )
        for (a, b), length in kept.items()
    ]
    return tuple(sorted(found, key=lambda pair: (not pair.across, pair.ratio, pair.path)))


def _spanning(pairs: dict[tuple[int, int], float], n: int, splits: Sequence[str]) -> dict[tuple[int, int], float]:
    """Keep enough pairs to join each set of alike images once; a burst of 50 frames is 49 lines, not 1,225."""
    parent = list(range(n))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    kept = {}
    for (a, b), length in sorted(
        pairs.items(), key=lambda item: (splits[item[0][0]] == splits[item[0][1]], item[1], item[0])
    ):
        if root(a) != root(b):
            parent[root(a)] = root(b)
            kept[(a, b)] = length
    return kept


def outliers(
    near: Neighbours, paths: Sequence[str], labels: Sequence[str], deviations: float = OUTLIER_DEVIATIONS
) -> tuple[Outlier, ...]:
    """Find images whose k nearest neighbours are far away, farthest first."""
    if near.distances.shape[1] == 0:
        return ()
    distance = np.log(np.maximum(near.distances.mean(axis=1), 1e-12))
    middle = float(np.median(distance))
    spread = 1.4826 * float(np.median(np.abs(distance - middle))) or 1.0
    score = (distance - middle) / spread
    found = sorted(np.flatnonzero(score > deviations).tolist(), key=lambda row: (-score[row], paths[row]))
    return tuple(Outlier(str(paths[row]), str(labels[row]), float(score[row]), int(row)) for row in found)


def examine(
    features: NDArray[np.floating], paths: Sequence[str], labels: Sequence[str], splits: Sequence[str]
) -> Findings:
    """Look for near-duplicates and outliers among all images; features : shape (n, dim), a row per path."""
    near = neighbours(project(features))
    return Findings((), near_duplicates(near, paths, labels, splits), outliers(near, paths, labels))


def _csv(kind: type[SuspiciousLabel] | type[NearDuplicate] | type[Outlier], rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    names = [field.name for field in fields(kind) if field.name != "row"]
    writer = csv.DictWriter(buffer, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
