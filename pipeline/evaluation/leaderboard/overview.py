"""Several targets on the same images: the best row of each, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import Leaderboard, cross_validated, test_text

HEADERS = (
    "target",
    "training images",
    "cross-validation",
    "test [95 %]",
    "a constant guess",
    "best row",
    "recommended instead",
)


def overview(boards: Mapping[str, Leaderboard]) -> list[tuple[str, ...]]:
    """Return a row of cells for each target, as `HEADERS` names them."""
    return [_cells(name, board) for name, board in boards.items()]


def overview_text(boards: Mapping[str, Leaderboard]) -> str:
    """Return the table for a terminal."""
    return tabulate(overview(boards), HEADERS, disable_numparse=True)


def _cells(name: str, board: Leaderboard) -> tuple[str, ...]:
    best, guess = board.best, next((row for row in board.rows if row.constant), None)
    recommended = board.verdict.recommended if board.verdict else best.key
    return (
        name,
        f"{board.provenance.get('images', {}).get('train', 0):,}",
        f"{board.metric.title} {cross_validated(best, board.scoring)}",
        _tested(board, best),
        _tested(board, guess),
        best.key,
        "" if recommended == best.key else recommended,
    )


def _tested(board: Leaderboard, row: LeaderboardRow | None) -> str:
    """Return what the leaderboard's column on the test says of a row."""
    if row is None or row.test is None:
        return "–"
    named = "" if board.told_by is board.metric else f"{board.told_by.title} "
    return named + test_text(row.test, board.told_by)
