"""How far the domains of a data set lie apart, which classes suffer, and the best head adapted to the test's new domains.

A domain is new where no training image is of it. Of its images only features are used, never a label: each half of them tells how the
other half is adapted, so that no image is judged by what it took part in.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from pipeline.evaluation.domains import FOLDS, LEAST, Adapted, Apart, Domains, align, apart, suffering, weights
from pipeline.evaluation.leaderboard import Leaderboard
from pipeline.experiment import plain
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.apart import ApartRows, Origin, origin, row_like, with_rows
from pipeline.stages.train_heads.task import Asked

VERSION = 2
"""Goes up when what is measured changes its meaning, so that it is made again."""
MOST_OF_A_DOMAIN, MOST_PAIRS = 1_000, 15
"""Images of a domain that are looked at, and pairs of domains, those of a new one with one of training first."""
MOST_TRAINING = 20_000
"""Training images that a head is fitted on again with weights."""

ImageRows = NDArray[np.intp]
"""Places among all images, training before test."""


@dataclass(frozen=True, eq=False)
class _Images:
    """The row that is looked at, and of its n training and m test images the domain, unit and half: arrays of shape (n + m,)."""

    origin: Origin
    asked: Asked
    domains: Texts
    units: NDArray[np.int64]
    half: NDArray[np.bool_]
    """Which half an image of a new domain is of, whole units together."""

    @property
    def n(self) -> int:
        """Training images."""
        return len(self.asked.task.train)

    @property
    def new(self) -> list[str]:
        """The domains that no training image is of."""
        return sorted({*self.domains[self.n :].tolist()} - {*self.domains[: self.n].tolist()})

    def halves(self, domains: Sequence[str]) -> tuple[ImageRows, ImageRows]:
        """Return both halves of the images of some domains."""
        there = np.isin(self.domains, list(domains))
        return np.flatnonzero(there & self.half), np.flatnonzero(there & ~self.half)

    def read(self, rows: ImageRows) -> NDArray[np.float32]:
        """Return the vectors of some images: float32 of shape (k, dim)."""
        task, store = self.asked.task, self.asked.stores[self.origin.row.embedding]
        return store.read(np.concatenate([task.train.digests, task.test.digests])[rows])

    def sample(self, rows: ImageRows) -> ImageRows:
        """Return at most `MOST_OF_A_DOMAIN` of some images."""
        return np.sort(np.random.default_rng(self.asked.config.seed).permutation(rows)[:MOST_OF_A_DOMAIN])


def with_domains(board: Leaderboard, asked: Asked) -> Leaderboard:
    """Return the leaderboard with what is known of the domains, and the best row on images adapted to new ones as further rows."""
    task, config = asked.task, asked.config
    parts = [own for index in (task.train, task.test) if (own := _domains(index, config)) is not None]
    best = origin(board, asked.stores, asked) if parts else None
    if best is None:
        return board
    domains = np.concatenate(parts)
    made_by = best.bundle.provenance["key"]
    key = fingerprint({"version": VERSION, "row": made_by, "domains": domains.tolist(), "adapt": config.adapt})

    def make(found: ApartRows) -> None:
        indexes = (task.train, task.test)
        groups = [np.full(len(each), "", object) if each.groups is None else each.groups for each in indexes]
        units = leakage_units(np.concatenate([each.digests for each in indexes]), np.concatenate(groups))
        half = np.random.default_rng(config.seed).permutation(units.max() + 1)[units] % 2 == 0
        _find(_Images(best, asked, domains, units, half), board, found)

    return with_rows(board, asked, "domains", key, make)


def _domains(index: DatasetIndex, config: Config) -> Texts | None:
    """Return the domain of each image, object (str) of shape (n,); None where nothing is said of domains."""
    if config.dataset.domain is not None and not config.dataset.domain_column:
        return np.where(index.splits == "test", "test", "training").astype(object)
    return index.domains if config.dataset.domain else None


def _find(images: _Images, board: Leaderboard, found: ApartRows) -> None:
    row, said, config = images.origin.row, images.origin.said, images.asked.config
    pairs, notes = _pairs(images)
    if config.adapt and not images.new:
        notes.append(
            "Every domain of the test is among the training images, so there is none to adapt to: give all images of one the split test."
        )
    adapted = list[Adapted]()
    for way in config.adapt if images.new else ():
        start, named = time.perf_counter(), f"{row.head}+{way}"
        told = WAYS[way](images)
        notes += [f"{way}: {told.amiss}."] * bool(told.amiss)
        if told.used:
            made = row_like(row, named, "domains", told.answers, board.metric, config.seed)
            found.rows.append(replace(made, fit_seconds=row.fit_seconds + time.perf_counter() - start))
            for name in told.used:
                new, old = (part.rows(images.domains[images.n :] == name) for part in (told.answers, said.test))
                gain = paired_answers(board.test_metric, new, old, config.seed)
                before, after = (float(part.correct.mean()) for part in (old, new))
                adapted.append(Adapted(made.key, way, name, len(new), before, after, gain))
        if told.fitted is not None:
            folder = found.save(replace(told.fitted, head=named), row.embedding, images.asked)
            notes.append(f"The re-weighted head is in {folder}.")
    assert said.out_of_fold is not None
    parts = [replace(part, units=None, scores=None, folds=None) for part in (said.out_of_fold, said.test)]
    units = None if images.units.max() + 1 == len(images.units) else images.units
    trained = sorted({*images.domains[: images.n].tolist()})
    each = suffering(replace(joined(parts), units=units), images.domains, trained)
    adapted.sort(key=lambda one: (one.domain, one.way))
    domains = Domains(row.key, row.embedding, pairs, each, tuple(adapted), tuple(notes))
    found.notes, found.more = domains.lines(), plain(domains)


def _pairs(images: _Images) -> tuple[tuple[Apart, ...], list[str]]:
    """Measure the pairs of domains, and say which were not."""
    ordered = sorted({*images.domains.tolist()}, key=lambda name: (name in images.new, name))
    rows = {name: np.flatnonzero(images.domains == name) for name in ordered}
    few = [name for name, own in rows.items() if len(np.unique(images.units[own])) < 2 * FOLDS]
    pairs = [pair for pair in combinations(ordered, 2) if not {*pair} & {*few}]
    pairs.sort(key=lambda pair: len({*pair} & {*images.new}) != 1)
    notes = [f"{len(rows[name])} images of {name!r} are too few to say how far it is from others." for name in few]
    notes += [f"Of {len(pairs)} pairs of domains {MOST_PAIRS} were measured."] * (len(pairs) > MOST_PAIRS)
    found = []
    for names in pairs[:MOST_PAIRS]:
        one, other = (images.sample(rows[name]) for name in names)
        units = images.units[np.concatenate([one, other])]
        found.append(apart(images.read(one), images.read(other), images.asked.config.seed, units, names))
    return tuple(found), notes


@dataclass(frozen=True, eq=False)
class _Told:
    """What an adapted head says of the test images, the domains it was adapted to, and what is amiss.

    `fitted` is the head where it is another, fitted with weights of all images of new domains.
    """

    answers: Predictions
    used: Sequence[str] = ()
    amiss: str = ""
    fitted: ModelBundle | None = None


def _coral(images: _Images) -> _Told:
    """Align the images of each new domain with the training images."""
    answers, used, few = images.origin.said.test, list[str](), list[str]()
    source = images.read(images.sample(np.arange(images.n)))
    for name in images.new:
        halves = images.halves([name])
        if min(map(len, halves)) < LEAST:
            few.append(f"{sum(map(len, halves))} of {name!r}")
            continue
        used.append(name)
        for own, other in (halves, halves[::-1]):
            alignment = align(source, images.read(images.sample(other)), images.asked.config.seed)
            answers = _answered(answers, own - images.n, images.origin.bundle.said(alignment(images.read(own))))
    amiss = f"too few test images to align by, expected {2 * LEAST} of a domain: {', '.join(few)}" if few else ""
    return _Told(answers, used, amiss)


def _reweight(images: _Images) -> _Told:
    """Fit the head again on training images weighted as if they came of the new domains."""
    bundle, answers, halves = images.origin.bundle, images.origin.said.test, images.halves(images.new)
    last, model = bundle.estimator.steps[-1]
    if not has_fit_parameter(model, "sample_weight"):
        return _Told(answers, amiss=f"{images.origin.row.head} takes no weights")
    if images.n > MOST_TRAINING:
        return _Told(answers, amiss=f"more than {MOST_TRAINING:,} training images")
    if min(map(len, halves)) < LEAST:
        few = sum(map(len, halves))
        return _Told(answers, amiss=f"{few} test images of new domains are too few, expected {2 * LEAST}")
    source, y = images.read(np.arange(images.n)), images.asked.task.y_train

    def weighed(rows: ImageRows) -> ModelBundle:
        found = weights(source, images.read(images.sample(rows)), images.asked.config.seed)
        return replace(bundle, estimator=clone(bundle.estimator).fit(source, y, **{f"{last}__sample_weight": found}))

    for own, other in (halves, halves[::-1]):
        answers = _answered(answers, own - images.n, weighed(other).said(images.read(own)))
    return _Told(answers, images.new, fitted=weighed(np.concatenate(halves)))


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
