"""Racing: candidates are fitted fold by fold, each fit in the journal before it counts, and those that can no longer win are stopped.

The next fits go to those worth their price. Fits run in parallel, within the memory there is, here or on an engine's workers.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from pipeline.evaluation import METRICS, Metric, Predictions
from pipeline.heads.head import Params
from pipeline.heads.tuning.evaluation import (
    GENERIC,
    FoldOutcome,
    Measured,
    Problem,
    Shared,
    counting_warnings,
    evaluator_for,
    failed,
    working_memory,
)
from pipeline.heads.tuning.journal import Journal, fit_event, key, replay
from pipeline.heads.tuning.room import is_spread, room_for, spread
from pipeline.io.process import look_in

log = logging.getLogger(__name__)

STAGE = 2
"""Folds fitted between two looks. A fixed number, so that results do not depend on how many run in parallel."""

CONFIDENCE = 2.0
"""Standard errors a candidate must lie behind the leader, on the same folds, to be stopped."""


@dataclass(eq=False)
class Candidate:
    """Parameters on their way through the folds: what was fitted so far, by fold, and why no more is."""

    number: int
    params: Params
    outcomes: dict[int, FoldOutcome] = field(default_factory=dict)
    reason: str | None = None

    @property
    def fitted(self) -> list[FoldOutcome]:
        """The outcomes in the order of the folds."""
        return [self.outcomes[fold] for fold in sorted(self.outcomes)]

    def scores(self, done: int) -> NDArray[np.float64]:
        """Return the scores on the first folds, float64 of shape (done,)."""
        return np.array([self.outcomes[fold].score for fold in range(done)])


@dataclass(frozen=True)
class Trial:
    """One set of parameters and how it scored; higher is better.

    `fold_scores` has None for a fold that was not fitted. `mean` is there for a finished trial only. `estimate` is what
    the search believed: the mean, or for a stopped trial what its first folds or its cheap version let expect.
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
    """Why it was stopped."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """The fold scores, float64 of shape (n_folds,), with NaN for a fold that was not fitted."""
        return np.array(self.fold_scores, dtype=np.float64)

    def record(self) -> dict[str, Any]:
        """Return the trial as plain data for JSON."""
        rounded = {name: round(getattr(self, name), 6) for name in ("fit_seconds", "score_seconds")}
        return {**vars(self), "fold_scores": list(self.fold_scores), **rounded}


# Fits on folds --------------------------------------------------------------------------------------------------------


class FoldFits:
    """The fits of one search: what its candidates share, what the journal knows, and the clock."""

    def __init__(self, problem: Problem, tuning: TuningConfig, journal: Journal) -> None:
        self.evaluator = evaluator_for(problem)
        needed = self.evaluator.work_bytes(problem) if self.evaluator.work_bytes else 0
        room = room_for(problem, tuning, needed)
        if room.work_bytes is not None and room.work_bytes < needed:
            log.info(
                "head %s: tuning.memory leaves no room for the %.0f MB that trials share on a fold; each is fitted by itself",
                problem.head.name,
                needed / 1e6,
            )
            self.evaluator = GENERIC
        self.problem = changed(
            problem,
            spare_bytes=room.spare_bytes,
            work_bytes=room.work_bytes,
            # What came through cheaper versions is dear to fit again at the end, only to judge it on more rows.
            judge_training=self.evaluator.screening is not None,
        )
        self.jobs, self._shared_bytes = room.jobs, room.shared_bytes
        self.shared = Shared(self.evaluator, self.problem, room.shared_bytes)
        self.replayed = self.done = 0
        self.tuning, self.journal, self.metric = tuning, journal, METRICS[tuning.scoring]
        self.held_out_rows = float(np.mean([len(held_out) for _, held_out in problem.folds]))
        self.tell: Callable[[], None] = lambda: None
        """Called as fits end, when they are in `done`."""
        fits = [event for event in journal.events if event["event"] == "fit"]
        ended = [event for event in journal.events if event["event"] == "trial"]
        self._judged = {key(event["rung"], event["params"]): event["estimate"] for event in ended}
        if not self.metric.mean_of_images:
            # The journal keeps no predictions, so what was not judged as a whole before a kill is fitted again.
            fits = [event for event in fits if key(event["rung"], event["params"]) in self._judged]
        self._known = {key(event["rung"], event["params"], event["fold"]): event for event in fits}
        self._before = max((float(event["elapsed"]) for event in journal.events), default=0.0)
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of this search, earlier runs included."""
        return self._before + time.perf_counter() - self._start

    def time_left(self) -> bool:
        """Whether another fit may begin."""
        return self.tuning.seconds is None or self.elapsed() < self.tuning.seconds

    def fit(self, candidates: Sequence[Candidate], stage: Sequence[int], rung: int, last: Candidate | None) -> None:
        """Fit candidates on a stage's folds, in parallel; each is in the journal before this returns.

        last : the one that is fitted though time is up
        """
        groups = [list(candidates)] if self.evaluator.together else [[one] for one in candidates]
        pending = []
        for fold, group in itertools.product(stage, filter(None, groups)):
            known = [self._known.get(key(rung, one.params, fold)) for one in group]
            if all(known):
                self.replayed += len(group)
                for one, event in zip(group, known, strict=True):
                    one.outcomes[fold] = replay(event or {})
            else:
                pending.append((fold, group))
        tasks = [(fold, [self._looked_at(one.params, rung) for one in group], last in group) for fold, group in pending]
        for place, made in self._made(self.problem, tasks):
            fold, group = pending[place]
            elapsed = self.elapsed()
            events = []
            for one, outcome in zip(group, made, strict=True):
                one.outcomes[fold] = outcome
                events.append(fit_event(one.number, one.params, fold, outcome, rung, elapsed))
            self.journal.append(events)
            self.done += len(group)
            self.tell()

    def _looked_at(self, params: Params, rung: int) -> Params:
        """Return what is fitted of a candidate: on rung 0 its cheap version, where there is one."""
        screening = self.evaluator.screening
        return params if screening is None or rung else {**params, **screening.cheaper(self.problem, params)}

    def on_every_fold(self, params: Params) -> list[FoldOutcome]:
        """Fit one candidate on every fold and judge it on the training rows too.

        It does not look into the journal, which keeps no predictions.
        """
        tasks = [(fold, [params], True) for fold in range(len(self.problem.folds))]
        made = dict(self._made(changed(self.problem, judge_training=True), tasks))
        return [made[fold][0] for fold in range(len(tasks))]

    def _made(
        self, problem: Problem, tasks: Sequence[tuple[int, list[Params], bool]]
    ) -> Iterator[tuple[int, list[FoldOutcome]]]:
        """Fit points on folds, and yield the place of each task with its outcomes as they come.

        A task is a fold, its points, and whether it is done though time is up. On an engine's workers tasks are spread where the
        features are a file that all map, but for what is solved together: there one decomposition is worth more than cores.
        """
        if self.evaluator.together or problem.projections or not (isinstance(problem.X, np.memmap) and is_spread()):

            def here(place: int, fold: int, points: list[Params], must: bool) -> tuple[int, list[FoldOutcome]]:
                done = must or self.time_left()
                return place, fit_fold(problem, self.shared, self.metric, fold, points) if done else []

            run = joblib.Parallel(n_jobs=self.jobs, backend="threading", return_as="generator_unordered")
            made = run(joblib.delayed(here)(place, *task) for place, task in enumerate(tasks))
            yield from ((place, outcomes) for place, outcomes in made if outcomes)
        elif tasks:
            import cloudpickle  # engines bring it with them

            bare = changed(problem, X=np.empty((0, problem.X.shape[1]), np.float32))
            packed = cloudpickle.dumps(
                (bare, str(problem.X.filename), self.evaluator, self._shared_bytes, self.metric.name)
            )
            ready = [
                (place, fold, points) for place, (fold, points, must) in enumerate(tasks) if must or self.time_left()
            ]
            yield from spread(_fit_there, ((os.getcwd(), packed, *task) for task in ready))

    def score(self, one: Candidate, rung: int) -> float:
        """Return the score of all held-out answers together, of a candidate that was fitted on every fold.

        Of a mean over images that is the mean of the folds' scores, weighted by their images. A mean over classes is no
        mean over folds: a fold without a rare class would count as if nothing were wrong with it.
        """
        held_out = [rows for _, rows in self.problem.folds]
        if self.metric.mean_of_images:
            return float(np.average(one.scores(len(held_out)), weights=[len(rows) for rows in held_out]))
        known = self._judged.get(key(rung, one.params))
        return (
            self.metric.score(_answers(self.problem, self.metric, held_out, one.fitted))
            if known is None
            else float(known)
        )


