"""The data audit: labels that look wrong, images that are there nearly twice, images that are like no other.

Works on what stages one and two leave behind, out-of-fold probabilities, features and perceptual hashes, and gives tables of
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
"""Images that are searched for near-duplicates and outliers, so that memory and time have a bound."""
COMPONENTS = 64
"""Principal components kept for distances: enough to tell pictures apart, few enough to be quick."""
DOUBT = 0.25
"""A label is doubted below this share of its class's usual probability. Among digits with 5 % of the labels flipped 0.25
found 76 to 100 % of them at a precision of 0.54 to 0.95; the original rule (another class reaches its own usual
probability) found 54 to 72 % at 0.63 to 0.95."""
NEAR, FAR = 10, 40
"""Neighbours by which the usual distance around an image is measured: the tenth, or the fortieth where ten are copies."""
CLOSE = 0.35
"""Near-duplicates lie closer than this share of the usual distance around them, whatever their hashes say ..."""
ALIKE, ALIKE_BITS = 0.8, 0.08
"""... or closer than this share, with hashes that differ in at most this share of their bits. Of 3,781 photos of clothes the two
rules name 0.05 to 0.3 %, of which most are copies; see docs/heads.md."""
OUTLIER_DEVIATIONS = 4.0
"""An outlier's distance to its neighbours lies this many robust standard deviations above the median, on a log scale."""


@dataclass(frozen=True)
class LabelIssue:
    """An image whose label the heads do not believe: `probability` is what they give it, `suggested` what they take it for."""

    path: str
    label: str
    suggested: str
    probability: float
    row: int


@dataclass(frozen=True)
class LabelIssues:
    """Labels that look wrong, least probable first, and how many would be named of as many images labelled rightly."""

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
        """Whether one of the two is a test image and the other is not, so that the test sees what was trained on."""
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
    """What stands out among the features of all images, worst first; stage two writes it down as it looks for leaks."""

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
    """Read what stage two found; PipelineError when it is missing, damaged, or of another format or version."""
    return read_record(path, AUDIT, Findings)


def label_issues(
    probabilities: NDArray[np.floating], y: NDArray[np.integer], classes: Sequence[str], paths: Sequence[str]
) -> LabelIssues:
    """Find labels that confident learning takes for wrong, those with the lowest probability first.

    probabilities : ndarray of shape (n, n_classes), of any float dtype, out of fold; y : column of each given label,
    of any integer dtype, shape (n,). A label is doubted when another class is likelier and it gets less than `DOUBT` of
    what its class usually gets, so a head that is unsure of a class as a whole does not accuse it.
    """
    p, rows = np.asarray(probabilities, dtype=np.float64), np.arange(len(y))
    usual = np.array([p[y == column, column].mean() if np.any(y == column) else 0.0 for column in range(p.shape[1])])
    suggested = p.argmax(axis=1)
    doubted = p < DOUBT * usual  # would the label be doubted, were it this one: (n, n_classes)
    doubted[rows, suggested] = False
    own = p[rows, y]
    found = sorted(np.flatnonzero(doubted[rows, y]).tolist(), key=lambda row: (own[row], paths[row]))
    by_chance = noise_rate(p, y) * doubted.sum() / max(p.shape[1] - 1, 1)
    issues = (LabelIssue(paths[row], classes[y[row]], classes[suggested[row]], float(own[row]), row) for row in found)
    return LabelIssues(tuple(issues), max(0.0, len(found) - float(by_chance)))


def noise_rate(p: NDArray[np.float64], y: NDArray[np.integer]) -> float:
    """Estimate the share of labels that are replaced by any other class at random.

    p : probabilities, float64 of shape (n, n_classes), y : column of each given label, of any integer dtype, (n,).
    Maximum likelihood of labels that are drawn from p**sharpness, made to sum to 1, or with this rate from all classes
    alike: probabilities that were calibrated on labels with errors are too flat, which `sharpness` undoes.
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
    # Some of the replaced labels are replaced by themselves.
    share: float = expit(best[1]) * (1 - 1 / p.shape[1])
    return share


def project(features: NDArray[np.floating], components: int = COMPONENTS) -> NDArray[np.float32]:
    """Return features on their first principal components, shape (n, at most `components`), float32."""
    X = np.asarray(features, dtype=np.float32)
    projected: NDArray[np.float32] = PCA(min(components, *X.shape), random_state=0).fit_transform(X)
    return projected


def neighbours(features: NDArray[np.floating], k: int = FAR) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Find the k nearest other rows of every row by Euclidean distance: rows and distances, nearest first, each of shape (n, k).

    features : of any float dtype, shape (n, dim)
    """
    X = np.asarray(features, dtype=np.float32)
    _, rows = NearestNeighbors(n_neighbors=min(k, len(X) - 1), algorithm="brute").fit(X).kneighbors()
    # Differences anew: the search's shortcut loses the digits that matter between near-duplicates.
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
    """Look for near-duplicates, which are returned as pairs of rows too, intp of shape (m, 2), and outliers among images.

    features : ndarray of shape (n, dim), of any float dtype, a row per path
    hashes : perceptual hashes of shape (n, HASH_BYTES), uint8, rows of 0 where there is none
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
    """Find the pairs of images that are nearly the same, each once: rows, shape (m, 2), and `NearDuplicate.ratio`, shape (m,).

    The yardstick is local and ignores copies: the distance to the tenth neighbour, of the two images the smaller one. It fits any
    embedding, and finds copies also where they are the rule.
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
    """Return enough pairs to join each set of alike images once, those across splits first, then the closest.

    A burst of 50 frames is 49 lines and not 1,225.
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
    """Read perceptual hashes of shape (n, HASH_BYTES), uint8; a row of 0 where an image has none.

    Stage one makes them of every image it decodes, so those embedded by an older version have none; without hashes,
    near-duplicates are found by the embedding alone.
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
