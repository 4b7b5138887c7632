"""Features in memory or on disk, read in blocks of rows, and their principal components.

If `tuning.pca` is set, every head works on components computed from each fold's training rows, once for all heads and trials. A
shared StandardScaler and PCA replace the head's own StandardScaler, if it starts with one: the final pipeline is an ordinary
Pipeline(StandardScaler, PCA, head).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.heads.head import Head
from pipeline.io.digests import bytes_digest
from pipeline.store import StoredRows

Array = NDArray[np.float32]

FeatureMatrix = NDArray[np.float32] | StoredRows
"""A matrix X of shape (n, dim), float32: in memory, or on disk for the heads that support it."""

BLOCK_BYTES = 4 << 20
"""Bytes of features read at once; fixed, so that results do not depend on the available memory."""


def on_disk(X: FeatureMatrix) -> bool:
    """Whether features, float32 of shape (n, dim), stay in a store's files."""
    return isinstance(X, StoredRows)


def blocks(X: FeatureMatrix, rows: NDArray[np.int64] | None = None) -> Iterator[tuple[Any, NDArray[np.float32]]]:
    """Yield blocks of features with their positions in `rows`, in the order on disk; without `rows`, all rows in order.

    X : float32 of shape (n, dim); rows : int64 of shape (k,); a block is float32 of shape (m, dim). Without `rows`, the position is a
        slice and the block a view if in memory; with `rows`, they are an integer array of shape (m,) and a copy
    """
    step = max(1, BLOCK_BYTES // (4 * X.shape[1]))
    n = len(X) if rows is None else len(rows)
    order = X.file_order(rows) if isinstance(X, StoredRows) and rows is not None else np.arange(n)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        yield (part, X[part]) if rows is None else (order[part], X[rows[order[part]]])


def part(X: FeatureMatrix, rows: NDArray[np.int64]) -> FeatureMatrix:
    """Return some rows: a copy if in memory, still unread if on disk.

    X : float32 of shape (n, dim); rows : int64 of shape (k,); returns float32 of shape (k, dim)
    """
    return X.part(rows) if isinstance(X, StoredRows) else X[rows]


def standardise(train: Array, held_out: Array) -> tuple[Array, Array]:
    """Scale both by the mean and standard deviation of the training rows, as scikit-learn's StandardScaler does.

    train, held_out : float32 of shape (n, dim) and (n_held_out, dim), like the returned arrays
    """
    mean = train.mean(axis=0, dtype=np.float64)
    scale = train.std(axis=0, dtype=np.float64)
    # A column whose spread is only rounding error of its mean is constant, and is not scaled.
    constant = scale <= 10 * np.finfo(np.float32).eps * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
    scale[constant] = 1.0
    shift, factor = mean.astype(np.float32), (1 / scale).astype(np.float32)
    return (train - shift) * factor, (held_out - shift) * factor


@dataclass(frozen=True)
class Standardised:
    """Rows of X, standardised as they are read."""

    X: FeatureMatrix
    rows: NDArray[np.int64]
    scaler: StandardScaler

    @staticmethod
    def of(X: FeatureMatrix, rows: NDArray[np.int64]) -> Standardised:
        """Compute means and standard deviations of the rows in one pass.

        X : float32 of shape (n, dim); rows : int64 of shape (k,)
        """
        scaler = StandardScaler()
        for _, block in blocks(X, rows):
            scaler.partial_fit(block)
        return Standardised(X, rows, scaler)

    def blocks(self) -> Iterator[tuple[Any, NDArray[np.float32]]]:
        """Yield positions in `rows`, integers of shape (m,), and their standardised features, float32 of shape (m, dim)."""
        shift, factor = self.scaler.mean_.astype(np.float32), (1 / self.scaler.scale_).astype(np.float32)
        for place, block in blocks(self.X, self.rows):
            block -= shift
            block *= factor
            yield place, block

    def products(self) -> NDArray[np.float64]:
        """Return X'X of the standardised rows, float64 of shape (dim, dim)."""
        dim = self.X.shape[1]
        total = np.zeros((dim, dim))
        for _, block in self.blocks():
            total += block.T @ block
        return total


@dataclass(frozen=True)
class Projection:
    """A StandardScaler and a PCA, fitted on some rows."""

    scaler: StandardScaler
    pca: PCA

    @staticmethod
    def of(X: FeatureMatrix, rows: NDArray[np.int64], components: int | float) -> Projection:
        """Fit both on some rows of X; `components` is their number, or the share of the variance to explain.

        At most as many components as rows or dimensions are kept.

        X : float32 of shape (n, dim); rows : int64 of shape (k,)
        """
        n, dim = len(rows), X.shape[1]
        kept = components if isinstance(components, float) else min(components, n, dim)
        # Both solvers are exact and need no seed; the covariance is faster if it is the smaller matrix.
        solver = "covariance_eigh" if on_disk(X) or dim <= n else "full"
        pca = PCA(kept, svd_solver=solver)
        if on_disk(X):
            source = Standardised.of(X, rows)
            return Projection(source.scaler, _fit_products(pca, source.products(), n))
        scaler = StandardScaler()
        return Projection(scaler, pca.fit(scaler.fit_transform(X[rows])))

    def apply(self, X: FeatureMatrix, rows: NDArray[np.int64]) -> Array:
        """Return some rows projected onto the components, float32 of shape (n, components)."""
        made = np.empty((len(rows), self.pca.n_components_), dtype=np.float32)
        for place, block in blocks(X, rows):
            made[place] = self.pca.transform(self.scaler.transform(block))
        return made


def _fit_products(pca: PCA, products: NDArray[np.float64], n: int) -> PCA:
    """Fit a PCA from X'X of n centred rows, with the results of scikit-learn's fit on the rows."""
    values, vectors = scipy.linalg.eigh(products, driver="evd", overwrite_a=True, check_finite=False)
    variances = np.maximum(values[::-1], 0) / (n - 1)
    shares = variances / variances.sum()
    count = pca.n_components
    if isinstance(count, float):
        count = int(np.searchsorted(np.cumsum(shares), count, side="right")) + 1
    axes = vectors[:, ::-1][:, :count].T
    axes = axes * np.sign(axes[np.arange(count), np.abs(axes).argmax(axis=1)])[:, None]
    pca.components_, pca.n_components_, pca.mean_ = axes.astype(np.float32), count, np.zeros(len(products), np.float32)
    pca.explained_variance_, pca.explained_variance_ratio_ = variances[:count], shares[:count]
    pca.singular_values_ = np.sqrt(variances[:count] * (n - 1))
    pca.noise_variance_ = float(variances[count:].mean()) if count < len(variances) else 0.0
    pca.n_samples_, pca.n_features_in_ = n, len(products)
    return pca


class Projections:
    """The projections of one matrix X, each computed at its first use and kept for all heads on X."""

    def __init__(self, X: FeatureMatrix, components: int | float) -> None:
        self._X, self._components = X, components
        self._kept: dict[str, tuple[Projection, Array]] = {}
        self._locks: dict[str, threading.Lock] = {}

    def fold(self, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return the training and held-out rows of a fold, projected onto the components of the training rows.

        train, held_out : int64 of shape (k,) and (m,); returns float32 of shape (k, components) and (m, components)
        """
        _, made = self._of(train, np.concatenate([train, held_out]))
        return made[: len(train)], made[len(train) :]

    def whole(self) -> tuple[Projection, Array]:
        """Return the projection fitted on all rows, and the projected rows, float32 of shape (n, components)."""
        rows = np.arange(len(self._X))
        return self._of(rows, rows)

    def _of(self, train: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[Projection, Array]:
        key = bytes_digest(train.tobytes() + b"/" + rows.tobytes())
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._kept:
                found = Projection.of(self._X, train, self._components)
                self._kept[key] = found, found.apply(self._X, rows)
            return self._kept[key]


def without_scaler(head: Head) -> Head:
    """Return the head without its pipeline's StandardScaler, if that is the first step."""

    def build(seed: int) -> Pipeline:
        pipeline = head.build(seed)
        scaled = len(pipeline.steps) > 1 and type(pipeline[0]) is StandardScaler
        return Pipeline(pipeline.steps[1:]) if scaled else pipeline

    return replace(head, build=build)
