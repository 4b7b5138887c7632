"""What a search fits on one fold, and how it is judged there, with or without work shared among sets of parameters.

`generic` fits the head's own pipeline from scratch and works for every head; the evaluators in `pipeline.heads.fast` find the same
optimum with work shared.
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

from pipeline.data.classes import ANY_CLASSES, ScoreKind
from pipeline.data.targets import Target
from pipeline.errors import HeadError
from pipeline.evaluation import Metric, Predictions
from pipeline.heads.head import Head, Params, configure
from pipeline.heads.tuning.features import FeatureMatrix, Projections, on_disk, standardise

log = logging.getLogger(__name__)


def derived_seed(seed: int, *place: int) -> int:
    """Return a seed of its own for one fit: (0, fold) for those of folds, (1, attempt) for those on all rows."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


@dataclass(frozen=True)
class Problem:
    """What every trial of a search is fitted on.

    X : ndarray of shape (n, dim), float32, or a memory map of one, or rows of a store that stay on disk
    y : what the target makes of labels: ndarray of shape (n,), int64, places in its classes; or as `Predictions` has it
    """

    head: Head
    X: FeatureMatrix
    y: NDArray[Any]
    target: Target
    folds: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    seed: int
    work_bytes: int | None = None
    """What each fold's fits may take beyond copies of the features, or on disk beyond the least; None without a limit."""
    projections: Projections | None = None
    """The principal components that the head works on instead of X."""
    judge_training: bool = False
    """Whether the rows a fold is fitted on are judged too, after those it holds out."""

    @property
    def on_disk(self) -> bool:
        """Whether the head is fitted on features that stay on disk."""
        return on_disk(self.X) and self.projections is None

    @property
    def dim(self) -> int:
        """The length of what the head works on."""
        return int((self.X if self.projections is None else self.matrices(0)[0]).shape[1])

    def learned(self, fold: int) -> NDArray[Any]:
        """Return what an estimator is fitted on in a fold: int64 of shape (k,), or numbers, float64 of shape (k,) or (k, width)."""
        return self.target.learned(self.y[self.folds[fold][0]])

    def matrices(self, fold: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what the head is fitted on in a fold, and what it is judged on, in memory.

        They are float32 of shape (n_train, dim) and (n_judged, dim), with `judge_training` the first at the end of the second.
        """
        train, held_out = self.folds[fold]
        if self.projections is not None:
            X_train, X = self.projections.fold(train, held_out)
        else:
            X_train, X = self.X[train], self.X[held_out]
        return X_train, np.concatenate([X, X_train]) if self.judge_training else X

    def fold_seed(self, fold: int) -> int:
        """Return the seed of a fold's fits: one for each, so that no luck of one seed is in all scores."""
        return derived_seed(self.seed, 0, fold)


@dataclass(frozen=True)
class Measured:
    """A score on some rows, higher being better, and its standard error."""

    score: float
    error: float

    @staticmethod
    def of(metric: Metric, predictions: Predictions) -> Measured:
        """Score predictions; the standard error is that of the mean of what each unit adds."""
        added = metric.contributions(predictions)
        return Measured(metric.score(predictions), float(added.std() / np.sqrt(len(added))))


@dataclass(frozen=True)
class FoldOutcome:
    """One set of parameters on one fold.

    predictions : of n_judged rows what `Predictions.y_pred` is; None after an error
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
    """On the rows it was fitted on, where they were judged."""
    score: float = np.nan
    """On the rows the fold holds out; higher is better."""


@dataclass(frozen=True)
class Screening:
    """A step of successive halving (Jamieson and Talwalkar 2016): a cheap version, and what goes on from it to full fits."""

    cheaper: Callable[[Problem, Params], Params]
    """(problem, a candidate) -> parameters that make it cheap; they replace its own."""
    budget: float
    """The best that together cost no more than so many of the head's defaults go on."""
    cost: Callable[[Problem, Params], float]
    """What a candidate's full fit costs against others'."""


Evaluate = Callable[[Problem, int, Any, Sequence[Params]], list[FoldOutcome]]
"""(problem, fold, what `prepare` returned, candidates) -> one outcome per candidate, of what `Problem.matrices` judges."""


@dataclass(frozen=True)
class Evaluator:
    """One way to judge parameters on a fold; of functions with a name, so that a head can be pickled."""

    name: str
    """What journals call it."""
    evaluate: Evaluate
    prepare: Callable[[Problem, int], Any] | None = None
    """What all candidates share on a fold, made once."""
    together: bool = False
    """Whether the candidates of a round are solved as one problem; otherwise each is a task of its own."""
    usable: Callable[[Problem], bool] | None = None
    """Whether it can serve a problem; None where it serves all."""
    work_bytes: Callable[[Problem], int] | None = None
    """What a fold's work takes besides copies of the features. Where a limit leaves less, the generic evaluator serves."""
    screening: Screening | None = None
    """A cheap version that is tried first; without one, all candidates are fitted in full."""
    fit_in_blocks: Callable[[Problem, Params, NDArray[Any]], Pipeline] | None = None
    """(problem, parameters, y) -> the head fitted on all rows, for evaluators that work on features on disk too."""
    quicker: bool = False
    """Whether `fit_in_blocks` is much quicker than the head's own fit in memory too."""


def one_by_one(fit: Callable[[Problem, int, Any, Params], FoldOutcome]) -> Evaluate:
    """Turn the fit of one candidate on a fold into an evaluator of several; a fit that raises is a failed outcome."""

    @wraps(fit)
    def evaluate(problem: Problem, fold: int, prepared: Any, candidates: Sequence[Params]) -> list[FoldOutcome]:
        made = []
        for params in candidates:
            with counted() as counts:
                try:
                    made.append(changed(fit(problem, fold, prepared, params), warnings=dict(counts)))
                except Exception as error:  # a trial that fails is a result: it is recorded and the search goes on
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
    """Return the head's evaluator, or the generic one where it has none or cannot be served.

    HeadError where the features are on disk and the head cannot be fitted there.
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
    """Whether the classifier is fitted on standardised features and on nothing else, as `standardised` returns them."""
    steps = [type(step) for _, step in problem.head.build(problem.seed).steps[:-1]]
    return steps == ([StandardScaler] if problem.projections is None else [])


def smaller_caches(pipeline: Pipeline, work_bytes: int | None) -> dict[str, float]:
    """Return the parameters that keep the kernel caches of a pipeline, in MB, within a limit; they change no result."""
    sizes = {key: value for key, value in pipeline.get_params().items() if key.endswith("__cache_size")}
    return {} if work_bytes is None else {key: max(1.0, min(mb, work_bytes / 1e6)) for key, mb in sizes.items()}


def working_memory(work_bytes: int | None) -> AbstractContextManager[None]:
    """Keep scikit-learn's blocks of distances, as nearest neighbours take, within a limit, in this thread.

    It counts a block in float64; besides the distances there are their places, so that twice as much is taken.
    """
    limit = None if work_bytes is None else max(1, work_bytes >> 21)
    return cast("AbstractContextManager[None]", config_context(working_memory=limit))


def standardised(problem: Problem, fold: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return a fold's training and held-out rows as a head gets them behind its StandardScaler.

    Both are float32, of shape (n_train, dim) and (n_judged, dim), as `Problem.matrices` has them.
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
    """Count this thread's warnings by category, vague ones by their text too, within `counting_warnings`."""
    _current.counts = Counter()
    try:
        yield _current.counts
    finally:
        _current.counts = None


@contextmanager
def counting_warnings() -> Iterator[None]:
    """Send every warning to the counter of its thread, and print none: a search would print the same one 500 times.

    What shows warnings is one for all threads: the first search changes it, the last one changes it back.
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
    # What a library plans to change is said to programmers, and is no news of a fit.
    if counts is not None and not issubclass(category, (FutureWarning, DeprecationWarning)):
        vague = category in (UserWarning, RuntimeWarning)
        text = re.split(r"\.?(?:\n|$)|\.(?= |[A-Z])", str(message), maxsplit=1)[0][:80]  # its first sentence
        counts[f"{category.__name__}: {text}" if vague else category.__name__] += 1


class FoldWork:
    """Fits sets of parameters on folds; what its evaluator prepares of a fold is made by the first thread that needs it, and kept."""

    def __init__(self, problem: Problem, evaluator: Evaluator, metric: Metric, limit_bytes: int) -> None:
        self._problem, self._evaluator, self._metric, self._limit = problem, evaluator, metric, limit_bytes
        self._threads = ThreadpoolController()
        self._kept: dict[int, Any] = {}
        self._locks = [threading.Lock() for _ in problem.folds]

    def fit(self, fold: int, points: Sequence[Params], judge_training: bool) -> list[FoldOutcome]:
        """Fit points on a fold and score the rows it holds out, and if asked those they are fitted on."""
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
        # OpenMP counts its threads per calling thread, so the limit is set here and not once outside.
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
                    "head %s: no shared work on fold %d (%r); each trial is fitted by itself", name, fold, error
                )
                return generic(problem, fold, None, points)

    def _prepared(self, fold: int) -> Any:
        """Return what the candidates share on a fold; it is kept while it fits into the limit."""
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
