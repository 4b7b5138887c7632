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
from threadpoolctl import ThreadpoolController

from pipeline.config import TuningConfig
from pipeline.heads import Params
from pipeline.metrics import METRICS, Answers
from pipeline.tuning.evaluation import Evaluator, Shared, failed, working_memory
from pipeline.tuning.evaluators import GENERIC, evaluator_for
from pipeline.tuning.events import fit_event, fit_key, replay
from pipeline.tuning.journal import Journal
from pipeline.tuning.records import FoldOutcome, Problem
from pipeline.tuning.room import room_for

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
        self.problem = changed(problem, spare_bytes=room.spare_bytes, work_bytes=room.work_bytes)
        self.jobs = room.jobs
        self.shared = Shared(self.evaluator, self.problem, room.shared_bytes)
        self.replayed = self.done = 0
        self.journal = journal
        fits = [event for event in journal.events if event["event"] == "fit"]
        self._known = {fit_key(event["rung"], event["params"], event["fold"]): event for event in fits}
        self._before = max((float(event["elapsed"]) for event in journal.events), default=0.0)
        self._start = time.perf_counter()
        self._threads = ThreadpoolController()
        self._metric = METRICS[tuning.scoring]

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
    ) -> list[tuple[int, int, FoldOutcome, float]]:
        """Fit the living points on a stage's folds, in parallel; each is in the journal before this returns.

        tell : called as fits end, when they are in `done`
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
        for fold, group, made in run(joblib.delayed(self._task)(fold, group, points, rung) for fold, group in pending):
            events = []
            for place, (outcome, score) in zip(group, made, strict=True):
                results.append((place, fold, outcome, score))
                events.append(fit_event(numbers[place], points[place], fold, outcome, score, rung, self.elapsed()))
            self.journal.append(events)
            self.done += len(group)
            tell()
        return sorted(results, key=lambda result: result[:2])

    def _task(
        self, fold: int, group: Sequence[int], points: Sequence[Params], rung: int
    ) -> tuple[int, Sequence[int], list[tuple[FoldOutcome, float]]]:
        candidates = [points[place] for place in group]
        if self.evaluator.cheap(rung):
            step = self.evaluator.rungs[rung]
            candidates = [{**params, **step.cheaper(self.problem, params)} for params in candidates]
        outcomes = self._evaluate(fold, candidates)
        y = self.problem.y[self.problem.folds[fold][1]]
        judged = []
        for outcome in outcomes:
            if outcome.predictions is None:
                judged.append((outcome, math.nan))
                continue
            columns = outcome.scores if self._metric.needs_probabilities else None
            judged.append((outcome, self._metric.score(Answers.of(y, outcome.predictions, columns))))
        return fold, group, judged

    def _evaluate(self, fold: int, candidates: Sequence[Params]) -> list[FoldOutcome]:
        # OpenMP counts its threads per calling thread, so the limit is set here and not once outside.
        with self._threads.limit(limits=1, user_api="openmp"), working_memory(self.problem.work_bytes):
            points = [{**self.problem.head.fixed, **candidate} for candidate in candidates]
            if len(np.unique(self.problem.y[self.problem.folds[fold][0]])) < 2:
                return GENERIC.evaluate(self.problem, fold, None, points)
            try:
                return self.evaluator.evaluate(self.problem, fold, self.shared.get(fold), points)
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

    def on_every_fold(self, params: Params) -> list[FoldOutcome]:
        """Fit one candidate on every fold, without a look into the journal, which keeps no predictions."""
        run = joblib.Parallel(n_jobs=self.jobs, backend="threading")
        tasks = (joblib.delayed(self._evaluate)(fold, [params]) for fold in range(len(self.problem.folds)))
        return [made[0] for made in run(tasks)]
