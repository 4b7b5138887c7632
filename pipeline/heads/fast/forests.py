"""Random forests: judged from a few trees first, and grown on from there when they are worth it.

Trees of a forest vote independently, so a forest of a few is a noisier version of the same forest at a fraction of its
price, and the trees grown for it are the first ones of the whole forest. Only votes are kept, not trees. Judged on the
rows of each fold that are held out and never on out-of-bag rows, which would know their own group or near-duplicate.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

from pipeline.data.classes import expand_scores
from pipeline.heads.head import Params, configure
from pipeline.heads.tuning.evaluation import Evaluator, Screening, generic, one_by_one
from pipeline.heads.tuning.records import FoldOutcome, Problem

FEW = 16
"""Trees a candidate is first judged from, at the price of the head's defaults."""

FEWEST, MOST = 8, 32
"""Bounds of that number for dearer and cheaper candidates."""

BUDGET = 7.0
"""What goes on to the whole forest may cost so many forests of the head's defaults, which may go on besides."""

KEPT_BYTES = 64 << 20
"""Votes kept on one fold; a forest whose votes are not kept is grown from its first tree again, with the same result."""


@dataclass(frozen=True)
class Votes:
    """What the first trees of a forest say of the rows it is judged on, those a fold holds out first.

    total : ndarray of shape (n, len(present)), float64: the trees' probabilities, summed in the order of the trees
    squares : ndarray of shape (n,), float64: the sum over trees and classes of their squares
    present : ndarray of int64: the classes among the training rows
    """

    trees: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]
    present: NDArray[np.int64]
    fit_seconds: float = 0.0
    score_seconds: float = 0.0


class Grown:
    """The votes of one fold's forests so far, by their parameters without the number of trees; threads share it."""

    def __init__(self) -> None:
        self.votes: dict[str, Votes] = {}
        self._lock = threading.Lock()

    def keep(self, key: str, votes: Votes) -> None:
        """Keep votes in place of those of fewer trees, where there is room."""
        with self._lock:
            others = sum(kept.total.nbytes for other, kept in self.votes.items() if other != key)
            if others + votes.total.nbytes <= KEPT_BYTES:
                self.votes[key] = votes


def _no_votes(problem: Problem, fold: int) -> Grown:
    return Grown()


def usable(problem: Problem) -> bool:
    """Whether the head is a forest with a seed that has twice the trees of a first look or more."""
    model = configure(problem.head, problem.head.defaults, problem.seed)[-1]
    return (
        type(model) in (RandomForestClassifier, ExtraTreesClassifier)
        and isinstance(model.random_state, int)
        and not model.warm_start
        and "n_estimators" not in problem.head.space
        and bool(model.n_estimators >= 2 * MOST)
    )


@one_by_one
def forest(problem: Problem, fold: int, grown: Grown, params: Params) -> FoldOutcome:
    """Grow a candidate's forest to its number of trees; one of fewer than the head's is judged as `extrapolated`."""
    _, held_out = problem.folds[fold]
    whole = int(configure(problem.head, {}, problem.seed)[-1].n_estimators)
    key = repr(sorted((name, value) for name, value in params.items() if name != "n_estimators"))
    votes = grow(problem, fold, params, grown.votes.get(key))
    grown.keep(key, votes)
    shares = votes.total / votes.trees
    if votes.trees < whole:
        n = len(held_out)
        first = replace(votes, total=votes.total[:n], squares=votes.squares[:n])
        shares[:n] = extrapolated(first, problem.y[held_out], whole)
    return FoldOutcome(
        predictions=votes.present[shares.argmax(axis=1)],
        scores=expand_scores(shares, votes.present, problem.width, "probability"),
        kind="probability",
        fit_seconds=votes.fit_seconds,
        score_seconds=votes.score_seconds,
    )


def cost(problem: Problem, params: Params) -> float:
    """Return the features a split looks at, to which the time a tree takes is proportional."""
    dim = problem.dim
    wanted = configure(problem.head, params, problem.seed)[-1].max_features
    named = {"sqrt": np.sqrt(dim), "log2": np.log2(dim), None: dim}
    features = float(named[wanted] if wanted in named else wanted if isinstance(wanted, int) else wanted * dim)
    return max(1.0, features)


def few(problem: Problem, params: Params) -> Params:
    """Return how many trees a candidate is first judged from: about as many as take as long as the defaults' `FEW`.

    A forest whose splits look at few features is cheap, and its trees differ much: from an equal number of trees it
    would be judged worse than it is, and a dear forest better, which leads the surrogate to where trees are dear.
    """
    trees = FEW * cost(problem, problem.head.defaults) / cost(problem, params)
    return {"n_estimators": int(np.clip(round(trees), FEWEST, MOST))}


