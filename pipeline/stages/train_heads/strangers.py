"""Near-duplicates across the test or fold boundary, and detection of unknown images for the best and the recommended row.

Detection is tested by leaving out classes; the reference data for it is kept in the rows' bundles.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from pipeline.errors import BundleError, first_line
from pipeline.evaluation import HeadPredictions, Predictions, audit
from pipeline.evaluation.leaderboard import Leaderboard, Leaks, read_predictions
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
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.task import Asked

log = logging.getLogger(__name__)

VERSION = 2
"""Increased when the stored data or the test changes, so that both are recomputed."""
MOST_IMAGES = 5_000
"""Maximum number of training images, and of test images."""
MOST_REFERENCES = 1_000
"""Maximum number of training vectors in a bundle; a hundredth of the images is nearly as good (Sun et al. 2022)."""
MOST_GROUPS = 5
FALSE_ALARMS, COVERAGE = 0.05, 0.9
"""The false-alarm rate of detection and the coverage of label sets in the report."""

DISTANCES = {"distance": False, "centred distance": True}
"""Distance measures, and whether each first subtracts the mean of the training images; which is better depends on the network."""


def with_strangers(board: Leaderboard, asked: Asked) -> Leaderboard:
    """Add tests of unknown-image detection to the leaderboard, for its best and recommended row, and to these rows' bundles."""
    found = dict[str, Mapping[str, Any]]()
    for name, row in {each.key: each for each in (board.best, board.recommended)}.items():
        if row.bundle is None or row.constant or row.task != asked.task.key or not asked.task.target.exclusive:
            continue
        folder = asked.files.root / row.bundle
        try:
            document = bundles.describe(folder)
            key = fingerprint({"version": VERSION, "row": document["provenance"]["key"]})
            record = document.get("unknown", {})
            if record.get("key") != key or not _is_whole(folder):
                log.info("%s: leaving out classes to test the detection of unknown images", row.key)
                record = _find(folder, asked, key)
            found |= {name: record} if record else {}
        except BundleError as error:
            log.info("%s: detection of unknown images is not tested: %s", name, error)
    return replace(board, provenance={**board.provenance, "unknown": found}) if found else board


def _is_whole(folder: Path) -> bool:
    """Whether the reference data that an earlier run saved with a bundle is present and undamaged."""
    with suppress(BundleError):
        bundles.bundle_file(folder, bundles.KNOWN)
        return True
    return False


def _find(folder: Path, asked: Asked, key: str) -> Mapping[str, Any]:
    task, stores, seed = asked.task, asked.stores, asked.config.seed
    bundle, predictions = bundles.load(folder), HeadPredictions.read(folder / FILE_NAME)
    used = np.sort(stratified_order(task.y_train, seed)[:MOST_IMAGES])
    y, fold = task.y_train[used], task.fold[used]
    names = [str(part.embedding["name"]) for part in bundle.parts]
    vectors = [stores[name].read(task.train.digests[used]) for name in names]
    groups = _left_out(bundle, vectors, y, fold, seed)
    if not groups:
        return {}
    shared = [name for name in (*DISTANCES, PROBABILITY) if all(name in group for group in groups)]
    means = {name: float(np.mean([group[name]["auroc"] for group in groups])) for name in shared}
    nearest = max(DISTANCES, key=lambda name: means[name])
    known = _kept(vectors[0], y, fold, DISTANCES[nearest], seed)
    tested = np.linspace(0, len(task.test) - 1, min(len(task.test), MOST_IMAGES)).astype(int)
    own: dict[str, NDArray[np.floating]] = {nearest: known.distances}
    new = {nearest: known.distance(stores[names[0]].read(task.test.digests[tested]))}
    record: dict[str, Any] = {"key": key, "groups": groups, "auroc": means, "references": len(known.references)}
    out_of_fold, of_test = predictions.out_of_fold, predictions.test.probabilities
    if out_of_fold is not None and out_of_fold.probabilities is not None and of_test is not None:
        own[PROBABILITY], new[PROBABILITY] = unsureness(out_of_fold.probabilities), unsureness(of_test)
        of_truth = out_of_fold.probabilities[np.arange(len(out_of_fold)), out_of_fold.y_true]
        sets = label_sets(of_test, of_truth, COVERAGE)
        held = sets[np.arange(len(sets)), predictions.test.y_true]
        record["sets"] = {"asked": COVERAGE, "held": float(held.mean()), "labels": float(sets.sum(axis=1).mean())}
    best = max(own, key=lambda name: means.get(name, 0.0))
    alarms = float(np.mean(alike(new[best], own[best]) <= FALSE_ALARMS))
    record |= {"score": best, "false_alarms": {"asked": FALSE_ALARMS, "found": alarms, "images": len(new[best])}}
    bundles.add(folder, {bundles.KNOWN: known.to_bytes()}, {"unknown": record})
    return record


