"""Rows made of another row, which stand apart and choose nothing: found again where nothing changed, and added with what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import BundleError, PipelineError
from pipeline.evaluation import HeadPredictions, Metric, Predictions, scores
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, read_leaderboard
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.stages.train_heads.task import Task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """The row that others are made of, its bundle with the key it was made by, and what it said."""

    row: LeaderboardRow
    bundle: ModelBundle
    key: str
    said: HeadPredictions


@dataclass(frozen=True)
class ApartRows:
    """Rows, sentences on them, the folders of their bundles, and what else the leaderboard's provenance says."""

    rows: tuple[LeaderboardRow, ...] = ()
    notes: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


def origin(board: Leaderboard, embeddings: Mapping[str, Any], task: Task, files: Artifacts) -> Origin | None:
    """Return the best row on some embeddings, by name; None where there is none of classes that can be opened."""
    rows = [row for row in board.ranked if row.embedding in embeddings and row.bundle and row.task == task.key]
    if not rows or not task.target.exclusive:
        return None
    folder = files.root / str(rows[0].bundle)
    try:
        key = bundles.describe(folder)["provenance"]["key"]
        return Origin(rows[0], bundles.load(folder), key, HeadPredictions.read(folder / FILE_NAME))
    except BundleError as error:  # such as code, which nobody has said is to be trusted
        log.info("%s: no further rows are made of it: %s", rows[0].key, error)
        return None


def found_before(files: Artifacts, name: str, key: str) -> ApartRows | None:
    """Return what an earlier run found of the same, where its bundles are whole."""
    with suppress(PipelineError, OSError, KeyError, TypeError, ValueError):
        before = read_leaderboard(files.root)
        told = before.provenance[name]
        if told["key"] == key:
            for folder in told["bundles"]:
                bundles.load(files.root / folder)
            rows = tuple(row for row in before.rows if row.apart == name)
            return ApartRows(rows, tuple(told["notes"]), tuple(told["bundles"]), told["more"])
    return None


def with_rows(board: Leaderboard, name: str, key: str, found: ApartRows) -> Leaderboard:
    """Return the leaderboard with further rows, and what is said of them."""
    told = {"key": key, "notes": found.notes, "bundles": found.bundles, "more": found.more}
    notes = [*board.provenance.get("notes", ()), *found.notes]
    return replace(board, rows=board.rows + found.rows, provenance={**board.provenance, "notes": notes, name: told})


def row_like(
    row: LeaderboardRow, head: str, apart: str, test: Predictions, metric: Metric, seed: int
) -> LeaderboardRow:
    """Return the row of a head that was made of another's; it has no bundle that every command would take."""
    none = dict.fromkeys(("bundle", "nested", "seeds", "reweighted", "last_fit", "expected_test", "search_seconds"))
    return replace(row, head=head, apart=apart, test=scores(test, seed, metric), trials=1, **none)  # type: ignore[arg-type]
