"""The data audit: labels that look wrong, near-duplicate images, and outliers.

Works on the stored results of stages one and two (out-of-fold probabilities, features, perceptual hashes) and makes tables of
image paths. Nothing is removed: a person looks and decides. Sources: confident learning, Northcutt, Jiang, Chuang 2021;
outliers by the distance to the k-th neighbour, Ramaswamy, Rastogi, Shim 2000.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.special import expit
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from pipeline.errors import StoreError
from pipeline.experiment import AUDIT, Artifacts, read_record, to_cell
from pipeline.images import HASH_BYTES, HASH_IDENTITY, HASH_STORE, hash_distances
from pipeline.io.digests import Digests, fingerprint
from pipeline.store import FeatureStore

log = logging.getLogger(__name__)

MOST_IMAGES = 20_000
"""Most images searched for near-duplicates and outliers, which bounds memory and time."""
COMPONENTS = 64
"""Principal components kept for distances: enough to tell pictures apart, few enough to be quick."""
DOUBT = 0.25
"""A label is doubted below this share of its class's usual probability. Among digits with 5 % of the labels flipped 0.25
found 76 to 100 % of them at a precision of 0.54 to 0.95; the original rule (another class reaches its own usual
probability) found 54 to 72 % at 0.63 to 0.95."""
NEAR, FAR = 10, 40
"""The usual distance around an image is that to its tenth neighbour, or to its fortieth where the first ten are copies."""
CLOSE = 0.35
"""Near-duplicates lie closer than this share of the usual distance around them, whatever their hashes say ..."""
ALIKE, ALIKE_BITS = 0.8, 0.08
"""... or closer than this share, with hashes that differ in at most this share of their bits. Of 3,781 photos of clothes the two
rules name 0.05 to 0.3 %, of which most are copies; see docs/heads.md."""
OUTLIER_DEVIATIONS = 4.0
"""An outlier's distance to its neighbours lies this many robust standard deviations above the median, on a log scale."""


@dataclass(frozen=True)
class LabelIssue:
    """An image whose label the heads doubt: `probability` is that of its label, `suggested` the label they predict."""

    path: str
    label: str
    suggested: str
    probability: float
    row: int


@dataclass(frozen=True)
class LabelIssues:
    """Labels that look wrong, least probable first, and the expected number of false alarms."""

    found: tuple[LabelIssue, ...] = ()
    expected: float = 0.0


@dataclass(frozen=True)
class NearDuplicate:
    """Two images that are nearly the same; `ratio` is their distance over the usual distance around them."""

    path: str
    other: str
    ratio: float
    split: str
    other_split: str
    label: str
    other_label: str

    @property
    def across(self) -> bool:
        """Whether exactly one of the two is a test image, so that training data leaks into the test."""
        return (self.split == "test") != (self.other_split == "test")


@dataclass(frozen=True)
class Outlier:
    """An image far from every other; `score` is in robust standard deviations above the median."""

    path: str
    label: str
    score: float
    row: int


@dataclass(frozen=True)
class Findings:
    """Near-duplicates and outliers among all images, worst first; stage two stores them when it looks for leaks."""

    near_duplicates: tuple[NearDuplicate, ...] = ()
    outliers: tuple[Outlier, ...] = ()


def to_csv(issues: LabelIssues, findings: Findings) -> dict[str, str]:
    """Return one CSV text per kind of finding, by file name."""
    tables: tuple[tuple[str, Any, Sequence[Any]], ...] = (
        ("label_issues.csv", LabelIssue, issues.found),
        ("near_duplicates.csv", NearDuplicate, findings.near_duplicates),
        ("outliers.csv", Outlier, findings.outliers),
    )
    made = {}
    for file, kind, rows in tables:
        buffer, names = io.StringIO(), [field.name for field in fields(kind) if field.name != "row"]
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([names, *([to_cell(str(getattr(row, name))) for name in names] for row in rows)])
        made[file] = buffer.getvalue()
    return made


def read_findings(path: Path) -> Findings:
    """Read the findings of stage two; PipelineError when they are missing, damaged, or of another format or version."""
    return read_record(path, AUDIT, Findings)