def _kept(X: NDArray[np.float32], y: NDArray[np.int64], fold: NDArray[np.int64], centred: bool, seed: int) -> Reference:
    """Return the reference data for a bundle: reference vectors, and each image's distance from those of the other folds."""
    mean = _mean(X, centred)
    units, chosen = directions(X, mean), np.zeros(len(X), dtype=bool)
    chosen[stratified_order(y, seed)[:MOST_REFERENCES]] = True
    distances = np.zeros(len(X))
    for number in np.unique(fold):
        others = units[chosen & (fold != number)]
        # Among fewer references, the neighbour of the same relative rank.
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
    """Leave out each group of classes in turn, fit the head on the others without one fold, and compare strangeness scores.

    The left-out classes are the unknown images, the held-out fold of the other classes the known ones.
    """
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
) -> Mapping[str, NDArray[np.floating]]:
    """Return strangeness scores of all n images against the training ones, shape (n,), by the name of the measure.

    The measures are the distances, and `probability` if the head has probabilities and can be fitted on these images.
    """
    X, fitted_on, found = vectors[0], np.flatnonzero(train), dict[str, NDArray[np.floating]]()
    some = fitted_on[np.linspace(0, len(fitted_on) - 1, min(len(fitted_on), MOST_REFERENCES)).astype(int)]
    for name, centred in DISTANCES.items():
        units = directions(X, _mean(X[train], centred))
        found[name] = distance(units, units[some])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # convergence warnings, which the search has already reported
            fitted = [
                replace(part, estimator=clone(part.estimator).fit(own[train], y[train]))
                for part, own in zip(bundle.parts, vectors, strict=True)
            ]
            whole = replace(bundle, members=tuple(fitted)) if bundle.members else fitted[0]
            probabilities = whole.said(*vectors)[1] if len(np.unique(y[train])) > 1 else None
    except Exception as error:  # as in a search: a single class, for instance, or fewer rows than neighbours
        log.info("%s: cannot be fitted without some of the classes: %s", bundle.head, first_line(error))
        probabilities = None
    if probabilities is not None:
        found[PROBABILITY] = unsureness(probabilities)
    return found


def find_leaks(board: Leaderboard, asked: Asked) -> tuple[Leaks | None, audit.Findings]:
    """Find near-duplicates, their effect on the scores, and outliers, in the embedding of the best row that has one.

    At most `audit.MOST_IMAGES` images are examined, at most half of them test images. Without a row that has an embedding, the leaks
    are None.
    """
    task, stores = asked.task, asked.stores
    embedding = next((row.embedding for row in board.rows if row.embedding in stores), None)
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
    hashes = audit.read_hashes(asked.files, digests)
    pairs, findings = audit.examine(
        stores[embedding].read(digests), paths.tolist(), labels.tolist(), splits.tolist(), hashes
    )
    first, second = pairs.T
    across = in_test[first] != in_test[second]
    parted = ~across & (fold[first] != fold[second])
    tested, folded = (np.unique(pairs[part]) for part in (across, parted))
    tested = tested[in_test[tested]]
    metric, without, held_out = board.test_metric, dict[str, float](), dict[str, tuple[float, float]]()

    def clean_score(part: Predictions, leaking: NDArray[np.intp]) -> float:
        clean = part.rows(~np.isin(np.asarray(part.paths).astype(str), paths[leaking]))
        return metric.score(clean) if len(clean) else np.nan

    for key, predictions in read_predictions(board, asked.files.root).items():
        if np.isfinite(score := clean_score(predictions.test, tested)):
            without[key] = score
        if predictions.out_of_fold and np.isfinite(score := clean_score(predictions.out_of_fold, folded)):
            held_out[key] = metric.score(predictions.out_of_fold), score
    images = len(task.train) + len(task.test)
    return Leaks(embedding, images, len(tested), n_test, len(folded), n_train, without, held_out), findings
