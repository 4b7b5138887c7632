"""Rows made of other rows: soft votes, and rows that stand apart and choose nothing, found again where nothing changed since."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BundleError, PipelineError
from pipeline.evaluation import HeadPredictions, Metric, Predictions, scores
from pipeline.evaluation.calibration import fit_calibrator
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.stages.train_heads.task import Asked, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The row that others are made of, its bundle, whose provenance has the key it was made by, and what it said."""

    row: LeaderboardRow
    bundle: ModelBundle
    said: HeadPredictions


@dataclass
class ApartRows:
    """Rows, sentences on them, the folders of their bundles, and what else the leaderboard's provenance says."""

    key: str
    rows: list[LeaderboardRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)
    more: Any = None

    def save(self, bundle: ModelBundle, embedding: str, asked: Asked, said: HeadPredictions | None = None) -> str:
        """Save the bundle of a row, with what it says if given; return its folder as seen from the output folder."""
        folder = asked.files.bundle(embedding, bundle.head)
        beside = {} if said is None else {FILE_NAME: said.to_bytes()}
        bundles.save(replace(bundle, provenance={"key": self.key, "seed": asked.config.seed}), folder, beside)
        self.bundles.append(folder.relative_to(asked.files.root).as_posix())
        return self.bundles[-1]


def origin(board: Leaderboard, embeddings: Collection[str], asked: Asked) -> Origin | None:
    """Return the best row on some embeddings, by name; None where there is none of classes that can be opened."""
    rows = [row for row in board.ranked if row.embedding in embeddings and row.bundle and row.task == asked.task.key]
    if not rows or not asked.task.target.exclusive:
        return None
    folder = asked.files.root / str(rows[0].bundle)
    try:
        return Origin(rows[0], bundles.load(folder), HeadPredictions.read(folder / FILE_NAME))
    except BundleError as error:  # such as code, which nobody has said is to be trusted
        log.info("%s: no further rows are made of it: %s", rows[0].key, error)
        return None


def with_rows(board: Leaderboard, asked: Asked, name: str, key: str, make: Callable[[ApartRows], None]) -> Leaderboard:
    """Return the leaderboard with further rows and what is said of them: as an earlier run with this key found them, or made now."""
    found = ApartRows(key)
    if not _found_before(found, asked, name):
        make(found)
    told = {"key": key, "notes": found.notes, "bundles": found.bundles, "more": found.more}
    notes = [*board.provenance.get("notes", ()), *found.notes]
    rows = (*board.rows, *found.rows)
    return replace(board, rows=rows, provenance={**board.provenance, "notes": notes, name: told})


def _found_before(found: ApartRows, asked: Asked, name: str) -> bool:
    """Fill in what an earlier run found of the same; False where there is none, or its bundles are not whole."""
    with suppress(PipelineError, OSError, KeyError, TypeError, ValueError):
        before = read_leaderboard(asked.files.root)
        told = before.provenance[name]
        if told["key"] == found.key:
            for folder in told["bundles"]:
                bundles.load(asked.files.root / folder)
            found.rows = [row for row in before.rows if row.apart == name]
            found.notes, found.bundles, found.more = list(told["notes"]), list(told["bundles"]), told["more"]
            return True
    return False


def row_like(
    row: LeaderboardRow, head: str, apart: str, test: Predictions, metric: Metric, seed: int
) -> LeaderboardRow:
    """Return the row of a head that was made of another's; it has no bundle that every command would take."""
    none = dict.fromkeys(("bundle", "nested", "seeds", "reweighted", "last_fit", "expected_test", "search_seconds"))
    return replace(row, head=head, apart=apart, test=scores(test, seed, metric), trials=1, **none)  # type: ignore[arg-type]


def cross_validated(said: Predictions, task: Task, metric: Metric) -> dict[str, Any]:
    """Return the fields of a row that tell how good answers out of fold are."""
    folds = tuple(metric.score(said.rows(held_out)) for _, held_out in task.folds)
    return {"cv_mean": metric.score(said), "cv_std": float(np.std(folds, ddof=1)), "cv_scores": folds}


def soft_vote(
    head: str, params: Any, members: Sequence[ModelBundle], mean: NDArray[np.float64], task: Task
) -> ModelBundle:
    """Return the bundle of a vote, calibrated by the mean that its members say out of fold: float64 of shape (n, n_classes)."""
    calibrator = fit_calibrator(bundles.logits(mean, "probability"), task.y_train)
    return ModelBundle(head, params, members[0].target, {}, None, {}, calibrator, tuple(members))
