"""Simulations of heads, quick enough to be run thousands of times: heads in a few lines of numpy, and heads made up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from pipeline.data.classes import MultiLabel
from pipeline.data.targets import Regression
from pipeline.evaluation import METRICS, Predictions, compare, scores
from pipeline.evaluation.calibration import fit_sigmoids
from pipeline.evaluation.comparison import exchange_test, holm, paired_interval
from pipeline.evaluation.intervals import critical

Features = NDArray[np.float64]
Labels = NDArray[np.int64]


def centroid(X: Features, y: Labels, X_new: Features) -> Labels:
    classes = np.unique(y)
    centres = np.stack([X[y == label].mean(axis=0) for label in classes])
    return classes[((X_new[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)]


def ridge(X: Features, y: Labels, X_new: Features) -> Labels:
    classes, middle = np.unique(y), X.mean(axis=0)
    targets = (y[:, None] == classes) - np.mean(y[:, None] == classes, axis=0)
    weights = np.linalg.solve((X - middle).T @ (X - middle) + np.eye(X.shape[1]), (X - middle).T @ targets)
    return classes[((X_new - middle) @ weights + np.mean(y[:, None] == classes, axis=0)).argmax(axis=1)]


def nearest(X: Features, y: Labels, X_new: Features, k: int = 1) -> Labels:
    classes = np.unique(y)
    distances = (X**2).sum(axis=1) - 2 * X_new @ X.T  # but for what is the same for all neighbours of a row
    near = np.argpartition(distances, k - 1, axis=1)[:, :k]
    return classes[(y[near][:, :, None] == classes).sum(axis=1).argmax(axis=1)]


def five_nearest(X: Features, y: Labels, X_new: Features) -> Labels:
    return nearest(X, y, X_new, 5)


def stump(X: Features, y: Labels, X_new: Features) -> Labels:
    """The most frequent label on either side of the first feature's median."""
    cut = np.median(X[:, 0])
    left, right = (np.bincount(y[side]).argmax() for side in (X[:, 0] <= cut, X[:, 0] > cut))
    return np.where(X_new[:, 0] <= cut, left, right)


CHEAP_HEADS: dict[str, Callable[[Features, Labels, Features], Labels]] = {
    "centroid": centroid,
    "ridge": ridge,
    "nearest": nearest,
    "five_nearest": five_nearest,
    "stump": stump,
}


def folds_of(y: Labels, k: int, seed: int) -> NDArray[np.int64]:
    """Stratified folds: each class is dealt out in turn."""
    rng = np.random.default_rng(seed)
    folds = np.empty(len(y), dtype=np.int64)
    for label in np.unique(y):
        rows = rng.permutation(np.flatnonzero(y == label))
        folds[rows] = (np.arange(len(rows)) + rng.integers(k)) % k
    return folds


def out_of_fold(
    X: Features, y: Labels, folds: NDArray[np.int64], names: Sequence[str] = tuple(CHEAP_HEADS)
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, list[float]]]:
    """Which rows each head labels right out of fold, and its fold scores."""
    correct = {name: np.zeros(len(y), dtype=bool) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}
    for fold in np.unique(folds):
        held = folds == fold
        for name in names:
            correct[name][held] = CHEAP_HEADS[name](X[~held], y[~held], X[held]) == y[held]
            found[name].append(float(correct[name][held].mean()))
    return correct, found


# Groups and rare classes: shares of runs, so that the default tests and the long proofs count the same things.

PRIORS, RECALLS = np.array([0.9, 0.07, 0.03]), np.array([0.97, 0.85, 0.7])
"""Three classes, the last with one image in thirty, and how often each is labelled right."""


def in_groups(rng: np.random.Generator, n: int, groups: int | None, effect: float, heads: int = 1) -> list[Predictions]:
    """Equally good heads on uneven classes; images of a group, and of different size, are right or wrong together.

    effect : standard deviation of what a group adds to the normal score that decides whether an image is labelled right
    """
    sizes = np.ones(n, dtype=int) if groups is None else rng.multinomial(n, rng.dirichlet(np.full(groups, 3.0)))
    units = np.unique(np.repeat(np.arange(len(sizes)), sizes), return_inverse=True)[1]
    y = rng.choice(3, n, p=PRIORS)
    made = []
    for _ in range(heads):
        shift = np.repeat(rng.normal(0, effect, len(sizes)), sizes)
        right = rng.normal(size=n) < norm.ppf(RECALLS[y]) * np.sqrt(1 + effect**2) + shift
        guess = np.where(right, y, (y + 1 + (rng.random(n) < 0.3)) % 3)
        made.append(Predictions(y, guess, units=None if groups is None else units))
    return made