@lru_cache(2)
def _unpacked(working: str, packed: bytes) -> tuple[Problem, Shared, Metric]:
    """Take up a search in a worker, where its fits share what is prepared until those of two others come."""
    look_in(Path(working))  # a head may be of the user's own
    bare, features, evaluator, shared_bytes, scoring = pickle.loads(packed)
    problem = changed(bare, X=np.load(features, mmap_mode="r"))
    return problem, Shared(evaluator, problem, shared_bytes), METRICS[scoring]


def _fit_there(
    working: str, packed: bytes, place: int, fold: int, points: list[Params]
) -> tuple[int, list[FoldOutcome]]:
    problem, shared, metric = _unpacked(working, packed)
    with counting_warnings(), threadpool_limits(limits=1, user_api="blas"):
        return place, fit_fold(problem, shared, metric, fold, points)


def fit_fold(
    problem: Problem, shared: Shared, metric: Metric, fold: int, points: Sequence[Params]
) -> list[FoldOutcome]:
    """Fit points on a fold and score the rows it holds out; with `judge_training` too those they are fitted on."""
    train, held_out = problem.folds[fold]
    n, made = len(held_out), []
    for outcome in _outcomes(problem, shared, fold, points):
        if outcome.predictions is not None:
            if problem.judge_training:
                own = _answers(problem, metric, [train], [_rows(outcome, slice(n, None))])
                outcome = changed(_rows(outcome, slice(n)), training=Measured.of(metric, own))
            outcome = changed(outcome, score=metric.score(_answers(problem, metric, [held_out], [outcome])))
        made.append(outcome)
    return made


