"""The recommendation on a leaderboard: comparison with the best row, the recommended row, selection optimism, class imbalance.

It is computed from the files of stage two: the `predictions.npz` of each bundle and the journals of trials.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.data.targets import Target
from pipeline.errors import BundleError, HeadError
from pipeline.evaluation import Difference, HeadPredictions, Metric, Predictions, Scores, compare, counted, scores
from pipeline.evaluation.calibration import correct_priors
from pipeline.evaluation.comparison import selection_optimism, trial_optimism
from pipeline.evaluation.leaderboard.rows import LeaderboardRow, Recommendation
from pipeline.evaluation.leaderboard.table import Leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import TRIALS, Artifacts, read_lines

log = logging.getLogger(__name__)

Trials = Sequence[Mapping[str, Any]]
"""The finished, stopped and failed trials of one search, as in its journal."""


def recommend(leaderboard: Leaderboard, output: Path) -> Leaderboard:
    """Return the leaderboard with its recommendation, or without one where the best row has no out-of-fold predictions.

    Rows whose predictions are missing or of other images, or whose saved fit is bad, are left out of the comparison.
    """
    if not leaderboard.rows:
        return leaderboard
    said = {key: found for key, found in read_predictions(leaderboard, output).items() if leaderboard.row(key).sound}
    best, metric, seed = leaderboard.best.key, leaderboard.metric, int(leaderboard.provenance.get("seed", 0))
    held_out = _same_images(said, "out_of_fold", best, metric)
    if best not in held_out:
        return replace(leaderboard, recommendation=None)
    folds = {row.key: row.cv_scores for row in leaderboard.rows}
    test = _same_images(said, "test", best, metric)
    ordered = {row.key: held_out[row.key] for row in leaderboard.rows if row.key in held_out}
    differences = compare(ordered, best, test, folds, seed, metric)
    recommended, reason = _choose(leaderboard, differences, ordered[best])
    optimism = selection_optimism(tuple(ordered.values()), seed, metric=metric) if len(ordered) > 1 else None
    luck = _trial_optimism(read_trials(leaderboard, output).get(best, ()))
    return replace(leaderboard, recommendation=Recommendation(differences, recommended.key, reason, optimism, *luck))


def read_predictions(leaderboard: Leaderboard, output: Path) -> dict[str, HeadPredictions]:
    """Return the predictions of every row that has them, by key."""
    found = {}
    for row in leaderboard.rows:
        try:
            if row.bundle is not None:
                found[row.key] = HeadPredictions.read(output / row.bundle / FILE_NAME)
        except BundleError as error:
            log.warning("%s: takes no part in the comparison: %s", row.key, error)
    return found


def read_trials(leaderboard: Leaderboard, output: Path) -> dict[str, Trials]:
    """Return the trials of every row that has a journal, by key, in the order they were made."""
    found: dict[str, Trials] = {}
    for row in leaderboard.rows:
        path = Artifacts(output).trials(row.embedding, row.head)
        if not path.exists():
            continue
        try:
            events = read_lines(path, TRIALS).records
            # A resumed search writes a trial again: the last word on each number counts.
            trials = {event["number"]: event for event in events if event.get("event") == "trial"}
            if len(trials) < row.trials:
                raise TRIALS.damaged(path, f"it has {len(trials)} of {row.trials} trials")
            found[row.key] = [trials[number] for number in sorted(trials)]
        except HeadError as error:
            log.warning("%s: its trials are left out: %s", row.key, error)
    return found


def _same_images(
    said: Mapping[str, HeadPredictions], which: Literal["test", "out_of_fold"], best: str, metric: Metric
) -> dict[str, Predictions]:
    """Return one part of the predictions of the rows with the best row's images in the same order.

    Probability metrics use a head's own probabilities out of fold, as the search does, and calibrated ones on the test images, as
    users get them. Rows without the predictions that the metric needs are left out.
    """
    reference, found = getattr(said.get(best), which, None), dict[str, Predictions]()
    for key, both in said.items():
        part = both.test if which == "test" else both.out_of_fold
        if part is None or reference is None or not np.array_equal(np.asarray(part.paths), np.asarray(reference.paths)):
            continue
        own = part.probabilities if which == "test" else part.scores
        if own is not None or not metric.needs_probabilities:
            found[key] = replace(part, y_true=reference.y_true, probabilities=own, units=reference.units)
    return found


def _trial_optimism(trials: Trials) -> tuple[float | None, int | None]:
    """Return the optimism of selecting the best trial, None for fewer than two, and the number of trials fitted on every fold.

    The estimate needs all scores on the same folds. More trials can only raise it, so it is a lower bound where some were
    stopped early.
    """
    complete = []
    for trial in trials:
        scores = trial["fold_scores"] if trial.get("status") == "ok" else None
        if scores and None not in scores:
            complete.append(scores)
    return trial_optimism(np.array(complete, dtype=np.float64)) if len(complete) > 1 else None, len(complete) or None


def _cost(row: LeaderboardRow) -> tuple[bool, float, int, str]:
    """Return the sort key of a row's cost, which no timing affects: a network or none, the head's complexity, the dimension."""
    return (not row.baseline, row.simplicity, row.dim or 0, row.key)


LARGEST_MARGIN = 0.05
"""5 points of a share, or 0.05 nats, which lower the true class's probability by 5 %."""

SHARE_OF_THE_ERROR = 0.5


