"""What uneven classes do to a head, and what prior correction and class weights would change, out of fold and on the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation import Predictions, PredictionSet, Scores, class_columns, correct_priors, scores
from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import Leaderboard

UNEVEN = 1.5
"""Classes count as uneven when the largest has this many times the training images of the smallest."""


MOST_UNEVEN = 10
"""Beyond it accuracy hardly sees the smallest class."""


def advice(counts: Sequence[int], classes: Sequence[str], scoring: str) -> list[str]:
    """Return what to set where classes are very uneven and accuracy is tuned; counts : training images of each class."""
    if scoring != "accuracy" or unevenness(counts) <= MOST_UNEVEN:
        return []
    present = [(count, name) for count, name in zip(counts, classes, strict=True) if count > 0]
    (least, rare), (most, common) = min(present), max(present)
    return [
        f"Classes are uneven: {most:,} training images of {common}, {least:,} of {rare}, and accuracy hardly sees the small ones; where "
        "they matter, set tuning.scoring: balanced_accuracy (or macro_f1), and class_weight: balanced for the heads that take it."
    ]


@dataclass(frozen=True)
class Effect:
    """One way to treat uneven classes: scores out of fold, and on the test images where they are known."""

    name: str
    out_of_fold: Scores
    test: Scores | None


def unevenness(counts: Sequence[int]) -> float:
    """Return how many times the images of the smallest class the largest has."""
    present = [count for count in counts if count > 0]
    return max(present) / min(present) if present else 1.0


def effects(board: Leaderboard, found: Predictions) -> tuple[Effect, ...]:
    """Return the best row as it is and as it would be; empty where classes are even or probabilities are missing."""
    part, row = found.out_of_fold, board.best
    if part is None or part.probabilities is None:
        return ()
    counts = np.bincount(class_columns(part.y_true, found.classes), minlength=len(found.classes))
    if unevenness(counts.tolist()) < UNEVEN:
        return ()
    shares = counts / counts.sum()
    made = [Effect("as it is", _scores(part, part.y_pred, found), _scores(found.test, found.test.y_pred, found))]
    corrected = [_corrected(images, shares, found) for images in (part, found.test)]
    if corrected[0] is not None:
        made.append(Effect("prior correction: every class taken as equally likely", corrected[0], corrected[1]))
    if row.reweighted is not None:
        name = "without class weights" if _is_weighted(board, row) else "with class weights"
        made.append(Effect(f"fitted {name}", row.reweighted, None))
    return tuple(made)


def _scores(images: PredictionSet, guess: np.ndarray, found: Predictions) -> Scores:
    return scores(images.y_true, guess, None, found.classes, units=images.units)


def _corrected(images: PredictionSet, shares: np.ndarray, found: Predictions) -> Scores | None:
    if images.probabilities is None:
        return None
    even = np.where(shares > 0, 1 / np.count_nonzero(shares), 0.0)
    place = correct_priors(images.probabilities, shares, even).argmax(axis=1)
    return _scores(images, np.asarray(found.classes)[place], found)


def _is_weighted(board: Leaderboard, row: LeaderboardRow) -> bool:
    heads = board.provenance.get("config", {}).get("heads", [])
    return any(head.get("name") == row.head and head.get("class_weight") for head in heads)