def grow(problem: Problem, fold: int, params: Params, votes: Votes | None) -> Votes:
    """Return the votes of a forest with these parameters, those of its first trees given or not.

    A forest draws one number per tree from its random state, so a state that has drawn as many as there are trees gives
    the trees that would have come next.
    """
    train, _ = problem.folds[fold]
    pipeline = configure(problem.head, params, problem.fold_seed(fold))
    model = pipeline[-1]
    trees = int(model.n_estimators)
    if votes is not None and votes.trees == trees:
        return votes
    if votes is not None and votes.trees > trees:
        votes = None
    done = votes.trees if votes is not None else 0
    state = np.random.RandomState(model.random_state)
    state.randint(np.iinfo(np.int32).max, size=done)
    model.set_params(n_estimators=trees - done, random_state=state)
    X_train, X = problem.matrices(fold)
    start = time.perf_counter()
    pipeline.fit(X_train, problem.y[train])
    fitted = time.perf_counter()
    if len(pipeline) > 1:
        X = pipeline[:-1].transform(X)
    total = np.zeros((len(X), len(model.classes_))) if votes is None else votes.total.copy()
    squares = np.zeros(len(X)) if votes is None else votes.squares.copy()
    for tree in model.estimators_:  # tree by tree, as scikit-learn sums them: the last digit decides a tie
        vote = tree.predict_proba(X)
        total += vote
        squares += np.einsum("ij,ij->i", vote, vote)
    return Votes(
        trees=trees,
        total=total,
        squares=squares,
        present=np.asarray(model.classes_, dtype=np.int64),
        fit_seconds=fitted - start + (votes.fit_seconds if votes is not None else 0.0),
        score_seconds=time.perf_counter() - fitted + (votes.score_seconds if votes is not None else 0.0),
    )


def extrapolated(votes: Votes, y: NDArray[np.int64], trees: int) -> NDArray[np.float64]:
    """Return vote shares that err about as often as those of a forest with more trees.

    With T trees the share p of a row lies around the mean m of its class with variance b + s / T, where s is the variance
    between a row's trees and b is what rows differ in truly. s is estimated without bias from the sum and the sum of
    squares of the votes, and b as what is left. Moving each share towards m until the variance is b + s / `trees` gives
    rows the spread that more trees would give (the shrinkage of James and Stein 1961). Else parameters whose trees
    differ much, which gain most from more trees, would lose against those whose trees are alike.

    It reads the labels of the rows, so it is for ranking parameters only, never for a score that is reported. The mean
    leaves the row itself out; a row that is alone in its class stays as it is.

    y : ndarray of shape (n,), int64: the classes of the rows
    Returns an ndarray of shape (n, len(votes.present)); rows sum to 1.
    """
    shares = votes.total / votes.trees
    codes, sizes = np.unique(y, return_inverse=True, return_counts=True)[1:]
    sums = np.zeros((len(sizes), shares.shape[1]))
    np.add.at(sums, codes, shares)
    companions = (sizes[codes] - 1)[:, None]
    mean = (sums[codes] - shares) / np.maximum(companions, 1)
    away = np.where(companions > 0, shares - mean, 0.0)
    # Around a mean without the row itself the variance is larger by 1 + 1 / companions.
    spread = float(np.mean((away**2).sum(axis=1) * (companions / (companions + 1))[:, 0]))
    within = np.maximum(votes.squares - (votes.total**2).sum(axis=1) / votes.trees, 0.0) / max(votes.trees - 1, 1)
    s = float(within.mean())
    b = max(spread - s / votes.trees, 0.0)
    keep = np.sqrt((b + s / trees) / (b + s / votes.trees)) if s > 0 else 1.0
    return np.asarray(shares - (1 - keep) * away)


def forest_of_numbers(problem: Problem, fold: int, prepared: None, candidates: Sequence[Params]) -> list[FoldOutcome]:
    """Grow each candidate's forest from its first tree; few trees of it are judged as they are."""
    return generic(problem, fold, prepared, candidates)


FOREST_OF_NUMBERS = Evaluator(forest_of_numbers, screening=Screening(few, BUDGET, cost))
FOREST = Evaluator(forest, prepare=_no_votes, usable=usable, screening=Screening(few, BUDGET, cost))
