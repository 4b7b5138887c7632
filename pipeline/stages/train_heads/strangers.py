"""What the features tell besides: near-duplicates across test or folds, and what is strange to the best and the recommended row.

Strangeness is tested on classes that are left out, and what tells it is kept in the rows' bundles.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from pipeline.errors import BundleError, first_line
from pipeline.evaluation import HeadPredictions, Metric, Predictions, audit
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, Leaks, read_predictions
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.evaluation.strangeness import (
    NEIGHBOURS,
    PROBABILITY,
    Reference,
    alike,
    auroc,
    directions,
    distance,
    label_sets,
    unsureness,
)
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, JoinedStores

log = logging.getLogger(__name__)

VERSION = 2
"""Goes up when what is kept or tested changes, so that it is made again."""
MOST_IMAGES = 5_000
"""Training images that take part, and test images that are asked."""
MOST_REFERENCES = 1_000
"""Training images that a bundle keeps the vectors of; a hundredth of the images is nearly as good (Sun et al. 2022)."""
MOST_GROUPS = 5
FALSE_ALARMS, COVERAGE = 0.05, 0.9
"""What the report tells detections and sets for."""

DISTANCES = {"distance": False, "centred distance": True}
"""Whether the mean of the training images is taken off first; which is better depends on the network."""

StrangenessScores = Mapping[str, NDArray[np.floating]]
"""Strangeness of n images, shape (n,), by how it is measured: the distances, and `probability` where the head has some."""


def with_strangers(
    board: Leaderboard, task: Task, stores: Mapping[str, FeatureStore | JoinedStores], files: Artifacts, seed: int
) -> Leaderboard:
    """Return the leaderboard with what was found of its best and recommended row, and let their bundles know it."""
    found = dict[str, Mapping[str, Any]]()
    for name, row in {each.key: each for each in (board.best, board.recommended)}.items():
        if row.bundle is None or row.constant or row.task != task.key or not task.target.exclusive:
            continue
        try:
            record = _known_before(files.root / row.bundle) or _find(row, task, stores, files, seed)
            found |= {name: record} if record else {}
        except BundleError as error:
            log.info("%s: is not asked about strangers: %s", name, error)
    return replace(board, provenance={**board.provenance, "unknown": found}) if found else board


def _key(document: Mapping[str, Any]) -> str:
    return fingerprint({"version": VERSION, "row": document["provenance"]["key"]})


def _known_before(folder: Path) -> Mapping[str, Any] | None:
    """Return what an earlier run found of the same row, if what it kept is whole."""
    document = bundles.describe(folder)
    record: Mapping[str, Any] = document.get("unknown", {})
    if record.get("key") != _key(document):
        return None
    try:
        bundles.bundle_file(folder, bundles.KNOWN)
    except BundleError:
        return None
    return record


def _find(
    row: LeaderboardRow, task: Task, stores: Mapping[str, FeatureStore | JoinedStores], files: Artifacts, seed: int
) -> Mapping[str, Any]:
    log.info("%s: leaves classes out, to learn what is strange to it", row.key)
    folder = files.root / str(row.bundle)
    bundle, said = bundles.load(folder), HeadPredictions.read(folder / FILE_NAME)
    used = np.sort(stratified_order(task.y_train, seed)[:MOST_IMAGES])
    digests = task.train.digests[used]
    vectors = [stores[str(part.embedding["name"])].read(digests) for part in bundle.parts]
    fold = task.fold[used]
    groups = _left_out(bundle, vectors, task.y_train[used], fold, seed)
    if not groups:
        return {}
    shared = [name for name in (*DISTANCES, PROBABILITY) if all(name in group for group in groups)]
    means = {name: float(np.mean([group[name]["auroc"] for group in groups])) for name in shared}
    nearest = max(DISTANCES, key=lambda name: means[name])
    known = _kept(vectors[0], task.y_train[used], fold, DISTANCES[nearest], seed)
    tested = np.linspace(0, len(task.test) - 1, min(len(task.test), MOST_IMAGES)).astype(int)
    first = stores[str(bundle.parts[0].embedding["name"])].read(task.test.digests[tested])
    own: dict[str, NDArray[np.floating]] = {nearest: known.distances}
    new: dict[str, NDArray[np.floating]] = {nearest: known.distance(first)}
    record: dict[str, Any] = {"groups": groups, "auroc": means, "references": len(known.references)}
    out_of_fold = said.out_of_fold
    if out_of_fold is not None and out_of_fold.probabilities is not None and said.test.probabilities is not None:
        own[PROBABILITY] = unsureness(out_of_fold.probabilities)
        new[PROBABILITY] = unsureness(said.test.probabilities)
        of_truth = out_of_fold.probabilities[np.arange(len(out_of_fold)), out_of_fold.y_true]
        sets = label_sets(said.test.probabilities, of_truth, COVERAGE)
        held = sets[np.arange(len(sets)), said.test.y_true]
        record["sets"] = {"asked": COVERAGE, "held": float(held.mean()), "labels": float(sets.sum(axis=1).mean())}
    best = max(own, key=lambda name: means.get(name, 0.0))
    alarms = float(np.mean(alike(new[best], own[best]) <= FALSE_ALARMS))
    record |= {"score": best, "false_alarms": {"asked": FALSE_ALARMS, "found": alarms, "images": len(new[best])}}
    document = bundles.describe(folder)
    record["key"] = _key(document)
    bundles.add(folder, {bundles.KNOWN: known.to_bytes()}, {"unknown": record})
    return record


def _kept(X: NDArray[np.float32], y: NDArray[np.int64], fold: NDArray[np.int64], centred: bool, seed: int) -> Reference:
    """Return what a bundle keeps: references, and how far each image lies from those of the other folds."""
    mean = _mean(X, centred)
    units = directions(X, mean)
    chosen = np.zeros(len(X), dtype=bool)
    chosen[stratified_order(y, seed)[:MOST_REFERENCES]] = True
    distances = np.zeros(len(X))
    for number in np.unique(fold):
        others = units[chosen & (fold != number)]
        # Of fewer references the one that is as near among them as the nth among all.
        nth = round(NEIGHBOURS * len(others) / chosen.sum())
        distances[fold == number] = distance(units[fold == number], others, nth)
    return Reference(mean, units[chosen], distances, np.linalg.norm(X[chosen] - mean, axis=1))


def _mean(X: NDArray[np.float32], centred: bool) -> NDArray[np.float32]:
    return np.asarray(X.mean(axis=0)) if centred else np.zeros(X.shape[1], np.float32)


def _left_out(
    bundle: ModelBundle,
    vectors: Sequence[NDArray[np.float32]],
    y: NDArray[np.int64],
    fold: NDArray[np.int64],
    seed: int,
) -> list[dict[str, Any]]:
    """Leave a group of classes out, fit the head on some folds of the others, and see how strange those and these are to it."""
    classes, found = np.random.default_rng(seed).permutation(np.unique(y)), []
    for number, left in enumerate(np.array_split(classes, min(MOST_GROUPS, len(classes)))):
        unknown = np.isin(y, left)
        held_out = ~unknown & (fold == number % (fold.max() + 1))
        train = ~unknown & ~held_out
        if not held_out.any() or not train.any():
            continue
        group: dict[str, Any] = {"classes": [bundle.classes[place] for place in left]}
        for name, scores in _scores(bundle, vectors, y, train).items():
            known, strange = scores[held_out], scores[unknown]
            line = np.quantile(known, 1 - FALSE_ALARMS)
            group[name] = {"auroc": auroc(known, strange), "found": float(np.mean(strange > line))}
        found.append(group)
    return found


def _scores(
    bundle: ModelBundle, vectors: Sequence[NDArray[np.float32]], y: NDArray[np.int64], train: NDArray[np.bool_]
) -> StrangenessScores:
    """Return how strange all images are to what was learned from some of them."""
    X, fitted_on, found = vectors[0], np.flatnonzero(train), dict[str, NDArray[np.floating]]()
    some = fitted_on[np.linspace(0, len(fitted_on) - 1, min(len(fitted_on), MOST_REFERENCES)).astype(int)]
    for name, centred in DISTANCES.items():
        units = directions(X, _mean(X[train], centred))
        found[name] = distance(units, units[some])
    probabilities = _probabilities(bundle, vectors, y, train) if len(np.unique(y[train])) > 1 else None
    if probabilities is not None:
        found[PROBABILITY] = unsureness(probabilities)
    return found


def _probabilities(
    bundle: ModelBundle, vectors: Sequence[NDArray[np.float32]], y: NDArray[np.int64], train: NDArray[np.bool_]
) -> NDArray[np.floating] | None:
    """Fit the head on some images, and return the probabilities that it gives to all; None where it cannot or has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence: what the search was told of
            fitted = [
                replace(part, estimator=clone(part.estimator).fit(own[train], y[train]))
                for part, own in zip(bundle.parts, vectors, strict=True)
            ]
            whole = replace(bundle, members=tuple(fitted)) if bundle.members else fitted[0]
            return whole.said(*vectors)[1]
    except Exception as error:  # as in a search: such as more neighbours than there are rows now
        log.info("%s: cannot be fitted without some of the classes: %s", bundle.head, first_line(error))
        return None