def margin(metric: Metric, best: float, images: int) -> float:
    """Return the non-inferiority margin: how far a simpler row may be behind the best and still be recommended.

    Half of the best row's error (5 points at 99.5 % would be ten times its error), at least half an image and at most
    `LARGEST_MARGIN`; for a metric in the units of a number, `LARGEST_MARGIN` times the error.
    best : the best row's out-of-fold score, higher being better
    """
    if metric.in_units:
        return LARGEST_MARGIN * (metric.high - best)
    return min(LARGEST_MARGIN, SHARE_OF_THE_ERROR * max(metric.high - best, 1 / images))


def _choose(
    leaderboard: Leaderboard, differences: Sequence[Difference], held_out: Predictions
) -> tuple[LeaderboardRow, str]:
    """Choose the cheapest and simplest row that is shown to be as good as the best, and give the reason.

    A row of the no-evidence group replaces the best only if its whole interval lies within the margin: a test of
    non-inferiority (Schuirmann 1987), because with few images no difference shows, and absence of evidence is not evidence of
    absence (Altman and Bland 1995). The best row is chosen where no cheaper row passes, or where even a constant guess is in the
    no-evidence group.
    """
    best, metric = leaderboard.best, leaderboard.metric
    images = counted(len(held_out), held_out.units)
    group = {row.key: row for row in differences if row.no_evidence}
    alike = [row for row in leaderboard.rows if row.key in group]
    if len(alike) == 1:
        where = "" if len(differences) == len(leaderboard.rows) else " on the same images"
        return best, f"Use {best.key}; every other row{where} is worse by more than chance explains."
    if any(row.constant for row in alike):
        return best, (
            f"Use {best.key} for want of evidence: {images} do not show that any row is better than a constant guess."
        )
    allowed = margin(metric, best.cv_mean, len(held_out))
    cheapest = min(alike, key=_cost)
    candidates = [row for row in alike if row.key == best.key or group[row.key].interval[1] <= allowed]
    chosen = min(candidates, key=_cost)
    as_good = f"{len(alike)} rows are as good as {images} can show"
    if cheapest.key == best.key:
        return best, f"Use {best.key}; {as_good}, and it scores best and is the simplest and cheapest of them."
    written = f"{float(f'{abs(metric.scale) * allowed:.2g}'):g} {metric.unit}"
    behind = group[cheapest.key if chosen.key == best.key else chosen.key]
    gap, low, high = map(metric.gap_text, (behind.difference, *behind.interval))
    gap = f"({gap} {metric.unit} in favour of the best, 95 % interval {low} to {high})"
    if chosen.key == best.key:
        return best, (
            f"Use {best.key}; {as_good}. It scores best, and that the simplest and cheapest of them, {cheapest.key}, is at most "
            f"{written} worse is not shown {gap}."
        )
    return chosen, (
        f"Use {chosen.key}; {as_good}, and it is the simplest and cheapest of those shown to be at most {written} worse than "
        f"the best, {best.key} {gap}."
    )


UNEVEN = 1.5
"""Classes are imbalanced from this ratio of training images on, largest to smallest class."""


MOST_UNEVEN = 10
"""Ratio above which accuracy hardly depends on the smallest class."""


def advice(y: NDArray[Any], target: Target, scoring: str) -> list[str]:
    """Advise on settings where classes are very imbalanced and accuracy is tuned.

    y : labels of the training images; int64 of shape (n,) where accuracy is tuned
    """
    if scoring != "accuracy":
        return []
    counts = np.bincount(y, minlength=target.width).tolist()
    if unevenness(counts) <= MOST_UNEVEN:
        return []
    present = [(count, name) for count, name in zip(counts, target.classes, strict=True) if count > 0]
    (least, rare), (most, common) = min(present), max(present)
    return [
        f"Classes are uneven: {most:,} training images of {common}, {least:,} of {rare}, and accuracy hardly sees the small ones; where "
        "they matter, set tuning.scoring: balanced_accuracy (or macro_f1), and class_weight: balanced for the heads that take it."
    ]


@dataclass(frozen=True)
class Effect:
    """One way to treat imbalanced classes: its scores out of fold, and on the test images if known."""

    name: str
    out_of_fold: Scores | None
    test: Scores | None


def unevenness(counts: Sequence[int]) -> float:
    """Return the ratio of images between the largest and the smallest class."""
    present = [count for count in counts if count > 0]
    return max(present) / min(present) if present else 1.0


def effects(board: Leaderboard, found: HeadPredictions) -> tuple[Effect, ...]:
    """Return the best row's scores without and with each treatment of imbalance; empty for balanced classes or no probabilities."""
    part, row = found.out_of_fold, board.best
    if part is None or part.probabilities is None:
        return ()
    counts = np.bincount(part.y_true, minlength=len(part.classes))
    if unevenness(counts.tolist()) < UNEVEN:
        return ()
    even = np.where(counts > 0, 1 / np.count_nonzero(counts), 0.0)

    def evened(images: Predictions) -> Scores | None:
        if images.probabilities is None:
            return None
        guess = correct_priors(images.probabilities, counts / counts.sum(), even).argmax(axis=1)
        return scores(replace(images, y_pred=guess, probabilities=None))

    plain = [scores(replace(images, probabilities=None)) for images in (part, found.test)]
    made = [
        Effect("as it is", *plain),
        Effect("prior correction: every class taken as equally likely", evened(part), evened(found.test)),
    ]
    if row.reweighted is not None:
        heads = board.provenance.get("config", {}).get("heads") or []
        weighted = any(head.get("name") == row.head and head.get("class_weight") for head in heads)
        made.append(Effect(f"fitted {'without' if weighted else 'with'} class weights", row.reweighted, None))
    return tuple(made)
