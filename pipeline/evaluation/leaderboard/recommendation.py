"""The recommendation on a leaderboard: who is no worse than the best, what to use, how flattering the best score is, what uneven classes do.

Reads what stage two saved: `predictions.npz` beside each bundle and the trials' journals.
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
"""The finished, stopped and failed trials of one search, as its journal holds them."""


def recommend(leaderboard: Leaderboard, output: Path) -> Leaderboard:
    """Return the leaderboard with its recommendation; without one where the best row left no out-of-fold predictions.

    Rows whose predictions are missing or of other images, or whose saved fit is bad, take no part in the comparison.
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
    """Return the trials of every row whose journal is there, by key, in the order they were made."""
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
    """Return one part of the predictions of the rows that saw the best row's images in the same order.

    A search that is scored by probabilities judges a head's own, out of fold; users get calibrated ones, which the test
    images are compared by. A row without what the metric looks at takes no part.
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
    """Return the optimism of picking the best trial, and of how many: those that were fitted on every fold.

    The estimate needs the others' scores on the same folds. More trials can only raise it, so it is a lower bound where
    some were stopped early; of one trial alone there is none.
    """
    complete = []
    for trial in trials:
        scores = trial["fold_scores"] if trial.get("status") == "ok" else None
        if scores and None not in scores:
            complete.append(scores)
    return trial_optimism(np.array(complete, dtype=np.float64)) if len(complete) > 1 else None, len(complete) or None


def _cost(row: LeaderboardRow) -> tuple[bool, float, int, str]:
    """What a user pays for a row, in what no busy machine changes: a network or none, how simple the head is, how many numbers."""
    return (not row.baseline, row.simplicity, row.dim or 0, row.key)


LARGEST_MARGIN = 0.05
"""5 points of a share, or 0.05 nats, by which the true class's probability falls by 5 %."""

SHARE_OF_THE_ERROR = 0.5


def margin(metric: Metric, best: float, images: int) -> float:
    """Return what a row of the no-evidence group may at most be behind the best to be recommended for being simpler.

    Half of the best row's error, as 5 points at 99.5 % are ten times the errors, and never more than `LARGEST_MARGIN`. An error
    that no image shows counts as one image. Of an error in the units of a number it is that share of the error.
    best : its score out of fold, higher being better
    """
    if metric.in_units:
        return LARGEST_MARGIN * (metric.high - best)
    return min(LARGEST_MARGIN, SHARE_OF_THE_ERROR * max(metric.high - best, 1 / images))


def _choose(
    leaderboard: Leaderboard, differences: Sequence[Difference], held_out: Predictions
) -> tuple[LeaderboardRow, str]:
    """Pick the cheapest and simplest row that is shown to be as good as the best, and say what to use and why.

    A row of the no-evidence group stands in for the best only if its whole interval lies within the margin: a test of
    non-inferiority (Schuirmann 1987), because few images show no difference of anything, and absence of evidence is not
    evidence of absence (Altman and Bland 1995). Where no cheaper row passes, the best score decides; so it does where even
    the guess that looks at no image may be as good.
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
"""Classes count as uneven when the largest has this many times the training images of the smallest."""


MOST_UNEVEN = 10
"""Beyond it accuracy hardly sees the smallest class."""


def advice(y: NDArray[Any], target: Target, scoring: str) -> list[str]:
    """Return what to set where classes are very uneven and accuracy is tuned.

    y : of the training images; int64 of shape (n,) where accuracy is tuned
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
    """One way to treat uneven classes: scores out of fold, and on the test images where they are known."""

    name: str
    out_of_fold: Scores | None
    test: Scores | None


def unevenness(counts: Sequence[int]) -> float:
    """Return how many times the images of the smallest class the largest has."""
    present = [count for count in counts if count > 0]
    return max(present) / min(present) if present else 1.0


def effects(board: Leaderboard, found: HeadPredictions) -> tuple[Effect, ...]:
    """Return the best row as it is and as it would be; empty where classes are even or probabilities are missing."""
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
