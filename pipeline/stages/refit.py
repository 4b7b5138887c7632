"""Refit: fit saved heads on additional images or classes with their tuned hyperparameters, and judge whether a new search is worthwhile.

The leaderboard and its bundles do not change. Results are in the experiment's folder `refit`, with several targets in
one folder each, and `predict` accepts it like an experiment's folder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from pipeline.config import Config, unknown
from pipeline.data.classes import class_columns, expand_scores
from pipeline.errors import BundleError, HeadError, PipelineError, number_of
from pipeline.evaluation import METRICS, HeadPredictions, Metric, Predictions, compare, joined
from pipeline.evaluation.comparison import Paired, paired_answers
from pipeline.evaluation.intervals import Interval
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, read_leaderboard
from pipeline.evaluation.learning_curve import curve_from_scores, curve_sizes
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import REFIT, TARGETS, Artifacts, write_document
from pipeline.heads import RIDGE, TABLES, Head, held_at
from pipeline.heads.tuning import fits_of, growing, neighbours
from pipeline.heads.tuning.evaluation import FoldOutcome
from pipeline.io.files import make_folder
from pipeline.stages import targets
from pipeline.stages.train_heads import Asked, ask
from pipeline.stages.train_heads.apart import VOTE
from pipeline.stages.train_heads.row import finished_row, make_row, row_key
from pipeline.stages.train_heads.strangers import with_strangers
from pipeline.stages.train_heads.task import Embedding, SharedFeatures, Task

log = logging.getLogger(__name__)

ALL = "all"
MOST_NEIGHBOURS = 8
CURVE_HEAD = RIDGE.name
MOST_CURVE_IMAGES = 5_000
"""Training images of the learning curve's largest fit."""


@dataclass(frozen=True)
class NewClass:
    """A class that the stored head does not have."""

    name: str
    images: int
    test: int
    """How many of them are test images."""
    right: int
    """How many of the test images are labelled correctly."""


@dataclass(frozen=True)
class Refitted:
    """One refitted head, and the evidence for and against a new search; higher scores are better."""

    key: str
    """The row's name: `embedding/head`."""
    bundle: str
    """Its folder, relative to the folder of refits."""
    params: Mapping[str, Any]
    scoring: str
    train: tuple[int, int]
    """Number of training images before and now."""
    test: int
    of_all: float
    """Score on all current test images."""
    same: int
    """How many of them were test images before, with the same label."""
    before: float
    """Score of the old head on these."""
    now: float
    change: Paired
    """The paired difference between the two."""
    new_classes: tuple[NewClass, ...]
    expected: float | None
    """The gain in score that a learning curve predicts for the added images; None without a curve."""
    held_out: float
    """Score of the stored parameters in cross-validation on all current training images."""
    tried: int
    """Number of neighbouring parameters that were evaluated likewise."""
    best: Mapping[str, Any]
    """The changed values of the best neighbour; empty if no neighbour has a higher score."""
    gain: float
    """The best neighbour's gain in score; the interval accounts for its selection."""
    gain_interval: Interval
    shown: bool
    """Whether the gain is statistically significant."""
    sound: bool
    seconds: float
    """Duration of the fit, with its cross-validation."""

    @property
    def reasons(self) -> list[str]:
        """Return the reasons for a new search; empty if there are none."""
        found = []
        if self.shown:
            found.append("other parameters are better than the stored ones, beyond chance")
        if not self.sound:
            found.append("with the stored parameters the last fit is worse than those of cross-validation")
        if self.new_classes:  # more classes are a harder task: a lower score says nothing about the parameters
            return found
        if self.change.shown < 0:
            found.append("the refitted head is worse than the old one on the same test images, beyond chance")
        if self.expected is not None and self.expected > self.change.interval[1]:
            found.append("the new images brought less than the learning curve predicts")
        return found

    def lines(self) -> list[str]:
        """Return the result as plain lines."""
        metric = METRICS[self.scoring]
        words = {-1: "worse, beyond chance", 0: "no difference is shown", 1: "better, beyond chance"}
        lines = [
            f"{self.key} refitted with {_params(self.params)} in {self.seconds:.1f} s",
            f"  training images   {self.train[0]:,} before, {self.train[1]:,} now",
        ]
        for each in self.new_classes:
            placed = f"{each.test:,} of its {number_of(each.images, 'image')} are test images, by the rule of the split"
            lines.append(f"  new class         {each.name}: {placed}; {each.right:,} of these are labelled right")
        lines += [
            f"  same test images  {self.same:,} that were test images before: {metric.title} "
            f"{metric.text(self.before)}{metric.percent} before, {metric.text(self.now)}{metric.percent} now: "
            f"{_gap(metric, self.change.difference, self.change.interval)}, {words[self.change.shown]}",
            f"  all test images   {self.test:,}: {metric.title} {metric.text(self.of_all)}{metric.percent}",
        ]
        if self.expected is not None:
            expected = _gap(metric, self.expected)
            lines.append(f"  learning curve    of {CURVE_HEAD}, predicts {expected} for the images added since")
        if self.tried:
            other = f"none of {number_of(self.tried, 'neighbour')} is better"
            if self.best:
                beyond = "better, beyond chance" if self.shown else "no evidence that it is better"
                gain = _gap(metric, self.gain, self.gain_interval)
                other = f"the best of {number_of(self.tried, 'neighbour')}, {_params(self.best)}, {gain}: {beyond}"
            stored = f"held out, the stored ones have {metric.text(self.held_out)}{metric.percent}"
            lines.append(f"  parameters        {stored}; {other}")
        why = "; ".join(self.reasons)
        verdict = f"is worth it (`manyheads heads`): {why}" if why else "is not worth it yet: nothing above supports it"
        return [*lines, f"  a new search      {verdict}"]


