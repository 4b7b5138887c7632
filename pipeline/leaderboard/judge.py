"""The verdict on a leaderboard: who is no worse than the best, what to use, and how flattering the best score is.

Reads what stage two saved: `predictions.npz` beside each bundle and the trials' journals.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Artifacts
from pipeline.errors import BundleError
from pipeline.leaderboard.rows import CONSTANT_GUESS, LeaderboardRow, Verdict
from pipeline.leaderboard.table import Leaderboard
from pipeline.metrics import (
    Answers,
    Difference,
    Metric,
    Optimism,
    Predictions,
    PredictionSet,
    class_columns,
    compare,
    selection_optimism,
    trial_optimism,
)
from pipeline.metrics.scoring import row_log_losses

Trials = Sequence[Mapping[str, Any]]
"""The finished, stopped and failed trials of one search, as its journal holds them."""


def judge(leaderboard: Leaderboard, output: Path) -> Leaderboard:
    """Return the leaderboard with its verdict; without one where the best row left no out-of-fold predictions.

    Rows whose predictions are missing or of other images, or whose saved fit is bad, take no part in the comparison.
    """
    predictions = {
        key: value for key, value in read_predictions(leaderboard, output).items() if leaderboard.row(key).sound
    }
    trials = read_trials(leaderboard, output)
    verdict = _verdict(leaderboard, predictions, trials) if leaderboard.rows else None
    return replace(leaderboard, verdict=verdict)


def read_predictions(leaderboard: Leaderboard, output: Path) -> dict[str, Predictions]:
    """Return the predictions of every row that has them, by key."""
    found = {}
    for row in leaderboard.rows:
        try:
            if row.bundle is not None:
                found[row.key] = Predictions.read(output / row.bundle / "predictions.npz")
        except BundleError:
            continue
    return found


def read_trials(leaderboard: Leaderboard, output: Path) -> dict[str, Trials]:
    """Return the trials of every row whose journal is there, by key, in the order they were made."""
    found: dict[str, Trials] = {}
    for row in leaderboard.rows:
        path = Artifacts(output).trials(row.embedding, row.head)
        if path.is_file():
            events = [_event(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            # A resumed search writes a trial again: the last word on each number counts.
            trials = {event["number"]: event for event in events if event.get("event") == "trial"}
            found[row.key] = [trials[number] for number in sorted(trials)]
    return found


def _event(line: str) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}


def _verdict(
    leaderboard: Leaderboard, predictions: Mapping[str, Predictions], trials: Mapping[str, Trials]
) -> Verdict | None:
    best, metric = leaderboard.best, leaderboard.metric
    if best.key not in predictions:
        return None
    seed, classes = int(leaderboard.provenance.get("seed", 0)), predictions[best.key].classes
    held_out = _same_images(
        {key: value.out_of_fold for key, value in predictions.items()}, best.key, classes, metric, as_searched=True
    )
    if best.key not in held_out:
        return None
    folds = {row.key: row.cv_scores for row in leaderboard.rows}
    test = _same_images({key: value.test for key, value in predictions.items()}, best.key, classes, metric)
    ordered = {row.key: held_out[row.key] for row in leaderboard.rows if row.key in held_out}
    differences = compare(ordered, best.key, test, folds, seed, metric)
    recommended, reason = _recommend(leaderboard, differences, len(ordered[best.key].truth))
    optimism: Optimism | None = None
    if len(ordered) > 1:
        optimism = selection_optimism(tuple(ordered.values()), seed, metric=metric)
    return Verdict(differences, recommended.key, reason, optimism, *_trial_optimism(trials.get(best.key, ())))


def _same_images(
    sets: Mapping[str, PredictionSet | None],
    best: str,
    classes: Sequence[str],
    metric: Metric,
    as_searched: bool = False,
) -> dict[str, Answers]:
    """Return each row's answers, for the rows that saw the best row's images in the same order.

    A search that is scored by log loss judges a head's own probabilities (`as_searched`); users get calibrated ones, which
    the test images are compared by. A row without what the metric looks at takes no part.
    """
    reference = sets.get(best)
    if reference is None:
        return {}
    # A test image may have a label that no training image has.
    names = (*classes, *sorted(set(reference.y_true.tolist()) - set(classes)))
    truth = class_columns(reference.y_true, names).astype(np.int64)
    found = {}
    for key, part in sets.items():
        if part is None or not np.array_equal(part.paths, reference.paths):
            continue
        own = None
        if metric.needs_probabilities:
            own = part.log_probabilities if as_searched else _log_probabilities(part, classes)
            if own is None:
                continue
        found[key] = Answers(truth, class_columns(part.y_pred, names).astype(np.int64), own)
    return found


def _log_probabilities(part: PredictionSet, classes: Sequence[str]) -> np.ndarray | None:
    return None if part.probabilities is None else -row_log_losses(part.y_true, part.probabilities, classes)


def _trial_optimism(trials: Trials) -> tuple[float | None, int | None]:
    """Return the optimism of picking the best trial, and of how many: those that were fitted on every fold.

    The estimate needs the others' scores on the same folds. More trials can only raise it, so it is a lower bound where
    some were stopped early; of one trial alone there is none.
    """
    finished = [trial["fold_scores"] for trial in trials if trial.get("status") == "ok"]
    complete = [scores for scores in finished if scores and all(score is not None for score in scores)]
    if not complete:
        return None, None
    lonely = len(complete) == 1 and len(trials) > 1
    return None if lonely else trial_optimism(np.array(complete, dtype=np.float64)), len(complete)


def _cost(row: LeaderboardRow) -> tuple[float, int, float, float]:
    """What a user pays for a row: the embedding first (steps of 25 %, as times are noisy), then how simple the head is."""
    embedding = 0.0 if not row.embed_seconds else round(math.log(row.embed_seconds) / math.log(1.25))
    free = -math.inf if not row.embed_seconds and row.baseline else embedding
    return (free, row.simplicity, row.predict_seconds, row.fit_seconds)


MARGIN = 0.05
"""What a row of the no-evidence group may at most be behind the best to be recommended for being simpler: 5 points of a share, or
0.05 nats, by which the true class's probability falls by 5 %. With a few thousand images hardly a row of the group is
further away; with a few hundred most may be."""


def _recommend(leaderboard: Leaderboard, differences: Sequence[Difference], images: int) -> tuple[LeaderboardRow, str]:
    """Pick the cheapest and simplest row that is shown to be as good as the best, with the reason in one sentence.

    A row of the no-evidence group stands in for the best only if its whole interval lies within MARGIN: a test of
    non-inferiority (Schuirmann 1987), because few images show no difference of anything, and absence of evidence is not
    evidence of absence (Altman and Bland 1995). Where no cheaper row passes, the best score decides; so it does where even
    the guess that looks at no image may be as good.
    """
    best, metric = leaderboard.best, leaderboard.metric
    group = {row.key: row for row in differences if row.no_evidence}
    alike = [row for row in leaderboard.rows if row.key in group]
    if len(alike) == 1:
        others = (
            "Every other row" if len(differences) == len(leaderboard.rows) else "Every other row on the same images"
        )
        return best, f"{others} is worse by more than chance explains."
    if any(row.embedding == CONSTANT_GUESS for row in alike):
        return best, (
            f"{images:,} images do not show that any row is better than a constant guess: the row with the best score is named for "
            "want of evidence."
        )
    cheapest = min(alike, key=_cost)
    candidates = [row for row in alike if row.key == best.key or group[row.key].interval[1] <= MARGIN]
    chosen = min(candidates, key=_cost)
    if cheapest.key == best.key:
        others = "the one row" if len(alike) == 2 else f"any of the {len(alike) - 1} rows"
        return best, f"It scores best, and is simpler or cheaper than {others} that may be as good."
    margin = f"{abs(metric.scale) * MARGIN:g} {metric.unit}"
    behind = group[cheapest.key if chosen.key == best.key else chosen.key]
    low, high = (metric.gap_text(end) for end in behind.interval)
    gap = f"({metric.gap_text(behind.difference)} {metric.unit} in favour of the best, 95 % interval {low} to {high})"
    if chosen.key == best.key:
        return best, (
            f"{images:,} images cannot tell these {len(alike)} rows apart, nor show that the simplest and cheapest of them, {cheapest.key}, "
            f"is at most {margin} worse {gap}: the row with the best score is named for want of evidence."
        )
    near = "" if len(candidates) == len(alike) else f" and that are at most {margin} worse"
    return chosen, (
        f"Nothing shows it to be worse than {best.key} {gap}, "
        f"and it is the simplest and cheapest of the {len(candidates)} rows of which that is true{near}."
    )