def label_issues(
    probabilities: NDArray[np.floating], y: NDArray[np.integer], classes: Sequence[str], paths: Sequence[str]
) -> LabelIssues:
    """Find probably wrong labels by confident learning, those with the lowest probability first.

    probabilities : ndarray of shape (n, n_classes), of any float dtype, out of fold; y : column of each given label,
    of any integer dtype, shape (n,). A label is doubted when another class is more likely and its probability is below `DOUBT`
    times the mean of its class, so that a head's uncertainty about a whole class raises no doubts.
    """
    p, rows = np.asarray(probabilities, dtype=np.float64), np.arange(len(y))
    usual = np.array([p[y == column, column].mean() if np.any(y == column) else 0.0 for column in range(p.shape[1])])
    suggested = p.argmax(axis=1)
    doubted = p < DOUBT * usual  # whether each class would be doubted as the label: (n, n_classes)
    doubted[rows, suggested] = False
    own = p[rows, y]
    found = sorted(np.flatnonzero(doubted[rows, y]).tolist(), key=lambda row: (own[row], paths[row]))
    by_chance = noise_rate(p, y) * doubted.sum() / max(p.shape[1] - 1, 1)
    issues = (LabelIssue(paths[row], classes[y[row]], classes[suggested[row]], float(own[row]), row) for row in found)
    return LabelIssues(tuple(issues), max(0.0, len(found) - float(by_chance)))


def noise_rate(p: NDArray[np.float64], y: NDArray[np.integer]) -> float:
    """Estimate the share of labels that were replaced by another class at random.

    p : probabilities, float64 of shape (n, n_classes), y : column of each given label, of any integer dtype, (n,).
    Maximum likelihood where labels are drawn from p**sharpness, normalised to sum 1, or with this rate uniformly from all
    classes: probabilities calibrated on noisy labels are too flat, which `sharpness` corrects.
    """
    if len(y) == 0 or p.shape[1] < 2:
        return 0.0
    logs, rows = np.log(np.maximum(p, 1e-12)), np.arange(len(y))

    def loss(values: NDArray[np.float64]) -> float:
        sharpened = np.exp(values[0]) * logs
        true = np.exp(sharpened[rows, y] - np.logaddexp.reduce(sharpened, axis=1))
        rate = float(expit(values[1]))
        return -float(np.log((1 - rate) * true + rate / p.shape[1]).mean())

    best = minimize(loss, [0.0, -3.0], method="Nelder-Mead").x
    # A uniform draw replaces some labels by themselves.
    share: float = expit(best[1]) * (1 - 1 / p.shape[1])
    return share


def project(features: NDArray[np.floating], components: int = COMPONENTS) -> NDArray[np.float32]:
    """Project features onto their first principal components: float32 of shape (n, at most `components`)."""
    X = np.asarray(features, dtype=np.float32)
    projected: NDArray[np.float32] = PCA(min(components, *X.shape), random_state=0).fit_transform(X)
    return projected