def _params(params: Mapping[str, Any]) -> str:
    values = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in params.items()}
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "no parameters"


def _gap(metric: Metric, difference: float, interval: Interval | None = None) -> str:
    ends = "" if interval is None else f" [{metric.gap_text(interval[0])}, {metric.gap_text(interval[1])}]"
    return f"{metric.gap_text(difference)}{ends} {metric.unit if metric.unit == 'points' else ''}".rstrip()


@dataclass(frozen=True)
class RefitRun:
    """The refitted heads by the name of each target, '' for a single one."""

    folder: Path
    heads: Mapping[str, Sequence[Refitted]]

    def summary_lines(self) -> list[str]:
        """Return the results, and the command to use them."""
        lines = []
        for name, heads in self.heads.items():
            lines += [*targets.heading(name), *(line for head in heads for line in head.lines())]
        return [
            *lines,
            "",
            "the leaderboard and its heads are unchanged",
            f"to predict   manyheads predict {quote(str(self.folder))} IMAGES --output labels.csv",
        ]


def run(config: Config, row: str | None = None) -> RefitRun:
    """Refit saved heads on all training images with features; a head already fitted on these images is kept.

    `row` is `embedding/head`, or `all`; by default the recommended row. The config must still contain the row's backbone and head.
    """
    folder, each = Artifacts(config.output).refit, targets.experiments(config)
    make_folder(folder)
    if "" not in each:
        write_document(Artifacts(folder).targets, TARGETS, {"targets": list(each)})
        return RefitRun(folder, {name: _refit(one, Artifacts(folder).target(name), row) for name, one in each.items()})
    return RefitRun(folder, {"": _refit(config, folder, row)})


def _refit(config: Config, folder: Path, name: str | None) -> list[Refitted]:
    board, asked, files = read_leaderboard(Path(config.output)), ask(config), Artifacts(folder)
    made = [_refitted(row, asked, files) for row in _chosen(board, name)]
    write_document(files.refitted, REFIT, {"heads": made})
    return made


def _chosen(board: Leaderboard, name: str | None) -> list[LeaderboardRow]:
    """Return the rows to refit, starting with the one to use."""
    recommended = board.recommended.key
    ordered = sorted(board.rows, key=lambda row: row.key != recommended)
    able = {row.key: row for row in ordered if row.bundle and not row.constant and row.embedding != VOTE}
    if not able:
        raise PipelineError("the leaderboard has no head to refit; run `manyheads heads` first")
    if name is None:
        first = next(iter(able.values()))
        if first.key != recommended:
            log.info("%s cannot be refitted, only single heads on images can; %s is", recommended, first.key)
        return [first]
    if name != ALL and name not in able:
        raise HeadError(f"--row: {unknown('row', name, (*able, ALL))}")
    return list(able.values()) if name == ALL else [able[name]]


