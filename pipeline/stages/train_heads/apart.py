"""Rows derived from other rows: the soft vote, and separate rows, which are never chosen and are reused while their inputs are unchanged.

A soft vote is the mean of the probabilities of the best rows of different embeddings. Its members are chosen greedily by out-of-fold
probabilities (Caruana et al. 2004): first the best row, then repeatedly the best row of another embedding that improves the score most,
until none does. For the score, the choice is repeated without each fold, so that no image is scored by a choice that it influenced; the
saved vote is the choice by all folds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.embed.published import joined
from pipeline.errors import BundleError, PipelineError
from pipeline.evaluation import METRICS, HeadPredictions, Metric, Predictions, scores
from pipeline.evaluation.calibration import fit_calibrator
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.row import ROW_VERSION, expected_test, finished_row
from pipeline.stages.train_heads.task import Asked, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The row that others are derived from, its bundle (with the row's key in the provenance), and its predictions."""

    row: LeaderboardRow
    bundle: ModelBundle
    predictions: HeadPredictions


@dataclass
class ApartRows:
    """Derived rows, notes on them, the folders of their bundles, and further fields (`more`) for the leaderboard's provenance."""

    key: str
    rows: list[LeaderboardRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)
    more: Any = None

    def save(self, bundle: ModelBundle, embedding: str, asked: Asked, answers: HeadPredictions | None = None) -> str:
        """Save the bundle of a row, with its predictions if given; return its folder relative to the output folder."""
        folder = asked.files.bundle(embedding, bundle.head)
        files = {} if answers is None else {FILE_NAME: answers.to_bytes()}
        bundles.save(replace(bundle, provenance={"key": self.key, "seed": asked.config.seed}), folder, files)
        self.bundles.append(folder.relative_to(asked.files.root).as_posix())
        return self.bundles[-1]


def origin(board: Leaderboard, embeddings: Collection[str], asked: Asked) -> Origin | None:
    """Return the best row on the named embeddings; None if none exists, it cannot be loaded, or the classes are not exclusive."""
    rows = [row for row in board.ranked if row.embedding in embeddings and row.bundle and row.task == asked.task.key]
    if not rows or not asked.task.target.exclusive:
        return None
    folder = asked.files.root / str(rows[0].bundle)
    try:
        return Origin(rows[0], bundles.load(folder), HeadPredictions.read(folder / FILE_NAME))
    except BundleError as error:  # such as a bundle that runs code and is not trusted
        log.info("%s: no rows are derived from it: %s", rows[0].key, error)
        return None


def with_rows(board: Leaderboard, asked: Asked, name: str, key: str, make: Callable[[ApartRows], None]) -> Leaderboard:
    """Add derived rows and their notes to the leaderboard: those of an earlier run with this key, or else newly made ones."""
    found = ApartRows(key)
    if not _found_before(found, asked, name):
        make(found)
    record = {"key": key, "notes": found.notes, "bundles": found.bundles, "more": found.more}
    notes = [*board.provenance.get("notes", ()), *found.notes]
    rows = (*board.rows, *found.rows)
    return replace(board, rows=rows, provenance={**board.provenance, "notes": notes, name: record})


def _found_before(found: ApartRows, asked: Asked, name: str) -> bool:
    """Fill in the rows of an earlier run with the same key; False if there is none, or its bundles are damaged."""
    with suppress(PipelineError, OSError, KeyError, TypeError, ValueError):
        before = read_leaderboard(asked.files.root)
        record = before.provenance[name]
        if record["key"] == found.key:
            for folder in record["bundles"]:
                bundles.load(asked.files.root / folder)
            found.rows = [row for row in before.rows if row.apart == name]
            found.notes, found.bundles, found.more = list(record["notes"]), list(record["bundles"]), record["more"]
            return True
    return False


def row_like(
    row: LeaderboardRow, head: str, apart: str, test: Predictions, metric: Metric, seed: int
) -> LeaderboardRow:
    """Return the row of a head derived from another row's; it names no bundle, as not every command could use it."""
    none = dict.fromkeys(("bundle", "nested", "seeds", "reweighted", "last_fit", "expected_test", "search_seconds"))
    return replace(row, head=head, apart=apart, test=scores(test, seed, metric), trials=1, **none)  # type: ignore[arg-type]


def cross_validated(predictions: Predictions, task: Task, metric: Metric) -> dict[str, Any]:
    """Return the cross-validation fields of a row, computed from out-of-fold predictions."""
    folds = tuple(metric.score(predictions.rows(held_out)) for _, held_out in task.folds)
    return {"cv_mean": metric.score(predictions), "cv_std": float(np.std(folds, ddof=1)), "cv_scores": folds}


def soft_vote(
    head: str, params: Any, members: Sequence[ModelBundle], mean: NDArray[np.float64], task: Task
) -> ModelBundle:
    """Return the bundle of a soft vote, calibrated on the mean of its members' out-of-fold probabilities: float64, (n, n_classes)."""
    calibrator = fit_calibrator(bundles.logits(mean, "probability"), task.y_train)
    return ModelBundle(head, params, members[0].target, {}, None, {}, calibrator, tuple(members))


# The soft vote ---------------------------------------------------------------------------------------------------------

VOTE, HEAD = "vote", "soft_vote"
"""The vote's name in place of an embedding's, and its head's name."""


