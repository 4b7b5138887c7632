"""How much a winner's score owes to having been picked: two estimates from what a search leaves behind.

The best of many is better than it will be on new images, because luck was picked too. Out-of-fold correctness gives the
bootstrap of Tsamardinos, Greasidou and Borboudakis 2018 (BBC-CV); fold scores of trials alone give the estimate of
Tibshirani and Tibshirani 2009.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.intervals import Interval


@dataclass(frozen=True)
class Optimism:
    """The picked candidate's `apparent` score, the score `corrected` for the picking with its 95 % interval."""

    candidates: int
    apparent: float
    corrected: float
    interval: Interval

    @property
    def bias(self) -> float:
        """Apparent minus corrected."""
        return self.apparent - self.corrected


def selection_optimism(correct: NDArray[np.bool_], seed: int, resamples: int = 1000) -> Optimism:
    """Estimate the optimism of taking the column with the highest mean.

    correct : ndarray of shape (n, n_candidates): which rows each candidate labelled right, out of fold. Each bootstrap
    sample picks its own best column and judges it on the rows it did not draw.
    """
    values = np.asarray(correct, dtype=np.float64)
    n, k = values.shape
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(resamples):
        counts = np.bincount(rng.integers(0, n, n), minlength=n)
        left_out = counts == 0
        if left_out.any():
            scores.append(float(values[left_out, int(np.argmax(counts @ values))].mean()))
    low, high = np.quantile(scores, [0.025, 0.975])
    return Optimism(k, float(values.mean(axis=0).max()), float(np.mean(scores)), (float(low), float(high)))


def trial_optimism(fold_scores: NDArray[np.float64]) -> float:
    """Estimate by how much the best trial's mean score flatters it, from fold scores of shape (n_trials, n_folds).

    The mean over folds of (the fold's own best score - the winner's score on that fold).
    """
    scores = np.asarray(fold_scores, dtype=np.float64)
    winner = int(np.argmax(scores.mean(axis=1)))
    return float(np.mean(scores.max(axis=0) - scores[winner]))