def _refitted(row: LeaderboardRow, asked: Asked, files: Artifacts) -> Refitted:
    start = time.perf_counter()
    config, embedding, head = _asked_for(row, asked)
    fixed, before = held_at(head, row.params), Path(config.output) / str(row.bundle)
    key, folder = row_key(fixed, embedding, config.seed), files.bundle(embedding.name, head.name)
    vectors, here = SharedFeatures(embedding), replace(asked, files=files)
    found = finished_row(folder, key) or make_row(fixed, embedding, vectors, here, key)
    with_strangers(Leaderboard((found,)), here)
    seconds = time.perf_counter() - start
    said, old = HeadPredictions.read(folder / FILE_NAME), HeadPredictions.read(before / FILE_NAME)
    if old.out_of_fold is None or old.test.paths is None or said.out_of_fold is None:
        raise BundleError(f"{before}: does not record what it was fitted on; run `manyheads heads` again")
    metric, added = METRICS[config.tuning.scoring], list[NewClass]()
    for name in sorted({*said.classes} - {*old.classes}) if old.test.target.exclusive else ():
        own, in_training = said.test.labels == name, said.out_of_fold.labels == name
        images, test, right = own.sum() + in_training.sum(), own.sum(), said.test.correct[own].sum()
        added.append(NewClass(name, int(images), int(test), int(right)))
    was, now = _same(old.test, said.test, row.key)
    train = len(old.out_of_fold), len(said.out_of_fold)
    journal = files.trials(embedding.name, head.name).with_suffix("")
    return Refitted(
        key=row.key,
        bundle=str(found.bundle),
        params=row.params,
        scoring=metric.name,
        train=train,
        test=len(said.test),
        of_all=metric.score(said.test),
        same=len(now),
        before=metric.score(was),
        now=metric.score(now),
        change=paired_answers(metric, now, was, config.seed),
        new_classes=tuple(added),
        expected=None if added else _expected(embedding, vectors, metric, train, journal, config.seed),
        **_beside(head, fixed, embedding, vectors, metric, journal, config.seed),
        sound=found.sound,
        seconds=seconds,
    )


def _asked_for(row: LeaderboardRow, asked: Asked) -> tuple[Config, Embedding, Head]:
    """Return a row's config, embedding and head, set to a single search trial."""
    once = {"trials": 1, "nested": False, "seeds": 1}
    config = asked.config.model_copy(update={"tuning": asked.config.tuning.model_copy(update=once)})
    for embedding in asked.embeddings:
        for head in embedding.heads:
            if (embedding.name, head.name) == (row.embedding, row.head):
                return config, replace(embedding, tuning=embedding.tuning.model_copy(update=once)), head
    raise HeadError(f"{row.key}: is no longer in the config; add its backbone and head, or name another --row")


def _same(before: Predictions, now: Predictions, key: str) -> tuple[Predictions, Predictions]:
    """Return two heads' predictions for the test images that both have, with the same label; both encoded by the second's target."""
    place = {path: row for row, path in enumerate(np.asarray(before.paths).tolist())}
    rows = np.array([place.get(path, -1) for path in np.asarray(now.paths).tolist()])
    now, before = now.rows(rows >= 0), before.rows(rows[rows >= 0])
    target: Any = now.target
    probabilities = before.probabilities
    try:
        y_true, y_pred = target.restored(before.labels), target.restored(before.predicted)
        if probabilities is not None:
            places = class_columns(before.classes, target.classes)
            if places.min(initial=0) < 0:
                raise ValueError(before.classes)
            probabilities = expand_scores(probabilities, places, target.width, "probability")
    except ValueError:
        raise HeadError(f"{key}: has a class that no image has now; run `manyheads heads` again") from None
    before = replace(now, y_true=y_true, y_pred=y_pred, probabilities=probabilities)
    equal = np.equal(y_true, now.y_true).reshape(len(now), -1).all(axis=1)
    if not equal.any():
        raise HeadError(f"{key}: none of its test images is still a test image; run `manyheads heads` again")
    return before.rows(equal), now.rows(equal)


