"""Views of images: a network's best head averaged over them, trained on them, or both, compared with the plain head.

All views of an image are in the same fold, so that no image is both trained and scored on. The parameters are those that the search
chose on the images alone. Each variant is a bundle; a variant that averages is a soft vote of the head over all views.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from pipeline.embed.records import EmbeddingRecord
from pipeline.embed.spec import VIEW
from pipeline.evaluation import ACCURACY, HeadPredictions, Metric, Predictions, paired_answers
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow
from pipeline.experiment import plain
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.apart import ApartRows, Origin, cross_validated, origin, row_like, soft_vote, with_rows
from pipeline.stages.train_heads.task import Asked

VERSION = 1
"""Increased when the meaning of the results changes, so that stored ones are recomputed."""
MOST_TRAINING = 20_000
"""Maximum number of training images for fitting a head on their views."""
WAYS = {"averaged": (False, True), "trained": (True, False), "trained+averaged": (True, True)}
"""For each variant: whether the head is trained on the views, and whether it is averaged over them."""

ViewVectors = Sequence[NDArray[np.float32]]
"""The vectors of the images, then those of each view, float32 of shape (n, dim) each."""
Viewed = tuple[Origin, list[EmbeddingRecord]]
"""The best row on a network that has views, and its embedding followed by those of the views."""


def with_views(board: Leaderboard, asked: Asked) -> Leaderboard:
    """Add to the leaderboard all variants of the best head of each network that has views, as separate rows."""
    viewed = list[Viewed]()
    for record in asked.records:
        parts = [record, *(other for other in asked.records if _is_of(other, record))]
        best = origin(board, [record.name], asked) if len(parts) > 1 else None
        viewed += [] if best is None else [(best, parts)]
    if not viewed:
        return board
    rows = [[best.bundle.provenance["key"], *(part.fingerprint for part in parts)] for best, parts in viewed]

    def make(found: ApartRows) -> None:
        for best, parts in viewed:
            _find(best, parts, asked, board.metric, found)

    return with_rows(board, asked, "views", fingerprint({"version": VERSION, "rows": rows}), make)


def _is_of(record: EmbeddingRecord, plain: EmbeddingRecord) -> bool:
    """Whether an embedding is a view of another: it has the same network, layer and pooling."""
    if record.kind != VIEW or plain.kind != "backbone" or record.section is None:
        return False
    same = (record.spec.layer, record.spec.pooling) == (plain.spec.layer, plain.spec.pooling)
    return same and record.section.model_copy(update={"view": None}) == plain.section


def _find(best: Origin, parts: Sequence[EmbeddingRecord], asked: Asked, metric: Metric, found: ApartRows) -> None:
    task, row, bundle, before = asked.task, best.row, best.bundle, best.predictions
    n = len(task.train)
    if before.out_of_fold is None or before.out_of_fold.probabilities is None or n > MOST_TRAINING:
        many = f"of more than {MOST_TRAINING:,} training images"
        why = many if n > MOST_TRAINING else f"{row.head} has no probabilities"
        found.notes.append(f"Views of {row.embedding} are not compared: {why}.")
        return
    X, T = ([asked.stores[part.name].read(images.digests) for part in parts] for images in (task.train, task.test))

    def fitted(rows: NDArray[np.intp], views: bool) -> ModelBundle:
        used = X if views else X[:1]
        vectors, y = np.concatenate([part[rows] for part in used]), np.tile(task.y_train[rows], len(used))
        return replace(bundle, estimator=clone(bundle.estimator).fit(vectors, y))

    held_out = {way: np.empty((n, task.target.width)) for way in WAYS}
    for train, out in task.folds:
        heads = [fitted(train, views) for views in (False, True)]
        for way, (views, averaged) in WAYS.items():
            held_out[way][out] = _mean(heads[views], [part[out] for part in X], averaged)
    start = time.perf_counter()
    trained = fitted(np.arange(n), True)
    seconds = time.perf_counter() - start
    for way, (views, averaged) in WAYS.items():
        head, name = trained if views else bundle, f"{row.head}+{way}"
        members = [replace(head, embedding=plain(part)) for part in parts]
        made = soft_vote(name, head.params, members, held_out[way], task) if averaged else replace(head, head=name)
        predictions = HeadPredictions(
            _predicted(before.test, made, _mean(head, T, averaged)),
            _predicted(before.out_of_fold, made, held_out[way]),
        )
        assert predictions.out_of_fold is not None
        costs = [part.seconds_per_image for part in parts[: len(made.parts)]]
        new = replace(
            row_like(row, name, "views", predictions.test, metric, asked.config.seed),
            **cross_validated(predictions.out_of_fold, task, metric),
            fit_seconds=seconds if views else row.fit_seconds,
            embed_seconds=None if None in costs else sum(cost or 0 for cost in costs),
        )
        found.rows.append(new)
        place = found.save(made, row.embedding, asked, predictions)
        found.notes.append(_sentence(best, new, predictions, len(parts), place, asked.config.seed))


def _mean(head: ModelBundle, views: ViewVectors, averaged: bool) -> NDArray[np.float64]:
    """Return the probabilities of n images, float64 of shape (n, n_classes): of the images alone, or averaged over their views."""
    probabilities = [head.said(part)[1] for part in (views if averaged else views[:1])]
    return np.asarray(np.mean([p for p in probabilities if p is not None], axis=0, dtype=np.float64))


def _predicted(before: Predictions, made: ModelBundle, p: NDArray[np.float64]) -> Predictions:
    y_pred, probabilities = made.voted([p]) if made.members else (p.argmax(axis=1), p)
    return replace(before, y_pred=y_pred, probabilities=probabilities, scores=None, kind=None)


def _sentence(best: Origin, row: LeaderboardRow, new: HeadPredictions, times: int, place: str, seed: int) -> str:
    """Describe the gain and the cost of a variant."""
    assert new.out_of_fold is not None
    assert best.predictions.out_of_fold is not None
    alone, kilobytes = best.row, 4 * (best.row.dim or 0) / 1e3
    held_out = paired_answers(ACCURACY, new.out_of_fold, best.predictions.out_of_fold, seed)
    test = paired_answers(ACCURACY, new.test, best.predictions.test, seed)
    price = [f"{times * kilobytes:.1f} kB of vectors per image instead of {kilobytes:.1f}"]
    if row.fit_seconds != alone.fit_seconds:
        price.append(f"fitted in {row.fit_seconds:.2g} s instead of {alone.fit_seconds:.2g}")
    if row.embed_seconds and alone.embed_seconds and row.embed_seconds != alone.embed_seconds:
        price.append(f"{1e3 * row.embed_seconds:.0f} ms to embed an image instead of {1e3 * alone.embed_seconds:.0f}")
    brought = f"{held_out.points} out of fold and {test.points} on the test: {held_out.verdict}"
    return f"{row.key}: {brought}; {', '.join(price)}; in {place}."
