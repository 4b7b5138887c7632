"""Racing: stop parameters that can no longer win by more than noise, and give the next fits to those worth their price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

STAGE = 2
"""Folds fitted between two looks. A fixed number, so that results do not depend on how many run in parallel."""

CONFIDENCE = 2.0
"""Standard errors a candidate must lie behind the leader, on the same folds, to be stopped."""


def stages(n_folds: int, size: int = STAGE) -> list[list[int]]:
    """Return the folds in the groups of a size between which candidates may be stopped."""
    return [list(range(start, min(start + size, n_folds))) for start in range(0, n_folds, size)]


def behind(candidate: NDArray[np.float64], leader: NDArray[np.float64], held_out_rows: float, bounded: bool) -> bool:
    """Whether a candidate is too far behind the leader after the same k folds to be worth the rest.

    The differences of the pairs have a standard error from their own spread, but never less than two heads that agree
    on half of their errors would show: sqrt(p (1 - p) / rows) per fold. Unbounded scores (log loss) have no such floor,
    so there the leader's own spread over the folds serves.

    candidate, leader : ndarray of shape (k,), k >= 2
    held_out_rows : mean number of rows a fold holds out
    """
    difference = candidate - leader
    error = max(float(difference.std(ddof=1)), _floor(leader, held_out_rows, bounded)) / np.sqrt(len(difference))
    return bool(difference.mean() + CONFIDENCE * error < 0)


def better_half(scores: NDArray[np.float64], alive: Sequence[int]) -> list[int]:
    """Return the living candidates with the better half of the means, at least two.

    scores : ndarray of shape (n_candidates, k): the fold scores so far
    alive : rows of `scores`; of equal means the earlier stays
    """
    best = sorted(alive, key=lambda place: (-float(scores[place].mean()), place))
    return sorted(best[: max(2, (len(best) + 1) // 2)])


def worth(
    estimates: NDArray[np.float64],
    costs: NDArray[np.float64],
    leader: NDArray[np.float64],
    held_out_rows: float,
    bounded: bool,
) -> NDArray[np.float64]:
    """Return the logarithm of each candidate's expected improvement over the best estimate, per unit of cost.

    The expected improvement of Jones, Schonlau and Welch 1998 divided by its price as in Snoek, Larochelle and Adams
    2012. Of candidates that noise does not tell apart the cheaper come first; one that is clearly behind comes last,
    whatever it costs. The noise is that of `behind` over all folds.

    estimates, costs : ndarray of shape (n,)
    leader : ndarray of shape (k,): the fold scores of the best
    """
    error = max(_floor(leader, held_out_rows, bounded) / np.sqrt(len(leader)), 1e-12)
    z = (estimates - estimates.max()) / error
    # phi(z) + z Phi(z) underflows far below zero, where it is phi(z) / z^2 (Abramowitz and Stegun 26.2.12).
    near = np.maximum(z, -20.0)
    gain = np.log(norm.pdf(near) + near * norm.cdf(near))
    far = norm.logpdf(np.minimum(z, -20.0)) - 2 * np.log(np.maximum(-z, 20.0))
    return np.asarray(np.where(z >= -20.0, gain, far) - np.log(costs))


def _floor(leader: NDArray[np.float64], held_out_rows: float, bounded: bool) -> float:
    share = float(np.clip(leader.mean(), 0.02, 0.98))
    return float(np.sqrt(share * (1 - share) / held_out_rows) if bounded else leader.std(ddof=1))
