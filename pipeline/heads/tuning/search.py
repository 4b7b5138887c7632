"""The search: get points from a strategy, fit them on the folds, record the results, report the scores, and refit the best."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from pipeline.config import TuningConfig, unknown
from pipeline.data.classes import ANY_CLASSES, ScoreKind
from pipeline.data.targets import Target
from pipeline.errors import HeadError, UnfittedError, number_of
from pipeline.evaluation import METRICS, Predictions, metric_of
from pipeline.evaluation.leaderboard import LastFit
from pipeline.heads.head import Head, Params
from pipeline.heads.tuning import racing, strategies
from pipeline.heads.tuning.evaluation import Measured, Problem, counting_warnings
from pipeline.heads.tuning.features import FeatureMatrix, Projections, blocks, without_scaler
from pipeline.heads.tuning.folds import Folds
from pipeline.heads.tuning.journal import Journal, search_identity
from pipeline.heads.tuning.last_fit import Promise, fit_as_promised
from pipeline.heads.tuning.racing import Candidate, FoldFits, Trial
from pipeline.io.process import bar


@dataclass(frozen=True)
class TuningRun:
    """A finished search. `pipeline` is the best head, fitted on all training rows."""

    classes: NDArray[Any]
    """For targets with classes, the values that occur in y, in the order of the codes and of the score columns."""
    trials: tuple[Trial, ...]
    best: Trial
    scoring: str
    seconds: float
    """Wall time of the search, including resumed earlier runs but not the last fit (`fit_seconds`)."""
    replayed: int
    """Number of fits read from the journal instead of repeated."""
    out_of_fold: Predictions
    """The out-of-fold predictions of the best parameters, in codes. A class missing from a fold's training rows has probability 0,
    or the lowest decision value of its row."""
    pipeline: Pipeline
    fit_seconds: float
    last_fit: LastFit

    @property
    def mean(self) -> float:
        """The score of the best trial."""
        return float(self.best.mean or 0.0)


def check(head: Head, tuning: TuningConfig, kind: str = "classification") -> list[str]:
    """Return the reasons why a head cannot be tuned as configured for a kind of target, without fitting anything."""
    if kind not in head.targets:
        return [f"head {head.name}: serves {' and '.join(head.targets)}, and the target is {kind}"]
    if tuning.scoring == "auto":
        return []
    serving = {name: metric for name, metric in METRICS.items() if kind in metric.targets}
    if tuning.scoring not in serving:
        what = f"score of {kind}" if tuning.scoring in METRICS else "score"
        return [f"tuning.scoring: {unknown(what, tuning.scoring, ('auto', *serving))}"]
    if serving[tuning.scoring].needs_probabilities and not head.probabilities:
        others = ", ".join(name for name, metric in serving.items() if not metric.needs_probabilities)
        needs = f"tuning.scoring {tuning.scoring!r} needs probabilities, which this head lacks"
        return [f"head {head.name}: {needs}; scores that do not: {others}"]
    return []


def tune(
    head: Head,
    X: FeatureMatrix,
    y: ArrayLike,
    folds: Folds,
    tuning: TuningConfig,
    seed: int,
    journal: Path,
    projections: Projections | None = None,
    target: Target = ANY_CLASSES,
) -> TuningRun:
    """Search a head's parameters on the folds, and fit the best on all rows.

    `journal`, `tuning.jobs` and `tuning.memory` do not affect the results; the memory limits how much is cached and run in parallel.
    Fits run in threads: the heads' loops release Python's global interpreter lock, and threads share one `X` without copies.

    X : ndarray of shape (n, dim), float32, or a memory map of one; every head copies a fold's rows to memory, see
        `memory_needed`. `StoredRows` stay on disk and are read in blocks, by the heads that support it.
    y : labels as the target encodes them, or class names: array of shape (n,), or (n, k); the fitted pipeline predicts the values
        of the target's `learned`
    journal : the JSON-lines file of this search's fits; the fits of the same search in it are not repeated
    projections : those of this X, to share the components of `tuning.pca` with searches of other heads

    HeadError if the head cannot be tuned as configured, no trial could be fitted, or the journal cannot be written.
    """
    problems = check(head, tuning, target.kind)
    if problems:
        raise HeadError(problems[0])
    wrong = next((place for place, block in blocks(X) if not np.isfinite(block).all()), None)
    if wrong is not None:
        rows = f"rows {wrong.start} to {wrong.stop - 1}"
        raise HeadError(f"the features hold NaN or infinity, first within {rows}; extract them again in fp32")
    given = np.asarray(y)
    with fits_of(head, X, given, folds, tuning, seed, journal, projections, target) as (fits, classes):
        search = _Search(fits)
        best = search.run()
        out_of_fold, training = _out_of_fold(fits, best, search.kept)
        elapsed = fits.elapsed()
    promised, learned = Promise.of(best.mean or 0.0, training), fits.problem.target.learned(given)
    pipeline, seconds, last_fit = fit_as_promised(fits.problem, best.params, learned, fits.jobs, fits.metric, promised)
    return TuningRun(
        classes=classes,
        trials=tuple(search.trials),
        best=best,
        scoring=fits.metric.name,
        seconds=elapsed,
        replayed=fits.replayed,
        out_of_fold=out_of_fold,
        pipeline=pipeline,
        fit_seconds=seconds,
        last_fit=changed(last_fit, fold_warnings=best.warnings),
    )


@contextmanager
def fits_of(
    head: Head,
    X: FeatureMatrix,
    y: NDArray[Any],
    folds: Folds,
    tuning: TuningConfig,
    seed: int,
    journal: Path,
    projections: Projections | None = None,
    target: Target = ANY_CLASSES,
) -> Iterator[tuple[FoldFits, NDArray[Any]]]:
    """Open the journal of a search and yield its `FoldFits` and the classes that occur; the arguments are those of `tune`."""
    narrowed, codes, classes = target.narrowed(y)
    tuning = tuning.model_copy(update={"scoring": metric_of(tuning.scoring, narrowed).name})
    problem = Problem(head, X, codes, narrowed, tuple(folds), seed)
    if tuning.pca is not None:
        shared = projections or Projections(X, tuning.pca)
        problem = changed(problem, head=without_scaler(head), projections=shared)
    book = Journal.open(journal, search_identity(problem, tuning))
    try:
        fits = FoldFits(problem, tuning, book)
        with counting_warnings(), threadpool_limits(limits=1, user_api="blas"):
            yield fits, classes
    finally:
        book.close()


class _Search:
    """The state of one search: its trials so far, and the best candidate with its outcomes."""

    def __init__(self, fits: FoldFits) -> None:
        self.fits, self.tuning, self.problem = fits, fits.tuning, fits.problem
        self.trials: list[Trial] = []
        self.kept: Candidate | None = None
        self._kept_mean = -math.inf

    def run(self) -> Trial:
        """Run all trials and return the best finished one."""
        tuning, head = self.tuning, self.problem.head
        asked = strategies.rounds(tuning.strategy, head.space, head.defaults, tuning.trials, self.problem.seed)
        with bar(tuning.trials, "trials", head.name) as progress:

            def tell() -> None:
                best = max(self._estimates(), default=None)
                text = "" if best is None else f"best {tuning.scoring} {abs(best):.4f}, "
                progress.note(f"{text}{self.fits.done} fits")

            self.fits.tell = tell  # a trial on many rows takes hours, so progress is shown after each fit
            points = next(asked)
            # If all trials of the first two rounds failed, more would fail too.
            while len(self.trials) < 2 * len(points) or any(trial.status != "failed" for trial in self.trials):
                first = len(self.trials)
                fresh = self._race(dict(enumerate(points[: tuning.trials - first], first)), rung=0)
                self.trials += fresh
                progress.update(len(fresh))
                tell()
                if len(self.trials) >= tuning.trials:
                    break
                # A failed trial counts as the worst so far, so that the surrogate avoids its surroundings.
                worst = min(self._estimates(), default=None)
                try:
                    points = asked.send([worst if trial.status == "failed" else trial.estimate for trial in fresh])
                except StopIteration:
                    break
            self._promote()
        done = [trial for trial in self.trials if trial.mean is not None]
        if done:
            return max(done, key=lambda trial: (trial.mean or 0.0, -trial.number))
        counts = Counter(trial.error for trial in self.trials)
        raise UnfittedError(
            f"head {head.name}: none of {number_of(len(self.trials), 'trial')} could be fitted",
            [f"{count} x {error}" for error, count in counts.most_common(5)],
        )

    def _estimates(self) -> list[float]:
        return [trial.estimate for trial in self.trials if trial.estimate is not None]

    def _race(self, points: dict[int, Params], rung: int) -> list[Trial]:
        """Race points, by number; write the trials to the journal, and keep the candidate of the best."""
        candidates = {number: Candidate(number, params) for number, params in points.items()}
        trials = racing.race(self.fits, list(candidates.values()), rung, self.trials)
        elapsed = self.fits.elapsed()
        self.fits.journal.append(
            [{"event": "trial", "elapsed": elapsed, "rung": rung, **vars(trial)} for trial in trials]
        )
        for trial in trials:
            if trial.mean is not None and trial.mean > self._kept_mean:
                self.kept, self._kept_mean = candidates[trial.number], trial.mean
        return trials

    def _promote(self) -> None:
        """After a screening, fit the best candidates and the defaults in full; after each fold, the better half continues.

        Candidates are taken in the order of their expected improvement per cost, within the budget; the best estimate is always taken.
        """
        screening = self.fits.evaluator.screening
        if screening is None:
            return
        left, chosen = screening.budget * screening.cost(self.problem, self.problem.head.defaults), {0}
        judged = [trial for trial in self.trials if trial.estimate is not None]
        if judged:
            estimates = np.array([trial.estimate for trial in judged], dtype=float)
            costs = np.array([screening.cost(self.problem, trial.params) for trial in judged])
            complete = [trial for trial in judged if None not in trial.fold_scores]
            leader = max(complete, key=lambda trial: (trial.estimate or 0.0, -trial.number)).scores
            value = racing.worth(estimates, costs, leader, self.fits.held_out_rows, self.fits.metric.bounded)
            order = np.argsort(-value, kind="stable")
            best = order[estimates[order].argmax()]
            for place in order:
                if place == best or costs[place] <= left:
                    chosen.add(judged[place].number)
                    left -= costs[place]
        for trial in self._race({number: self.trials[number].params for number in sorted(chosen)}, rung=1):
            self.trials[trial.number] = trial


def _out_of_fold(fits: FoldFits, best: Trial, kept: Candidate | None) -> tuple[Predictions, tuple[Measured, ...]]:
    """Return the out-of-fold predictions of the best parameters, and the score of each fold's fit on its training rows."""
    problem = fits.problem
    outcomes = kept.outcomes if kept is not None and kept.number == best.number else []
    # Replayed fits have no predictions, and most were not scored on their training rows. Candidates solved together are
    # solved again alone, so that a resumed search and an uninterrupted one agree to the last digit.
    if fits.evaluator.together or not outcomes or any(outcome.training is None for outcome in outcomes):
        outcomes = fits.on_every_fold(best.params)
    predictions, place = np.zeros_like(problem.y), np.full(len(problem.y), -1, dtype=np.int64)
    kinds = {outcome.kind for outcome in outcomes}
    scores = np.zeros((len(problem.y), problem.target.width), dtype=np.float32) if None not in kinds else None
    for fold, outcome in enumerate(outcomes):
        held_out = problem.folds[fold][1]
        assert outcome.predictions is not None, "the best trial was fitted on every fold"
        predictions[held_out], place[held_out] = outcome.predictions, fold
        if scores is not None and outcome.scores is not None:
            scores[held_out] = outcome.scores
    kind: ScoreKind | None = None if scores is None else "decision" if "decision" in kinds else "probability"
    training = tuple(outcome.training for outcome in outcomes if outcome.training is not None)
    return Predictions(problem.y, predictions, None, None, None, place, scores, kind, problem.target), training
