"""Fitting and scoring of candidates on one fold, with or without work shared among candidates.

`generic` fits the head's own pipeline from scratch and works for every head; the evaluators in `pipeline.heads.fast` find the same
optimum with shared work.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from functools import wraps
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import ThreadpoolController

from pipeline.data.classes import ANY_CLASSES, ScoreKind, expand_scores
from pipeline.data.targets import Target
from pipeline.errors import HeadError
from pipeline.evaluation import Metric, Predictions
from pipeline.heads.head import Head, Params, configure
from pipeline.heads.tuning.features import FeatureMatrix, Projections, on_disk, standardise

log = logging.getLogger(__name__)


def derived_seed(seed: int, *place: int) -> int:
    """Return the derived seed of one fit: `place` is (0, fold) for fits on folds, (1, attempt) for fits on all rows."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclass(frozen=True)
class Problem:
    """The head, data, folds and seed that all trials of a search share.

    X : ndarray of shape (n, dim), float32, or a memory map of one, or rows of a store that stay on disk
    y : labels as the target encodes them: ndarray of shape (n,), int64, class indices; or as `Predictions` has it
    """

    head: Head
    X: FeatureMatrix
    y: NDArray[Any]
    target: Target
    folds: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    seed: int
    work_bytes: int | None = None
    """Memory for a fold's fits besides copies of the features, or on disk besides the minimum; None without a limit."""
    projections: Projections | None = None
    """The principal components that the head is fitted on instead of X."""
    judge_training: bool = False
    """Whether a fold's training rows are predicted too, after its held-out rows."""

    @property
    def on_disk(self) -> bool:
        """Whether the head is fitted on features that stay on disk."""
        return on_disk(self.X) and self.projections is None

    @property
    def dim(self) -> int:
        """The number of features, or principal components, that the head is fitted on."""
        return int((self.X if self.projections is None else self.matrices(0)[0]).shape[1])

    def learned(self, fold: int) -> NDArray[Any]:
        """Return the y of a fold's training rows for `fit`: int64 of shape (k,), or numbers, float64 of shape (k,) or (k, width)."""
        return self.target.learned(self.y[self.folds[fold][0]])

    def matrices(self, fold: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return a fold's training rows and the rows to predict, in memory.

        Both are float32, of shape (n_train, dim) and (n_judged, dim); with `judge_training` the training rows end the second too.
        """
        train, held_out = self.folds[fold]
        if self.projections is not None:
            X_train, X = self.projections.fold(train, held_out)
        else:
            X_train, X = self.X[train], self.X[held_out]
        return X_train, np.concatenate([X, X_train]) if self.judge_training else X

    def fold_seed(self, fold: int) -> int:
        """Return the seed of a fold's fits; it differs between folds, so that one lucky seed does not affect all scores."""
        return derived_seed(self.seed, 0, fold)


@dataclass(frozen=True)
class Measured:
    """A score on some rows, higher being better, and its standard error."""

    score: float
    error: float

    @staticmethod
    def of(metric: Metric, predictions: Predictions) -> Measured:
        """Score predictions; the standard error is that of the mean of the units' contributions."""
        added = metric.contributions(predictions)
        return Measured(metric.score(predictions), float(added.std() / np.sqrt(len(added))))


@dataclass(frozen=True)
class FoldOutcome:
    """The result of one set of parameters on one fold.

    predictions : of n_judged rows, in the form of `Predictions.y_pred`; None after an error
    scores : ndarray of shape (n_judged, width), float32: probabilities or decision values; None without any
    """

    predictions: NDArray[Any] | None
    scores: NDArray[np.float32] | None = None
    kind: ScoreKind | None = None
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    warnings: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None
    training: Measured | None = None
    """The score on the training rows; None if they were not predicted."""
    score: float = np.nan
    """The score on the fold's held-out rows; higher is better."""


def outcome_of(
    target: Target, scores: NDArray[np.floating], present: NDArray[Any], fit_seconds: float, score_seconds: float = 0.0
) -> FoldOutcome:
    """Return the outcome of decision values: the class with the highest, the labels above 0, or the numbers that they are.

    scores : of any float dtype, shape (n_judged, k), or (n_judged,) for two classes; present : the k classes of the fit, int64
    """
    if target.kind == "regression":
        return FoldOutcome(target.told(scores), None, None, fit_seconds, score_seconds)
    if not target.exclusive:
        labels = scores > 0
        return FoldOutcome(labels, scores.astype(np.float32, copy=False), "decision", fit_seconds, score_seconds)
    predictions = present[(scores > 0).astype(np.int64) if scores.ndim == 1 else scores.argmax(axis=1)]
    full = expand_scores(scores, present, target.width, "decision")
    return FoldOutcome(predictions, full, "decision", fit_seconds, score_seconds)


@dataclass(frozen=True)
class Screening:
    """A step of successive halving (Jamieson and Talwalkar 2016): cheap fits of all candidates, then full fits of the best."""

    cheaper: Callable[[Problem, Params], Params]
    """(problem, candidate) -> the parameters to replace for a cheap fit."""
    budget: float
    """Cost limit of the full fits, in units of a fit of the head's defaults."""
    cost: Callable[[Problem, Params], float]
    """(problem, candidate) -> the relative cost of its full fit."""


Evaluate = Callable[[Problem, int, Any, Sequence[Params]], list[FoldOutcome]]
"""(problem, fold, result of `prepare`, candidates) -> one outcome per candidate, for the rows to predict of `Problem.matrices`."""


@dataclass(frozen=True)
class Evaluator:
    """A method of fitting and scoring candidates on a fold; made of named functions, so that a head can be pickled."""

    name: str
    """Its name in journals."""
    evaluate: Evaluate
    prepare: Callable[[Problem, int], Any] | None = None
    """(problem, fold) -> the work that all candidates on a fold share, computed once."""
    together: bool = False
    """Whether the candidates of a round are solved as one problem; otherwise each is a separate task."""
    usable: Callable[[Problem], bool] | None = None
    """Whether it supports a problem; None if it supports all."""
    work_bytes: Callable[[Problem], int] | None = None
    """Memory for a fold's work besides copies of the features; if a limit leaves less, the generic evaluator is used."""
    screening: Screening | None = None
    """The cheap fits to try first; without them, all candidates are fitted in full."""
    fit_in_blocks: Callable[[Problem, Params, NDArray[Any]], Pipeline] | None = None
    """(problem, parameters, y) -> the head fitted on all rows, for evaluators that also support features on disk."""
    quicker: bool = False
    """Whether `fit_in_blocks` is much faster than the head's own fit in memory too."""


def one_by_one(fit: Callable[[Problem, int, Any, Params], FoldOutcome]) -> Evaluate:
    """Turn a function for one candidate on a fold into one for several; an exception becomes a failed outcome."""

    @wraps(fit)
    def evaluate(problem: Problem, fold: int, prepared: Any, candidates: Sequence[Params]) -> list[FoldOutcome]:
        made = []
        for params in candidates:
            with counted() as counts:
                try:
                    made.append(changed(fit(problem, fold, prepared, params), warnings=dict(counts)))
                except Exception as error:  # a failed trial is recorded, and the search continues
                    made.append(failed(error, counts))
        return made

    return evaluate


@one_by_one
def generic(problem: Problem, fold: int, prepared: Any, params: Params) -> FoldOutcome:
    """Fit the head's pipeline on a fold's training rows, and predict the held-out rows."""
    (train, held_out), target = problem.folds[fold], problem.target
    only = target.only(problem.y[train], len(held_out) + len(train) * problem.judge_training)
    if only is not None:
        return FoldOutcome(*only)
    X_train, X = problem.matrices(fold)
    start = time.perf_counter()
    pipeline = configure(problem.head, params, problem.fold_seed(fold))
    pipeline = pipeline.set_params(**smaller_caches(pipeline, problem.work_bytes))
    pipeline = problem.head.fit(pipeline, X_train, problem.learned(fold))
    fitted = time.perf_counter()
    predictions, scores, kind = target.answers(pipeline, X)
    return FoldOutcome(predictions, scores, kind, fitted - start, time.perf_counter() - fitted)


GENERIC = Evaluator("generic", generic)


def evaluator_for(problem: Problem) -> Evaluator:
    """Return the head's evaluator, or the generic one if it has none or its own does not support the problem.

    HeadError if the features are on disk and the head cannot be fitted there.
    """
    evaluator = problem.head.evaluator or GENERIC
    if problem.on_disk and not works_on_disk(problem.head):
        raise HeadError(
            f"head {problem.head.name}: cannot be fitted on features that are larger than memory; set tuning.pca, or raise "
            "tuning.memory"
        )
    return evaluator if evaluator.usable is None or evaluator.usable(problem) else GENERIC


def works_on_disk(head: Head) -> bool:
    """Whether a head can be fitted on features that stay on disk."""
    own, nothing = head.evaluator, np.empty((0, 0), np.float32)
    problem = Problem(head, nothing, np.empty(0, np.int64), ANY_CLASSES, (), 0)
    return own is not None and own.fit_in_blocks is not None and (own.usable is None or own.usable(problem))


def scaled(problem: Problem) -> bool:
    """Whether the model is fitted directly on standardised features, as `standardised` returns them."""
    steps = [type(step) for _, step in problem.head.build(problem.seed).steps[:-1]]
    return steps == ([StandardScaler] if problem.projections is None else [])


def smaller_caches(pipeline: Pipeline, work_bytes: int | None) -> dict[str, float]:
    """Return the parameters that limit the kernel caches of a pipeline, in MB; they change no result."""
    sizes = {key: value for key, value in pipeline.get_params().items() if key.endswith("__cache_size")}
    return {} if work_bytes is None else {key: max(1.0, min(mb, work_bytes / 1e6)) for key, mb in sizes.items()}


def working_memory(work_bytes: int | None) -> AbstractContextManager[None]:
    """Limit the memory of scikit-learn's blocks of distances, such as those of nearest neighbours, in this thread.

    scikit-learn counts the distances only, in float64; their indices take as much again, hence half of the limit.
    """
    limit = None if work_bytes is None else max(1, work_bytes >> 21)
    return cast("AbstractContextManager[None]", config_context(working_memory=limit))


def standardised(problem: Problem, fold: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a fold's training rows and rows to predict, as transformed by the head's StandardScaler.

    Both are float32, of shape (n_train, dim) and (n_judged, dim), as in `Problem.matrices`.
    """
    train, held_out = problem.matrices(fold)
    return standardise(train, held_out) if problem.projections is None else (train, held_out)


def failed(error: Exception, counts: Mapping[str, int]) -> FoldOutcome:
    """Return the outcome of a fit that raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return FoldOutcome(None, warnings=dict(counts), error=text[:500])


_current = threading.local()
_counting, _searches, _restore = threading.Lock(), 0, ExitStack()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count this thread's warnings by category, those of generic categories also by text; used within `counting_warnings`."""
    _current.counts = Counter()
    try:
        yield _current.counts
    finally:
        _current.counts = None


@contextmanager
def counting_warnings() -> Iterator[None]:
    """Send every warning to the counter of its thread and print none, as a search would print the same one 500 times.

    `warnings.showwarning` is shared by all threads: the first search replaces it, the last one restores it.
    """
    global _searches
    with _counting:
        if _searches == 0:
            _restore.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = _count
        _searches += 1
    try:
        yield
    finally:
        with _counting:
            _searches -= 1
            if _searches == 0:
                _restore.close()


def _count(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    counts = getattr(_current, "counts", None)
    # A library's planned changes concern its callers, not the fit.
    if counts is not None and not issubclass(category, (FutureWarning, DeprecationWarning)):
        vague = category in (UserWarning, RuntimeWarning)
        text = re.split(r"\.?(?:\n|$)|\.(?= |[A-Z])", str(message), maxsplit=1)[0][:80]  # its first sentence
        counts[f"{category.__name__}: {text}" if vague else category.__name__] += 1


class FoldWork:
    """Fits sets of parameters on folds; the shared work of a fold is computed by the first thread that needs it, and kept."""

    def __init__(self, problem: Problem, evaluator: Evaluator, metric: Metric, limit_bytes: int) -> None:
        self._problem, self._evaluator, self._metric, self._limit = problem, evaluator, metric, limit_bytes
        self._threads = ThreadpoolController()
        self._kept: dict[int, Any] = {}
        self._locks = [threading.Lock() for _ in problem.folds]

    def fit(self, fold: int, points: Sequence[Params], judge_training: bool) -> list[FoldOutcome]:
        """Fit points on a fold and score them on its held-out rows, with `judge_training` also on its training rows."""
        problem, metric = changed(self._problem, judge_training=judge_training), self._metric
        train, held_out = problem.folds[fold]
        n, made = len(held_out), []
        for outcome in self._outcomes(problem, fold, [{**problem.head.fixed, **point} for point in points]):
            if outcome.predictions is not None:
                if judge_training:
                    own = answers(problem, metric, [train], [_rows(outcome, slice(n, None))])
                    outcome = changed(_rows(outcome, slice(n)), training=Measured.of(metric, own))
                outcome = changed(outcome, score=metric.score(answers(problem, metric, [held_out], [outcome])))
            made.append(outcome)
        return made

    def _outcomes(self, problem: Problem, fold: int, points: Sequence[Params]) -> list[FoldOutcome]:
        # OpenMP's limit applies per calling thread, so it is set here and not once outside.
        with self._threads.limit(limits=1, user_api="openmp"), working_memory(problem.work_bytes):
            if problem.target.only(problem.y[problem.folds[fold][0]], 0) is not None:
                return generic(problem, fold, None, points)
            try:
                return self._evaluator.evaluate(problem, fold, self._prepared(fold), points)
            except (MemoryError, np.linalg.LinAlgError) as error:
                if problem.on_disk:
                    return [failed(error, {}) for _ in points]
                name = problem.head.name
                log.warning(
                    "head %s: no shared work on fold %d (%r); each trial is fitted separately", name, fold, error
                )
                return generic(problem, fold, None, points)

    def _prepared(self, fold: int) -> Any:
        """Return the shared work of a fold; it is kept if it fits into the memory limit."""
        if self._evaluator.prepare is None:
            return None
        with self._locks[fold]:
            if fold in self._kept:
                return self._kept[fold]
            made = self._evaluator.prepare(self._problem, fold)
            if sum(getattr(kept, "nbytes", 0) for kept in [*self._kept.values(), made]) <= self._limit:
                self._kept[fold] = made
            return made


def answers(
    problem: Problem, metric: Metric, rows: Sequence[NDArray[np.int64]], outcomes: Sequence[FoldOutcome]
) -> Predictions:
    """Return the predictions of rows, given by fold; thresholds are chosen on the other folds, or on the rows of a single fold."""
    target, y = problem.target, problem.y[np.concatenate(rows)]
    labels = np.concatenate([outcome.predictions for outcome in outcomes if outcome.predictions is not None])
    assert len(labels) == len(y), "a failed fit cannot be scored"
    parts = [outcome.scores for outcome in outcomes if outcome.scores is not None]
    scores = np.concatenate(parts) if len(parts) == len(rows) else None
    if metric.threshold:
        folds = None if len(rows) == 1 else np.repeat(np.arange(len(rows)), [len(part) for part in rows])
        labels = target.decided(y, labels, scores, metric.threshold, folds)
    return Predictions(y, labels, scores if metric.needs_probabilities else None, target=target)


def _rows(outcome: FoldOutcome, rows: slice) -> FoldOutcome:
    assert outcome.predictions is not None, "a failed fit cannot be scored"
    scores = None if outcome.scores is None else outcome.scores[rows]
    return changed(outcome, predictions=outcome.predictions[rows], scores=scores)
