"""Fits on folds: candidates are fitted on a fold's training rows and judged on those it holds out.

In parallel, within the memory there is; each is in the journal before it counts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace as changed

import joblib
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from pipeline.config import TuningConfig
from pipeline.evaluation import METRICS, Answers, joined
from pipeline.heads.head import Params
from pipeline.heads.tuning.evaluation import GENERIC, Evaluator, Shared, evaluator_for, failed, working_memory
from pipeline.heads.tuning.events import fit_event, fit_key, replay, trial_key
from pipeline.heads.tuning.journal import Journal
from pipeline.heads.tuning.records import FoldOutcome, Measured, Problem
from pipeline.heads.tuning.room import room_for

log = logging.getLogger(__name__)


class FoldFits:
    """The fits of one search: what its candidates share, what the journal knows, and the clock."""

    def __init__(self, problem: Problem, tuning: TuningConfig, journal: Journal) -> None:
        self.evaluator: Evaluator = evaluator_for(problem)
        needed = self.evaluator.work_bytes(problem)
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
            judge_training=bool(self.evaluator.rungs),
        )
        self.jobs = room.jobs
        self.shared = Shared(self.evaluator, self.problem, room.shared_bytes)
        self.replayed = self.done = 0
        self.journal = journal
        self._metric = METRICS[tuning.scoring]
        fits = [event for event in journal.events if event["event"] == "fit"]
        ended = [event for event in journal.events if event["event"] == "trial"]
        self._judged = {trial_key(event["rung"], event["params"]): event["estimate"] for event in ended}
        if not self._metric.mean_of_images:
            # The journal keeps no predictions, so what was not judged as a whole before a kill is fitted again.
            fits = [event for event in fits if trial_key(event["rung"], event["params"]) in self._judged]
        self._known = {fit_key(event["rung"], event["params"], event["fold"]): event for event in fits}
        self._before = max((float(event["elapsed"]) for event in journal.events), default=0.0)
        self._start = time.perf_counter()
        self._threads = ThreadpoolController()

    def elapsed(self) -> float:
        """Seconds of this search, earlier runs included."""
        return self._before + time.perf_counter() - self._start

    def fit(
        self,
        alive: Sequence[int],
        points: Sequence[Params],
        stage: Sequence[int],
        numbers: Sequence[int],
        rung: int,
        tell: Callable[[], None] = lambda: None,
        going_on: Callable[[Sequence[int]], bool] = lambda group: True,
    ) -> list[tuple[int, int, FoldOutcome, float]]:
        """Fit the living points on a stage's folds, in parallel; each is in the journal before this returns.

        tell : called as fits end, when they are in `done`
        going_on : asked of the candidates of each fit before it begins; what it refuses is left out
        """
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
        tasks_left = (joblib.delayed(self._task)(fold, group, points, rung, going_on) for fold, group in pending)
        for fold, group, made in run(tasks_left):
            if not made:
                continue
            events = []
            for place, (outcome, score) in zip(group, made, strict=True):
                results.append((place, fold, outcome, score))
                events.append(fit_event(numbers[place], points[place], fold, outcome, score, rung, self.elapsed()))
            self.journal.append(events)
            self.done += len(group)
            tell()
        return sorted(results, key=lambda result: result[:2])

    def _task(
        self,
        fold: int,
        group: Sequence[int],
        points: Sequence[Params],
        rung: int,
        going_on: Callable[[Sequence[int]], bool],
    ) -> tuple[int, Sequence[int], list[tuple[FoldOutcome, float]]]:
        if not going_on(group):
            return fold, group, []
        candidates = [points[place] for place in group]
        if self.evaluator.cheap(rung):
            step = self.evaluator.rungs[rung]
            candidates = [{**params, **step.cheaper(self.problem, params)} for params in candidates]
        outcomes = self._judge_training(self.problem, fold, self._evaluate(self.problem, fold, candidates))
        y = self.problem.y[self.problem.folds[fold][1]]
        scores = [
            math.nan if outcome.predictions is None else self._metric.score(self._answers(y, outcome))
            for outcome in outcomes
        ]
        return fold, group, list(zip(outcomes, scores, strict=True))

    def _answers(self, y: NDArray[np.int64], outcome: FoldOutcome) -> Answers:
        assert outcome.predictions is not None, "a fit that failed is not judged"
        return Answers(y, outcome.predictions, outcome.scores if self._metric.needs_probabilities else None)

    def score(self, params: Params, rung: int, scores: NDArray[np.float64], outcomes: Sequence[FoldOutcome]) -> float:
        """Return the score of all held-out answers together, of a candidate that was fitted on every fold.

        Of a mean over images that is the mean of the folds' scores, weighted by their images. A mean over classes is no
        mean over folds: a fold without a rare class would count as if nothing were wrong with it.
        """
        held_out = [rows for _, rows in self.problem.folds]
        if self._metric.mean_of_images:
            return float(np.average(scores, weights=[len(rows) for rows in held_out]))
        known = self._judged.get(trial_key(rung, params))
        if known is not None:
            return float(known)
        parts = [self._answers(self.problem.y[rows], one) for rows, one in zip(held_out, outcomes, strict=True)]
        return self._metric.score(joined(parts))

    def _judge_training(self, problem: Problem, fold: int, outcomes: Sequence[FoldOutcome]) -> list[FoldOutcome]:
        """Score what was said of the rows a fold was fitted on, and leave the outcomes of those it holds out."""
        train, held_out = problem.folds[fold]
        n, made = len(held_out), []
        for outcome in outcomes:
            if problem.judge_training and outcome.predictions is not None:
                held, own = (
                    changed(outcome, predictions=outcome.predictions[rows], scores=_rows(outcome.scores, rows))
                    for rows in (slice(None, n), slice(n, None))
                )
                training = Measured.of(self._metric, self._answers(problem.y[train], own))
                outcome = changed(held, training=training)
            made.append(outcome)
        return made

    def _evaluate(self, problem: Problem, fold: int, candidates: Sequence[Params]) -> list[FoldOutcome]:
        # OpenMP counts its threads per calling thread, so the limit is set here and not once outside.
        with self._threads.limit(limits=1, user_api="openmp"), working_memory(problem.work_bytes):
            points = [{**problem.head.fixed, **candidate} for candidate in candidates]
            if len(np.unique(problem.y[problem.folds[fold][0]])) < 2:
                return GENERIC.evaluate(problem, fold, None, points)
            try:
                return self.evaluator.evaluate(problem, fold, self.shared.get(fold), points)
            except (MemoryError, np.linalg.LinAlgError) as error:
                if problem.on_disk:
                    return [failed(error, {}) for _ in points]
                log.warning(
                    "head %s: no shared work on fold %d (%r); each trial is fitted by itself",
                    problem.head.name,
                    fold,
                    error,
                )
                return GENERIC.evaluate(problem, fold, None, points)

    def on_every_fold(self, params: Params) -> list[FoldOutcome]:
        """Fit one candidate on every fold and judge it on the training rows too.

        It does not look into the journal, which keeps no predictions.
        """
        problem = changed(self.problem, judge_training=True)

        def fit(fold: int) -> FoldOutcome:
            return self._judge_training(problem, fold, self._evaluate(problem, fold, [params]))[0]

        run = joblib.Parallel(n_jobs=self.jobs, backend="threading")
        return list(run(joblib.delayed(fit)(fold) for fold in range(len(problem.folds))))


def _rows(scores: NDArray[np.float32] | None, rows: slice) -> NDArray[np.float32] | None:
    return None if scores is None else scores[rows]
