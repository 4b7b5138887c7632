"""Principal components of features: found within each fold's training rows, once for every head and trial.

Where `tuning.pca` is set, every head works on them: its own StandardScaler, if it starts with one, is taken off, and a
shared one and a PCA come first. The pipeline that is fitted at the end is an ordinary Pipeline(StandardScaler, PCA, head).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.heads.head import Head
from pipeline.heads.tuning.features import Features, Standardised, blocks, on_disk
from pipeline.io.digests import bytes_digest

Array = NDArray[np.float32]

NOISE = 1e-6
"""Of the largest component's variance: what float32 leaves of none at all."""


@dataclass(frozen=True)
class Projection:
    """A StandardScaler and a PCA, fitted on some rows."""

    scaler: StandardScaler
    pca: PCA

    @staticmethod
    def of(X: Features, rows: NDArray[np.int64], components: int | float, whiten: bool) -> Projection:
        """Fit both on some rows of X: as many components, or as many as hold this share of the variance.

        No more components than rows or dimensions are kept, and for `whiten` only those along which the rows differ.

        X : float32 of shape (n, dim); rows : int64 of shape (k,)
        """
        n, dim = len(rows), X.shape[1]
        kept = components if isinstance(components, float) else min(components, n, dim)
        # Both are exact and need no seed; the covariance is the quicker way where it is the smaller matrix.
        solver = "covariance_eigh" if on_disk(X) or dim <= n else "full"
        pca = PCA(kept, whiten=whiten, svd_solver=solver)
        if on_disk(X):
            source = Standardised.of(X, rows)
            return Projection(source.scaler, _without_noise(_fit_products(pca, source.products(), n)))
        scaler = StandardScaler()
        return Projection(scaler, _without_noise(pca.fit(scaler.fit_transform(X[rows]))))

    def apply(self, X: Features, rows: NDArray[np.int64]) -> Array:
        """Return some rows on the components, shape (n, components), float32."""
        made = np.empty((len(rows), self.pca.n_components_), dtype=np.float32)
        for place, block in blocks(X, rows):
            made[place] = self.pca.transform(self.scaler.transform(block))
        return made

    def before(self, head: Pipeline) -> Pipeline:
        """Return the pipeline of these two and the steps of a fitted head."""
        return Pipeline([("scaler", self.scaler), ("pca", self.pca), *head.steps])


def _fit_products(pca: PCA, products: NDArray[np.float64], n: int) -> PCA:
    """Fit a PCA from X'X of n centred rows, as scikit-learn does from the rows."""
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


def _without_noise(pca: PCA) -> PCA:
    """Take off whitened components of no variance: divided by it, other rows would be thrown a million units away."""
    variances = pca.explained_variance_
    count = max(1, int((variances > NOISE * variances[0]).sum())) if pca.whiten else len(variances)
    pca.components_, pca.n_components_ = pca.components_[:count], count
    for name in ("explained_variance_", "explained_variance_ratio_", "singular_values_"):
        setattr(pca, name, getattr(pca, name)[:count])
    return pca


class Projections:
    """The projections of one matrix X, each made by the first that needs it and kept for all heads on X."""

    def __init__(self, X: Features, components: int | float, whiten: bool) -> None:
        self._X, self._components, self._whiten = X, components, whiten
        self._kept: dict[str, tuple[Projection, Array]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def fold(self, train: NDArray[np.int64], held_out: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return the training and the held-out rows of a fold on the components of the training rows.

        train, held_out : int64 of shape (k,) and (m,); returns float32 of shape (k, components) and (m, components)
        """
        _, made = self._of(train, np.concatenate([train, held_out]))
        return made[: len(train)], made[len(train) :]

    def whole(self) -> tuple[Projection, Array]:
        """Return the projection of all rows, and the rows on it, float32 of shape (n, components)."""
        rows = np.arange(len(self._X))
        return self._of(rows, rows)

    def _of(self, train: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[Projection, Array]:
        key = bytes_digest(train.tobytes() + b"/" + rows.tobytes())
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._kept:
                found = Projection.of(self._X, train, self._components, self._whiten)
                self._kept[key] = found, found.apply(self._X, rows)
            return self._kept[key]


def without_scaler(head: Head) -> Head:
    """Return a head whose pipeline starts behind its StandardScaler, if that is its first step."""

    def build(seed: int) -> Pipeline:
        pipeline = head.build(seed)
        scaled = len(pipeline.steps) > 1 and type(pipeline[0]) is StandardScaler
        return Pipeline(pipeline.steps[1:]) if scaled else pipeline

    return replace(head, build=build)
