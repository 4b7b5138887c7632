"""Evaluators: how sets of parameters are fitted and judged on one fold, with or without work shared among them.

`generic` fits the head's own pipeline from scratch and works for every head; others, in `pipeline.heads.fast` and in the rows
of the table of heads, find the same optimum with work shared.
"""

from __future__ import annotations

import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.data.classes import ANY_CLASSES
from pipeline.errors import HeadError
from pipeline.heads.fast.solvers import standardise
from pipeline.heads.head import Head, Params, configure
from pipeline.heads.tuning.records import FoldOutcome, Problem


@dataclass(frozen=True)
class Screening:
    """A step of successive halving (Jamieson and Talwalkar 2016): a cheap version, and what goes on from it to full fits."""

    cheaper: Callable[[Problem, Params], Params]
    """(problem, a candidate) -> parameters that make it cheap; they replace its own."""
    budget: float
    """The best that together cost no more than so many of the head's defaults go on."""
    cost: Callable[[Problem, Params], float]
    """What a candidate's full fit costs against others'."""


# Functions with a name, so that a head can be pickled.
def _nothing(problem: Problem, fold: int) -> None:
    return None


def _always(problem: Problem) -> bool:
    return True


def _no_bytes(problem: Problem) -> int:
    return 0


@dataclass(frozen=True)
class Evaluator:
    """One way to judge parameters on a fold."""

    evaluate: Callable[[Problem, int, Any, Sequence[Params]], list[FoldOutcome]]
    """(problem, fold, what `prepare` returned, candidates) -> one outcome per candidate, of the rows `problem.judged`."""
    prepare: Callable[[Problem, int], Any] = _nothing
    """What all candidates share on a fold, made once."""
    together: bool = False
    """Whether the candidates of a round are solved as one problem; otherwise each is a task of its own."""
    usable: Callable[[Problem], bool] = _always
    """Whether it can serve this problem."""
    work_bytes: Callable[[Problem], int] = _no_bytes
    """What a fold's work takes besides copies of the features. Where a limit leaves less, the generic evaluator serves."""
    screening: Screening | None = None
    """A cheap version that is tried first; without one, all candidates are fitted in full."""
    fit_in_blocks: Callable[[Problem, Params, NDArray[Any]], Pipeline] | None = None
    """(problem, parameters, y) -> the head fitted on all rows, for evaluators that work on features on disk too."""
    quicker: bool = False
    """Whether `fit_in_blocks` is much quicker than the head's own fit in memory too."""

    @property
    def name(self) -> str:
        """What journals call it."""
        return self.evaluate.__name__


Fit = Callable[[Problem, int, Any, Params], FoldOutcome]


def one_by_one(fit: Fit) -> Callable[[Problem, int, Any, Sequence[Params]], list[FoldOutcome]]:
    """Turn the fit of one candidate on a fold into an evaluator of several; a fit that raises is a failed outcome."""

    def attempt(problem: Problem, fold: int, prepared: Any, params: Params) -> FoldOutcome:
        with counted() as counts:
            try:
                return changed(fit(problem, fold, prepared, params), warnings=dict(counts))
            except Exception as error:  # a trial that fails is a result: it is recorded and the search goes on
                return failed(error, counts)

    @wraps(fit)
    def evaluate(problem: Problem, fold: int, prepared: Any, candidates: Sequence[Params]) -> list[FoldOutcome]:
        return [attempt(problem, fold, prepared, params) for params in candidates]

    return evaluate


@one_by_one
def generic(problem: Problem, fold: int, prepared: Any, params: Params) -> FoldOutcome:
    """Fit the head's pipeline on a fold's training rows, and predict the held-out rows."""
    train, target = problem.folds[fold][0], problem.target
    only = target.only(problem.y[train], len(problem.judged(fold)))
    if only is not None:
        return FoldOutcome(*only)
    X_train, X = problem.matrices(fold)
    start = time.perf_counter()
    pipeline = configure(problem.head, params, problem.fold_seed(fold))
    pipeline = pipeline.set_params(**smaller_caches(pipeline, problem.work_bytes))
    pipeline = problem.head.fit(pipeline, X_train, problem.learned(train))
    fitted = time.perf_counter()
    predictions, scores, kind = target.answers(pipeline, X)
    return FoldOutcome(predictions, scores, kind, fitted - start, time.perf_counter() - fitted)


GENERIC = Evaluator(generic)


def evaluator_for(problem: Problem) -> Evaluator:
    """Return the head's evaluator, or the generic one where it has none or cannot be served.

    Raises
    ------
    HeadError
        When the features are on disk and the head cannot be fitted there.
    """
    evaluator = problem.head.evaluator or GENERIC
    if problem.on_disk and not works_on_disk(problem.head):
        raise HeadError(
            f"head {problem.head.name}: cannot be fitted on features that are larger than memory; set tuning.pca, or raise "
            "tuning.memory"
        )
    return evaluator if evaluator.usable(problem) else GENERIC


def works_on_disk(head: Head) -> bool:
    """Whether a head can be fitted on features that stay on disk."""
    if head.evaluator is None or head.evaluator.fit_in_blocks is None:
        return False
    nothing = Problem(head, np.empty((0, 0), np.float32), np.empty(0, np.int64), ANY_CLASSES, (), 0)
    return head.evaluator.usable(nothing)


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
    made: AbstractContextManager[None] = (
        nullcontext() if work_bytes is None else config_context(working_memory=max(1, work_bytes >> 21))
    )
    return made


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


_END_OF_SENTENCE = re.compile(r"\.(?=\s|[A-Z]|$)|\n")
"""A full stop within a name, such as `self.coef_`, ends none."""


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
    """Send every warning to the counter of its thread, and print none: a search would print the same one 500 times."""

    def count(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        counts = getattr(_current, "counts", None)
        # What a library plans to change is said to programmers, and is no news of a fit.
        if counts is not None and not issubclass(category, (FutureWarning, DeprecationWarning)):
            vague = category in (UserWarning, RuntimeWarning)
            text = _END_OF_SENTENCE.split(str(message), maxsplit=1)[0][:80]
            counts[f"{category.__name__}: {text}" if vague else category.__name__] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        yield


class Shared:
    """What evaluators prepared per fold: made once by the first thread that needs it, kept while it fits in memory."""

    def __init__(self, evaluator: Evaluator, problem: Problem, limit_bytes: int) -> None:
        self._evaluator, self._problem, self._limit = evaluator, problem, limit_bytes
        self._kept: dict[int, Any] = {}
        self._locks = {fold: threading.Lock() for fold in range(len(problem.folds))}

    def get(self, fold: int) -> Any:
        """Return what the candidates share on a fold."""
        with self._locks[fold]:
            if fold in self._kept:
                return self._kept[fold]
            made = self._evaluator.prepare(self._problem, fold)
            if sum(getattr(kept, "nbytes", 0) for kept in [*self._kept.values(), made]) <= self._limit:
                self._kept[fold] = made
            return made
