"""How far the domains of a data set lie apart, which classes suffer, and the best head adapted to the test's new domains.

A domain is new where no training image is of it. Of its images only features are used, never a label: each half of them tells how the
other half is adapted, so that no image is judged by what it took part in.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
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
from pipeline.errors import PipelineError
from pipeline.evaluation import HeadPredictions, Metric, Predictions, joined, paired_answers, scores
from pipeline.evaluation.domains import (
    FOLDS,
    LEAST,
    Adapted,
    Domains,
    align,
    apart,
    suffering,
    weights,
    worth,
)
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import Artifacts, from_plain, plain
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, JoinedStores

VERSION = 1
"""Goes up when what is measured changes its meaning, so that it is made again."""
MOST_OF_A_DOMAIN, MOST_PAIRS = 1_000, 15
"""Images of a domain that are looked at, and pairs of domains, those with new ones first."""
MOST_TRAINING = 20_000
"""Training images that a head is fitted on again with weights."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """The row that is looked at, what it said, the domains of the n training and m test images, and which of these are of new ones."""

    row: LeaderboardRow
    bundle: ModelBundle
    said: HeadPredictions
    task: Task
    store: FeatureStore | JoinedStores
    of_train: Texts
    of_test: Texts
    units: NDArray[np.int64]
    """Of all images, training before test: int64 of shape (n + m,)."""
    half: NDArray[np.bool_]
    """Which half of the test an image is of, whole units together: bool of shape (m,)."""
    seed: int

    @property
    def new(self) -> list[str]:
        """The domains that no training image is of."""
        return sorted({*self.of_test.tolist()} - {*self.of_train.tolist()})

    def read(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Return the vectors of some images, numbered as in `units`: float32 of shape (k, dim)."""
        return self.store.read(np.concatenate([self.task.train.digests, self.task.test.digests])[rows])

    def sample(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return at most `MOST_OF_A_DOMAIN` of some images."""
        drawn = np.random.default_rng(self.seed).permutation(rows)[:MOST_OF_A_DOMAIN]
        return np.asarray(np.sort(drawn), dtype=np.intp)


def with_domains(
    board: Leaderboard,
    task: Task,
    stores: Mapping[str, FeatureStore | JoinedStores],
    files: Artifacts,
    config: Config,
) -> Leaderboard:
    """Return the leaderboard with what is known of the domains, and the best row on images adapted to new ones as further rows."""
    domains = [own for part in (task.train, task.test) if (own := _domains(part, config)) is not None]
    able = [row for row in board.ranked if row.embedding in stores and row.bundle and row.task == task.key]
    if not domains or not able or not task.target.exclusive:
        return board
    row, of_all = able[0], np.concatenate(domains)
    made = bundles.describe(files.root / str(row.bundle))["provenance"]["key"]
    key = fingerprint({"version": VERSION, "row": made, "domains": of_all.tolist(), "adapt": config.adapt})
    found = _found_before(files, key) or _find(row, board, task, stores[row.embedding], domains, files, config, key)
    rows, told = found
    notes = [*board.provenance.get("notes", ()), *told.lines()]
    provenance = {**board.provenance, "notes": notes, "domains": plain(asdict(told))}
    return replace(board, rows=(*board.rows, *rows), provenance=provenance)


def _domains(index: DatasetIndex, config: Config) -> Texts | None:
    """Return the domain of each image, object (str) of shape (n,); None where nothing is said of domains."""
    if config.dataset.domain is not None and not config.dataset.domain_column:
        return np.where(index.splits == "test", "test", "training").astype(object)
    return index.domains if config.dataset.domain else None


def _found_before(files: Artifacts, key: str) -> tuple[list[LeaderboardRow], Domains] | None:
    """Return what an earlier run found of the same."""
    with suppress(PipelineError, OSError, KeyError, TypeError, ValueError, AttributeError):
        before = read_leaderboard(files.root)
        told: Domains = from_plain(Domains, before.provenance["domains"])
        if told.key == key:
            if told.bundle is not None:
                bundles.load(files.root / told.bundle)
            return [row for row in before.rows if row.adapted], told
    return None


def _find(
    row: LeaderboardRow,
    board: Leaderboard,
    task: Task,
    store: FeatureStore | JoinedStores,
    domains: list[Texts],
    files: Artifacts,
    config: Config,
    key: str,
) -> tuple[list[LeaderboardRow], Domains]:
    folder, seed = files.root / str(row.bundle), config.seed
    said = HeadPredictions.read(folder / FILE_NAME)
    groups = [
        part.groups if part.groups is not None else np.full(len(part), "", object) for part in (task.train, task.test)
    ]
    units = leakage_units(np.concatenate([task.train.digests, task.test.digests]), np.concatenate(groups))
    in_test = units[len(task.train) :]
    half = np.random.default_rng(seed).permutation(units.max() + 1)[in_test] % 2 == 0
    asked = _Asked(row, bundles.load(folder), said, task, store, domains[0], domains[1], units, half, seed)
    notes: list[str] = []
    adapted, rows, bundle = list[Adapted](), list[LeaderboardRow](), None
    if config.adapt and not asked.new:
        notes.append(
            "Every domain of the test is among the training images, so there is none to adapt to: give all images of one the split test."
        )
    for way in config.adapt if asked.new else ():
        start = time.perf_counter()
        answers, used, weighing, problem = WAYS[way](asked)
        notes += [f"{way}: {problem}."] if problem else []
        if answers is None:
            continue
        named = f"{row.head}+{way}"
        rows.append(_row(row, named, way, answers, board.metric, seed, time.perf_counter() - start))
        adapted += _brought(asked, f"{row.embedding}/{named}", way, answers, board.told_by, used, weighing)
        if weighing is not None:
            bundle = files.bundle(row.embedding, named).relative_to(files.root).as_posix()
            bundles.save(replace(weighing.fitted, provenance={"key": key, "seed": seed}), files.root / bundle)
            notes.append(f"The re-weighted head of all of them is in {bundle}.")
    of_all, trained = np.concatenate(domains), sorted({*domains[0].tolist()})
    pairs, left = _pairs(asked, of_all)
    assert said.out_of_fold is not None
    parts = [replace(part, units=None, scores=None, folds=None) for part in (said.out_of_fold, said.test)]
    distinct = units.max() + 1 == len(units)
    everything = replace(joined(parts), units=None if distinct else units)
    each = suffering(everything, of_all, trained)
    adapted.sort(key=lambda one: (one.domain, one.way))
    return rows, Domains(key, row.key, row.embedding, pairs, each, tuple(adapted), bundle, (*left, *notes))


def _pairs(asked: _Asked, of_all: Texts) -> tuple[tuple[Any, ...], list[str]]:
    """Measure the pairs of domains, and say which were not."""
    rows = {name: np.flatnonzero(of_all == name) for name in sorted({*of_all.tolist()})}
    few = [name for name, own in rows.items() if len(np.unique(asked.units[own])) < 2 * FOLDS]
    ordered = sorted(rows, key=lambda name: (name in asked.new, name))
    pairs = [pair for pair in combinations(ordered, 2) if not {*pair} & {*few}]
    pairs.sort(key=lambda pair: len({*pair} & {*asked.new}) != 1)
    notes = [f"{len(rows[name])} images of {name!r} are too few to say how far it is from others." for name in few]
    if len(pairs) > MOST_PAIRS:
        notes.append(f"Of {len(pairs)} pairs of domains {MOST_PAIRS} were measured.")
    found = []
    for one, other in pairs[:MOST_PAIRS]:
        a, b = (asked.sample(rows[name]) for name in (one, other))
        together = asked.units[np.concatenate([a, b])]
        found.append(apart(asked.read(a), asked.read(b), asked.seed, together, (one, other)))
    return tuple(found), notes


@dataclass(frozen=True)
class _Weighing:
    """A head fitted with weights made of all images of new domains, and how many training images these leave."""

    fitted: ModelBundle
    worth: float


Told = tuple[Predictions | None, Mapping[str, int], _Weighing | None, str]
"""What the adapted head said of the test, by domain how many images told it at least, the head where it is another, and what is amiss."""


def _coral(asked: _Asked) -> Told:
    """Align the images of each new domain with the training images."""
    n, answers, used, few = len(asked.task.train), asked.said.test, dict[str, int](), list[str]()
    source = asked.read(asked.sample(np.arange(n)))
    for name in asked.new:
        halves = [np.flatnonzero((asked.of_test == name) & (asked.half == side)) for side in (False, True)]
        if min(map(len, halves)) < LEAST:
            few.append(f"{sum(map(len, halves))} of {name!r}")
            continue
        used[name] = min(map(len, halves))
        for own, other in (halves, halves[::-1]):
            alignment = align(source, asked.read(n + asked.sample(other)), asked.seed)
            answers = _answered(answers, own, asked.bundle.said(alignment(asked.read(n + own))))
    amiss = f"too few test images to align by, expected {2 * LEAST} of a domain: {', '.join(few)}" if few else ""
    return (answers if used else None), used, None, amiss


def _reweight(asked: _Asked) -> Told:
    """Fit the head again on training images weighted as if they came of the new domains."""
    n, pipeline = len(asked.task.train), asked.bundle.estimator
    named, last = pipeline.steps[-1]
    if not has_fit_parameter(last, "sample_weight"):
        return None, {}, None, f"{asked.row.head} takes no weights"
    new = np.isin(asked.of_test, asked.new)
    halves = [np.flatnonzero(new & (asked.half == side)) for side in (False, True)]
    if min(map(len, halves)) < LEAST or n > MOST_TRAINING:
        what = f"{int(new.sum())} test images of new domains are too few, expected {2 * LEAST}"
        return None, {}, None, what if n <= MOST_TRAINING else f"more than {MOST_TRAINING:,} training images"
    source, answers = asked.read(np.arange(n)), asked.said.test

    def weighed(images: NDArray[np.intp]) -> _Weighing:
        found = weights(source, asked.read(n + asked.sample(images)), asked.seed)
        fitted = clone(pipeline).fit(source, asked.task.y_train, **{f"{named}__sample_weight": found})
        return _Weighing(replace(asked.bundle, estimator=fitted), worth(found))

    for own, other in (halves, halves[::-1]):
        answers = _answered(answers, own, weighed(other).fitted.said(asked.read(n + own)))
    used = {name: int(np.sum(asked.of_test == name)) // 2 for name in asked.new}
    return answers, used, weighed(np.flatnonzero(new)), ""


WAYS = {"coral": _coral, "reweight": _reweight}
"""By the words of `adapt`."""


def _answered(
    said: Predictions, rows: NDArray[np.intp], new: tuple[NDArray[Any], NDArray[np.float64] | None]
) -> Predictions:
    """Return predictions with those of some images replaced."""
    y_pred, probabilities = said.y_pred.copy(), said.probabilities
    y_pred[rows] = new[0]
    if probabilities is not None and new[1] is not None:
        probabilities = probabilities.astype(np.float64)
        probabilities[rows] = new[1]
    return replace(said, y_pred=y_pred, probabilities=probabilities)


def _row(
    row: LeaderboardRow, named: str, way: str, answers: Predictions, metric: Metric, seed: int, seconds: float
) -> LeaderboardRow:
    """Return the row of an adapted head; it has no bundle of its own that every command would take."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("bundle", "nested", "seeds", "reweighted", "last_fit", "expected_test", "search_seconds")
    )
    tested = scores(answers, seed, metric)
    return replace(
        row, head=named, adapted=way, test=tested, fit_seconds=row.fit_seconds + seconds, trials=1, **nothing
    )


def _brought(
    asked: _Asked,
    row: str,
    way: str,
    answers: Predictions,
    metric: Metric,
    used: Mapping[str, int],
    weighing: _Weighing | None,
) -> list[Adapted]:
    """Compare the adapted head with the plain one, on the test images of each new domain."""
    found = []
    for name, images in used.items():
        new, old = (part.rows(asked.of_test == name) for part in (answers, asked.said.test))
        gain = paired_answers(metric, new, old, asked.seed)
        plain_score, score = (float(part.correct.mean()) for part in (old, new))
        left = None if weighing is None else weighing.worth
        found.append(Adapted(row, way, name, len(new), plain_score, score, gain, images, left))
    return found
