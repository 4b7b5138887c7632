"""How far the domains of a data set lie apart, which classes suffer, and the best head adapted to the test's new domains.

A domain is new where no training image is of it. Of its images only features are used, never a label: each half of them tells how the
other half is adapted, so that no image is judged by what it took part in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.utils.validation import has_fit_parameter

from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.data.index import Texts, leakage_units
from pipeline.evaluation import Predictions, joined, paired_answers
from pipeline.evaluation.domains import (
    FOLDS,
    LEAST,
    Adapted,
    Apart,
    Domains,
    align,
    apart,
    suffering,
    weights,
)
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow
from pipeline.experiment import Artifacts, plain
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.apart import ApartRows, Origin, found_before, origin, row_like, with_rows
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, JoinedStores

VERSION = 2
"""Goes up when what is measured changes its meaning, so that it is made again."""
MOST_OF_A_DOMAIN, MOST_PAIRS = 1_000, 15
"""Images of a domain that are looked at, and pairs of domains, those of a new one with one of training first."""
MOST_TRAINING = 20_000
"""Training images that a head is fitted on again with weights."""

ImageRows = NDArray[np.intp]
"""Places among all images, training before test."""


@dataclass(frozen=True, eq=False)
class _DomainTask:
    """The row that is looked at, the n training and m test images, and the domain, unit and half of each: arrays of shape (n + m,)."""

    origin: Origin
    task: Task
    store: FeatureStore | JoinedStores
    domains: Texts
    units: NDArray[np.int64]
    half: NDArray[np.bool_]
    """Which half an image of a new domain is of, whole units together."""
    seed: int

    @property
    def new(self) -> list[str]:
        """The domains that no training image is of."""
        n = len(self.task.train)
        return sorted({*self.domains[n:].tolist()} - {*self.domains[:n].tolist()})

    def halves(self, domains: Sequence[str]) -> tuple[ImageRows, ImageRows]:
        """Return both halves of the images of some domains."""
        there = np.isin(self.domains, list(domains))
        return np.flatnonzero(there & self.half), np.flatnonzero(there & ~self.half)

    def read(self, rows: ImageRows) -> NDArray[np.float32]:
        """Return the vectors of some images: float32 of shape (k, dim)."""
        return self.store.read(np.concatenate([self.task.train.digests, self.task.test.digests])[rows])

    def sample(self, rows: ImageRows) -> ImageRows:
        """Return at most `MOST_OF_A_DOMAIN` of some images."""
        return np.sort(np.random.default_rng(self.seed).permutation(rows)[:MOST_OF_A_DOMAIN])


def with_domains(
    board: Leaderboard, task: Task, stores: Mapping[str, FeatureStore | JoinedStores], files: Artifacts, config: Config
) -> Leaderboard:
    """Return the leaderboard with what is known of the domains, and the best row on images adapted to new ones as further rows."""
    parts = [own for index in (task.train, task.test) if (own := _domains(index, config)) is not None]
    best = origin(board, stores, task, files) if parts else None
    if best is None:
        return board
    domains = np.concatenate(parts)
    key = fingerprint({"version": VERSION, "row": best.key, "domains": domains.tolist(), "adapt": config.adapt})
    found = found_before(files, "domains", key)
    if found is None:
        groups = [
            np.full(len(each), "", object) if each.groups is None else each.groups for each in (task.train, task.test)
        ]
        units = leakage_units(np.concatenate([task.train.digests, task.test.digests]), np.concatenate(groups))
        half = np.random.default_rng(config.seed).permutation(units.max() + 1)[units] % 2 == 0
        asked = _DomainTask(best, task, stores[best.row.embedding], domains, units, half, config.seed)
        found = _find(asked, board, files, config, key)
    return with_rows(board, "domains", key, found)


def _domains(index: DatasetIndex, config: Config) -> Texts | None:
    """Return the domain of each image, object (str) of shape (n,); None where nothing is said of domains."""
    if config.dataset.domain is not None and not config.dataset.domain_column:
        return np.where(index.splits == "test", "test", "training").astype(object)
    return index.domains if config.dataset.domain else None


def _find(asked: _DomainTask, board: Leaderboard, files: Artifacts, config: Config, key: str) -> ApartRows:
    row, said, task = asked.origin.row, asked.origin.said, asked.task
    adapted, rows, folders = list[Adapted](), list[LeaderboardRow](), list[str]()
    pairs, notes = _pairs(asked)
    if config.adapt and not asked.new:
        notes.append(
            "Every domain of the test is among the training images, so there is none to adapt to: give all images of one the split test."
        )
    for way in config.adapt if asked.new else ():
        start, named = time.perf_counter(), f"{row.head}+{way}"
        told = WAYS[way](asked)
        notes += [f"{way}: {told.amiss}."] * bool(told.amiss)
        if told.used:
            made = row_like(row, named, "domains", told.answers, board.metric, asked.seed)
            rows.append(replace(made, fit_seconds=row.fit_seconds + time.perf_counter() - start))
            adapted += _brought(asked, made.key, way, told, board)
        if told.fitted is not None:
            folders.append(files.bundle(row.embedding, named).relative_to(files.root).as_posix())
            bundles.save(replace(told.fitted, provenance={"key": key, "seed": asked.seed}), files.root / folders[-1])
            notes.append(f"The re-weighted head is in {folders[-1]}.")
    assert said.out_of_fold is not None
    parts = [replace(part, units=None, scores=None, folds=None) for part in (said.out_of_fold, said.test)]
    units = None if asked.units.max() + 1 == len(asked.units) else asked.units
    trained = sorted({*asked.domains[: len(task.train)].tolist()})
    each = suffering(replace(joined(parts), units=units), asked.domains, trained)
    adapted.sort(key=lambda one: (one.domain, one.way))
    domains = Domains(row.key, row.embedding, pairs, each, tuple(adapted), tuple(notes))
    return ApartRows(tuple(rows), tuple(domains.lines()), tuple(folders), plain(asdict(domains)))


def _pairs(asked: _DomainTask) -> tuple[tuple[Apart, ...], list[str]]:
    """Measure the pairs of domains, and say which were not."""
    ordered = sorted({*asked.domains.tolist()}, key=lambda name: (name in asked.new, name))
    rows = {name: np.flatnonzero(asked.domains == name) for name in ordered}
    few = [name for name, own in rows.items() if len(np.unique(asked.units[own])) < 2 * FOLDS]
    pairs = [pair for pair in combinations(ordered, 2) if not {*pair} & {*few}]
    pairs.sort(key=lambda pair: len({*pair} & {*asked.new}) != 1)
    notes = [f"{len(rows[name])} images of {name!r} are too few to say how far it is from others." for name in few]
    notes += [f"Of {len(pairs)} pairs of domains {MOST_PAIRS} were measured."] * (len(pairs) > MOST_PAIRS)
    found = []
    for names in pairs[:MOST_PAIRS]:
        one, other = (asked.sample(rows[name]) for name in names)
        units = asked.units[np.concatenate([one, other])]
        found.append(apart(asked.read(one), asked.read(other), asked.seed, units, names))
    return tuple(found), notes


@dataclass(frozen=True, eq=False)
class _Told:
    """What an adapted head says of the test images, by domain how many images told it at least, and what is amiss.

    `fitted` is the head where it is another, fitted with weights of all images of new domains.
    """

    answers: Predictions
    used: Mapping[str, int]
    amiss: str = ""
    fitted: ModelBundle | None = None


def _coral(asked: _DomainTask) -> _Told:
    """Align the images of each new domain with the training images."""
    n, answers, used, few = len(asked.task.train), asked.origin.said.test, dict[str, int](), list[str]()
    source = asked.read(asked.sample(np.arange(n)))
    for name in asked.new:
        halves = asked.halves([name])
        least = min(map(len, halves))
        if least < LEAST:
            few.append(f"{sum(map(len, halves))} of {name!r}")
            continue
        used[name] = least
        for own, other in (halves, halves[::-1]):
            alignment = align(source, asked.read(asked.sample(other)), asked.seed)
            answers = _answered(answers, own - n, asked.origin.bundle.said(alignment(asked.read(own))))
    amiss = f"too few test images to align by, expected {2 * LEAST} of a domain: {', '.join(few)}" if few else ""
    return _Told(answers, used, amiss)


def _reweight(asked: _DomainTask) -> _Told:
    """Fit the head again on training images weighted as if they came of the new domains."""
    n, bundle, answers = len(asked.task.train), asked.origin.bundle, asked.origin.said.test
    last, model = bundle.estimator.steps[-1]
    halves = asked.halves(asked.new)
    problems = {
        f"{asked.origin.row.head} takes no weights": not has_fit_parameter(model, "sample_weight"),
        f"more than {MOST_TRAINING:,} training images": n > MOST_TRAINING,
        f"{sum(map(len, halves))} test images of new domains are too few, expected {2 * LEAST}": min(map(len, halves))
        < LEAST,
    }
    if any(problems.values()):
        return _Told(answers, {}, next(problem for problem, found in problems.items() if found))
    source = asked.read(np.arange(n))

    def weighed(images: ImageRows) -> ModelBundle:
        found = weights(source, asked.read(asked.sample(images)), asked.seed)
        fitted = clone(bundle.estimator).fit(source, asked.task.y_train, **{f"{last}__sample_weight": found})
        return replace(bundle, estimator=fitted)

    for own, other in (halves, halves[::-1]):
        answers = _answered(answers, own - n, weighed(other).said(asked.read(own)))
    used = {name: min(map(len, asked.halves([name]))) for name in asked.new}
    return _Told(answers, used, "", weighed(np.concatenate(halves)))


WAYS = {"coral": _coral, "reweight": _reweight}
"""By the words of `adapt`."""


def _answered(said: Predictions, rows: ImageRows, new: tuple[NDArray[Any], NDArray[np.float64] | None]) -> Predictions:
    """Return predictions with those of some images replaced."""
    y_pred, probabilities = said.y_pred.copy(), said.probabilities
    y_pred[rows] = new[0]
    if probabilities is not None and new[1] is not None:
        probabilities = probabilities.astype(np.float64)
        probabilities[rows] = new[1]
    return replace(said, y_pred=y_pred, probabilities=probabilities)


def _brought(asked: _DomainTask, row: str, way: str, told: _Told, board: Leaderboard) -> list[Adapted]:
    """Compare the adapted head with the plain one, on the test images of each new domain."""
    found, of_test = [], asked.domains[len(asked.task.train) :]
    for name in told.used:
        new, old = (part.rows(of_test == name) for part in (told.answers, asked.origin.said.test))
        gain = paired_answers(board.told_by, new, old, asked.seed)
        plain_score, score = (float(part.correct.mean()) for part in (old, new))
        found.append(Adapted(row, way, name, len(new), plain_score, score, gain))
    return found