def true_scores() -> dict[str, float]:
    """The scores that `in_groups` would have on any number of images."""
    joint = np.zeros((3, 3))
    for y in range(3):
        joint[y, y] = PRIORS[y] * RECALLS[y]
        joint[y, (y + 1) % 3] = PRIORS[y] * (1 - RECALLS[y]) * 0.7
        joint[y, (y + 2) % 3] = PRIORS[y] * (1 - RECALLS[y]) * 0.3
    f1 = 2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))
    return {"accuracy": np.trace(joint), "balanced_accuracy": RECALLS.mean(), "macro_f1": f1.mean()}


def coverage(runs: int, n: int, groups: int | None, effect: float) -> dict[str, float]:
    """How often the 95 % intervals of three scores hold the truth, and those of the difference of two equal heads 0."""
    truth, held = true_scores(), dict[str, list[bool]]()
    for run in range(runs):
        first, second = in_groups(np.random.default_rng(run), n, groups, effect, 2)
        found = scores(first)
        ends = (found.intervals[name] for name in ("accuracy", "balanced_accuracy", "macro_f1"))
        for name, (low, high) in zip(truth, ends, strict=True):
            held.setdefault(name, []).append(low <= truth[name] <= high)
        low, high = paired_interval(first, second, critical(first.units))
        held.setdefault("paired", []).append(low <= 0 <= high)
    return {name: float(np.mean(inside)) for name, inside in held.items()}


