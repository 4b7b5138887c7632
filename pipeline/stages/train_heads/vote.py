"""Soft voting: the mean of the probabilities that the best rows of different embeddings give, as one more row.

Who votes is chosen by probabilities out of fold, greedily (Caruana et al. 2004): the best row, then of the best rows of the other
embeddings the one that helps most, as long as one helps. So that no image is judged by a choice that it had a part in, the score is
of a choice made again without each fold; what is saved is the choice by all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.embed.published import joined
from pipeline.errors import BundleError
from pipeline.evaluation import METRICS, HeadPredictions, Metric, Predictions, scores
from pipeline.evaluation.leaderboard import LeaderboardRow
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.export import bundle as bundles
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.apart import cross_validated, soft_vote
from pipeline.stages.train_heads.row import ROW_VERSION, expected_test, finished_row
from pipeline.stages.train_heads.task import Asked

log = logging.getLogger(__name__)

VOTE, HEAD = "vote", "soft_vote"
"""What the row has in place of an embedding's name, and its head."""


@dataclass(frozen=True)
class Voter:
    """A row that can vote, what it said of the images, and its probabilities: out of fold, shape (n, n_classes), and of the test."""

    row: LeaderboardRow
    out_of_fold: Predictions
    test: Predictions
    probabilities: NDArray[np.floating]
    of_test: NDArray[np.floating]


Voters = Mapping[str, Voter]
"""By the key of the row."""


def vote_row(rows: Sequence[LeaderboardRow], asked: Asked) -> LeaderboardRow | str:
    """Return the row of the soft vote, or why there is none."""
    task, files, seed = asked.task, asked.files, asked.config.seed
    scoring, able = asked.config.tuning.scoring, _able(rows, asked)
    if not task.target.exclusive or len({voter.row.embedding for voter in able.values()}) < 2:
        return "No soft vote: it takes rows with probabilities on two embeddings at least, on the same images."
    made = [bundles.describe(files.root / str(voter.row.bundle))["provenance"]["key"] for voter in able.values()]
    key = fingerprint({"row": ROW_VERSION, "rows": made, "task": task.key, "scoring": scoring, "seed": seed})
    folder, metric = files.bundle(VOTE, HEAD), METRICS[scoring]
    found = finished_row(folder, key)
    if found is not None:
        return found
    members = _chosen(able, metric, np.arange(len(task.train)))
    if len(members) < 2:
        return f"No soft vote: no second embedding makes {members[0]} better out of fold."
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
    said = HeadPredictions(
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
        test=scores(said.test, seed, metric),
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
        expected_test=expected_test(said, task),
    )
    provenance = {"key": key, "row": row.to_record(), "seed": seed}
    bundles.save(replace(bundle, provenance=provenance), folder, {FILE_NAME: said.to_bytes()})
    return row


def _able(rows: Sequence[LeaderboardRow], asked: Asked) -> Voters:
    """Return the rows that can vote, by key: on the images of the task, sound, with probabilities out of fold."""
    found = {}
    for row in rows:
        if row.bundle is None or row.constant or not row.sound or row.task != asked.task.key:
            continue
        folder = asked.files.root / row.bundle
        try:
            if bundles.describe(folder)["runs_code_when_loaded"]:
                continue  # a folder may be a stranger's, and members are loaded to be saved again
            said = HeadPredictions.read(folder / FILE_NAME)
        except BundleError as error:
            log.warning("%s: has no vote: %s", row.key, error)
            continue
        own, test = said.out_of_fold, said.test
        if own is not None and own.probabilities is not None and test.probabilities is not None:
            found[row.key] = Voter(row, own, test, own.probabilities, test.probabilities)
    return found


def _mean(able: Voters, members: Sequence[str], rows: NDArray[np.intp]) -> NDArray[np.float64]:
    return np.asarray(np.mean([able[key].probabilities[rows] for key in members], axis=0, dtype=np.float64))


def _chosen(able: Voters, metric: Metric, rows: NDArray[np.intp]) -> list[str]:
    """Return who votes, the best first, by what they say of some training rows, given by number."""
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