def find_leaks(
    leaderboard: Leaderboard, task: Task, stores: Mapping[str, FeatureStore | JoinedStores], files: Artifacts
) -> tuple[Leaks | None, audit.Findings]:
    """Look at all images of a task, in the embedding of the best row that has one: near-duplicates, what they do, outliers.

    Of more than `audit.MOST_IMAGES` images only a part is looked at, half of them test images at most. There are no leaks to
    tell of where no row has an embedding.
    """
    embedding = next((row.embedding for row in leaderboard.rows if row.embedding in stores), None)
    if embedding is None:
        return None, audit.Findings()
    n_test = min(len(task.test), audit.MOST_IMAGES // 2)
    n_train = min(len(task.train), audit.MOST_IMAGES - n_test)
    train, test = (
        np.linspace(0, n - 1, m).astype(int) for n, m in ((len(task.train), n_train), (len(task.test), n_test))
    )
    parts = task.train.rows(train), task.test.rows(test)
    fold = np.concatenate([task.fold[train], np.full(n_test, -1)])
    paths = np.concatenate([part.paths.astype(str) for part in parts])
    order = np.argsort(paths)  # as the index has them
    paths, fold, in_test = paths[order], fold[order], order >= n_train
    digests, labels, splits = (
        np.concatenate([getattr(part, column) for part in parts])[order] for column in ("digests", "labels", "splits")
    )
    hashes = audit.read_hashes(files, digests)
    pairs, findings = audit.examine(
        stores[embedding].read(digests), paths.tolist(), labels.tolist(), splits.tolist(), hashes
    )
    first, second = pairs.T
    across = in_test[first] != in_test[second]
    parted = ~across & (fold[first] != fold[second])
    tested, folded = (np.unique(pairs[part]) for part in (across, parted))
    tested = tested[in_test[tested]]
    said, metric = read_predictions(leaderboard, files.root), leaderboard.told_by
    without = {key: _with_and_without(metric, found.test, paths[tested])[1] for key, found in said.items()}
    judged = {
        key: _with_and_without(metric, found.out_of_fold, paths[folded])
        for key, found in said.items()
        if found.out_of_fold
    }
    leaks = Leaks(
        embedding,
        len(task.train) + len(task.test),
        len(tested),
        n_test,
        len(folded),
        n_train,
        {key: value for key, value in without.items() if np.isfinite(value)},
        {key: value for key, value in judged.items() if np.isfinite(value[1])},
    )
    return leaks, findings


def _with_and_without(metric: Metric, part: Predictions, leaking: NDArray[np.str_]) -> tuple[float, float]:
    """Return the score on all images and on those that do not leak, paths of shape (m,); NaN where there are none."""
    clean = part.rows(~np.isin(np.asarray(part.paths).astype(str), leaking))
    return metric.score(part), metric.score(clean) if len(clean) else float("nan")
