"""Domain shift: the distance between the images of two sources, the classes that suffer, and two ways to adapt without labels.

Only `suffering` uses labels. Sources: Lopez-Paz and Oquab 2017 (classifier two-sample test); Gretton et al. 2012 (MMD); Sun, Feng
and Saenko 2016 (CORAL); Bickel, Brückner and Scheffer 2009 (weights by a classifier of domains).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.evaluation.comparison import Paired
from pipeline.evaluation.intervals import Interval, effective_size, numbered, share_interval, wilson
from pipeline.evaluation.predictions import Predictions

LEAST = 50
"""Fewest images from which the mean and covariance of a domain are estimated for alignment; fewer are refused."""
COMPONENTS = 32
"""Principal components in which covariances are aligned: with a few hundred images more are noise, which costs accuracy."""
FEW = 4
"""Fewest images per component."""
RIDGE = 1.0
"""Added to every variance before its root is taken, in units of a standardised feature, as in the paper."""
FOLDS, PERMUTATIONS = 5, 200
SHARED = 2.0
"""Factor of DeLong's variance, as folds share training images: it covered 95 % of random divisions of photos of clothes, 1 only 85 %."""
HEAVIEST = 20.0
"""Largest weight of a training image, relative to the mean weight."""
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Apart:
    """The distance between the images of two domains in an embedding.

    `auc` is that of a linear classifier of the two domains, out of fold: 0.5 where they are alike. `mmd` is the unbiased squared maximum
    mean discrepancy, `p_value` that of its permutation test. `mean` is the distance of the means and `covariance` the Frobenius distance
    of the covariances, in shares of the spread within a domain.
    """

    one: str
    other: str
    images: tuple[int, int]
    auc: float
    interval: Interval
    mmd: float
    p_value: float
    mean: float
    covariance: float

    @property
    def shown(self) -> bool:
        """Whether both tests show a difference between the domains."""
        return self.interval[0] > 0.5 and self.p_value < 0.05


def apart(
    X: Vectors, Y: Vectors, seed: int, units: NDArray[np.int64] | None = None, names: tuple[str, str] = ("", "")
) -> Apart:
    """Measure the distance between two sets of vectors.

    X, Y : float32 of shapes (n, dim) and (m, dim), at least `FOLDS` each; units : int64 of shape (n + m,), images of X then Y that
        belong together share a number
    """
    both, sizes = np.concatenate([X, Y]), (len(X), len(Y))
    second = np.repeat([False, True], sizes)
    place = numbered(units, len(both))
    Z = _components(both, 2 * COMPONENTS, seed)
    exchanged = numbered(2 * place + second, len(both))  # a unit with images of both domains counts as one in each
    of_unit = np.bincount(exchanged, second) > 0
    drawn = np.random.default_rng(seed).permuted(np.tile(of_unit, (PERMUTATIONS, 1)), axis=1)[:, exchanged]
    found = _mmd(Z, np.concatenate([second[None], drawn]).astype(np.float32))
    p_value = (1 + int(np.sum(found[1:] >= found[0] - 1e-12))) / (1 + PERMUTATIONS)
    auc, interval = two_sample(both, second, place, seed)
    return Apart(*names, sizes, auc, interval, float(found[0]), p_value, *_moments(Z[~second], Z[second]))


def _components(X: Vectors, most: int, seed: int) -> Vectors:
    """Standardise features and project them onto their first principal components: float32 of shape (n, k)."""
    scaled = StandardScaler().fit_transform(X)
    return np.asarray(PCA(min(most, *X.shape), random_state=seed).fit_transform(scaled))


def two_sample(X: Vectors, second: NDArray[np.bool_], place: NDArray[np.int64], seed: int) -> tuple[float, Interval]:
    """Return the out-of-fold AUC of a linear classifier of domains, and its 95 % interval.

    X : float32 of shape (n, dim); second : bool of shape (n,); place : int64 of shape (n,), the unit of each image. The interval is
    Wilson's at the effective sample size that DeLong's variance implies.
    """
    distinct = place.max() + 1 == len(place)
    folds = (StratifiedKFold if distinct else StratifiedGroupKFold)(FOLDS, shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=X.shape[1], class_weight="balanced"))
    told = cross_val_predict(model, X, second, cv=folds, groups=None if distinct else place, method="decision_function")
    first, other = np.sort(told[~second]), np.sort(told[second])
    above = _ranked(told[second], first)  # per image of the second domain, the share of the first with lower scores
    below = 1 - _ranked(told[~second], other)
    units = (None, None) if distinct else (place[second], place[~second])
    worth = [effective_size(part, own) for part, own in zip((above, below), units, strict=True)]
    auc = float(above.mean())
    variance = SHARED * sum(float(part.var(ddof=1)) / size for part, size in zip((above, below), worth, strict=True))
    size = min(auc * (1 - auc) / variance if variance > 0 else np.inf, sum(worth) if variance > 0 else min(worth))
    return auc, wilson(auc * size, size)


