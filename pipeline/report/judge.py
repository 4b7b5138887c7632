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
from numpy.typing import NDArray

from pipeline.config import Artifacts
from pipeline.errors import BundleError
from pipeline.metrics import (
    Difference,
    Optimism,
    Predictions,
    PredictionSet,
    compare,
    selection_optimism,
    trial_optimism,
)
from pipeline.report.leaderboard import Leaderboard
from pipeline.report.rows import LeaderboardRow, Verdict

Trials = Sequence[Mapping[str, Any]]
"""The finished, stopped and failed trials of one search, as its journal holds them."""


def judge(leaderboard: Leaderboard, output: Path) -> Leaderboard:
    """Return the leaderboard with its verdict; without one where the best row left no out-of-fold predictions.

    Rows whose predictions are missing or of other images take no part in the comparison.
    """
    predictions = read_predictions(leaderboard, output)
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
    best = leaderboard.best
    seed = int(leaderboard.provenance.get("seed", 0))
    held_out = _same_images({key: value.out_of_fold for key, value in predictions.items()}, best.key)
    if best.key not in held_out:
        return None
    folds = {row.key: row.cv_scores for row in leaderboard.rows}
    test = _same_images({key: value.test for key, value in predictions.items()}, best.key)
    ordered = {row.key: held_out[row.key] for row in leaderboard.rows if row.key in held_out}
    differences = compare(ordered, best.key, test, folds, seed)
    recommended, reason = _recommend(leaderboard, differences)
    optimism: Optimism | None = None
    if len(ordered) > 1:
        optimism = selection_optimism(np.stack(list(ordered.values()), axis=1), seed)
    return Verdict(differences, recommended.key, reason, optimism, _trial_optimism(trials.get(best.key, ())))


def _same_images(sets: Mapping[str, PredictionSet | None], best: str) -> dict[str, NDArray[np.bool_]]:
    """Return which images each row labelled right, for the rows that saw the best row's images in the same order."""
    reference = sets.get(best)
    if reference is None:
        return {}
    return {
        key: part.correct
        for key, part in sets.items()
        if part is not None and np.array_equal(part.paths, reference.paths)
    }


def _trial_optimism(trials: Trials) -> float | None:
    finished = [trial["fold_scores"] for trial in trials if trial.get("status") == "ok"]
    complete = [scores for scores in finished if scores and all(score is not None for score in scores)]
    return trial_optimism(np.array(complete, dtype=np.float64)) if complete else None


def _cost(row: LeaderboardRow) -> tuple[float, int, float, float]:
    """What a user pays for a row: the embedding first (steps of 25 %, as times are noisy), then how simple the head is."""
    embedding = 0.0 if not row.embed_seconds else round(math.log(row.embed_seconds) / math.log(1.25))
    free = -math.inf if not row.embed_seconds and row.baseline else embedding
    return (free, row.simplicity, row.predict_seconds, row.fit_seconds)


def _recommend(leaderboard: Leaderboard, differences: Sequence[Difference]) -> tuple[LeaderboardRow, str]:
    """Pick the cheapest and simplest row of the no-evidence group, with the reason in one sentence."""
    group = {row.key: row for row in differences if row.no_evidence}
    candidates = [row for row in leaderboard.rows if row.key in group]
    chosen = min(candidates, key=_cost)
    best = leaderboard.best
    if len(candidates) == 1:
        others = (
            "Every other row" if len(differences) == len(leaderboard.rows) else "Every other row on the same images"
        )
        return best, f"{others} is worse by more than chance explains."
    if chosen.key == best.key:
        others = "the one row" if len(candidates) == 2 else f"any of the {len(candidates) - 1} rows"
        return best, f"It scores best, and is simpler or cheaper than {others} that may be as good."
    behind = group[chosen.key]
    low, high = (100 * end for end in behind.interval)
    return chosen, (
        f"Nothing shows it to be worse than {best.key} ({100 * behind.difference:+.1f} points in favour of the best, "
        f"95 % interval {low:+.1f} to {high:+.1f}), and it is the simplest and cheapest of the {len(candidates)} rows of which that is true."
    )