def false_winners(runs: int, n: int, groups: int | None, effect: float, metric: str = "accuracy") -> dict[str, float]:
    """How often some of five equal heads is called worse than the best: out of fold, on the test, and thinking in images."""
    found = {"out of fold": 0, "test": 0, "images": 0}
    for run in range(runs):
        rng = np.random.default_rng(run)
        heads = dict(zip("abcde", in_groups(rng, n, groups, effect, 5), strict=True))
        tested = dict(zip("abcde", in_groups(rng, n // 2, groups, effect, 5), strict=True))
        best = max(heads, key=lambda name: METRICS[metric].score(heads[name]))
        rows = compare(heads, best, tested, seed=run, metric=METRICS[metric])
        found["out of fold"] += any(not row.no_evidence for row in rows)
        found["test"] += any(row.test is not None and row.test.shown != 0 for row in rows)
        alone = {name: replace(head, units=None) for name, head in heads.items()}
        found["images"] += any(not row.no_evidence for row in compare(alone, best, seed=run, metric=METRICS[metric]))
    return {name: count / runs for name, count in found.items()}


def false_winners_of_exchange(runs: int, n: int, groups: int, effect: float, metric: str) -> float:
    """How often a head differs from some of four equal ones by the test that the test images are compared by, after Holm."""
    wrong = 0
    for run in range(runs):
        first, *others = in_groups(np.random.default_rng(run), n, groups, effect, 5)
        wrong += min(holm([exchange_test(METRICS[metric], first, other, run) for other in others])) < 0.05
    return wrong / runs


def false_winners_of_permuted_groups(runs: int, groups: int = 40, size: int = 6) -> float:
    """How often real heads differ on labels that mean nothing, given to whole groups of images that look alike."""
    wrong = 0
    for run in range(runs):
        rng = np.random.default_rng(run)
        of_group, units = rng.integers(0, 3, groups), np.repeat(np.arange(groups), size)
        y, folds = np.repeat(of_group, size), np.repeat(folds_of(of_group, 5, run), size)
        X = np.repeat(rng.normal(size=(groups, 8)), size, axis=0) + 0.3 * rng.normal(size=(groups * size, 8))
        correct, fold_scores = out_of_fold(X, y, folds)
        best = max(correct, key=lambda name: float(np.mean(correct[name])))
        heads = {name: Predictions(y * 0, np.where(right, 0, 1), units=units) for name, right in correct.items()}
        wrong += any(not row.no_evidence for row in compare(heads, best, folds=fold_scores, seed=run))
    return wrong / runs


def regressed(rng: np.random.Generator, n: int, correlation: float) -> tuple[Features, Features]:
    """Numbers of variance 1 and what the best head that there is says of them, which goes together with them so far."""
    said = correlation * rng.normal(size=n)
    return said + np.sqrt(1 - correlation**2) * rng.normal(size=n), said


def interval_coverage(runs: int, n: int, correlation: float = 0.8) -> dict[str, float]:
    """In which share of simulated data sets of numbers each score's interval has the true score."""
    error = np.sqrt(1 - correlation**2)
    true = {
        "mae": error * np.sqrt(2 / np.pi),
        "rmse": error,
        "r2": correlation**2,
        "spearman": 6 / np.pi * np.arcsin(correlation / 2),
    }
    rng, hits = np.random.default_rng(0), dict.fromkeys(true, 0)
    for _ in range(runs):
        found = scores(Predictions(*regressed(rng, n, correlation), target=Regression())).intervals
        for name, value in true.items():
            hits[name] += found[name][0] <= value <= found[name][1]
    return {name: count / runs for name, count in hits.items()}


def permuted_numbers(runs: int, n: int = 150, dim: int = 10, metric: str = "mae") -> int:
    """Of so many data sets with permuted numbers, in how many a head is said to be better out of fold than it can be.

    Four ridges on features of their own, none of which tells anything, are equally good, and none is better than the mean.
    """
    rng, false = np.random.default_rng(0), 0
    for _ in range(runs):
        y, folds = rng.permutation(rng.exponential(size=n)), rng.permutation(np.arange(n) % 5)
        heads = {name: np.empty(n) for name in ("a", "b", "c", "d", "mean")}
        for name, guess in heads.items():
            X = rng.normal(size=(n, dim)) * (name != "mean")
            for fold in range(5):
                held = folds == fold
                A, middle = X[~held] - X[~held].mean(axis=0), y[~held].mean()
                weights = np.linalg.solve(A.T @ A + 30 * np.eye(dim), A.T @ (y[~held] - middle))
                guess[held] = (X[held] - X[~held].mean(axis=0)) @ weights + middle
        said = {name: Predictions(y, guess, target=Regression()) for name, guess in heads.items()}
        best = max(said, key=lambda name: METRICS[metric].score(said[name]))
        if best == "mean":  # it may well be better than heads that learn noise; among these none is
            del said["mean"]
            best = max(said, key=lambda name: METRICS[metric].score(said[name]))
        false += not all(row.no_evidence for row in compare(said, best, seed=0, metric=METRICS[metric]))
    return false


SHARES = np.array([0.05, 0.1, 0.2, 0.3, 0.5])
"""How many images have each of five labels."""


def labelled(rng: np.random.Generator, n: int, signal: float = 1.5, groups: int | None = None) -> Predictions:
    """Labels, and what a head says of them whose scores are so many standard deviations higher where a label is there.

    Images of a group have scores that are off together.
    """
    y = rng.random((n, len(SHARES))) < SHARES
    units = None if groups is None else rng.integers(0, groups, n)
    off = 0 if units is None else rng.normal(0, 0.5, (groups, len(SHARES)))[units]
    z = signal * y + rng.normal(size=y.shape) + off
    p = 1 / (1 + np.exp(-(signal * z - signal**2 / 2 + np.log(SHARES / (1 - SHARES)))))
    return Predictions(y, p >= 0.4, p, units=units, target=MultiLabel(tuple("abcde")))


def _true(said: Predictions) -> dict[str, float]:
    served = [metric for metric in METRICS.values() if "multilabel" in metric.targets]
    return {metric.name: metric.sign * metric.score(said) for metric in served}


def label_coverage(runs: int, n: int = 300, groups: int | None = None, signal: float = 1.5) -> dict[str, float]:
    """In which share of simulated data sets of several labels each score's interval has the true score."""
    rng = np.random.default_rng(0)
    many = 50_000 if runs < 200 else 400_000
    true = _true(labelled(rng, many, signal, None if groups is None else many * groups // n))
    hits = dict.fromkeys(true, 0)
    for _ in range(runs):
        found = scores(labelled(rng, n, signal, groups)).intervals
        for name, value in true.items():
            hits[name] += found[name][0] <= value <= found[name][1]
    return {name: count / runs for name, count in hits.items()}


def permuted_labels(
    runs: int, n: int = 150, dim: int = 10, metric: str = "mean_average_precision", alpha: float = 30
) -> int:
    """Of so many data sets with permuted labels, in how many a head is said to be better out of fold than it can be.

    Four ridges on features of their own, none of which tells anything, and where order alone counts the labels' shares, which are as
    good; by how many labels are said these differ truly. Labels are said from thresholds on as rows of a leaderboard say them.
    """
    rng, false, target, by = np.random.default_rng(0), 0, MultiLabel(tuple("abcde")), METRICS[metric].threshold
    for _ in range(runs):
        y, folds = rng.permutation(labelled(rng, n).y_true), rng.permutation(np.arange(n) % 5)
        heads = {}
        for name in ("a", "b", "c", "d", *(["shares"] if METRICS[metric].needs_probabilities else [])):
            X, said = rng.normal(size=(n, dim)) * (name != "shares"), np.empty(y.shape)
            for fold in range(5):
                held, middle = folds == fold, y.mean(axis=0)
                A = X[~held] - X[~held].mean(axis=0)
                weights = np.linalg.solve(A.T @ A + alpha * np.eye(dim), A.T @ (y[~held] - middle))
                said[held] = (X[held] - X[~held].mean(axis=0)) @ weights + middle
            if by != "each":  # else order alone counts
                said = fit_sigmoids(said, y).probabilities(said)
            heads[name] = Predictions(y, target.decided(y, y, said, by, folds), said, target=target)
        best = max(heads, key=lambda name: METRICS[metric].score(heads[name]))
        false += not all(row.no_evidence for row in compare(heads, best, seed=0, metric=METRICS[metric]))
    return false