def _ranked(values: NDArray[np.floating], known: NDArray[np.floating]) -> NDArray[np.float64]:
    sides = [np.searchsorted(known, values, side=side) for side in ("left", "right")]
    return np.asarray(sum(sides) / (2 * len(known)))


def _mmd(Z: Vectors, second: NDArray[np.float32]) -> NDArray[np.floating]:
    """Return the unbiased squared MMD of r divisions, shape (r, n), with a Gaussian kernel of the median distance's width."""
    squares = np.square(Z).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * Z @ Z.T, 0)
    kernel = np.exp(-distances / max(float(np.median(distances)), 1e-12))
    first = 1 - second
    n, m = first.sum(axis=1), second.sum(axis=1)
    within = [np.einsum("rn,rn->r", part @ kernel, part) for part in (first, second)]
    across = np.einsum("rn,rn->r", first @ kernel, second)
    return np.asarray((within[0] - n) / (n * (n - 1)) + (within[1] - m) / (m * (m - 1)) - 2 * across / (n * m))


def _moments(X: Vectors, Y: Vectors) -> tuple[float, float]:
    """Return the distances of means and of covariances, in shares of the spread within a domain."""
    step = X.mean(axis=0) - Y.mean(axis=0)
    a, b = np.atleast_2d(np.cov(X.T)), np.atleast_2d(np.cov(Y.T))
    spread = np.sqrt((np.trace(a) + np.trace(b)) / 2)
    return float(np.linalg.norm(step) / spread), float(np.linalg.norm(a - b) / np.linalg.norm((a + b) / 2))


@dataclass(frozen=True)
class Alignment:
    """CORAL's map of a target domain onto the source: equal means and, in the source's first components, equal covariances.

    source, target, scale : float of shape (dim,), means and the source's standard deviations; components : (k, dim); turn : (k, k)
    """

    source: NDArray[np.floating]
    target: NDArray[np.floating]
    scale: NDArray[np.floating]
    components: NDArray[np.floating]
    turn: NDArray[np.floating]

    def __call__(self, X: Vectors) -> Vectors:
        """Map vectors of the target domain onto the source: float32 of shape (n, dim)."""
        centred = (X - self.target) / self.scale
        inside = centred @ self.components.T
        return np.asarray(
            self.source + self.scale * (centred + (inside @ self.turn - inside) @ self.components), np.float32
        )


def align(source: Vectors, target: Vectors, seed: int = 0, ridge: float = RIDGE) -> Alignment:
    """Fit the map of a target domain onto the source, without labels.

    source, target : float32 of shapes (n, dim) and (m, dim); ValueError for fewer than `LEAST` images of either
    """
    if min(len(source), len(target)) < LEAST:
        raise ValueError(f"{min(len(source), len(target))} images, expected {LEAST} at least")
    means, scale = (source.mean(axis=0), target.mean(axis=0)), source.std(axis=0)
    scale = np.where(scale > 1e-6 * scale.max(initial=0), scale, 1).astype(np.float32)
    count = min(COMPONENTS, source.shape[1], min(len(source), len(target)) // FEW)
    found = PCA(count, random_state=seed).fit(source / scale)
    spreads = [np.atleast_2d(np.cov(found.components_ @ (part / scale).T)) for part in (target, source)]
    turn = _power(spreads[0], -0.5, ridge) @ _power(spreads[1], 0.5, ridge)
    return Alignment(*means, scale, found.components_, turn.astype(np.float32))


def _power(matrix: NDArray[np.floating], exponent: float, ridge: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * (np.maximum(values, 0) + ridge) ** exponent) @ vectors.T)


def weights(source: Vectors, target: Vectors, seed: int) -> NDArray[np.float64]:
    """Return importance weights of the source's images for the target domain: float64 of shape (n,), mean 1.

    They are the out-of-fold odds of a classifier of domains, clipped at `HEAVIEST`. source, target : float32 of shapes (n, dim), (m, dim)
    """
    second = np.repeat([0, 1], [len(source), len(target)])
    Z = _components(np.concatenate([source, target]), COMPONENTS, seed)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, class_weight="balanced"))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    p = cross_val_predict(model, Z, second, cv=folds, method="predict_proba")[: len(source), 1]
    odds = p / np.maximum(1 - p, 1e-6)
    odds = np.minimum(odds / odds.mean(), HEAVIEST)
    return np.asarray(odds / odds.mean())


# ---- classes that suffer


