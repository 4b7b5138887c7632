"""What near-duplicates on both sides of the test, or of a fold, do to the scores of a leaderboard."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation import Metric, Predictions, audit
from pipeline.evaluation.leaderboard import Leaderboard, Leaks, read_predictions
from pipeline.experiment import Artifacts
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, JoinedStores


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
    fold = np.full(n_train + n_test, -1)
    for number, (_, held_out) in enumerate(task.folds):
        fold[:n_train][np.isin(train, held_out)] = number
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
    predictions, metric = read_predictions(leaderboard, files.root), leaderboard.told_by
    without = {key: _with_and_without(metric, found.test, paths[tested])[1] for key, found in predictions.items()}
    judged = {
        key: _with_and_without(metric, found.out_of_fold, paths[folded])
        for key, found in predictions.items()
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
