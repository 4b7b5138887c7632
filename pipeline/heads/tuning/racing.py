"""Racing: candidates are fitted fold by fold, and those that can no longer win are stopped early.

Every fit is journalled before it is used. Fits run in parallel within the memory limit, in threads here or on an engine's workers.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from threadpoolctl import threadpool_limits

from pipeline.config import TuningConfig
from pipeline.evaluation import METRICS
from pipeline.heads.head import Params
from pipeline.heads.tuning.evaluation import (
    GENERIC,
    FoldOutcome,
    FoldWork,
    Problem,
    answers,
    counting_warnings,
    evaluator_for,
)
from pipeline.heads.tuning.journal import Journal, fit_event, key, replay
from pipeline.heads.tuning.room import is_spread, room_for, spread
from pipeline.io.process import look_in

log = logging.getLogger(__name__)

STAGE = 2
"""Folds fitted between two comparisons; fixed, so that results do not depend on the number of parallel fits."""

CONFIDENCE = 2.0
"""A candidate is stopped if it is more than this many standard errors behind the leader on the same folds."""


@dataclass(eq=False)
class Candidate:
    """A set of parameters in a race: its outcomes on the first folds, and the reason if it was stopped."""

    number: int
    params: Params
    outcomes: list[FoldOutcome] = field(default_factory=list)
    reason: str | None = None

    @property
    def scores(self) -> NDArray[np.float64]:
        """The scores on the folds so far, float64 of shape (k,); NaN where a fit failed."""
        return np.array([outcome.score for outcome in self.outcomes])

    @property
    def error(self) -> str | None:
        """The error of the first failed fit, or None."""
        return next((outcome.error for outcome in self.outcomes if outcome.error), None)


@dataclass(frozen=True)
class Trial:
    """One set of parameters and its scores; higher is better.

    `fold_scores` has None for a fold that was not fitted. `mean` is None unless the trial is finished. `estimate` is the score
    that the search uses: the mean, or for a stopped trial the one expected from its first folds or cheap fits. `reason` is why
    it was stopped.
    """

    number: int
    params: Params
    status: Literal["ok", "stopped", "failed"]
    fold_scores: tuple[float | None, ...]
    mean: float | None
    estimate: float | None
    fit_seconds: float
    score_seconds: float
    warnings: dict[str, int]
    error: str | None = None
    reason: str | None = None

    @property
    def scores(self) -> NDArray[np.float64]:
        """The fold scores, float64 of shape (n_folds,), with NaN for a fold that was not fitted."""
        return np.array(self.fold_scores, dtype=np.float64)


# Fits on folds --------------------------------------------------------------------------------------------------------


class FoldFits:
    """The fits of one search: the work that candidates share, the recorded fits of the journal, and the clock."""

    def __init__(self, problem: Problem, tuning: TuningConfig, journal: Journal) -> None:
        evaluator, self.metric = evaluator_for(problem), METRICS[tuning.scoring]
        needed = evaluator.work_bytes(problem) if evaluator.work_bytes else 0
        room = room_for(problem, tuning, needed)
        if room.work_bytes is not None and room.work_bytes < needed:
            log.info(
                "head %s: tuning.memory leaves no room for the %.0f MB that trials share on a fold; each is fitted separately",
                problem.head.name,
                needed / 1e6,
            )
            evaluator = GENERIC
        self.problem, self.evaluator = changed(problem, work_bytes=room.work_bytes), evaluator
        self.jobs, self._shared_bytes = room.jobs, room.shared_bytes
        self._work = FoldWork(self.problem, evaluator, self.metric, room.shared_bytes)
        self.replayed = self.done = 0
        self.tuning, self.journal = tuning, journal
        self.held_out_rows = float(np.mean([len(held_out) for _, held_out in problem.folds]))
        self.tell: Callable[[], None] = lambda: None
        """Called after finished fits have been counted in `done`."""
        self._judged, self._known, before = dict[str, float | None](), dict[str, Mapping[str, Any]](), 0.0
        for event in journal.events:
            before = max(before, float(event["elapsed"]))
            if event["event"] == "trial":
                self._judged[key(event["rung"], event["params"])] = event["estimate"]
        for event in journal.events:
            # The journal has no predictions, so a candidate killed before its overall score is fitted again if that needs them.
            whole = self.metric.mean_of_images or key(event["rung"], event["params"]) in self._judged
            if event["event"] == "fit" and whole:
                self._known[key(event["rung"], event["params"], event["fold"])] = event
        self._start = time.perf_counter() - before

    def elapsed(self) -> float:
        """Return the seconds of this search, including earlier runs."""
        return time.perf_counter() - self._start

    def fit(self, candidates: Sequence[Candidate], folds: Sequence[int], rung: int) -> None:
        """Fit candidates on the next folds in parallel; all fits are in the journal when this returns.

        On rung 0, heads with a screening get its cheap fits.
        """
        groups = [candidates] if self.evaluator.together else [[one] for one in candidates]
        screening = None if rung else self.evaluator.screening
        plan, tasks = [], []
        for fold, group in itertools.product(folds, groups):
            known = [self._known.get(key(rung, one.params, fold)) for one in group]
            plan.append((fold, group, known))
            if not all(known):
                points = [one.params for one in group]
                if screening is not None:
                    points = [{**point, **screening.cheaper(self.problem, point)} for point in points]
                # With a screening, training rows are scored at once: refitting the best later only for them would be expensive.
                tasks.append((fold, points, self.evaluator.screening is not None))
        made = self._made(tasks)
        for fold, group, known in plan:
            if all(known):
                outcomes = [replay(event or {}) for event in known]
                self.replayed += len(group)
            else:
                outcomes, elapsed, events = next(made), self.elapsed(), []
                for one, outcome in zip(group, outcomes, strict=True):
                    events.append(fit_event(one.number, one.params, fold, outcome, rung, elapsed))
                self.journal.append(events)
                self.done += len(group)
                self.tell()
            for one, outcome in zip(group, outcomes, strict=True):
                one.outcomes.append(outcome)

    def on_every_fold(self, params: Params) -> list[FoldOutcome]:
        """Fit one candidate on every fold and score it on the training rows too.

        The journal is not used, as it has no predictions.
        """
        return [made[0] for made in self._made([(fold, [params], True) for fold in range(len(self.problem.folds))])]

    def _made(self, tasks: Sequence[tuple[int, list[Params], bool]]) -> Iterator[list[FoldOutcome]]:
        """Call `FoldWork.fit` with the arguments of each task, in parallel, and yield the outcomes in the order of the tasks.

        Tasks run on an engine's workers if the features are a memory-mapped file, except for candidates solved together: for
        these, sharing one decomposition saves more than further cores.
        """
        problem = self.problem
        if not tasks:
            return
        if self.evaluator.together or problem.projections or not (isinstance(problem.X, np.memmap) and is_spread()):
            run = joblib.Parallel(n_jobs=self.jobs, backend="threading", return_as="generator")
            yield from run(joblib.delayed(self._work.fit)(*task) for task in tasks)
        else:
            import cloudpickle  # a dependency of all engines

            bare = changed(problem, X=np.empty((0, problem.X.shape[1]), np.float32))
            packed = cloudpickle.dumps(
                (bare, str(problem.X.filename), self.evaluator, self.metric.name, self._shared_bytes)
            )
            yield from spread(_fit_there, [(os.getcwd(), packed, *task) for task in tasks])

    def score(self, one: Candidate, rung: int) -> float:
        """Return the score of all held-out predictions together, for a candidate that was fitted on every fold.

        For a metric that is a mean over images, this is the mean of the folds' scores, weighted by their images. A mean over
        classes is not a mean over folds: a fold without a rare class would count as if it had no errors there.
        """
        held_out = [rows for _, rows in self.problem.folds]
        if self.metric.mean_of_images:
            return float(np.average(one.scores, weights=list(map(len, held_out))))
        known = self._judged.get(key(rung, one.params))
        if known is not None:
            return float(known)
        return self.metric.score(answers(self.problem, self.metric, held_out, one.outcomes))


@lru_cache(2)
def _unpacked(working: str, packed: bytes) -> FoldWork:
    """Unpack a search in a worker, where its fits share work; the last two searches are cached."""
    look_in(Path(working))  # a user's head may be a module there
    bare, features, evaluator, scoring, shared_bytes = pickle.loads(packed)
    return FoldWork(changed(bare, X=np.load(features, mmap_mode="r")), evaluator, METRICS[scoring], shared_bytes)


def _fit_there(working: str, packed: bytes, fold: int, points: list[Params], judge: bool) -> list[FoldOutcome]:
    with counting_warnings(), threadpool_limits(limits=1, user_api="blas"):
        return _unpacked(working, packed).fit(fold, points, judge)


# The race -------------------------------------------------------------------------------------------------------------


def race(fits: FoldFits, candidates: Sequence[Candidate], rung: int, trials: Sequence[Trial]) -> list[Trial]:
    """Fit candidates fold by fold, stop those that can no longer win, and return the trial of each.

    rung : 0, or 1 for the full fits after a screening
    trials : earlier trials; on rung 0 candidates compete with them too, on rung 1 only with each other
    """
    n_folds, alive = len(fits.problem.folds), list(candidates)
    earlier = [trial for trial in trials if rung == 0 and None not in trial.fold_scores and trial.estimate is not None]
    # After a screening, candidates are too close for a test: after each fold the better half continues.
    size = 1 if rung else STAGE
    for start in range(0, n_folds, size):
        fits.fit(alive, range(start, min(start + size, n_folds)), rung)
        alive = [one for one in alive if one.error is None]
        if alive and start + size < n_folds:
            alive = _still_racing(fits, alive, earlier, halves=rung > 0)
    wholes = {one.number: fits.score(one, rung) for one in alive}
    judged = [(one.scores, wholes[one.number]) for one in alive]
    judged += [(trial.scores, trial.estimate or 0.0) for trial in earlier]
    leader = max(judged, key=lambda pair: pair[1], default=None)
    cheap = rung == 0 and fits.evaluator.screening is not None
    return [_trial(one, n_folds, wholes.get(one.number), leader, cheap) for one in candidates]


def _still_racing(
    fits: FoldFits, alive: Sequence[Candidate], earlier: Sequence[Trial], halves: bool
) -> list[Candidate]:
    """Return the candidates that can still win after some folds, and set the `reason` of the others."""
    rows, done, kept = np.array([one.scores for one in alive]), len(alive[0].outcomes), []
    best = max([*rows, *(trial.scores[:done] for trial in earlier)], key=np.mean)
    left = better_half(rows) if halves else range(len(alive))
    for place, one in enumerate(alive):
        own = rows[place]
        if place in left and not (done > 1 and behind(own, best, fits.held_out_rows, fits.metric.bounded)):
            kept.append(one)
        else:
            gap = float(np.mean(best - own))
            one.reason = f"{gap:.4f} behind the best after {done} of {len(fits.problem.folds)} folds"
    return kept


def _trial(
    one: Candidate, n_folds: int, whole: float | None, leader: tuple[NDArray[np.float64], float] | None, cheap: bool
) -> Trial:
    """Return the trial of a candidate.

    whole : the score of all its held-out predictions, None if some folds are missing
    leader : the fold scores and the score of the best so far
    """
    status: Literal["ok", "stopped", "failed"] = "ok"
    mean, estimate, reason = whole, whole, None
    if one.error is not None:
        status, mean, estimate = "failed", None, None
    elif one.reason is not None:
        status, reason = "stopped", one.reason
        if leader is not None:
            # On the same folds, the difference from the leader is less noisy than the score itself.
            estimate = float(leader[1] + np.mean(one.scores - leader[0][: len(one.outcomes)]))
    elif cheap:
        status, mean, reason = "stopped", None, "screened only"
    fit_seconds, score_seconds, warnings = 0.0, 0.0, Counter[str]()
    scores: list[float | None] = [None] * n_folds
    for fold, outcome in enumerate(one.outcomes):
        scores[fold] = None if np.isnan(outcome.score) else outcome.score
        fit_seconds, score_seconds = fit_seconds + outcome.fit_seconds, score_seconds + outcome.score_seconds
        warnings.update(outcome.warnings)
    error, counts = one.error, dict(warnings)
    times = (fit_seconds, score_seconds)
    return Trial(one.number, dict(one.params), status, tuple(scores), mean, estimate, *times, counts, error, reason)


def behind(candidate: NDArray[np.float64], leader: NDArray[np.float64], held_out_rows: float, bounded: bool) -> bool:
    """Whether a candidate is too far behind the leader after the same k folds to be fitted on the rest.

    The standard error of the paired differences is estimated from their spread, but is at least that of two heads that share
    half of their errors: sqrt(p (1 - p) / rows) per fold. For unbounded scores (log loss), the floor is the leader's standard
    deviation over the folds.

    candidate, leader : ndarray of shape (k,), float64, k >= 2
    held_out_rows : mean number of held-out rows per fold
    """
    difference = candidate - leader
    error = max(float(difference.std(ddof=1)), _floor(leader, held_out_rows, bounded)) / np.sqrt(len(difference))
    return bool(difference.mean() + CONFIDENCE * error < 0)


def better_half(scores: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the indices of the better half of the candidates by their mean, at least two; among equals, the earlier is kept.

    scores : ndarray of shape (n_candidates, k), float64: the fold scores so far
    """
    best = np.argsort(-scores.mean(axis=1), kind="stable")
    return best[: max(2, (len(best) + 1) // 2)]


def worth(
    estimates: NDArray[np.float64],
    costs: NDArray[np.float64],
    leader: NDArray[np.float64],
    held_out_rows: float,
    bounded: bool,
) -> NDArray[np.float64]:
    """Return the logarithm of each candidate's expected improvement over the best estimate, per unit of cost.

    The expected improvement of Jones, Schonlau and Welch 1998, divided by the cost as in Snoek, Larochelle and Adams
    2012. Among candidates that differ by less than the noise, cheaper ones come first; one that is clearly behind comes last,
    whatever it costs. The noise is the floor of `behind` over all folds.

    estimates, costs : ndarray of shape (n,), float64, like the returned array
    leader : ndarray of shape (k,), float64: the fold scores of the best
    """
    error = max(_floor(leader, held_out_rows, bounded) / np.sqrt(len(leader)), 1e-12)
    z = (estimates - estimates.max()) / error
    # phi(z) + z Phi(z) underflows far below zero, where it approaches phi(z) / z^2 (Abramowitz and Stegun 26.2.12).
    near = np.maximum(z, -20.0)
    gain = np.log(norm.pdf(near) + near * norm.cdf(near))
    far = norm.logpdf(np.minimum(z, -20.0)) - 2 * np.log(np.maximum(-z, 20.0))
    return np.asarray(np.where(z >= -20.0, gain, far) - np.log(costs))


def _floor(leader: NDArray[np.float64], held_out_rows: float, bounded: bool) -> float:
    share = float(np.clip(leader.mean(), 0.02, 0.98))
    return float(np.sqrt(share * (1 - share) / held_out_rows) if bounded else leader.std(ddof=1))
