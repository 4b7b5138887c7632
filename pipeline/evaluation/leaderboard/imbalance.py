"""What uneven classes do to a head, and what prior correction and class weights would change, out of fold and on the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.targets import Target
from pipeline.evaluation import HeadPredictions, Predictions, Scores, scores
from pipeline.evaluation.calibration import correct_priors
from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import Leaderboard

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
        return _scores(images, correct_priors(images.probabilities, counts / counts.sum(), even).argmax(axis=1))

    made = [
        Effect("as it is", _scores(part, part.y_pred), _scores(found.test, found.test.y_pred)),
        Effect("prior correction: every class taken as equally likely", evened(part), evened(found.test)),
    ]
    if row.reweighted is not None:
        name = "without class weights" if _is_weighted(board, row) else "with class weights"
        made.append(Effect(f"fitted {name}", row.reweighted, None))
    return tuple(made)


def _scores(images: Predictions, guess: NDArray[np.int64]) -> Scores:
    return scores(replace(images, y_pred=guess, probabilities=None))


def _is_weighted(board: Leaderboard, row: LeaderboardRow) -> bool:
    heads = board.provenance.get("config", {}).get("heads") or []
    return any(head.get("name") == row.head and head.get("class_weight") for head in heads)
