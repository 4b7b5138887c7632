"""How much a winner's score owes to having been picked: two estimates from what a search leaves behind.

The best of many is better than it will be on new images, because luck was picked too. Out-of-fold answers give the
bootstrap of Tsamardinos, Greasidou and Borboudakis 2018 (BBC-CV); fold scores of trials alone give the estimate of
Tibshirani and Tibshirani 2009.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.intervals import Interval
from pipeline.evaluation.metric import ACCURACY, Metric, drawn, rescored
from pipeline.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Optimism:
    """The picked candidate's `apparent` score, the score `corrected` for the picking with its 95 % interval.

    In the metric it was picked by, higher being better.
    """

    candidates: int
    apparent: float
    corrected: float
    interval: Interval

    @property
    def bias(self) -> float:
        """Apparent minus corrected."""
        return self.apparent - self.corrected


def selection_optimism(
    columns: Sequence[Predictions], seed: int, resamples: int = 1000, metric: Metric = ACCURACY
) -> Optimism:
    """Estimate the optimism of taking the head with the highest score; answers out of fold, to the same images.

    Each bootstrap sample of the units picks its own best head and judges it on the images it did not draw.
    """
    weighted, scores = rescored(metric, columns), list[float]()
    for counts in drawn(int(columns[0].unit_numbers.max()) + 1, seed, metric.draws(resamples)):
        left_out = (counts == 0).astype(np.int64)
        picked = np.argmax(weighted(counts), axis=1)
        judged = weighted(left_out)[np.arange(len(counts)), picked]
        scores += judged[left_out.any(axis=1)].tolist()
    low, high = np.quantile(scores, [0.025, 0.975])
    apparent = max(metric.score(column) for column in columns)
    return Optimism(len(columns), apparent, float(np.mean(scores)), (float(low), float(high)))


def trial_optimism(fold_scores: NDArray[np.float64]) -> float:
    """Estimate by how much the best trial's mean score flatters it, from fold scores.

    The mean over folds of (the fold's own best score - the winner's score on that fold).

    fold_scores : float64 of shape (n_trials, n_folds)
    """
    scores = np.asarray(fold_scores, dtype=np.float64)
    winner = int(np.argmax(scores.mean(axis=1)))
    return float(np.mean(scores.max(axis=0) - scores[winner]))
