"""The search itself: ask a strategy for points, fit them on the folds, write down, tell, and refit the best."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path

import joblib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import ThreadpoolController, threadpool_limits

from pipeline.config import TuningConfig
from pipeline.errors import HeadError
from pipeline.heads import Head, Params
from pipeline.progress import Progress, bar
from pipeline.tuning import devices, racing, strategies
from pipeline.tuning.evaluation import Evaluator, Shared, counting_warnings, failed, working_memory
from pipeline.tuning.evaluators import GENERIC, evaluator_for
from pipeline.tuning.events import fit_event, fit_key, replay, search_identity
from pipeline.tuning.features import Features, blocks
from pipeline.tuning.folds import Folds
from pipeline.tuning.journal import Journal
from pipeline.tuning.last_fit import fit_on_all
from pipeline.tuning.projection import Projections, without_scaler
from pipeline.tuning.records import FoldOutcome, OutOfFold, Problem, ScoreKind, Trial, TuningRun
from pipeline.tuning.room import most_components, room_for
from pipeline.tuning.scoring import SCORERS

log = logging.getLogger(__name__)

MOST_TRIALS = 200
"""Trials in a search limited by time: beyond this the surrogate would cost more than most fits."""


def check(head: Head, tuning: TuningConfig) -> list[str]:
    """Return the reasons why a head cannot be tuned as configured, before anything is spent."""
    if tuning.scoring == "log_loss" and not head.probabilities:
        return [
            f"head {head.name}: scoring 'log_loss' needs probabilities, which it does not give; use 'accuracy', 'balanced_accuracy' or 'macro_f1'"
        ]
    return []


def tune(
    head: Head,
    X: Features,
    y: ArrayLike,
    folds: Folds,
    tuning: TuningConfig,
    seed: int,
    journal: Path,
    projections: Projections | None = None,
) -> TuningRun:
    """Search a head's parameters on the folds, and fit the best on all rows.

    Results depend on the arguments but for `journal`, `tuning.jobs`, `tuning.device` (to rounding) and `tuning.memory`,
    which decides what is kept between fits and how many run at once; with `tuning.seconds` also on the machine.
    Fits run in threads: the heads' loops release Python's lock, and threads read one `X` without a copy of it.

    Parameters
    ----------
    X : ndarray of shape (n, dim), float32, or a memory map of one; every head copies a fold's rows to memory, see
        `memory_needed`. `StoredRows` stay on disk and are read in blocks, by the heads that can be fitted so.
    y : array of shape (n,): labels or codes; the fitted pipeline predicts values of the same kind
    journal : the JSON-lines file of this search's fits; what it holds of the same search is not fitted again
    projections : of this X, to share what is found for `tuning.pca` with searches of other heads

    Raises
    ------
    HeadError
        When the head cannot be tuned as configured, no trial could be fitted, or the journal cannot be written.
    """
    problems = check(head, tuning)
    if problems:
        raise HeadError(problems[0])
    wrong = next((place for place, block in blocks(X) if not np.isfinite(block).all()), None)
    if wrong is not None:
        raise HeadError(
            f"the features hold NaN or infinity, first within rows {wrong.start} to {min(wrong.stop, len(X)) - 1}; extract them again in fp32"
        )
    classes, codes = np.unique(np.asarray(y), return_inverse=True)
    problem = Problem(head, X, codes.astype(np.int64), len(classes), tuple(folds), seed)
    if tuning.pca is not None:
        shared = projections or Projections(X, tuning.pca, tuning.whiten)
        problem = changed(problem, head=without_scaler(head), projections=shared)
    book = Journal.open(journal, search_identity(problem, classes, tuning))
    try:
        search = _Search(problem, tuning, book)
        with counting_warnings(), threadpool_limits(limits=1, user_api="blas"):
            best = search.run()
            out_of_fold = search.out_of_fold(best)
    finally:
        book.close()
    start = time.perf_counter()
    pipeline = fit_on_all(search.problem, best.params, np.asarray(y), search.jobs)
    return TuningRun(
        head=head,
        classes=classes,
        trials=tuple(search.trials),
        best=best,
        strategy=tuning.strategy,
        scoring=tuning.scoring,
        seed=seed,
        seconds=search.elapsed(),
        surrogate_seconds=search.surrogate_seconds,
        replayed=search.replayed,
        out_of_fold=out_of_fold,
        pipeline=pipeline,
        fit_seconds=time.perf_counter() - start,
    )


class _Search:
    """The state of one search: its trials so far, what the journal knows, and the clock."""

    def __init__(self, problem: Problem, tuning: TuningConfig, journal: Journal) -> None:
        self.evaluator: Evaluator = evaluator_for(problem)
        needed = self.evaluator.work_bytes(problem)
        self.room = room = room_for(problem, tuning, needed)
        if room.work_bytes is not None and room.work_bytes < needed:
            log.info(
                "head %s: tuning.memory leaves no room for the %.0f MB that trials share on a fold; each is fitted by itself",
                problem.head.name,
                needed / 1e6,
            )
            self.evaluator = GENERIC
        self.problem = changed(problem, spare_bytes=room.spare_bytes, work_bytes=room.work_bytes)
        self.tuning, self.journal = tuning, journal
        width = problem.X.shape[1] if tuning.pca is None else most_components(problem.X.shape, tuning.pca)
        large = 4 * len(problem.X) * width >= devices.WORTH_A_GPU
        self._move(devices.resolve(tuning.device, large) if self.evaluator.on_device else devices.CPU)
        self.trials: list[Trial] = []
        self.surrogate_seconds = 0.0
        self.replayed = 0
        fits = [event for event in journal.events if event["event"] == "fit"]
        self._known = {fit_key(event["rung"], event["params"], event["fold"]): event for event in fits}
        self._before = max((float(event["elapsed"]) for event in journal.events), default=0.0)
        self._start = time.perf_counter()
        self._kept: dict[int, list[FoldOutcome]] = {}
        self._kept_mean = -math.inf
        self._threads = ThreadpoolController()
        self._scorer = SCORERS[tuning.scoring]
        self._bounded = tuning.scoring != "log_loss"
        self._held_out_rows = float(np.mean([len(held_out) for _, held_out in problem.folds]))

    def _move(self, device: str) -> None:
        """Do the folds' work on a device; on a GPU one after another, because each can fill it."""
        self.problem = changed(self.problem, device=device)
        self.jobs = self.room.jobs if device == devices.CPU else 1
        free = devices.free_bytes(device)
        self.shared = Shared(self.evaluator, self.problem, self.room.shared_bytes if free is None else free // 2)

    def elapsed(self) -> float:
        """Seconds of this search, earlier runs included."""
        return self._before + time.perf_counter() - self._start

    def run(self) -> Trial:
        """Search until the budget is spent and return the best finished trial."""
        limit = self.tuning.trials if self.tuning.seconds is None else MOST_TRIALS
        head = self.problem.head
        asked = strategies.rounds(
            self.tuning.strategy, head.space, head.defaults, self.tuning.trials, self.problem.seed
        )
        with bar(limit, "trials", head.name) as progress:
            points = next(asked, None)
            while points and len(self.trials) < limit and self._time_left() and not self._hopeless(len(points)):
                values = self._round(points[: limit - len(self.trials)], progress)
                start = time.perf_counter()
                try:
                    points = asked.send(values) if len(self.trials) < limit else None
                except StopIteration:
                    points = None
                self.surrogate_seconds += time.perf_counter() - start
            if self.evaluator.rungs:
                self._promote(progress)
        return self._best()

    def _cheap(self, rung: int) -> bool:
        """Whether fits on this rung are of a cheaper version."""
        return rung < len(self.evaluator.rungs)

    def _time_left(self) -> bool:
        return self.tuning.seconds is None or not self.trials or self.elapsed() < self.tuning.seconds

    def _hopeless(self, size: int) -> bool:
        """Whether the first two rounds failed to the last trial: more would fail too."""
        return len(self.trials) >= 2 * size and all(trial.status == "failed" for trial in self.trials)

    def _round(self, points: Sequence[Params], progress: Progress) -> list[float | None]:
        """Fit one round of points; return what the strategy is told of each."""
        first = len(self.trials)
        numbers = list(range(first, first + len(points)))
        fresh = self._race(numbers, points, rung=0)
        self.trials += fresh
        self.journal.append([{"event": "trial", "elapsed": self.elapsed(), **trial.record()} for trial in fresh])
        progress.update(len(fresh))
        estimates = [trial.estimate for trial in self.trials if trial.estimate is not None]
        if estimates:
            progress.note(f"best {self.tuning.scoring} {abs(max(estimates)):.4f}")
        # A failed trial counts as the worst seen, so that the surrogate keeps away from it.
        worst = min(estimates, default=None)
        return [worst if trial.status == "failed" else trial.estimate for trial in fresh]

    def _promote(self, progress: Progress) -> None:
        """Halve the trials rung by rung: those best on a rung, and the defaults, go on to the next and at last in full.

        In full they race too: the better half of them is fitted on the next folds.
        """
        climbing = [trial.number for trial in self.trials]
        for rung, step in enumerate(self.evaluator.rungs, start=1):
            climbing = sorted({*self._promising(climbing)[: step.keep], 0})
            progress.note(f"{len(climbing)} of them go on")
            for trial in self._race(climbing, [self.trials[number].params for number in climbing], rung):
                self.trials[trial.number] = trial
                self.journal.append([{"event": "trial", "elapsed": self.elapsed(), **trial.record()}])

    def _promising(self, numbers: Sequence[int]) -> list[int]:
        """Return the trials with an estimate that are most worth a dearer fit, the best first."""
        judged = [trial for trial in (self.trials[number] for number in numbers) if trial.estimate is not None]
        complete = [trial for trial in judged if None not in trial.fold_scores]
        if not complete:
            return [trial.number for trial in judged]
        best = max(complete, key=lambda trial: (trial.estimate or 0.0, -trial.number))
        value = racing.worth(
            np.array([trial.estimate for trial in judged], dtype=float),
            np.array([self.evaluator.cost(self.problem, trial.params) for trial in judged]),
            np.array(best.fold_scores, dtype=float),
            self._held_out_rows,
            self._bounded,
        )
        return [judged[place].number for place in np.argsort(-value, kind="stable")]

    def _race(self, numbers: Sequence[int], points: Sequence[Params], rung: int) -> list[Trial]:
        """Fit points fold by fold, stopping those that can no longer win."""
        n_folds = len(self.problem.folds)
        scores = np.full((len(points), n_folds), np.nan)
        outcomes: list[list[FoldOutcome]] = [[] for _ in points]
        alive = list(range(len(points)))
        reasons: dict[int, str] = {}
        for stage in racing.stages(n_folds, race=True):
            for place, fold, outcome, score in self._fit(alive, points, stage, numbers, rung):
                outcomes[place].append(outcome)
                scores[place, fold] = score
            done = stage[-1] + 1
            alive = [place for place in alive if all(outcome.error is None for outcome in outcomes[place])]
            if done < n_folds:
                alive = self._still_racing(alive, scores, done, reasons, rung)
        leader = self._leader(scores, alive, n_folds, rung)
        trials = []
        for place, (number, params) in enumerate(zip(numbers, points, strict=True)):
            trials.append(self._trial(number, params, scores[place], outcomes[place], reasons.get(place), leader, rung))
            mean = trials[-1].mean
            if mean is not None and mean > self._kept_mean:
                self._kept, self._kept_mean = {number: outcomes[place]}, mean
        return trials

    def _still_racing(
        self, alive: list[int], scores: NDArray[np.float64], done: int, reasons: dict[int, str], rung: int
    ) -> list[int]:
        leader = self._leader(scores, alive, done, rung)
        if leader is None:
            return alive
        # What came through the rungs is close together: there the better half goes on from look to look.
        last = self.evaluator.rungs and not self._cheap(rung)
        left = set(racing.better_half(scores[:, :done], alive) if last else alive)
        kept = []
        for place in alive:
            own, best = scores[place, :done], leader[:done]
            if place not in left or racing.behind(own, best, self._held_out_rows, self._bounded):
                gap = float(np.mean(best - own))
                reasons[place] = f"{gap:.4f} behind the best after {done} of {scores.shape[1]} folds"
            else:
                kept.append(place)
        return kept

    def _leader(
        self, scores: NDArray[np.float64], alive: Sequence[int], done: int, rung: int
    ) -> NDArray[np.float64] | None:
        """Fold scores of the best so far on the first `done` folds: of earlier trials and of this round."""
        rows = [scores[place] for place in alive]
        if rung == 0:  # on a later rung this round has all that were judged alike
            earlier = [trial.fold_scores for trial in self.trials if None not in trial.fold_scores]
            rows += [np.array(fold_scores, dtype=float) for fold_scores in earlier]
        rows = [row for row in rows if not np.isnan(row[:done]).any()]
        return max(rows, key=lambda row: float(row[:done].mean())) if rows else None

    def _fit(
        self, alive: Sequence[int], points: Sequence[Params], stage: Sequence[int], numbers: Sequence[int], rung: int
    ) -> list[tuple[int, int, FoldOutcome, float]]:
        """Fit the living points on a stage's folds, in parallel; each is in the journal before this returns."""
        groups = [list(alive)] if self.evaluator.together else [[place] for place in alive]
        tasks = [(fold, group) for fold in stage for group in groups if group]
        results: list[tuple[int, int, FoldOutcome, float]] = []
        pending = []
        for fold, group in tasks:
            known = [self._known.get(fit_key(rung, points[place], fold)) for place in group]
            if all(known):
                self.replayed += len(group)
                results += [(place, fold, *replay(event)) for place, event in zip(group, known, strict=True) if event]
            else:
                pending.append((fold, group))
        run = joblib.Parallel(n_jobs=self.jobs, backend="threading", return_as="generator_unordered")
        for fold, group, made in run(joblib.delayed(self._task)(fold, group, points, rung) for fold, group in pending):
            events = []
            for place, (outcome, score) in zip(group, made, strict=True):
                results.append((place, fold, outcome, score))
                events.append(fit_event(numbers[place], points[place], fold, outcome, score, rung, self.elapsed()))
            self.journal.append(events)
        return sorted(results, key=lambda result: result[:2])

    def _task(
        self, fold: int, group: Sequence[int], points: Sequence[Params], rung: int
    ) -> tuple[int, Sequence[int], list[tuple[FoldOutcome, float]]]:
        candidates = [points[place] for place in group]
        if self._cheap(rung):
            step = self.evaluator.rungs[rung]
            candidates = [{**params, **step.cheaper(self.problem, params)} for params in candidates]
        outcomes = self._evaluate(fold, candidates)
        y = self.problem.y[self.problem.folds[fold][1]]
        judged = []
        for outcome in outcomes:
            if outcome.predictions is None:
                judged.append((outcome, math.nan))
                continue
            judged.append((outcome, self._scorer(y, outcome.predictions, outcome.scores)))
        return fold, group, judged

    def _evaluate(self, fold: int, candidates: Sequence[Params]) -> list[FoldOutcome]:
        # OpenMP counts its threads per calling thread, so the limit is set here and not once outside.
        with self._threads.limit(limits=1, user_api="openmp"), working_memory(self.problem.work_bytes):
            points = [{**self.problem.head.fixed, **candidate} for candidate in candidates]
            if len(np.unique(self.problem.y[self.problem.folds[fold][0]])) < 2:
                return GENERIC.evaluate(self.problem, fold, None, points)
            try:
                return self.evaluator.evaluate(self.problem, fold, self.shared.get(fold), points)
            except RuntimeError as error:  # what torch raises, for lack of memory too
                if self.problem.device == devices.CPU:
                    raise
                log.warning(
                    "head %s: %s gave up on fold %d (%r); the search goes on on the processor",
                    self.problem.head.name,
                    self.problem.device,
                    fold,
                    error,
                )
                self._move(devices.CPU)
                return self._evaluate(fold, candidates)
            except (MemoryError, np.linalg.LinAlgError) as error:
                if self.problem.on_disk:
                    return [failed(error, {}) for _ in points]
                log.warning(
                    "head %s: no shared work on fold %d (%r); each trial is fitted by itself",
                    self.problem.head.name,
                    fold,
                    error,
                )
                return GENERIC.evaluate(self.problem, fold, None, points)

    def _trial(
        self,
        number: int,
        params: Params,
        scores: NDArray[np.float64],
        outcomes: Sequence[FoldOutcome],
        reason: str | None,
        leader: NDArray[np.float64] | None,
        rung: int,
    ) -> Trial:
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        fitted = ~np.isnan(scores)
        trial = Trial(
            number=number,
            params=dict(params),
            status="ok",
            fold_scores=tuple(float(score) if known else None for score, known in zip(scores, fitted, strict=True)),
            mean=None,
            estimate=None,
            fit_seconds=sum(outcome.fit_seconds for outcome in outcomes),
            score_seconds=sum(outcome.score_seconds for outcome in outcomes),
            warnings=dict(sum((Counter(outcome.warnings) for outcome in outcomes), Counter())),
        )
        if errors:
            return changed(trial, status="failed", error=errors[0])
        if reason is not None and leader is not None:
            # On the same folds the difference to the leader is less noisy than the score itself.
            estimate = float(leader.mean() + (scores[fitted] - leader[fitted]).mean())
            return changed(trial, status="stopped", estimate=estimate, reason=reason)
        mean = float(scores.mean())
        if self._cheap(rung):
            return changed(trial, status="stopped", estimate=mean, reason="screened only")
        return changed(trial, mean=mean, estimate=mean)

    def _best(self) -> Trial:
        done = [trial for trial in self.trials if trial.mean is not None]
        if done:
            return max(done, key=lambda trial: (trial.mean or 0.0, -trial.number))
        counts = Counter(trial.error for trial in self.trials)
        plural = "trial" if len(self.trials) == 1 else "trials"
        raise HeadError(
            f"head {self.problem.head.name}: none of {len(self.trials)} {plural} could be fitted; see what it needs in the errors below",
            [f"{count} x {error}" for error, count in counts.most_common(5)],
        )

    def out_of_fold(self, best: Trial) -> OutOfFold:
        """Predict every row with the best parameters, fitted on the folds that do not hold it out."""
        problem = self.problem
        outcomes = self._kept.get(best.number, [])
        # Replayed fits have no predictions. What was solved together is solved again alone, so that a resumed search
        # and an uninterrupted one give the same to the last digit.
        if self.evaluator.together or not outcomes or any(outcome.predictions is None for outcome in outcomes):
            run = joblib.Parallel(n_jobs=self.jobs, backend="threading")
            tasks = (joblib.delayed(self._evaluate)(fold, [best.params]) for fold in range(len(problem.folds)))
            outcomes = [made[0] for made in run(tasks)]
        predictions = np.full(len(problem.y), -1, dtype=np.int64)
        place = np.full(len(problem.y), -1, dtype=np.int64)
        kinds = {outcome.kind for outcome in outcomes}
        scores = np.zeros((len(problem.y), problem.n_classes), dtype=np.float32) if None not in kinds else None
        for fold, outcome in enumerate(outcomes):
            held_out = problem.folds[fold][1]
            assert outcome.predictions is not None, "the best trial was fitted on every fold"
            predictions[held_out], place[held_out] = outcome.predictions, fold
            if scores is not None and outcome.scores is not None:
                scores[held_out] = outcome.scores
        kind: ScoreKind = "decision" if "decision" in kinds else "probability"
        return OutOfFold(predictions, scores, kind if scores is not None else None, place)
