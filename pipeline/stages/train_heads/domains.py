"""Distances between the domains of a data set, the classes most affected, and the best head adapted to new domains.

A domain is new if only test images belong to it. Adaptation uses the features of these images, never their labels. Each half of them
is adapted with the other half, so that no image is scored by an adaptation that used it.
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
"""Increased when the meaning of the results changes, so that stored ones are recomputed."""
MOST_OF_A_DOMAIN, MOST_PAIRS = 1_000, 15
"""Maximum numbers of images per domain and of pairs of domains; pairs of a new and a training domain come first."""
MOST_TRAINING = 20_000
"""Maximum number of training images for refitting a head with weights."""

ImageRows = NDArray[np.intp]
"""Indices of images, with the training images before the test images."""


@dataclass(frozen=True, eq=False)
class _Images:
    """The row to adapt, and the domain, unit and half of its n training and m test images: arrays of shape (n + m,)."""

    origin: Origin
    asked: Asked
    domains: Texts
    units: NDArray[np.int64]
    half: NDArray[np.bool_]
    """The half that an image of a new domain belongs to; units are not divided."""

    @property
    def n(self) -> int:
        """The number of training images."""
        return len(self.asked.task.train)

    @property
    def new(self) -> list[str]:
        """The domains without training images, sorted."""
        return sorted({*self.domains[self.n :].tolist()} - {*self.domains[: self.n].tolist()})

    def halves(self, domains: Sequence[str]) -> tuple[ImageRows, ImageRows]:
        """Return the two halves of the images of some domains."""
        there = np.isin(self.domains, list(domains))
        return np.flatnonzero(there & self.half), np.flatnonzero(there & ~self.half)

    def read(self, rows: ImageRows) -> NDArray[np.float32]:
        """Return the vectors of some images: float32 of shape (k, dim)."""
        task, store = self.asked.task, self.asked.stores[self.origin.row.embedding]
        return store.read(np.concatenate([task.train.digests, task.test.digests])[rows])

    def sample(self, rows: ImageRows) -> ImageRows:
        """Return a random sample of at most `MOST_OF_A_DOMAIN` of these images."""
        return np.sort(np.random.default_rng(self.asked.config.seed).permutation(rows)[:MOST_OF_A_DOMAIN])


def with_domains(board: Leaderboard, asked: Asked) -> Leaderboard:
    """Add the comparison of domains to the leaderboard, and rows of its best head adapted to new domains."""
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
    """Return the domain of each image, object (str) of shape (n,); None if the config names no domains."""
    if config.dataset.domain is not None and not config.dataset.domain_column:
        return np.where(index.splits == "test", "test", "training").astype(object)
    return index.domains if config.dataset.domain else None


def _find(images: _Images, board: Leaderboard, found: ApartRows) -> None:
    row, predictions, config = images.origin.row, images.origin.predictions, images.asked.config
    pairs, notes = _pairs(images)
    if config.adapt and not images.new:
        notes.append(
            "Every domain of the test also has training images, so there is none to adapt to: put all images of a domain into split test."
        )
    adapted = list[Adapted]()
    for way in config.adapt if images.new else ():
        start, named = time.perf_counter(), f"{row.head}+{way}"
        head = WAYS[way](images)
        notes += [f"{way}: {head.problem}."] * bool(head.problem)
        if head.used:
            made = row_like(row, named, "domains", head.answers, board.metric, config.seed)
            found.rows.append(replace(made, fit_seconds=row.fit_seconds + time.perf_counter() - start))
            for name in head.used:
                new, old = (part.rows(images.domains[images.n :] == name) for part in (head.answers, predictions.test))
                gain = paired_answers(board.test_metric, new, old, config.seed)
                before, after = (float(part.correct.mean()) for part in (old, new))
                adapted.append(Adapted(made.key, way, name, len(new), before, after, gain))
        if head.fitted is not None:
            folder = found.save(replace(head.fitted, head=named), row.embedding, images.asked)
            notes.append(f"The re-weighted head is in {folder}.")
    assert predictions.out_of_fold is not None
    parts = [replace(part, units=None, scores=None, folds=None) for part in (predictions.out_of_fold, predictions.test)]
    units = None if images.units.max() + 1 == len(images.units) else images.units
    trained = sorted({*images.domains[: images.n].tolist()})
    each = suffering(replace(joined(parts), units=units), images.domains, trained)
    adapted.sort(key=lambda one: (one.domain, one.way))
    domains = Domains(row.key, row.embedding, pairs, each, tuple(adapted), tuple(notes))
    found.notes, found.more = domains.lines(), plain(domains)


def _pairs(images: _Images) -> tuple[tuple[Apart, ...], list[str]]:
    """Measure the distances between pairs of domains; also return notes on the pairs left out."""
    ordered = sorted({*images.domains.tolist()}, key=lambda name: (name in images.new, name))
    rows = {name: np.flatnonzero(images.domains == name) for name in ordered}
    few = [name for name, own in rows.items() if len(np.unique(images.units[own])) < 2 * FOLDS]
    pairs = [pair for pair in combinations(ordered, 2) if not {*pair} & {*few}]
    pairs.sort(key=lambda pair: len({*pair} & {*images.new}) != 1)
    notes = [f"{len(rows[name])} images of {name!r} are too few to measure its distance from others." for name in few]
    notes += [f"Of {len(pairs)} pairs of domains {MOST_PAIRS} were measured."] * (len(pairs) > MOST_PAIRS)
    found = []
    for names in pairs[:MOST_PAIRS]:
        one, other = (images.sample(rows[name]) for name in names)
        units = images.units[np.concatenate([one, other])]
        found.append(apart(images.read(one), images.read(other), images.asked.config.seed, units, names))
    return tuple(found), notes


@dataclass(frozen=True, eq=False)
class _AdaptedHead:
    """An adapted head's predictions of the test images, the domains it was adapted to, and why others were left out.

    `fitted` is the refitted head, weighted by all images of new domains; None if the original head is used.
    """

    answers: Predictions
    used: Sequence[str] = ()
    problem: str = ""
    fitted: ModelBundle | None = None


def _coral(images: _Images) -> _AdaptedHead:
    """Align the features of each new domain with those of the training images."""
    answers, used, few = images.origin.predictions.test, list[str](), list[str]()
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
    problem = f"too few test images to align by, expected {2 * LEAST} of a domain: {', '.join(few)}" if few else ""
    return _AdaptedHead(answers, used, problem)


def _reweight(images: _Images) -> _AdaptedHead:
    """Refit the head on training images weighted to resemble the new domains."""
    bundle, answers, halves = images.origin.bundle, images.origin.predictions.test, images.halves(images.new)
    last, model = bundle.estimator.steps[-1]
    if not has_fit_parameter(model, "sample_weight"):
        return _AdaptedHead(answers, problem=f"{images.origin.row.head} takes no sample weights")
    if images.n > MOST_TRAINING:
        return _AdaptedHead(answers, problem=f"more than {MOST_TRAINING:,} training images")
    if min(map(len, halves)) < LEAST:
        few = sum(map(len, halves))
        return _AdaptedHead(answers, problem=f"{few} test images of new domains are too few, expected {2 * LEAST}")
    source, y = images.read(np.arange(images.n)), images.asked.task.y_train

    def refitted(rows: ImageRows) -> ModelBundle:
        found = weights(source, images.read(images.sample(rows)), images.asked.config.seed)
        return replace(bundle, estimator=clone(bundle.estimator).fit(source, y, **{f"{last}__sample_weight": found}))

    for own, other in (halves, halves[::-1]):
        answers = _answered(answers, own - images.n, refitted(other).said(images.read(own)))
    return _AdaptedHead(answers, images.new, fitted=refitted(np.concatenate(halves)))


WAYS = {"coral": _coral, "reweight": _reweight}
"""The adaptation methods, by their name in the config's `adapt`."""


def _answered(old: Predictions, rows: ImageRows, new: tuple[NDArray[Any], NDArray[np.float64] | None]) -> Predictions:
    """Replace the predictions of some images."""
    y_pred, probabilities = old.y_pred.copy(), old.probabilities
    y_pred[rows] = new[0]
    if probabilities is not None and new[1] is not None:
        probabilities = probabilities.astype(np.float64)
        probabilities[rows] = new[1]
    return replace(old, y_pred=y_pred, probabilities=probabilities)
