"""The search itself: ask a strategy for points, fit them on the folds, write down, tell, and refit the best."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from pipeline.config import TuningConfig
from pipeline.errors import HeadError, UnfittedError
from pipeline.evaluation import METRICS
from pipeline.evaluation.said import ScoreKind
from pipeline.heads.head import Head, Params
from pipeline.heads.tuning import racing, strategies
from pipeline.heads.tuning.evaluation import counting_warnings
from pipeline.heads.tuning.events import search_identity
from pipeline.heads.tuning.features import Features, blocks
from pipeline.heads.tuning.fold_fits import FoldFits
from pipeline.heads.tuning.folds import Folds
from pipeline.heads.tuning.journal import Journal
from pipeline.heads.tuning.last_fit import Promise, fit_as_promised
from pipeline.heads.tuning.projection import Projections, without_scaler
from pipeline.heads.tuning.records import FoldOutcome, OutOfFold, Problem, Trial, TuningRun
from pipeline.io.progress import Progress, bar

MOST_TRIALS = 200
"""Trials in a search limited by time: beyond this the surrogate would cost more than most fits."""


def check(head: Head, tuning: TuningConfig) -> list[str]:
    """Return the reasons why a head cannot be tuned as configured, before anything is spent."""
    if METRICS[tuning.scoring].needs_probabilities and not head.probabilities:
        *some, last = (name for name, metric in METRICS.items() if not metric.needs_probabilities)
        return [
            f"head {head.name}: tuning.scoring {tuning.scoring!r} needs probabilities, which it does not give; the others are {', '.join(some)} and {last}"
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

    Results depend on the arguments but for `journal`, `tuning.jobs` and `tuning.memory`,
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
        fits = FoldFits(problem, tuning, book)
        search = _Search(fits, tuning, book)
        with counting_warnings(), threadpool_limits(limits=1, user_api="blas"):
            best = search.run()
            out_of_fold = search.out_of_fold(best)
    finally:
        book.close()
    promised = Promise.of(best, out_of_fold.training)
    fitted = fit_as_promised(fits.problem, best.params, np.asarray(y), fits.jobs, METRICS[tuning.scoring], promised)
    return TuningRun(
        head=head,
        classes=classes,
        trials=tuple(search.trials),
        best=best,
        strategy=tuning.strategy,
        scoring=tuning.scoring,
        seed=seed,
        seconds=fits.elapsed(),
        surrogate_seconds=search.surrogate_seconds,
        replayed=fits.replayed,
        out_of_fold=out_of_fold,
        pipeline=fitted.pipeline,
        fit_seconds=fitted.seconds,
        last_fit=fitted.record(best, promised),
    )


class _Search:
    """The state of one search: its trials so far, and what is kept of the best."""

    def __init__(self, fits: FoldFits, tuning: TuningConfig, journal: Journal) -> None:
        self.fits, self.tuning, self.journal = fits, tuning, journal
        self.problem, self.evaluator = fits.problem, fits.evaluator
        self.trials: list[Trial] = []
        self.surrogate_seconds = 0.0
        self._kept: dict[int, list[FoldOutcome]] = {}
        self._kept_mean = -math.inf
        self._progress: Progress | None = None
        self._said = ""
        self._bounded = METRICS[tuning.scoring].bounded
        self._held_out_rows = float(np.mean([len(held_out) for _, held_out in self.problem.folds]))

    def run(self) -> Trial:
        """Search until the budget is spent and return the best finished trial."""
        limit = self.tuning.trials if self.tuning.seconds is None else MOST_TRIALS
        head = self.problem.head
        asked = strategies.rounds(
            self.tuning.strategy, head.space, head.defaults, self.tuning.trials, self.problem.seed
        )
        with bar(limit, "trials", head.name) as progress:
            self._progress = progress
            points = next(asked, None)
            while points and len(self.trials) < limit and self._goes_on() and not self._hopeless(len(points)):
                values = self._round(points[: limit - len(self.trials)], progress)
                start = time.perf_counter()
                try:
                    points = asked.send(values) if len(self.trials) < limit and self._time_left() else None
                except StopIteration:
                    points = None
                self.surrogate_seconds += time.perf_counter() - start
            if self.evaluator.rungs:
                self._promote()
        return self._best()

    def _say(self, text: str | None = None) -> None:
        """Show a text behind the bar, or the last one again, with the fits so far: a trial of many rows takes hours."""
        self._said = self._said if text is None else text
        if self._progress is not None:
            self._progress.note(", ".join(filter(None, [self._said, f"{self.fits.done} fits"])))

    def _time_left(self) -> bool:
        return self.tuning.seconds is None or self.fits.elapsed() < self.tuning.seconds

    def _goes_on(self) -> bool:
        """Whether another round may begin: the first always may, as one trial must end."""
        return not self.trials or self._time_left()

    def _hopeless(self, size: int) -> bool:
        """Whether the first two rounds failed to the last trial: more would fail too."""
        return len(self.trials) >= 2 * size and all(trial.status == "failed" for trial in self.trials)

    def _round(self, points: Sequence[Params], progress: Progress) -> list[float | None]:
        """Fit one round of points; return what the strategy is told of each."""
        first = len(self.trials)
        numbers = list(range(first, first + len(points)))
        fresh = self._race(numbers, points, rung=0)
        self.trials += fresh
        self._write(fresh, rung=0)
        progress.update(len(fresh))
        estimates = [trial.estimate for trial in self.trials if trial.estimate is not None]
        if estimates:
            self._say(f"best {self.tuning.scoring} {abs(max(estimates)):.4f}")
        # A failed trial counts as the worst seen, so that the surrogate keeps away from it.
        worst = min(estimates, default=None)
        return [worst if trial.status == "failed" else trial.estimate for trial in fresh]

    def _promote(self) -> None:
        """Halve the trials rung by rung: those best on a rung, and the defaults, go on to the next and at last in full.

        In full they race too: the better half of them is fitted on the next fold.
        """
        climbing = [trial.number for trial in self.trials]
        for rung, step in enumerate(self.evaluator.rungs, start=1):
            climbing = sorted({*self._affordable(self._promising(climbing), step.budget), 0})
            self._say(f"{len(climbing)} of them go on")
            for trial in self._race(climbing, [self.trials[number].params for number in climbing], rung):
                self.trials[trial.number] = trial
                self._write([trial], rung)

    def _write(self, trials: Sequence[Trial], rung: int) -> None:
        elapsed = self.fits.elapsed()
        self.journal.append(
            [{"event": "trial", "elapsed": elapsed, "rung": rung, **trial.record()} for trial in trials]
        )

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

    def _affordable(self, numbers: Sequence[int], budget: float) -> list[int]:
        """Return the trials, in this order, that fit into a budget, which is in fits of the head's defaults.

        The one with the best estimate is always among them, whatever it costs.
        """
        left = budget * self.evaluator.cost(self.problem, self.problem.head.defaults)
        best = max(numbers, key=lambda number: self.trials[number].estimate or 0.0, default=None)
        chosen = []
        for number in numbers:
            cost = self.evaluator.cost(self.problem, self.trials[number].params)
            if number == best or cost <= left:
                chosen.append(number)
                left -= cost
        return chosen

    def _race(self, numbers: Sequence[int], points: Sequence[Params], rung: int) -> list[Trial]:
        """Fit points fold by fold, stopping those that can no longer win, and when time is up all but one.

        Returns the trials of those that were fitted on a fold at least.
        """
        n_folds = len(self.problem.folds)
        scores = np.full((len(points), n_folds), np.nan)
        outcomes: list[list[FoldOutcome]] = [[] for _ in points]
        alive = list(range(len(points)))
        reasons: dict[int, str] = {}
        one_by_one = self._halves(rung) or self.tuning.seconds is not None
        for stage in racing.stages(n_folds, 1 if one_by_one else racing.STAGE):
            last = self._to_finish(alive, scores[:, : stage[0]])
            begins = partial(self._begins, last)
            for place, fold, outcome, score in self.fits.fit(alive, points, stage, numbers, rung, self._say, begins):
                outcomes[place].append(outcome)
                scores[place, fold] = score
            done = stage[-1] + 1
            alive = [place for place in alive if all(outcome.error is None for outcome in outcomes[place])]
            alive = self._in_time(alive, outcomes, scores, done, reasons)
            if done < n_folds:
                alive = self._still_racing(alive, scores, done, reasons, rung)
        wholes = {place: self.fits.score(points[place], rung, scores[place], outcomes[place]) for place in alive}
        leader = self._leader(scores, alive, n_folds, rung, wholes)
        trials = []
        for place, (number, params) in enumerate(zip(numbers, points, strict=True)):
            if not outcomes[place]:
                continue
            trial = self._trial(number, params, scores[place], outcomes[place], wholes.get(place), rung)
            trials.append(self._stopped(trial, reasons.get(place), leader))
            mean = trials[-1].mean
            if mean is not None and mean > self._kept_mean:
                self._kept, self._kept_mean = {number: outcomes[place]}, mean
        return trials

    def _begins(self, last: int | None, group: Sequence[int]) -> bool:
        """Whether a fit may begin: while there is time, and that of the candidate that has to finish."""
        return self._time_left() or last in group

    def _to_finish(self, alive: Sequence[int], scores: NDArray[np.float64]) -> int | None:
        """Return which candidate is fitted whatever the clock says: the best so far, until a trial has finished."""
        if not alive or any(trial.mean is not None for trial in self.trials):
            return None
        return max(alive, key=lambda place: (float(scores[place].mean()) if scores.size else 0.0, -place))

    def _in_time(
        self,
        alive: list[int],
        outcomes: Sequence[Sequence[FoldOutcome]],
        scores: NDArray[np.float64],
        done: int,
        reasons: dict[int, str],
    ) -> list[int]:
        """Return who goes on: all that were fitted on the folds so far, and when time is up the one that has to finish."""
        n_folds = scores.shape[1]
        kept = [place for place in alive if len(outcomes[place]) == done]
        if done < n_folds and not self._time_left():
            last = self._to_finish(kept, scores[:, :done])
            kept = [] if last is None else [last]
        for place in set(alive) - set(kept):
            reasons[place] = f"time was up after {len(outcomes[place])} of {n_folds} folds"
        return kept

    def _halves(self, rung: int) -> bool:
        """Whether the better half goes on from fold to fold: what came through the rungs is too close for a margin."""
        return bool(self.evaluator.rungs) and not self.evaluator.cheap(rung)

    def _still_racing(
        self, alive: list[int], scores: NDArray[np.float64], done: int, reasons: dict[int, str], rung: int
    ) -> list[int]:
        found = self._leader(scores, alive, done, rung)
        if found is None:
            return alive
        leader, _ = found
        left = set(racing.better_half(scores[:, :done], alive) if self._halves(rung) else alive)
        kept = []
        for place in alive:
            own, best = scores[place, :done], leader[:done]
            if place not in left or (done > 1 and racing.behind(own, best, self._held_out_rows, self._bounded)):
                gap = float(np.mean(best - own))
                reasons[place] = f"{gap:.4f} behind the best after {done} of {scores.shape[1]} folds"
            else:
                kept.append(place)
        return kept

    def _leader(
        self,
        scores: NDArray[np.float64],
        alive: Sequence[int],
        done: int,
        rung: int,
        wholes: Mapping[int, float] | None = None,
    ) -> tuple[NDArray[np.float64], float] | None:
        """Fold scores of the best so far on the first `done` folds, of earlier trials and of this round, and its score.

        wholes : the scores of all held-out answers of this round's candidates; without them the folds' mean decides
        """
        rows = [(scores[place], None if wholes is None else wholes[place]) for place in alive]
        if rung == 0:  # on a later rung this round has all that were judged alike
            earlier = [trial for trial in self.trials if None not in trial.fold_scores and trial.estimate is not None]
            rows += [
                (np.array(trial.fold_scores, dtype=float), None if wholes is None else trial.estimate)
                for trial in earlier
            ]
        judged = [(row, float(row[:done].mean()) if whole is None else whole) for row, whole in rows]
        judged = [(row, score) for row, score in judged if not np.isnan(row[:done]).any()]
        return max(judged, key=lambda pair: pair[1]) if judged else None

    def _trial(
        self,
        number: int,
        params: Params,
        scores: NDArray[np.float64],
        outcomes: Sequence[FoldOutcome],
        whole: float | None,
        rung: int,
    ) -> Trial:
        """Return the trial of a candidate; whole : the score of all its held-out answers, None where it was not fitted on all."""
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        trial = Trial(
            number=number,
            params=dict(params),
            status="ok",
            fold_scores=tuple(None if np.isnan(score) else float(score) for score in scores),
            mean=whole,
            estimate=whole,
            fit_seconds=sum(outcome.fit_seconds for outcome in outcomes),
            score_seconds=sum(outcome.score_seconds for outcome in outcomes),
            warnings=dict(sum((Counter(outcome.warnings) for outcome in outcomes), Counter())),
        )
        if errors:
            return changed(trial, status="failed", error=errors[0], mean=None, estimate=None)
        if whole is not None and self.evaluator.cheap(rung):
            return changed(trial, status="stopped", mean=None, reason="screened only")
        return trial

    def _stopped(self, trial: Trial, reason: str | None, leader: tuple[NDArray[np.float64], float] | None) -> Trial:
        """Return a trial that was stopped with what its folds let expect."""
        if reason is None or trial.status == "failed":
            return trial
        estimate = None
        if leader is not None:
            # On the same folds the difference to the leader is less noisy than the score itself.
            fold_scores, score = leader
            gaps = [own - best for own, best in zip(trial.fold_scores, fold_scores, strict=True) if own is not None]
            estimate = float(score + np.mean(gaps))
        return changed(trial, status="stopped", estimate=estimate, reason=reason)

    def _best(self) -> Trial:
        done = [trial for trial in self.trials if trial.mean is not None]
        if done:
            return max(done, key=lambda trial: (trial.mean or 0.0, -trial.number))
        counts = Counter(trial.error for trial in self.trials)
        plural = "trial" if len(self.trials) == 1 else "trials"
        raise UnfittedError(
            f"head {self.problem.head.name}: none of {len(self.trials)} {plural} could be fitted",
            [f"{count} x {error}" for error, count in counts.most_common(5)],
        )

    def out_of_fold(self, best: Trial) -> OutOfFold:
        """Predict every row with the best parameters, fitted on the folds that do not hold it out."""
        problem = self.problem
        outcomes = self._kept.get(best.number, [])
        # Replayed fits have no predictions, and most were not judged on their training rows. What was solved together is
        # solved again alone, so that a resumed search and an uninterrupted one give the same to the last digit.
        if self.evaluator.together or not outcomes or any(outcome.training is None for outcome in outcomes):
            outcomes = self.fits.on_every_fold(best.params)
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
        training = tuple(outcome.training for outcome in outcomes if outcome.training is not None)
        return OutOfFold(predictions, scores, kind if scores is not None else None, place, training)
