"""One leaderboard row: tune a head, calibrate it, score it once on the test images and save it, or reuse a finished row.

On request, each search is repeated within outer folds and with other seeds; with imbalanced classes, class weights are switched
on or off for comparison. Repeats never choose a head; they show how reliable the choice is. Each has its own journal, in a folder
next to the main one.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC, NuSVC

from pipeline.config import TuningConfig
from pipeline.data.classes import expand_scores
from pipeline.errors import BundleError
from pipeline.evaluation import METRICS, HeadPredictions, Metric, Predictions, Scores, metrics_for, scores
from pipeline.evaluation.calibration import Calibrator, fit_calibrator, fit_sigmoids
from pipeline.evaluation.intervals import Interval, expected_accuracy
from pipeline.evaluation.leaderboard import LeaderboardRow, Nested, Seeds
from pipeline.evaluation.leaderboard.recommendation import UNEVEN, unevenness
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import bundle_file, plain
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.heads import Head, identity
from pipeline.heads.choosing import weighted
from pipeline.heads.tuning import FeatureMatrix, Projections, TuningRun, blocks, make_folds, part, tune
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.task import Asked, Embedding, SharedFeatures, Task, predict

log = logging.getLogger(__name__)

ROW_VERSION = 5
"""Increased when the meaning of a row or bundle changes, so that finished ones are recomputed."""


def row_key(head: Head, embedding: Embedding, seed: int) -> str:
    """Return a digest of everything that determines a row."""
    return fingerprint(
        {
            "row": ROW_VERSION,
            "embedding": embedding.record.fingerprint if embedding.record else embedding.name,
            "task": embedding.task.key,
            "head": identity(head, seed),
            "tuning": embedding.tuning.model_dump(mode="json", exclude={"jobs", "memory", "budget"}),
            "seed": seed,
            "versions": bundles.versions(),
        }
    )


def finished_row(folder: Path, key: str) -> LeaderboardRow | None:
    """Return the row of an earlier run with the same key; None if there is none, or its bundle is damaged."""
    try:
        document = bundles.describe(folder)
        if document.get("provenance", {}).get("key") != key:
            return None
        for place in bundles.places_of(folder, document) or [folder]:
            bundle_file(place, bundles.describe(place)["file"])
        HeadPredictions.read(folder / FILE_NAME)
        return LeaderboardRow.from_record(document["provenance"]["row"])
    except (BundleError, KeyError, TypeError, ValueError, AttributeError):
        return None


def make_row(head: Head, embedding: Embedding, vectors: SharedFeatures, asked: Asked, key: str) -> LeaderboardRow:
    """Tune one head, score it once on the test images, run the repeats that the config asks for, and save its bundle.

    UnfittedError if the head cannot be tuned here, or all of its trials failed.
    """
    embedding.require(head)
    log.info("%s / %s", embedding.name, head.name)
    record, task, tuning, seed, files = (
        embedding.record,
        embedding.task,
        embedding.tuning,
        asked.config.seed,
        asked.files,
    )
    journal, folder = files.trials(embedding.name, head.name), files.bundle(embedding.name, head.name)
    tuned = tune(head, vectors.train, task.y_train, task.folds, tuning, seed, journal, vectors.projections, task.target)
    made_of = plain(record) if record else {}
    bundle = ModelBundle(
        head.name, tuned.best.params, task.target, made_of, tuned.pipeline, {}, calibrator_of(tuned, task)
    )
    own, by = _out_of_fold(tuned, task, bundle), METRICS[tuned.scoring].threshold
    target = task.target.settled(task.y_train, own.y_pred, own.probabilities, by)
    bundle, own = replace(bundle, target=target), replace(own, target=target)
    start = time.perf_counter()
    y_pred, probabilities = predict(bundle, vectors.test, tuning)
    seconds = time.perf_counter() - start
    units, paths = task.test.fold_groups(), task.test.paths
    predictions = HeadPredictions(Predictions(task.y_test, y_pred, probabilities, units, paths, target=target), own)
    row = _row(head, embedding, tuned, predictions, seed)
    row = replace(
        row,
        predict_seconds=seconds,
        bundle=folder.relative_to(files.root).as_posix(),
        nested=nested(head, vectors.train, task, tuning, seed, journal),
        seeds=_seeds(row, head, embedding, vectors, seed, journal),
        reweighted=reweighted(head, vectors.train, task, tuning, seed, tuned, journal, vectors.projections),
    )
    provenance = {"key": key, "row": row.to_record(), "seed": seed, "strategy": tuning.strategy}
    bundles.save(replace(bundle, provenance=provenance), folder, {FILE_NAME: predictions.to_bytes()})
    return row


def _row(head: Head, embedding: Embedding, tuned: TuningRun, predictions: HeadPredictions, seed: int) -> LeaderboardRow:
    """Return the row of a tuned head, still without its prediction time, bundle and repeats."""
    record, task, best = embedding.record, embedding.task, tuned.best
    spec = record.spec if record else None
    own = float(np.mean(tuned.last_fit.fold_scores)) if tuned.scoring == "accuracy" else 1.0
    metric, held_out = METRICS[tuned.scoring], predictions.out_of_fold
    mean, by_fold = tuned.mean, [score for score in best.fold_scores if score is not None]
    if not task.target.exclusive and metric.needs == "labels" and held_out is not None:
        # Calibrated, with thresholds from the other folds, in the same way as the test images are scored.
        mean, by_fold = metric.score(held_out), [metric.score(held_out.rows(rows)) for _, rows in task.folds]
    return LeaderboardRow(
        embedding=embedding.name,
        backbone=spec.architecture if spec else embedding.name,
        layer=spec.layer if spec else "",
        head=head.name,
        untrained=spec is not None and spec.untrained,
        baseline=spec is None or spec.kind == "baseline",
        unseen_rows=None if task.chose is None else len(task.train),
        chose_rows=task.chose or 0,
        task=task.key,
        cv_mean=mean,
        cv_std=float(np.std(by_fold, ddof=1)) if len(by_fold) > 1 else 0.0,
        cv_scores=tuple(map(float, by_fold)),
        test=scores(predictions.test, seed, metric),
        fit_seconds=tuned.fit_seconds,
        predict_seconds=0.0,
        trials=len(tuned.trials),
        params=best.params,
        simplicity=head.simplicity,
        dim=spec.dim if spec else 0,
        search_seconds=tuned.seconds,
        embed_seconds=record.seconds_per_image if record else None,
        components=None if embedding.tuning.pca is None else int(tuned.pipeline["pca"].n_components_),
        last_fit=tuned.last_fit,
        expected_test=expected_test(predictions, task, own),
    )


def calibrator_of(tuned: TuningRun, task: Task) -> Calibrator | None:
    """Fit the calibrator from scores to probabilities on the out-of-fold scores; None if there are no scores, or one class only."""
    out_of_fold = tuned.out_of_fold
    if out_of_fold.scores is None or len(tuned.classes) < 2:
        return None
    if not task.target.exclusive:
        return fit_sigmoids(out_of_fold.scores, out_of_fold.y_true)
    model = tuned.pipeline[-1]
    # The scores of scikit-learn's SVC are the number of pairwise votes for each class.
    counts = isinstance(model, (SVC, NuSVC)) and model.decision_function_shape == "ovr"
    votes = counts and out_of_fold.kind == "decision" and len(tuned.classes) > 2
    logits = bundles.logits(out_of_fold.scores, out_of_fold.kind)
    return fit_calibrator(logits, out_of_fold.y_true, "margins" if votes else "temperature")


def _out_of_fold(tuned: TuningRun, task: Task, bundle: ModelBundle) -> Predictions:
    """Return the out-of-fold predictions of the chosen parameters, with a column for every class of the task."""
    found, target, calibrated = tuned.out_of_fold, bundle.target, None
    if found.scores is not None:
        calibrated = bundle.calibrated(found.scores, found.kind)
    metric = METRICS[tuned.scoring]
    searched = found.scores if metric.needs_probabilities else None
    probabilities, searched = (
        None if scores is None else expand_scores(scores, tuned.classes, target.width, "probability")
        for scores in (calibrated, searched)
    )
    y_pred = tuned.classes[found.y_pred] if target.exclusive else found.y_pred
    return replace(
        found,
        y_true=task.y_train,
        y_pred=target.decided(task.y_train, y_pred, probabilities, metric.threshold, found.folds),
        probabilities=probabilities,
        units=task.groups,
        paths=task.train.paths,
        scores=searched,
        target=target,
    )


def expected_test(predictions: HeadPredictions, task: Task, own: float = 1.0) -> Interval | None:
    """Return the interval of the test accuracy expected from cross-validation; `own` is the folds' training accuracy.

    None for targets without exclusive classes.
    """
    assert predictions.out_of_fold is not None
    if not task.target.exclusive:
        return None
    correct = predictions.out_of_fold.correct
    # A fit on all training images may gain a share of the gap between training and held-out accuracy, as in `Promise.of`.
    allowance = max(0.0, own - float(correct.mean())) / len(task.folds)
    return expected_accuracy(correct, len(task.test), task.groups, predictions.test.units, allowance)


def nested(head: Head, X: FeatureMatrix, task: Task, tuning: TuningConfig, seed: int, journal: Path) -> Nested | None:
    """Nested cross-validation: search within the training images of each fold and score the best on the held-out ones.

    X : of shape (n, dim), float32, the training images. Inner folds keep groups together, like outer ones. None unless `tuning.nested`.
    """
    if not tuning.nested:
        return None
    inner, outer = [], []
    for number, (train, held_out) in enumerate(task.folds):
        log.info("%s, nested: outer fold %d of %d", head.name, number + 1, len(task.folds))
        y, groups = task.y_train[train], None if task.groups is None else task.groups[train]
        folds = make_folds(task.target.strata(y), tuning.folds, seed, groups)
        beside = _beside(journal, f"nested-{number}")
        found = tune(head, part(X, train), y, folds, tuning, seed, beside, target=task.target)
        inner.append(found.mean)
        outer.append(_score(found, part(X, held_out), task.y_train[held_out], task, METRICS[found.scoring]))
    return Nested(tuple(inner), tuple(outer))


def _seeds(
    row: LeaderboardRow, head: Head, embedding: Embedding, vectors: SharedFeatures, seed: int, journal: Path
) -> Seeds | None:
    """Repeat the search with the next seeds, each with its own folds; None if `tuning.seeds` is below 2."""
    task, tuning = embedding.task, embedding.tuning
    test_metric = metrics_for(task.target)[0]
    if tuning.seeds < 2:
        return None
    assert row.test is not None
    sign = test_metric.sign
    numbers, means, on_test = (
        tuple(range(seed, seed + tuning.seeds)),
        [row.cv_mean],
        [row.test.of(test_metric)[0] or 0.0],
    )
    for number in numbers[1:]:
        log.info("%s, seed %d", head.name, number)
        folds = make_folds(task.target.strata(task.y_train), tuning.folds, number, task.groups)
        beside = _beside(journal, f"seed-{number}")
        found = tune(head, vectors.train, task.y_train, folds, tuning, number, beside, target=task.target)
        means.append(found.mean)
        on_test.append(sign * _score(found, vectors.test, task.y_test, task, test_metric))
    return Seeds(numbers, tuple(means), tuple(on_test))


def reweighted(
    head: Head,
    X: FeatureMatrix,
    task: Task,
    tuning: TuningConfig,
    seed: int,
    tuned: TuningRun,
    journal: Path,
    projections: Projections | None = None,
) -> Scores | None:
    """Score the chosen parameters out of fold with class weights switched on, or off if they were on.

    This takes one more trial, not a search. None if the classes are balanced or the head takes no class weights.

    X : of shape (n, dim), float32, the training images
    """
    if not head.takes_class_weight or unevenness(np.bincount(task.y_train).tolist()) < UNEVEN:
        return None
    weights = None if head.build(seed)[-1].get_params()["class_weight"] else "balanced"
    fixed = {**head.fixed, **tuned.best.params}
    switched = replace(head, build=partial(weighted, head.build, weights), space={}, defaults={}, fixed=fixed)
    once = tuning.model_copy(update={"trials": 1})
    found = tune(switched, X, task.y_train, task.folds, once, seed, _beside(journal, "class-weights"), projections)
    guess = found.classes[found.out_of_fold.y_pred]
    return scores(Predictions(task.y_train, guess, units=task.groups, target=task.target), seed)


def _beside(journal: Path, name: str) -> Path:
    return journal.with_suffix("") / f"{name}.jsonl"


def _score(found: TuningRun, X: FeatureMatrix, y: NDArray[Any], task: Task, metric: Metric) -> float:
    """Score a search's fitted head on new images with the search's metric, using thresholds from its out-of-fold predictions."""
    outputs, known = [task.target.answers(found.pipeline, block) for _, block in blocks(X)], found.out_of_fold
    labels = np.concatenate([labels for labels, _, _ in outputs])
    columns = [scores for _, scores, _ in outputs if scores is not None]
    scored = np.concatenate(columns) if columns else None
    if metric.threshold and not task.target.exclusive and scored is not None and known.scores is not None:
        whole, all_scores = np.concatenate([known.y_true, y]), np.concatenate([known.scores, scored])
        new = np.repeat([0, 1], [len(known), len(y)])
        labels = task.target.decided(whole, whole, all_scores, metric.threshold, new)[len(known) :]
    return metric.score(Predictions(y, labels, scored if metric.needs_probabilities else None, target=task.target))