@dataclass(frozen=True)
class InClass:
    """The images of one class in one domain; it `suffers` if its recall is shown to be below that in the training domains."""

    label: str
    images: int
    recall: float | None
    interval: Interval
    suffers: bool = False


@dataclass(frozen=True)
class InDomain:
    """A head's accuracy in one domain, on its test images and, in training domains, on out-of-fold predictions."""

    name: str
    new: bool
    """Whether the domain has no training image."""
    images: int
    accuracy: float
    interval: Interval
    classes: tuple[InClass, ...]


def suffering(said: Predictions, domains: NDArray[np.object_], trained: Sequence[str]) -> tuple[InDomain, ...]:
    """Return a head's accuracy in each domain, training domains first; tests of a domain's classes are Bonferroni-corrected.

    said : predictions of n images, each by a model not fitted on it; domains : object (str) of shape (n,); trained : the training
    domains
    """
    known = said.rows(np.isin(domains, list(trained)))
    order = sorted(set(domains.tolist()), key=lambda name: (name not in trained, name))
    return tuple(
        _in_domain(said.rows(domains == name), name, None if name in trained or not len(known) else known)
        for name in order
    )


def _in_domain(said: Predictions, name: str, known: Predictions | None) -> InDomain:
    classes = []
    for code, label in enumerate(said.classes):
        part = said.rows(said.y_true == code)
        if not len(part):
            classes.append(InClass(label, 0, None, (0.0, 1.0)))
            continue
        before = None if known is None else known.rows(known.y_true == code)
        suffers = before is not None and len(before) > 0 and _least_gap(before, part, len(np.unique(said.y_true))) > 0
        interval = share_interval(part.correct, part.units)
        classes.append(InClass(label, len(part), float(part.correct.mean()), interval, suffers))
    accuracy, interval = float(said.correct.mean()), share_interval(said.correct, said.units)
    return InDomain(name, known is not None, len(said), accuracy, interval, tuple(classes))


def _least_gap(a: Predictions, b: Predictions, of: int) -> float:
    """Return the lower end of Newcombe's interval (1998) of accuracy(a) - accuracy(b), unpaired, one of `of` simultaneous at 95 %."""
    z = float(norm.ppf(1 - 0.025 / of))
    shares = [float(part.correct.mean()) for part in (a, b)]
    sizes = [effective_size(part.correct, part.units) for part in (a, b)]
    (low, _), (_, high) = (wilson(share * n, n, z) for share, n in zip(shares, sizes, strict=True))
    return shares[0] - shares[1] - float(np.hypot(shares[0] - low, high - shares[1]))


# ---- the record that stage two stores


@dataclass(frozen=True)
class Adapted:
    """The effect of an adaptation on the test images of one domain: `gain` is adapted minus plain, for the same head."""

    row: str
    way: str
    domain: str
    images: int
    plain: float
    score: float
    gain: Paired


@dataclass(frozen=True)
class Domains:
    """The domains of an experiment as one row of its leaderboard sees them."""

    row: str
    embedding: str
    pairs: tuple[Apart, ...]
    each: tuple[InDomain, ...]
    adapted: tuple[Adapted, ...]
    notes: tuple[str, ...]
    """Analyses that were skipped, and why."""

    def lines(self) -> list[str]:
        """Return the findings as sentences."""
        new = {each.name for each in self.each if each.new}
        found = [
            f"Domains {pair.one!r} and {pair.other!r}: a linear classifier of {self.embedding} tells them apart with AUC {pair.auc:.2f} "
            f"[{pair.interval[0]:.2f}, {pair.interval[1]:.2f}], where 0.5 is chance; MMD² {pair.mmd:.3f} (p = {pair.p_value:.3f}); in shares of the "
            f"spread within, means {pair.mean:.2f} and covariances {pair.covariance:.2f} apart{'' if pair.shown else ': no difference is shown'}."
            for pair in self.pairs
            if not new or len({pair.one, pair.other} & new) == 1
        ]
        told = ", ".join(
            f"{each.name!r} {100 * each.accuracy:.1f} [{100 * each.interval[0]:.1f}, {100 * each.interval[1]:.1f}]"
            + " (none in training)" * each.new
            for each in self.each
        )
        found.append(f"Accuracy of {self.row} by domain, %: {told}.")
        for each in self.each:
            worse = [f"{one.label} {100 * (one.recall or 0):.0f} %" for one in each.classes if one.suffers]
            if worse or each.new:
                found.append(f"Classes that suffer in {each.name!r}: {', '.join(worse) or 'none is shown to'}.")
        found += [
            f"{one.way} on {one.domain!r}: {100 * one.plain:.1f} to {100 * one.score:.1f} %, {one.gain.points} "
            f"on {one.images:,} test images: {one.gain.verdict}."
            for one in self.adapted
        ]
        return [*found, *self.notes]
