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
from dataclasses import asdict, dataclass, fields
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

from pipeline.errors import StoreError, first_line
from pipeline.experiment import AUDIT, Artifacts, from_plain, read_document, to_cell, write_document
from pipeline.images import HASH_BYTES, HASH_IDENTITY, HASH_STORE, hash_distances
from pipeline.io.digests import Digests
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
    return {
        "label_issues.csv": _csv(LabelIssue, issues.found),
        "near_duplicates.csv": _csv(NearDuplicate, findings.near_duplicates),
        "outliers.csv": _csv(Outlier, findings.outliers),
    }


def write_findings(path: Path, findings: Findings) -> None:
    """Write down what was found."""
    write_document(path, AUDIT, asdict(findings))


def read_findings(path: Path) -> Findings:
    """Read what was found.

    Raises
    ------
    PipelineError
        When it is missing, damaged, or of another format or version.
    """
    document = read_document(path, AUDIT)
    try:
        found: Findings = from_plain(Findings, {field.name: document[field.name] for field in fields(Findings)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AUDIT.damaged(path, first_line(error)) from None
    return found


def label_issues(
    probabilities: NDArray[np.floating], y: NDArray[np.integer], classes: Sequence[str], paths: Sequence[str]
) -> LabelIssues:
    """Find labels that confident learning takes for wrong, those with the lowest probability first.

    probabilities : ndarray of shape (n, n_classes), of any float dtype, out of fold; y : column of each given label,
    of any integer dtype, shape (n,). A label is doubted when another class is likelier and it gets less than `DOUBT` of
    what its class usually gets, so a head that is unsure of a class as a whole does not accuse it.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    rows = np.arange(len(y))
    usual = np.array([p[y == column, column].mean() if np.any(y == column) else 0.0 for column in range(p.shape[1])])
    suggested = p.argmax(axis=1)
    doubted = p < DOUBT * usual  # would the label be doubted, were it this one: (n, n_classes)
    doubted[rows, suggested] = False
    own = p[rows, y]
    found = sorted(np.flatnonzero(doubted[rows, y]).tolist(), key=lambda row: (own[row], paths[row]))
    by_chance = noise_rate(p, y) * doubted.sum() / max(p.shape[1] - 1, 1)
    issues = tuple(
        LabelIssue(str(paths[row]), classes[y[row]], classes[suggested[row]], float(own[row]), int(row))
        for row in found
    )
    return LabelIssues(issues, max(0.0, len(found) - float(by_chance)))


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


@dataclass(frozen=True)
class Neighbours:
    """The k nearest other rows of every row: `rows` and `distances` of shape (n, k), nearest first."""

    rows: NDArray[np.intp]
    distances: NDArray[np.float32]


def project(features: NDArray[np.floating], components: int = COMPONENTS) -> NDArray[np.float32]:
    """Return features on their first principal components, shape (n, at most `components`), float32."""
    X = np.asarray(features, dtype=np.float32)
    projected: NDArray[np.float32] = PCA(min(components, *X.shape), random_state=0).fit_transform(X)
    return projected


def neighbours(features: NDArray[np.floating], k: int = FAR) -> Neighbours:
    """Find the k nearest other rows of every row by Euclidean distance.

    features : of any float dtype, shape (n, dim)
    """
    X = np.asarray(features, dtype=np.float32)
    search = NearestNeighbors(n_neighbors=min(k, len(X) - 1), algorithm="brute").fit(X)
    _, rows = search.kneighbors()
    # Differences anew: the search's shortcut loses the digits that matter between near-duplicates.
    exact = np.stack([np.linalg.norm(X - X[column], axis=1) for column in rows.T], axis=1)
    order = np.lexsort((rows, exact), axis=1)
    return Neighbours(np.take_along_axis(rows, order, axis=1), np.take_along_axis(exact, order, axis=1))


@dataclass(frozen=True)
class Pairs:
    """n pairs of near-duplicates: `first` and `second` are their rows, `ratio` as in NearDuplicate, each of shape (n,)."""

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    ratio: NDArray[np.float64]


_NO_PAIRS = Pairs(np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp), np.zeros(0))


def close_pairs(near: Neighbours, hashes: NDArray[np.uint8] | None = None) -> Pairs:
    """Find the pairs of images that are nearly the same; each is named once.

    hashes : perceptual hashes of shape (n, HASH_BYTES), uint8, rows of 0 where there is none. The yardstick is local and
    ignores copies: the distance to the tenth neighbour, of the two images the smaller one. It fits any embedding, and finds
    copies also where they are the rule.
    """
    n, k = near.distances.shape
    if k == 0:
        return _NO_PAIRS
    tenth, fortieth = (near.distances[:, min(place, k) - 1] for place in (NEAR, FAR))
    usual = np.where(tenth <= CLOSE * fortieth, fortieth, tenth).astype(np.float64)
    yardstick = np.minimum(usual[:, None], usual[near.rows])
    ratio = np.divide(near.distances, yardstick, out=np.zeros((n, k)), where=yardstick > 0)
    left, column = np.nonzero(ratio <= ALIKE)
    right, found = near.rows[left, column], ratio[left, column]
    close = found <= CLOSE
    if hashes is not None:
        close[~close] = hash_distances(hashes[left[~close]], hashes[right[~close]]) <= ALIKE_BITS
    ends = np.sort(np.stack([left[close], right[close]], axis=1), axis=1)
    ends, once = np.unique(ends, axis=0, return_index=True)
    return Pairs(ends[:, 0], ends[:, 1], found[close][once])


def near_duplicates(
    pairs: Pairs, paths: Sequence[str], labels: Sequence[str], splits: Sequence[str]
) -> tuple[NearDuplicate, ...]:
    """Name enough pairs to join each set of alike images once, those across splits first, then the closest.

    A burst of 50 frames is 49 lines and not 1,225.
    """
    found = [
        NearDuplicate(
            str(paths[a]), str(paths[b]), ratio, str(splits[a]), str(splits[b]), str(labels[a]), str(labels[b])
        )
        for a, b, ratio in zip(*(part.tolist() for part in (pairs.first, pairs.second, pairs.ratio)), strict=True)
    ]
    order = sorted(range(len(found)), key=lambda row: (not found[row].across, found[row].ratio, found[row].path))
    cost = np.empty(len(found))
    cost[order] = np.arange(1, len(found) + 1)
    tree = minimum_spanning_tree(coo_array((cost, (pairs.first, pairs.second)), shape=(len(paths),) * 2).tocsr())
    return tuple(found[order[int(place) - 1]] for place in np.sort(tree.data))


def outliers(
    near: Neighbours, paths: Sequence[str], labels: Sequence[str], deviations: float = OUTLIER_DEVIATIONS
) -> tuple[Outlier, ...]:
    """Find images whose nearest neighbours are far away, farthest first."""
    if near.distances.shape[1] == 0:
        return ()
    distance = np.log(np.maximum(near.distances[:, :NEAR].mean(axis=1), 1e-12))
    middle = float(np.median(distance))
    spread = 1.4826 * float(np.median(np.abs(distance - middle))) or 1.0
    score = (distance - middle) / spread
    found = sorted(np.flatnonzero(score > deviations).tolist(), key=lambda row: (-score[row], paths[row]))
    return tuple(Outlier(str(paths[row]), str(labels[row]), float(score[row]), int(row)) for row in found)


def examine(
    features: NDArray[np.floating],
    paths: Sequence[str],
    labels: Sequence[str],
    splits: Sequence[str],
    hashes: NDArray[np.uint8] | None = None,
) -> tuple[Pairs, Findings]:
    """Look for near-duplicates, which are returned as pairs of rows too, and outliers among images.

    features : ndarray of shape (n, dim), of any float dtype, a row per path; hashes : as in `close_pairs`
    """
    if len(paths) < 2:
        return _NO_PAIRS, Findings()
    near = neighbours(project(features))
    pairs = close_pairs(near, hashes)
    return pairs, Findings(near_duplicates(pairs, paths, labels, splits), outliers(near, paths, labels))


def read_hashes(files: Artifacts, digests: Digests) -> NDArray[np.uint8]:
    """Read perceptual hashes of shape (n, HASH_BYTES), uint8; a row of 0 where an image has none.

    Stage one makes them of every image it decodes, so those embedded by an older version have none; without hashes,
    near-duplicates are found by the embedding alone.
    """
    hashes = np.zeros((len(digests), HASH_BYTES), dtype=np.uint8)
    for path in reversed(files.find_stores(HASH_STORE)):
        try:
            store = FeatureStore.open(path, identity=HASH_IDENTITY)
            known = ~store.missing(digests)
            hashes[known] = store.read(digests[known])
        except StoreError as error:
            log.warning("near-duplicates are searched without perceptual hashes: %s", error)
    return hashes


def _csv(kind: type[LabelIssue] | type[NearDuplicate] | type[Outlier], rows: Sequence[Any]) -> str:
    buffer = io.StringIO()
    names = [field.name for field in fields(kind) if field.name != "row"]
    writer = csv.DictWriter(buffer, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows({key: to_cell(str(value)) for key, value in asdict(row).items()} for row in rows)
    return buffer.getvalue()