def _expected(
    embedding: Embedding, vectors: SharedFeatures, metric: Metric, train: tuple[int, int], journal: Path, seed: int
) -> float | None:
    """Return the gain in score that a learning curve predicts for the added images; None for metrics whose best value is not 1.

    The curve is that of ridge, which is fast, as in the report. Each fold is a draw: growing parts of its training images, scored on those it
    holds out; test images are not used.
    """
    if metric.high != 1 or metric.needs_probabilities:
        return None
    task = embedding.task
    smallest = min(min(len(rows) for rows, _ in task.folds), MOST_CURVE_IMAGES)
    sizes = curve_sizes(smallest, max(len(task.target.classes), 10))
    folds = growing(task.folds, task.target.strata(task.y_train), sizes, seed)
    head, params = TABLES[task.target.kind].heads[CURVE_HEAD], {"alpha": float(vectors.train.shape[1])}
    X, y, book = vectors.train, task.y_train, journal / "curve.jsonl"
    with fits_of(head, X, y, folds, embedding.tuning, seed, book, None, task.target) as (fits, _):
        outcomes = fits.on_every_fold(params)
    scores = np.array([outcome.score for outcome in outcomes]).reshape(len(sizes), -1)
    known = np.flatnonzero(np.isfinite(scores).all(axis=1)).tolist()
    curve = curve_from_scores([sizes[place] for place in known], [scores[place] for place in known], seed, train[1])
    if curve.law is None:
        return None
    before, now = curve.law.accuracy([float(size) for size in train]).tolist()
    return float(now - before)


def _beside(
    head: Head, fixed: Head, embedding: Embedding, vectors: SharedFeatures, metric: Metric, journal: Path, seed: int
) -> dict[str, Any]:
    """Compare the stored parameters with their neighbours by cross-validation on all current training images.

    Returns the fields `held_out` to `shown` of a `Refitted`; neighbours that cannot be fitted on every fold are left out.
    """
    stored, others = fixed.defaults, neighbours(head, fixed.defaults)
    # Evenly spread, so that every parameter is varied, not only the first.
    some = np.unique(np.linspace(0, max(0, len(others) - 1), min(len(others), MOST_NEIGHBOURS)).astype(int))
    points = {"stored": stored, **{str(place): others[place] for place in some}}
    task, X, y, book = embedding.task, vectors.train, embedding.task.y_train, journal / "neighbours.jsonl"
    with fits_of(head, X, y, task.folds, embedding.tuning, seed, book, vectors.projections, task.target) as (fits, _):
        outcomes = {name: fits.on_every_fold(params) for name, params in points.items()}
    fitted = {name: folds for name, folds in outcomes.items() if all(fold.predictions is not None for fold in folds)}
    answers = {name: _out_of_fold(folds, task, metric) for name, folds in fitted.items()}
    scores = {name: metric.score(said) for name, said in answers.items()}
    best = max(scores, key=lambda name: scores[name])
    found = {"held_out": scores["stored"], "tried": len(scores) - 1}
    if best == "stored":
        return {**found, "best": {}, "gain": 0.0, "gain_interval": (0.0, 0.0), "shown": False}
    by_fold = {name: [fold.score for fold in folds] for name, folds in fitted.items()}
    behind = {each.key: each for each in compare(answers, best, folds=by_fold, seed=seed, metric=metric)}["stored"]
    return {
        **found,
        "best": {name: value for name, value in points[best].items() if value != stored[name]},
        "gain": behind.difference,
        "gain_interval": behind.interval,
        "shown": not behind.no_evidence,
    }


def _out_of_fold(folds: Sequence[FoldOutcome], task: Task, metric: Metric) -> Predictions:
    """Join the predictions of one set of parameters for the held-out images of each fold."""
    narrowed, codes, _ = task.target.narrowed(task.y_train)
    parts = []
    for fold, ((_, held), outcome) in enumerate(zip(task.folds, folds, strict=True)):
        assert outcome.predictions is not None  # incomplete outcomes were removed
        units, of = (None if task.groups is None else task.groups[held]), np.full(len(held), fold)
        parts.append(Predictions(codes[held], outcome.predictions, outcome.scores, units, folds=of, target=narrowed))
    said = joined(parts)
    if not metric.threshold:
        return said
    y_pred = narrowed.decided(said.y_true, said.y_pred, said.probabilities, metric.threshold, said.folds)
    return replace(said, y_pred=y_pred)
