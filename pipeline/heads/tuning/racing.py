"""Racing: stop parameters that can no longer win by more than noise, and give the next fits to those worth their price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from pipeline.heads.tuning.fold_fits import FoldFits
from pipeline.heads.tuning.records import Candidate, Trial

STAGE = 2
"""Folds fitted between two looks. A fixed number, so that results do not depend on how many run in parallel."""

CONFIDENCE = 2.0
"""Standard errors a candidate must lie behind the leader, on the same folds, to be stopped."""


Leader = tuple[NDArray[np.float64], float]
"""The fold scores of the best so far, and its score."""


def race(fits: FoldFits, candidates: Sequence[Candidate], rung: int, trials: Sequence[Trial]) -> list[Trial]:
    """Fit candidates fold by fold, stopping those that can no longer win, and when time is up all but one.

    rung : 1 where the candidates came through the screening on rung 0
    trials : the earlier ones; on rung 0 they are raced against too, on rung 1 all that are judged alike run here
    Returns the trials of those that were fitted on a fold at least.
    """
    n_folds = len(fits.problem.folds)
    earlier = [trial for trial in trials if rung == 0 and None not in trial.fold_scores and trial.estimate is not None]
    # What came through a screening is too close for a margin: the better half goes on from fold to fold.
    halves = rung > 0
    any_finished = any(trial.mean is not None for trial in trials)
    alive = list(candidates)
    for stage in stages(n_folds, 1 if halves or fits.tuning.seconds is not None else STAGE):
        # Until a trial has finished, the best so far is fitted whatever the clock says.
        fits.fit(alive, stage, rung, None if any_finished else _best(alive, stage[0]))
        done = stage[-1] + 1
        alive = [one for one in alive if all(outcome.error is None for outcome in one.outcomes.values())]
        in_time = [one for one in alive if len(one.outcomes) == done]
        if done < n_folds and not fits.time_left():
            last = None if any_finished else _best(in_time, done)
            in_time = [] if last is None else [last]
        for one in alive:
            if one not in in_time:
                one.reason = f"time was up after {len(one.outcomes)} of {n_folds} folds"
        alive = in_time if done == n_folds else _still_racing(fits, in_time, earlier, done, halves)
    wholes = {one.number: fits.score(one, rung) for one in alive}
    leader = _leader(
        [
            *((one.scores(n_folds), wholes[one.number]) for one in alive),
            *((trial.scores, trial.estimate) for trial in earlier),
        ]
    )
    cheap = rung == 0 and fits.evaluator.screening is not None
    return [_trial(one, n_folds, wholes.get(one.number), leader, cheap) for one in candidates if one.outcomes]


def _best(candidates: Sequence[Candidate], done: int) -> Candidate | None:
    return max(candidates, key=lambda one: (float(one.scores(done).mean()) if done else 0.0, -one.number), default=None)


def _leader(judged: Iterable[tuple[NDArray[np.float64], float | None]]) -> Leader | None:
    """Return the best of fold scores and the scores of all held-out answers, in place of which the folds' mean may stand."""
    pairs = [(row, float(row.mean()) if whole is None else whole) for row, whole in judged if not np.isnan(row).any()]
    return max(pairs, key=lambda pair: pair[1], default=None)


def _still_racing(
    fits: FoldFits, alive: list[Candidate], earlier: Sequence[Trial], done: int, halves: bool
) -> list[Candidate]:
    """Return who can still win after so many folds, and tell the others why they cannot."""
    rows = [one.scores(done) for one in alive]
    found = _leader([*((row, None) for row in rows), *((trial.scores[:done], None) for trial in earlier)])
    if found is None:
        return alive
    left = better_half(np.array(rows), range(len(alive))) if halves else range(len(alive))
    kept = []
    for place, (one, own) in enumerate(zip(alive, rows, strict=True)):
        if place in left and not (done > 1 and behind(own, found[0], fits.held_out_rows, fits.metric.bounded)):
            kept.append(one)
        else:
            one.reason = (
                f"{float(np.mean(found[0] - own)):.4f} behind the best after {done} of {len(fits.problem.folds)} folds"
            )
    return kept


def _trial(one: Candidate, n_folds: int, whole: float | None, leader: Leader | None, cheap: bool) -> Trial:
    """Return what became of a candidate; whole : the score of all its held-out answers, None where some folds are missing."""
    outcomes = one.fitted
    scores = tuple(
        None if fold not in one.outcomes or np.isnan(one.outcomes[fold].score) else one.outcomes[fold].score
        for fold in range(n_folds)
    )
    error = next((outcome.error for outcome in outcomes if outcome.error is not None), None)
    status: Literal["ok", "stopped", "failed"] = "ok"
    mean, estimate, reason = whole, whole, None
    if error is not None:
        status, mean, estimate = "failed", None, None
    elif one.reason is not None:
        status, reason = "stopped", one.reason
        if leader is not None:
            # On the same folds the difference to the leader is less noisy than the score itself.
            gaps = [own - best for own, best in zip(scores, leader[0], strict=True) if own is not None]
            estimate = float(leader[1] + np.mean(gaps))
    elif cheap:
        status, mean, reason = "stopped", None, "screened only"
    return Trial(
        number=one.number,
        params=dict(one.params),
        status=status,
        fold_scores=scores,
        mean=mean,
        estimate=estimate,
        fit_seconds=sum(outcome.fit_seconds for outcome in outcomes),
        score_seconds=sum(outcome.score_seconds for outcome in outcomes),
        warnings=dict(sum((Counter(outcome.warnings) for outcome in outcomes), Counter())),
        error=error,
        reason=reason,
    )


def stages(n_folds: int, size: int = STAGE) -> list[list[int]]:
    """Return the folds in the groups of a size between which candidates may be stopped."""
    return [list(range(start, min(start + size, n_folds))) for start in range(0, n_folds, size)]


def behind(candidate: NDArray[np.float64], leader: NDArray[np.float64], held_out_rows: float, bounded: bool) -> bool:
    """Whether a candidate is too far behind the leader after the same k folds to be worth the rest.

    The differences of the pairs have a standard error from their own spread, but never less than two heads that agree
    on half of their errors would show: sqrt(p (1 - p) / rows) per fold. Unbounded scores (log loss) have no such floor,
    so there the leader's own spread over the folds serves.

    candidate, leader : ndarray of shape (k,), float64, k >= 2
    held_out_rows : mean number of rows a fold holds out
    """
    difference = candidate - leader
    error = max(float(difference.std(ddof=1)), _floor(leader, held_out_rows, bounded)) / np.sqrt(len(difference))
    return bool(difference.mean() + CONFIDENCE * error < 0)


def better_half(scores: NDArray[np.float64], alive: Sequence[int]) -> list[int]:
    """Return the living candidates with the better half of the means, at least two.

    scores : ndarray of shape (n_candidates, k), float64: the fold scores so far
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

    estimates, costs : ndarray of shape (n,), float64; so is what is returned
    leader : ndarray of shape (k,), float64: the fold scores of the best
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
