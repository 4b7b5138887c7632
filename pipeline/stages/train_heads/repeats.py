"""Repeats: every search within outer folds and with other seeds, on request; the winner with its class weights switched.

They choose nothing; they say how far to trust what was chosen.

Each search has its own journal, in the folder beside the main one's, so a killed run goes on where it was.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from pipeline.config import TuningConfig
from pipeline.evaluation import METRICS, Metric, Predictions, Scores, metrics_for, scores
from pipeline.evaluation.leaderboard import LeaderboardRow, Nested, Seeds
from pipeline.evaluation.leaderboard.judge import UNEVEN, unevenness
from pipeline.heads import Head
from pipeline.heads.tuning import Features, Projections, TuningRun, blocks, make_folds, part, tune
from pipeline.stages.train_heads.embedding import Embedding, Vectors
from pipeline.stages.train_heads.task import Task

log = logging.getLogger(__name__)


def repeated(
    row: LeaderboardRow, head: Head, embedding: Embedding, vectors: Vectors, tuned: TuningRun, seed: int, journal: Path
) -> LeaderboardRow:
    """Return the row with what its repeats found.

    vectors : the features, float32 of shape (n, dim), of the training and of the test images
    """
    task, tuning, X = embedding.task, embedding.tuning, vectors.train
    assert row.test is not None
    first = row.cv_mean, float(row.test.of(metrics_for(task.target)[0])[0] or 0.0)
    return replace(
        row,
        nested=nested(head, X, task, tuning, seed, journal),
        seeds=seeds(head, (X, vectors.test), task, tuning, seed, journal, first),
        reweighted=reweighted(head, X, task, tuning, seed, tuned, journal, vectors.projections),
    )


def nested(head: Head, X: Features, task: Task, tuning: TuningConfig, seed: int, journal: Path) -> Nested | None:
    """Search within the training images of every fold and score the winner on the fold; None unless it is asked for.

    X : of shape (n, dim), float32, the training images. The inner folds keep groups together as the outer ones do.
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
        inner.append(float(found.best.mean if found.best.mean is not None else -np.inf))
        outer.append(_score(found, part(X, held_out), task.y_train[held_out], task, METRICS[found.scoring]))
    return Nested(tuple(inner), tuple(outer))


def seeds(
    head: Head,
    features: tuple[Features, Features],
    task: Task,
    tuning: TuningConfig,
    seed: int,
    journal: Path,
    first: tuple[float, float],
) -> Seeds | None:
    """Search again with the next seeds, each with its own folds; None unless it is asked for.

    features : of the training and of the test images, float32 of shape (n, dim). first : cross-validation mean, and the
    score that the test is told by, of the experiment's own seed.
    """
    if tuning.seeds < 2:
        return None
    (X_train, X_test), told_by = features, metrics_for(task.target)[0]
    numbers = tuple(range(seed, seed + tuning.seeds))
    found = [first]
    for number in numbers[1:]:
        log.info("%s, seed %d", head.name, number)
        folds = make_folds(task.target.strata(task.y_train), tuning.folds, number, task.groups)
        beside = _beside(journal, f"seed-{number}")
        run = tune(head, X_train, task.y_train, folds, tuning, number, beside, target=task.target)
        mean = float(run.best.mean if run.best.mean is not None else np.nan)
        sign = 1 if told_by.higher_is_better else -1
        found.append((mean, sign * _score(run, X_test, task.y_test, task, told_by)))
    return Seeds(numbers, tuple(mean for mean, _ in found), tuple(test for _, test in found))


def reweighted(
    head: Head,
    X: Features,
    task: Task,
    tuning: TuningConfig,
    seed: int,
    tuned: TuningRun,
    journal: Path,
    projections: Projections | None = None,
) -> Scores | None:
    """Score the chosen parameters out of fold with class weights switched on, or off where they were on.

    None where the classes are even or the head takes no weights: one trial more, not a search.

    X : of shape (n, dim), float32, the training images
    """
    if not head.takes_class_weight or unevenness(np.bincount(task.y_train).tolist()) < UNEVEN:
        return None
    weights = None if head.build(seed)[-1].get_params()["class_weight"] else "balanced"

    def build(seed: int) -> Pipeline:
        pipeline = head.build(seed)
        pipeline[-1].set_params(class_weight=weights)
        return pipeline

    params = {**head.fixed, **tuned.best.params}
    switched = replace(head, build=build, space={}, defaults={}, fixed=params)
    once = tuning.model_copy(update={"trials": 1, "seconds": None})
    found = tune(switched, X, task.y_train, task.folds, once, seed, _beside(journal, "class-weights"), projections)
    guess = found.classes[found.out_of_fold.y_pred]
    return scores(Predictions(task.y_train, guess, units=task.groups, target=task.target), seed)


def _beside(journal: Path, name: str) -> Path:
    return journal.with_suffix("") / f"{name}.jsonl"


def _score(found: TuningRun, X: Features, y: NDArray[Any], task: Task, metric: Metric) -> float:
    """Score what a search found as the search would have, with the thresholds that its answers out of fold tell."""
    said, known = [task.target.answers(found.pipeline, block) for _, block in blocks(X)], found.out_of_fold
    labels = np.concatenate([labels for labels, _, _ in said])
    columns = [scores for _, scores, _ in said if scores is not None]
    scored = np.concatenate(columns) if columns else None
    if metric.threshold and not task.target.exclusive and scored is not None and known.scores is not None:
        whole, all_scores = np.concatenate([known.y_true, y]), np.concatenate([known.scores, scored])
        new = np.repeat([0, 1], [len(known), len(y)])
        labels = task.target.decided(whole, whole, all_scores, metric.threshold, new)[len(known) :]
    return metric.score(Predictions(y, labels, scored if metric.needs_probabilities else None, target=task.target))
