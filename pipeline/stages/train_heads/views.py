"""Views of images: the best head on a network averaged over them, learned from them, and both, compared with the plain head.

Folds are of images: a head that learns from the views of some is judged on others, so that no picture is on both sides. Parameters stay
those that the search chose on the images alone. Each way is a bundle; one that averages is a soft vote of the head on every view.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from pipeline.embed.records import EmbeddingRecord
from pipeline.embed.spec import VIEW
from pipeline.evaluation import ACCURACY, HeadPredictions, Metric, Predictions, paired_answers
from pipeline.evaluation.calibration import fit_calibrator
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import Artifacts, plain
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.apart import ApartRows, Origin, found_before, origin, row_like, with_rows
from pipeline.stages.train_heads.task import Task
from pipeline.store import FeatureStore, JoinedStores

VERSION = 1
"""Goes up when what is measured changes its meaning, so that it is made again."""
MOST_TRAINING = 20_000
"""Training images whose views a head is fitted on."""
WAYS = {"averaged": (False, True), "trained": (True, False), "trained+averaged": (True, True)}
"""Whether the head learns from the views, and whether it is averaged over them."""

ViewVectors = Sequence[NDArray[np.float32]]
"""Of the images and of each view of them, float32 of shape (n, dim) each."""


@dataclass(frozen=True)
class _ViewedRow:
    """A row of a network that has views, and its embedding before those of the views."""

    origin: Origin
    parts: Sequence[EmbeddingRecord]

    def cost(self, times: int) -> float | None:
        """Seconds to embed an image in so many of the ways, where they are known."""
        found = [part.seconds_per_image for part in self.parts[:times]]
        return None if None in found else sum(each for each in found if each is not None)


def with_views(
    board: Leaderboard,
    task: Task,
    stores: Mapping[str, FeatureStore | JoinedStores],
    records: Sequence[EmbeddingRecord],
    files: Artifacts,
    seed: int,
) -> Leaderboard:
    """Return the leaderboard with the best head of each network that has views in all ways, as rows that stand apart."""
    asked = []
    for record in records:
        views = [other for other in records if _is_of(other, record)]
        best = origin(board, {record.name: record}, task, files) if views else None
        asked += [] if best is None else [_ViewedRow(best, [record, *views])]
    if not asked:
        return board
    made = [[each.origin.key, *(part.fingerprint for part in each.parts)] for each in asked]
    key = fingerprint({"version": VERSION, "rows": made})
    found = found_before(files, "views", key)
    if found is None:
        each = [_find(one, board.metric, task, stores, files, seed, key) for one in asked]
        rows, notes, folders = (
            tuple(chain(*of)) for of in zip(*((one.rows, one.notes, one.bundles) for one in each), strict=True)
        )
        found = ApartRows(rows, notes, folders)
    return with_rows(board, "views", key, found)


def _is_of(record: EmbeddingRecord, plain: EmbeddingRecord) -> bool:
    """Whether an embedding is a view of another: the same layer and pooling of the same network."""
    if record.kind != VIEW or plain.kind != "backbone" or record.section is None:
        return False
    same = (record.spec.layer, record.spec.pooling) == (plain.spec.layer, plain.spec.pooling)
    return same and record.section.model_copy(update={"view": None}) == plain.section


def _find(
    asked: _ViewedRow,
    metric: Metric,
    task: Task,
    stores: Mapping[str, FeatureStore | JoinedStores],
    files: Artifacts,
    seed: int,
    key: str,
) -> ApartRows:
    row, bundle, said, n = asked.origin.row, asked.origin.bundle, asked.origin.said, len(task.train)
    if said.out_of_fold is None or said.out_of_fold.probabilities is None or n > MOST_TRAINING:
        why = (
            f"of more than {MOST_TRAINING:,} training images"
            if n > MOST_TRAINING
            else f"{row.head} has no probabilities"
        )
        return ApartRows(notes=(f"Views of {row.embedding} are not compared: {why}.",))
    X, T = ([stores[part.name].read(images.digests) for part in asked.parts] for images in (task.train, task.test))
    seconds = dict[bool, float]()

    def fitted(rows: NDArray[np.intp], views: bool) -> ModelBundle:
        used, start = X if views else X[:1], time.perf_counter()
        vectors, y = np.concatenate([part[rows] for part in used]), np.tile(task.y_train[rows], len(used))
        made = replace(bundle, estimator=clone(bundle.estimator).fit(vectors, y))
        seconds[views] = time.perf_counter() - start
        return made

    held_out = {way: np.empty((n, task.target.width)) for way in WAYS}
    for train, out in task.folds:
        heads = [fitted(train, views) for views in (False, True)]
        for way, (views, averaged) in WAYS.items():
            held_out[way][out] = _mean(heads[views], [part[out] for part in X], averaged)
    whole = [bundle, fitted(np.arange(n), True)]
    rows, notes, folders = list[LeaderboardRow](), list[str](), list[str]()
    for way, (views, averaged) in WAYS.items():
        made = _made(whole[views], f"{row.head}+{way}", asked.parts if averaged else (), held_out[way], task)
        told = HeadPredictions(
            _predicted(said.test, made, _mean(whole[views], T, averaged)),
            _predicted(said.out_of_fold, made, held_out[way]),
        )
        folder = files.bundle(row.embedding, made.head)
        bundles.save(replace(made, provenance={"key": key, "seed": seed}), folder, {FILE_NAME: told.to_bytes()})
        folders.append(folder.relative_to(files.root).as_posix())
        rows.append(_row(asked, made, told, metric, task, seed, seconds[views]))
        notes.append(_sentence(asked, rows[-1], told, views, averaged, folders[-1], seed))
    return ApartRows(tuple(rows), tuple(notes), tuple(folders))


def _mean(head: ModelBundle, views: ViewVectors, averaged: bool) -> NDArray[np.float64]:
    """Return probabilities of n images, float64 of shape (n, n_classes): of the image alone, or averaged over its views."""
    told = [head.said(part)[1] for part in (views if averaged else views[:1])]
    return np.asarray(np.mean([p for p in told if p is not None], axis=0, dtype=np.float64))


def _made(
    head: ModelBundle, name: str, parts: Sequence[EmbeddingRecord], held_out: NDArray[np.float64], task: Task
) -> ModelBundle:
    """Return the bundle of a way: the head itself, or its vote on all views, calibrated by what it said out of fold."""
    if not parts:
        return replace(head, head=name)
    calibrator = fit_calibrator(bundles.logits(held_out, "probability"), task.y_train)
    members = tuple(replace(head, embedding=plain(part)) for part in parts)
    return ModelBundle(name, head.params, head.target, {}, None, {}, calibrator, members)


def _predicted(before: Predictions, made: ModelBundle, p: NDArray[np.float64]) -> Predictions:
    y_pred, probabilities = made.voted([p]) if made.members else (p.argmax(axis=1), p)
    return replace(before, y_pred=y_pred, probabilities=probabilities, scores=None, kind=None)


def _row(
    asked: _ViewedRow, made: ModelBundle, told: HeadPredictions, metric: Metric, task: Task, seed: int, seconds: float
) -> LeaderboardRow:
    assert told.out_of_fold is not None
    folds = tuple(metric.score(told.out_of_fold.rows(out)) for _, out in task.folds)
    like = row_like(asked.origin.row, made.head, "views", told.test, metric, seed)
    return replace(
        like,
        cv_mean=metric.score(told.out_of_fold),
        cv_std=float(np.std(folds, ddof=1)),
        cv_scores=folds,
        fit_seconds=seconds,
        embed_seconds=asked.cost(len(made.parts)),
    )


def _sentence(
    asked: _ViewedRow, row: LeaderboardRow, told: HeadPredictions, views: bool, averaged: bool, place: str, seed: int
) -> str:
    """Say what a way brought, and what it costs."""
    plain, before = asked.origin.row, asked.origin.said
    assert told.out_of_fold is not None
    assert before.out_of_fold is not None
    pairs = {"out of fold": (told.out_of_fold, before.out_of_fold), "on the test": (told.test, before.test)}
    gains = {where: paired_answers(ACCURACY, new, old, seed) for where, (new, old) in pairs.items()}
    brought = " and ".join(f"{gain.points} {where}" for where, gain in gains.items())
    times, kilobytes = len(asked.parts), 4 * (plain.dim or 0) / 1e3
    price = [f"{times * kilobytes:.1f} kB of vectors an image in place of {kilobytes:.1f}"]
    if views:
        price.append(f"fitted in {row.fit_seconds:.2g} s in place of {plain.fit_seconds:.2g}")
    if averaged and row.embed_seconds and plain.embed_seconds:
        new, old = row.embed_seconds, plain.embed_seconds
        price.append(
            f"{1e3 * new:.0f} ms to embed an image in place of {1e3 * old:.0f} ({1 / new:.0f} images/s in place of {1 / old:.0f})"
        )
    return f"{row.key}: {brought}: {gains['out of fold'].verdict}; {', '.join(price)}; in {place}."