def _outcomes(problem: Problem, shared: Shared, fold: int, points: Sequence[Params]) -> list[FoldOutcome]:
    # OpenMP counts its threads per calling thread, so the limit is set here and not once outside.
    with shared.threads.limit(limits=1, user_api="openmp"), working_memory(problem.work_bytes):
        points = [{**problem.head.fixed, **point} for point in points]
        if problem.target.only(problem.y[problem.folds[fold][0]], 0) is not None:
            return GENERIC.evaluate(problem, fold, None, points)
        try:
            return shared.evaluator.evaluate(problem, fold, shared.get(fold), points)
        except (MemoryError, np.linalg.LinAlgError) as error:
            if problem.on_disk:
                return [failed(error, {}) for _ in points]
            name = problem.head.name
            log.warning("head %s: no shared work on fold %d (%r); each trial is fitted by itself", name, fold, error)
            return GENERIC.evaluate(problem, fold, None, points)


def _answers(
    problem: Problem, metric: Metric, rows: Sequence[NDArray[np.int64]], outcomes: Sequence[FoldOutcome]
) -> Predictions:
    """Return what was said of rows, given by fold; thresholds are chosen on the other folds, of one fold on the rows themselves."""
    target, y = problem.target, problem.y[np.concatenate(rows)]
    said = np.concatenate([outcome.predictions for outcome in outcomes if outcome.predictions is not None])
    assert len(said) == len(y), "a fit that failed is not judged"
    parts = [outcome.scores for outcome in outcomes if outcome.scores is not None]
    scores = np.concatenate(parts) if len(parts) == len(rows) else None
    if metric.threshold:
        folds = None if len(rows) == 1 else np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        said = target.decided(y, said, scores, metric.threshold, folds)
    return Predictions(y, said, scores if metric.needs_probabilities else None, target=target)


def _rows(outcome: FoldOutcome, rows: slice) -> FoldOutcome:
    assert outcome.predictions is not None, "a fit that failed is not judged"
    scores = None if outcome.scores is None else outcome.scores[rows]
    return changed(outcome, predictions=outcome.predictions[rows], scores=scores)


# Who goes on ----------------------------------------------------------------------------------------------------------


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