@dataclass(frozen=True)
class Voter:
    """A row that can vote, its predictions, and their probabilities: out of fold, of shape (n, n_classes), and of the test images."""

    row: LeaderboardRow
    out_of_fold: Predictions
    test: Predictions
    probabilities: NDArray[np.floating]
    of_test: NDArray[np.floating]


Voters = Mapping[str, Voter]
"""Voters by the key of their row."""


def vote_row(rows: Sequence[LeaderboardRow], asked: Asked) -> LeaderboardRow | str:
    """Return the row of the soft vote, or a message on why there is none."""
    task, files, seed = asked.task, asked.files, asked.config.seed
    scoring, able = asked.config.tuning.scoring, _able(rows, asked)
    if not task.target.exclusive or len({voter.row.embedding for voter in able.values()}) < 2:
        return "No soft vote: it needs rows with probabilities on at least two embeddings of the same images."
    made = [bundles.describe(files.root / str(voter.row.bundle))["provenance"]["key"] for voter in able.values()]
    key = fingerprint({"row": ROW_VERSION, "rows": made, "task": task.key, "scoring": scoring, "seed": seed})
    folder, metric = files.bundle(VOTE, HEAD), METRICS[scoring]
    found = finished_row(folder, key)
    if found is not None:
        return found
    members = _chosen(able, metric, np.arange(len(task.train)))
    if len(members) < 2:
        return f"No soft vote: no second embedding improves on {members[0]} out of fold."
    mean = np.empty((len(task.train), task.target.width))
    for train, held_out in task.folds:
        mean[held_out] = _mean(able, _chosen(able, metric, train), held_out)
    chosen = [able[name] for name in members]
    voters, params = [voter.row for voter in chosen], {"members": members}
    loaded = [bundles.load(files.root / str(row.bundle)) for row in voters]
    bundle = soft_vote(HEAD, params, loaded, mean, task)
    y_pred, probabilities = bundle.voted([mean])
    test_pred, on_test = bundle.voted([voter.of_test for voter in chosen])
    searched = mean.astype(np.float32) if metric.needs_probabilities else None
    more = {"y_pred": y_pred, "probabilities": probabilities, "scores": searched, "kind": "probability"}
    predictions = HeadPredictions(
        replace(chosen[0].test, y_pred=test_pred, probabilities=on_test),
        replace(chosen[0].out_of_fold, **more),  # type: ignore[arg-type]
    )
    costs = [voter.embed_seconds for voter in voters]
    row = LeaderboardRow(
        embedding=VOTE,
        backbone=VOTE,
        layer="",
        head=HEAD,
        untrained=any(voter.untrained for voter in voters),
        baseline=all(voter.baseline for voter in voters),
        **cross_validated(Predictions(task.y_train, y_pred, mean), task, metric),
        test=scores(predictions.test, seed, metric),
        fit_seconds=sum(voter.fit_seconds for voter in voters),
        predict_seconds=sum(voter.predict_seconds for voter in voters),
        trials=len(able),
        params=params,
        bundle=folder.relative_to(files.root).as_posix(),
        simplicity=100,
        dim=sum(voter.dim or 0 for voter in voters),
        license=joined(voter.license for voter in voters),
        embed_seconds=None if None in costs else sum(cost or 0 for cost in costs),
        task=task.key,
        expected_test=expected_test(predictions, task),
    )
    provenance = {"key": key, "row": row.to_record(), "seed": seed}
    bundles.save(replace(bundle, provenance=provenance), folder, {FILE_NAME: predictions.to_bytes()})
    return row


def _able(rows: Sequence[LeaderboardRow], asked: Asked) -> Voters:
    """Return the rows that can vote, by key: those on the task's images that are sound and have out-of-fold probabilities."""
    found = {}
    for row in rows:
        if row.bundle is None or row.constant or not row.sound or row.task != asked.task.key:
            continue
        folder = asked.files.root / row.bundle
        try:
            if bundles.describe(folder)["runs_code_when_loaded"]:
                continue  # the folder may come from someone else, and members are loaded to be saved again
            predictions = HeadPredictions.read(folder / FILE_NAME)
        except BundleError as error:
            log.warning("%s: left out of the soft vote: %s", row.key, error)
            continue
        own, test = predictions.out_of_fold, predictions.test
        if own is not None and own.probabilities is not None and test.probabilities is not None:
            found[row.key] = Voter(row, own, test, own.probabilities, test.probabilities)
    return found


def _mean(able: Voters, members: Sequence[str], rows: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(np.mean([able[key].probabilities[rows] for key in members], axis=0, dtype=np.float64))


def _chosen(able: Voters, metric: Metric, rows: NDArray[np.intp]) -> list[str]:
    """Return the keys of the chosen voters, best first, by their out-of-fold predictions of some training rows, given by index."""
    y = next(iter(able.values())).out_of_fold.y_true[rows]

    def score(members: Sequence[str]) -> float:
        mean = _mean(able, members, rows)
        return metric.score(Predictions(y, mean.argmax(axis=1), mean))

    best: dict[str, str] = {}
    for key in sorted(able, key=lambda key: -score([key])):
        best.setdefault(able[key].row.embedding, key)
    first, *left = best.values()
    chosen, reached = [first], score([first])
    while left:
        gains = [score([*chosen, key]) for key in left]
        if max(gains) <= reached:
            break
        reached = max(gains)
        chosen.append(left.pop(gains.index(reached)))
    return chosen
