"""What a search leaves behind: its trials, the best of them, and its predictions out of fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from pipeline.data.classes import ScoreKind
from pipeline.data.targets import Target
from pipeline.evaluation import Metric, Predictions
from pipeline.evaluation.leaderboard import LastFit
from pipeline.heads.head import Head, Params
from pipeline.heads.tuning.features import Features, on_disk
from pipeline.heads.tuning.projection import Projections


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
    X: Features
    y: NDArray[Any]
    target: Target
    folds: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    seed: int
    spare_bytes: int = 0
    """What each fold's work may take beyond the least, when the features are on disk."""
    work_bytes: int | None = None
    """What each fold's fits may take for kernels and distances, beyond copies of the features; None without a limit."""
    projections: Projections | None = None
    """The principal components that the head works on instead of X."""
    judge_training: bool = False
    """Whether the rows a fold is fitted on are judged too, after those it holds out."""

    @property
    def width(self) -> int:
        """How many numbers a head says of an image."""
        return self.target.width

    def learned(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return what an estimator is fitted on in some rows, as the target says.

        rows : int64 of shape (k,); returns int64 of shape (k,), or numbers, float64 of shape (k,) or (k, width)
        """
        return self.target.learned(self.y[rows])

    @property
    def on_disk(self) -> bool:
        """Whether the head is fitted on features that stay on disk."""
        return on_disk(self.X) and self.projections is None

    @property
    def dim(self) -> int:
        """The length of what the head works on."""
        return int((self.X if self.projections is None else self.matrices(0)[0]).shape[1])

    def matrices(self, fold: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return what the head is fitted on in a fold, and what it is judged on, in memory.

        They are float32 of shape (n_train, dim) and (n_judged, dim), the second with the rows that `judged` names.
        """
        train, held_out = self.folds[fold]
        if self.projections is not None:
            X_train, X = self.projections.fold(train, held_out)
        else:
            X_train, X = self.X[train], self.X[held_out]
        return X_train, np.concatenate([X, X_train]) if self.judge_training else X

    def judged(self, fold: int) -> NDArray[np.int64]:
        """Return the rows that a fold's fits are judged on: those it holds out, with `judge_training` also the others.

        Returns int64 of shape (n_judged,).
        """
        train, held_out = self.folds[fold]
        return np.concatenate([held_out, train]) if self.judge_training else held_out

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

    predictions : of n_validation rows what `Predictions.y_pred` is; None after an error
    scores : ndarray of shape (n_validation, width), float32: probabilities or decision values; None without any
    training : the score on the rows it was fitted on, where they were judged
    """

    predictions: NDArray[Any] | None
    scores: NDArray[np.float32] | None = None
    kind: ScoreKind | None = None
    fit_seconds: float = 0.0
    score_seconds: float = 0.0
    warnings: Mapping[str, int] = field(default_factory=dict)
    error: str | None = None
    training: Measured | None = None
    score: float = np.nan
    """Of the rows the fold holds out; higher is better."""


@dataclass(eq=False)
class Candidate:
    """Parameters on their way through the folds: what was fitted so far, by fold, and why no more is."""

    number: int
    params: Params
    outcomes: dict[int, FoldOutcome] = field(default_factory=dict)
    reason: str | None = None

    @property
    def fitted(self) -> list[FoldOutcome]:
        """The outcomes in the order of the folds."""
        return [self.outcomes[fold] for fold in sorted(self.outcomes)]

    def scores(self, done: int) -> NDArray[np.float64]:
        """Return the scores on the first folds, float64 of shape (done,)."""
        return np.array([self.outcomes[fold].score for fold in range(done)])


@dataclass(frozen=True)
class Trial:
    """One set of parameters and how it scored; higher is better.

    `fold_scores` has None for a fold that was not fitted. `mean` is there for a finished trial only. `estimate` is what
    the search believed: the mean, or for a stopped trial what its first folds or its cheap version let expect.
    """

    number: int
    params: Params
    status: Literal["ok", "stopped", "failed"]
    fold_scores: tuple[float | None, ...]
    mean: float | None
    estimate: float | None
    fit_seconds: float
    score_seconds: float
    warnings: Mapping[str, int]
    error: str | None = None
    reason: str | None = None
    """Why it was stopped."""

    @property
    def scores(self) -> NDArray[np.float64]:
        """The fold scores, float64 of shape (n_folds,), with NaN for a fold that was not fitted."""
        return np.array(self.fold_scores, dtype=np.float64)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the fold scores, with n - 1; None unless finished."""
        if self.mean is None or len(self.fold_scores) < 2:
            return None
        return float(np.std([score for score in self.fold_scores if score is not None], ddof=1))

    def record(self) -> dict[str, Any]:
        """Return the trial as plain data for JSON."""
        rounded = {name: round(getattr(self, name), 6) for name in ("fit_seconds", "score_seconds")}
        return {**vars(self), "fold_scores": list(self.fold_scores), **rounded}


@dataclass(frozen=True)
class TuningRun:
    """A finished search. `pipeline` is the best head, fitted on all training rows."""

    classes: NDArray[Any]
    """Of a target with classes the values of y that occur, in the order of the codes and of the score columns."""
    trials: tuple[Trial, ...]
    best: Trial
    strategy: str
    scoring: str
    seconds: float
    """Wall time of the search, earlier runs that it resumed included; the last fit is `fit_seconds`."""
    surrogate_seconds: float
    """Wall time spent choosing the next points."""
    replayed: int
    """Fits that were read from the journal instead of done again."""
    out_of_fold: Predictions
    """What the best parameters said of each training row when its fold was held out, in codes. Of a class that a fold's training
    rows lack the probability is 0, or the lowest decision value of its row."""
    pipeline: Pipeline
    fit_seconds: float
    last_fit: LastFit