def neighbours(features: NDArray[np.floating], k: int = FAR) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Find the k nearest other rows of every row by Euclidean distance: rows and distances, nearest first, each of shape (n, k).

    features : of any float dtype, shape (n, dim)
    """
    X = np.asarray(features, dtype=np.float32)
    _, rows = NearestNeighbors(n_neighbors=min(k, len(X) - 1), algorithm="brute").fit(X).kneighbors()
    # Recompute the distances: the search's dot-product formula loses the digits that matter between near-duplicates.
    exact = np.stack([np.linalg.norm(X - X[column], axis=1) for column in rows.T], axis=1)
    order = np.lexsort((rows, exact), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(exact, order, axis=1)


def examine(
    features: NDArray[np.floating],
    paths: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[str],
    hashes: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.intp], Findings]:
    """Find near-duplicates and outliers; returns the near-duplicates also as pairs of rows, intp of shape (m, 2).

    features : ndarray of shape (n, dim), of any float dtype, a row per path
    hashes : perceptual hashes of shape (n, HASH_BYTES), uint8, a row of 0 for an image without one
    """
    if len(paths) < 2:
        return np.zeros((0, 2), dtype=np.intp), Findings()
    rows, distances = neighbours(project(features))
    pairs, ratios = _close_pairs(rows, distances, hashes)
    named = [
        NearDuplicate(paths[a], paths[b], ratio, splits[a], splits[b], labels[a], labels[b])
        for (a, b), ratio in zip(pairs.tolist(), ratios.tolist(), strict=True)
    ]
    return pairs, Findings(_spanning(pairs, named, len(paths)), _outliers(distances, paths, labels))


def _close_pairs(
    rows: NDArray[np.intp], distances: NDArray[np.float32], hashes: NDArray[np.uint8] | None
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Find each pair of near-duplicates once: rows, shape (m, 2), and `NearDuplicate.ratio`, shape (m,).

    Distances are relative to the usual distance around an image, the smaller one of the two images. That suits any embedding, and
    finds copies even where most images have some.
    """
    n, k = distances.shape
    tenth, fortieth = (distances[:, min(place, k) - 1] for place in (NEAR, FAR))
    usual = np.where(tenth <= CLOSE * fortieth, fortieth, tenth).astype(np.float64)
    yardstick = np.minimum(usual[:, None], usual[rows])
    ratio = np.divide(distances, yardstick, out=np.zeros((n, k)), where=yardstick > 0)
    left, column = np.nonzero(ratio <= ALIKE)
    right, found = rows[left, column], ratio[left, column]
    close = found <= CLOSE
    if hashes is not None:
        close[~close] = hash_distances(hashes[left[~close]], hashes[right[~close]]) <= ALIKE_BITS
    ends = np.sort(np.stack([left[close], right[close]], axis=1), axis=1)
    pairs, once = np.unique(ends, axis=0, return_index=True)
    return pairs, found[close][once]


def _spanning(pairs: NDArray[np.intp], named: Sequence[NearDuplicate], n: int) -> tuple[NearDuplicate, ...]:
    """Return a spanning forest of the pairs, those across splits first, then the closest.

    A burst of 50 similar frames gives 49 pairs and not 1,225.
    """
    order = sorted(named, key=lambda pair: (not pair.across, pair.ratio, pair.path))
    place = {pair: number for number, pair in enumerate(order, 1)}
    cost = np.array([place[pair] for pair in named], dtype=np.float64)
    tree = minimum_spanning_tree(coo_array((cost, pairs.T), shape=(n, n)).tocsr())
    return tuple(order[int(number) - 1] for number in np.sort(tree.data))


def _outliers(distances: NDArray[np.float32], paths: Sequence[str], labels: Sequence[str]) -> tuple[Outlier, ...]:
    """Find images whose nearest neighbours are far away, farthest first."""
    distance = np.log(np.maximum(distances[:, :NEAR].mean(axis=1), 1e-12))
    middle = float(np.median(distance))
    score = (distance - middle) / (1.4826 * float(np.median(np.abs(distance - middle))) or 1.0)
    found = sorted(np.flatnonzero(score > OUTLIER_DEVIATIONS).tolist(), key=lambda row: (-score[row], paths[row]))
    return tuple(Outlier(paths[row], labels[row], float(score[row]), row) for row in found)


def read_hashes(files: Artifacts, digests: Digests) -> NDArray[np.uint8]:
    """Read perceptual hashes of shape (n, HASH_BYTES), uint8; a row of 0 for an image without one.

    Images embedded by an older version have no hash; their near-duplicates are found by the embedding alone.
    """
    hashes = np.zeros((len(digests), HASH_BYTES), dtype=np.uint8)
    for path in reversed(files.find_stores(HASH_STORE)):
        try:
            store = FeatureStore.open(path, fingerprint(HASH_IDENTITY))
            known = ~store.missing(digests)
            hashes[known] = store.read(digests[known])
        except StoreError as error:
            log.warning("near-duplicates are searched without perceptual hashes: %s", error)
    return hashes
