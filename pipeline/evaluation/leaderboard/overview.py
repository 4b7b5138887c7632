"""Several targets on the same images: the best row of each, side by side."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import Leaderboard, cross_validated

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
    """Return a row's test score in what it was tuned for, else in what the test is told by."""
    if row is None or row.test is None:
        return "–"
    metric = board.metric if None not in row.test.of(board.metric) else board.told_by
    value, interval = row.test.of(metric)
    if value is None or interval is None:
        return "–"
    sign = -1 if metric.lower_is_better else 1
    named = "" if metric is board.metric else f"{metric.title} "
    return f"{named}{metric.text(sign * value)} {metric.interval_text((sign * interval[0], sign * interval[1]))}"
