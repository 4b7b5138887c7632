"""Fits on folds: candidates are fitted on a fold's training rows and judged on those it holds out.

In parallel, within the memory there is; each is in the journal before it counts.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace as changed

import joblib
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from pipeline.config import TuningConfig
from pipeline.evaluation import METRICS, Predictions
from pipeline.heads.head import Params
from pipeline.heads.tuning.evaluation import GENERIC, Evaluator, Shared, evaluator_for, failed, working_memory
from pipeline.heads.tuning.events import fit_event, fit_key, replay, trial_key
from pipeline.heads.tuning.journal import Journal
from pipeline.heads.tuning.records import Candidate, FoldOutcome, Measured, Problem
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
            judge_training=self.evaluator.screening is not None,
        )
        self.jobs = room.jobs
        self.shared = Shared(self.evaluator, self.problem, room.shared_bytes)
        self.replayed = self.done = 0
        self.tuning, self.journal, self.metric = tuning, journal, METRICS[tuning.scoring]
        self.held_out_rows = float(np.mean([len(held_out) for _, held_out in problem.folds]))
        self.tell: Callable[[], None] = lambda: None
        """Called as fits end, when they are in `done`."""
        fits = [event for event in journal.events if event["event"] == "fit"]
        ended = [event for event in journal.events if event["event"] == "trial"]
        self._judged = {trial_key(event["rung"], event["params"]): event["estimate"] for event in ended}
        if not self.metric.mean_of_images:
            # The journal keeps no predictions, so what was not judged as a whole before a kill is fitted again.
            fits = [event for event in fits if trial_key(event["rung"], event["params"]) in self._judged]
        self._known = {fit_key(event["rung"], event["params"], event["fold"]): event for event in fits}
        self._before = max((float(event["elapsed"]) for event in journal.events), default=0.0)
        self._start = time.perf_counter()
        self._threads = ThreadpoolController()

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
            known = [self._known.get(fit_key(rung, one.params, fold)) for one in group]
            if all(known):
                self.replayed += len(group)
                for one, event in zip(group, known, strict=True):
                    one.outcomes[fold] = replay(event or {})
            else:
                pending.append((fold, group))
        run = joblib.Parallel(n_jobs=self.jobs, backend="threading", return_as="generator_unordered")
        for fold, group, made in run(joblib.delayed(self._task)(fold, group, rung, last) for fold, group in pending):
            if not made:
                continue
            for one, outcome in zip(group, made, strict=True):
                one.outcomes[fold] = outcome
            elapsed = self.elapsed()
            self.journal.append(
                [fit_event(one.number, one.params, fold, one.outcomes[fold], rung, elapsed) for one in group]
            )
            self.done += len(group)
            self.tell()

    def _task(
        self, fold: int, group: Sequence[Candidate], rung: int, last: Candidate | None
    ) -> tuple[int, Sequence[Candidate], list[FoldOutcome]]:
        if not self.time_left() and last not in group:
            return fold, group, []
        points = [one.params for one in group]
        if self.evaluator.screening is not None and rung == 0:
            cheaper = self.evaluator.screening.cheaper
            points = [{**params, **cheaper(self.problem, params)} for params in points]
        return fold, group, self._scored(self.problem, fold, points)

    def _answers(self, rows: Sequence[NDArray[np.int64]], outcomes: Sequence[FoldOutcome]) -> Predictions:
        """Return what was said of rows, given by fold; thresholds are chosen on the other folds, of one fold on the rows themselves."""
        target, y = self.problem.target, self.problem.y[np.concatenate(rows)]
        said = np.concatenate([outcome.predictions for outcome in outcomes if outcome.predictions is not None])
        assert len(said) == len(y), "a fit that failed is not judged"
        parts = [outcome.scores for outcome in outcomes if outcome.scores is not None]
        scores = np.concatenate(parts) if len(parts) == len(rows) else None
        if self.metric.threshold:
            folds = None if len(rows) == 1 else np.repeat(np.arange(len(rows)), [len(part) for part in rows])
            said = target.decided(y, said, scores, self.metric.threshold, folds)
        return Predictions(y, said, scores if self.metric.needs_probabilities else None, target=target)

    def score(self, one: Candidate, rung: int) -> float:
        """Return the score of all held-out answers together, of a candidate that was fitted on every fold.

        Of a mean over images that is the mean of the folds' scores, weighted by their images. A mean over classes is no
        mean over folds: a fold without a rare class would count as if nothing were wrong with it.
        """
        held_out = [rows for _, rows in self.problem.folds]
        if self.metric.mean_of_images:
            return float(np.average(one.scores(len(held_out)), weights=[len(rows) for rows in held_out]))
        known = self._judged.get(trial_key(rung, one.params))
        if known is not None:
            return float(known)
        return self.metric.score(self._answers(held_out, one.fitted))

    def _scored(self, problem: Problem, fold: int, points: Sequence[Params]) -> list[FoldOutcome]:
        """Fit and score the rows a fold holds out, and where they are judged too those it is fitted on."""
        train, held_out = problem.folds[fold]
        n, made = len(held_out), []
        for outcome in self._evaluate(problem, fold, points):
            if outcome.predictions is not None:
                if problem.judge_training:
                    own = self._answers([train], [_rows(outcome, slice(n, None))])
                    outcome = changed(_rows(outcome, slice(n)), training=Measured.of(self.metric, own))
                outcome = changed(outcome, score=self.metric.score(self._answers([held_out], [outcome])))
            made.append(outcome)
        return made

    def _evaluate(self, problem: Problem, fold: int, candidates: Sequence[Params]) -> list[FoldOutcome]:
        # OpenMP counts its threads per calling thread, so the limit is set here and not once outside.
        with self._threads.limit(limits=1, user_api="openmp"), working_memory(problem.work_bytes):
            points = [{**problem.head.fixed, **candidate} for candidate in candidates]
            if problem.target.only(problem.y[problem.folds[fold][0]], 0) is not None:
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
        run = joblib.Parallel(n_jobs=self.jobs, backend="threading")
        made = run(joblib.delayed(self._scored)(problem, fold, [params]) for fold in range(len(problem.folds)))
        return [outcome for (outcome,) in made]


def _rows(outcome: FoldOutcome, rows: slice) -> FoldOutcome:
    assert outcome.predictions is not None, "a fit that failed is not judged"
    scores = None if outcome.scores is None else outcome.scores[rows]
    return changed(outcome, predictions=outcome.predictions[rows], scores=scores)
