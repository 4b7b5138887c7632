"""Several experiments side by side: ranks of their rows over data sets, and searches of different strategies.

One data set cannot say which head is better in general; average ranks over several can, with a critical difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tabulate import tabulate

from pipeline.errors import PipelineError
from pipeline.evaluation import Ranking, rank_over_datasets
from pipeline.evaluation.leaderboard.judge import Trials, read_trials
from pipeline.evaluation.leaderboard.table import Leaderboard, read_leaderboard, seconds
from pipeline.io.files import make_folder, write_atomic, write_text_atomic
from pipeline.report.charts import tuning_chart
from pipeline.report.drawing import to_png
from pipeline.report.ranks import ranking_chart


def compare(outputs: Sequence[Path], target: Path, row: str | None = None) -> list[str]:
    """Compare experiments and return what to print: ranks over several data sets, or searches on one.

    Experiments are on one data set when they answered the same question: the same images, labels and folds.

    Raises
    ------
    PipelineError
        When there are fewer than two, or they have too little in common.
    """
    if len(outputs) < 2:
        raise PipelineError(f"{len(outputs)} experiment given; a comparison needs at least 2 output folders")
    boards = [read_leaderboard(output) for output in outputs]
    _alike(outputs, boards)
    questions = {board.provenance.get("task") for board in boards}
    if len(questions) > 1 and row is None:
        rank(outputs, target)
        return [(target / "ranks.md").read_text(encoding="utf-8"), f"diagram  {target / 'ranks.png'}"]
    shared = [item.key for item in boards[0].rows if item.trials > 1 and all(_has(board, item.key) for board in boards)]
    if not shared:
        raise PipelineError("the experiments have no searched row in common; give them the same embeddings and heads")
    picture = searches(outputs, row or shared[0], target)
    text = _search_table(outputs, boards, shared)
    write_text_atomic(target / "searches.md", text)
    return [text, f"plot     {picture} ({row or shared[0]})", f"table    {target / 'searches.md'}"]


def _alike(outputs: Sequence[Path], boards: Sequence[Leaderboard]) -> None:
    """Refuse experiments that were tuned for different scores: their numbers cannot stand side by side."""
    if len({board.scoring for board in boards}) > 1:
        raise PipelineError(
            "the experiments were tuned for different scores; run them with the same tuning.scoring",
            [f"{output}: {board.scoring}" for output, board in zip(outputs, boards, strict=True)],
        )


def _has(board: Leaderboard, key: str) -> bool:
    return any(row.key == key for row in board.rows)


def _search_table(outputs: Sequence[Path], boards: Sequence[Leaderboard], keys: Sequence[str]) -> str:
    """Return the best cross-validation score of every shared row in every experiment, with trials and seconds."""
    names, metric = _names(outputs, boards), boards[0].metric
    lines = []
    for key in keys:
        found = [board.row(key) for board in boards]
        best = max(row.cv_mean for row in found)
        cells = []
        for row, board in zip(found, boards, strict=True):
            score = replace(board.metric, digits=board.metric.digits + 1).text(row.cv_mean)
            mark = "**" if round(row.cv_mean, 4) == round(best, 4) else ""
            cells.append(f"{mark}{score}{mark} ({row.trials} trials, {seconds(row.search_seconds or 0.0)} s)")
        lines.append([key, *cells])
    table = tabulate(lines, headers=["row", *names], tablefmt="github", disable_numparse=True)
    return "\n".join(
        [
            "# Searches on one data set",
            "",
            table,
            "",
            f"- The best cross-validation score ({metric.title}) that each search found; bold is the {'lowest' if metric.lower_is_better else 'highest'} of its row. Every search begins with the "
            "head's defaults. A gap within the spread of the folds says nothing about the strategies: repeat with tuning.seeds.",
            "",
        ]
    )


def _names(outputs: Sequence[Path], boards: Sequence[Leaderboard]) -> list[str]:
    """Name each experiment by its strategy, and by its folder too where two have the same."""
    found = [
        str(board.provenance.get("config", {}).get("tuning", {}).get("strategy", output.name))
        for output, board in zip(outputs, boards, strict=True)
    ]
    return [
        name if found.count(name) == 1 else f"{name} ({output.name})"
        for name, output in zip(found, outputs, strict=True)
    ]


def rank(outputs: Sequence[Path], target: Path) -> tuple[tuple[str, ...], Ranking]:
    """Rank the rows that all experiments share by the tuned score on the test; write `ranks.png` and `ranks.md` into `target`.

    Returns the rows' keys and their ranking. One experiment per data set, with the same embeddings and heads.

    Raises
    ------
    PipelineError
        With fewer than two experiments, or fewer than two rows in common, or when different scores were tuned.
    """
    boards = [read_leaderboard(output) for output in outputs]
    _alike(outputs, boards)
    tested = [_tested(board) for board in boards]
    keys = tuple(key for key in (tested[0] if tested else {}) if all(key in rows for rows in tested))
    if len(boards) < 2 or len(keys) < 2:
        raise PipelineError(
            f"{len(boards)} experiments with {len(keys)} rows in common; ranking needs at least 2 of both: run the same "
            "embeddings and heads on several data sets"
        )
    ranking = rank_over_datasets(np.array([[rows[key] for key in keys] for rows in tested]))
    make_folder(target)
    write_atomic(target / "ranks.png", to_png(ranking_chart(ranking, keys)))
    write_text_atomic(target / "ranks.md", _markdown(keys, ranking, boards))
    return keys, ranking


def _tested(board: Leaderboard) -> dict[str, float]:
    """Return what each row scores on the test images in the tuned score, higher is better; without those that have none."""
    found = {row.key: row.test.of(board.metric)[0] for row in board.rows if row.test}
    sign = -1.0 if board.metric.lower_is_better else 1.0
    return {key: sign * value for key, value in found.items() if value is not None}


def searches(outputs: Sequence[Path], key: str, target: Path) -> Path:
    """Draw one row's search in several experiments, such as bayes, random and grid at the same budget.

    Writes `search.png` into `target`, a line per experiment named by its strategy, and returns its path.

    Raises
    ------
    PipelineError
        When an experiment has no such row, or no journal of it.
    """
    named: dict[str, Trials] = {}
    boards = [read_leaderboard(output) for output in outputs]
    for output, board, name in zip(outputs, boards, _names(outputs, boards), strict=True):
        trials = read_trials(board, output).get(key)
        if trials is None:
            raise PipelineError(
                f"{output}: has no trials of {key}; its rows are {', '.join(row.key for row in board.rows)}"
            )
        named[name] = trials
    make_folder(target)
    write_atomic(target / "search.png", to_png(tuning_chart(named, boards[0].scoring)))
    return target / "search.png"


def _markdown(keys: Sequence[str], ranking: Ranking, boards: Sequence[Leaderboard]) -> str:
    order = np.argsort(ranking.average_ranks, kind="stable").tolist()
    table = tabulate(
        [[f"{ranking.average_ranks[i]:.2f}", keys[i]] for i in order],
        headers=["average rank", "row"],
        tablefmt="github",
        disable_numparse=True,
    )
    told_apart = "ranks differ by more than chance" if ranking.p_value < 0.05 else "no evidence that ranks differ"
    lines = [
        f"- {len(boards)} data sets, ranked by {boards[0].metric.title} on the test images; Friedman's test with the correction of Iman and Davenport: p = {ranking.p_value:.3g}, {told_apart}."
    ]
    lines.append(f"- Nemenyi's critical difference at 5 %: {ranking.critical_difference:.2f} ranks.")
    lines += [f"- Not told apart: {', '.join(keys[i] for i in group)}." for group in ranking.groups]
    return "\n".join(["# Ranks over data sets", "", table, "", *lines, ""])
