"""Active learning: which images to label next. Typical ones while few are labelled, later diverse ones that a head is unsure of.

Sources: typical images of clusters that have no label yet, Hacohen, Dekel, Weinshall 2022; unsure and diverse, Zhdanov 2019.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors

TYPICAL_UNTIL = 10
"""Labelled images per class up to which typical images teach more than unsure ones; see docs/looking.md."""
MOST_CLUSTERS = 500
MANY = 5_000
"""Images from which on k-means works on mini-batches."""
NEAR = 20
"""Neighbours in its cluster from which an image's typicality is computed."""
PER_PICK = 10
"""Unsure images considered per picked image."""


def typical(X: NDArray[np.float32], labelled: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.intp]:
    """Return `count` typical unlabelled images, from the largest clusters without a label first.

    X : float32 of shape (n, dim), all images; labelled : bool of shape (n,); returns their rows, intp of shape (count,), best first
    """
    X = _units(X)
    clusters = _clusters(X, min(int(labelled.sum()) + count, MOST_CLUSTERS), seed)
    covered = np.bincount(clusters[labelled], minlength=clusters.max() + 1)
    left = {c: _by_density(X, np.flatnonzero(clusters == c), labelled) for c in range(len(covered))}
    picked: list[int] = []
    while len(picked) < count:
        best = min((c for c in left if left[c]), key=lambda c: (covered[c], -len(left[c])))
        picked.append(left[best].pop(0))
        covered[best] += 1
    return np.array(picked)


def unsure(X: NDArray[np.float32], probabilities: NDArray[np.floating], count: int, seed: int) -> NDArray[np.intp]:
    """Return `count` diverse images that a head is unsure of, the least sure first: rows, intp of shape (count,).

    X : float32 of shape (n, dim), unlabelled images; probabilities : of any float dtype, shape (n, n_classes)
    """
    two = np.sort(probabilities, axis=1)[:, -2:]
    margin = two[:, 1] - two[:, 0]
    rows = np.argsort(margin, kind="stable")[: PER_PICK * count]
    clusters = _clusters(_units(X[rows]), count, seed, np.maximum(1 - margin[rows], 1e-3))
    _, first = np.unique(clusters, return_index=True)  # rows are in the order of their margins
    others = np.setdiff1d(np.arange(len(rows)), first)[: count - len(first)]
    picked: NDArray[np.intp] = rows[np.sort(np.concatenate([first, others]))]
    return picked


def _units(X: NDArray[np.float32]) -> NDArray[np.float32]:
    units: NDArray[np.float32] = X / np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-12)
    return units


def _clusters(
    X: NDArray[np.float32], count: int, seed: int, weights: NDArray[np.floating] | None = None
) -> NDArray[np.int32]:
    if count >= len(X):
        return np.arange(len(X), dtype=np.int32)
    kind = KMeans if len(X) < MANY else MiniBatchKMeans
    found: NDArray[np.int32] = kind(count, n_init=1, random_state=seed).fit_predict(X, sample_weight=weights)
    return found


def _by_density(X: NDArray[np.float32], rows: NDArray[np.intp], labelled: NDArray[np.bool_]) -> list[int]:
    """Return the unlabelled rows of a cluster, those in the densest places first."""
    if len(rows) > 2:
        near = NearestNeighbors(n_neighbors=min(NEAR, len(rows) - 1)).fit(X[rows]).kneighbors()[0].mean(axis=1)
        rows = rows[np.argsort(near, kind="stable")]
    left: list[int] = rows[~labelled[rows]].tolist()
    return left
