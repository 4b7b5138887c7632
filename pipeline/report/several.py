"""Several experiments side by side: ranks of their rows over data sets, and searches of different strategies.

One data set cannot say which head is better in general; average ranks over several can, with a critical difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from pipeline.errors import PipelineError
from pipeline.files import make_folder, write_atomic, write_text_atomic
from pipeline.metrics import Ranking, rank_over_datasets
from pipeline.report.charts import ranking_chart, tuning_chart
from pipeline.report.drawing import to_png
from pipeline.report.judge import Trials, read_trials
from pipeline.report.leaderboard import read_leaderboard


def rank(outputs: Sequence[Path], target: Path) -> tuple[tuple[str, ...], Ranking]:
    """Rank the rows that all experiments share by test accuracy; write `ranks.png` and `ranks.md` into `target`.

    Returns the rows' keys and their ranking. One experiment per data set, with the same embeddings and heads.

    Raises
    ------
    PipelineError
        With fewer than two experiments, or fewer than two rows in common.
    """
    boards = [read_leaderboard(output) for output in outputs]
    tested = [{row.key: row.test.accuracy for row in board.rows if row.test} for board in boards]
    keys = tuple(key for key in (tested[0] if tested else {}) if all(key in rows for rows in tested))
    if len(boards) < 2 or len(keys) < 2:
        raise PipelineError(
            f"{len(boards)} experiments with {len(keys)} rows in common; ranking needs at least 2 of both: run the same "
            "embeddings and heads on several data sets"
        )
    ranking = rank_over_datasets(np.array([[rows[key] for key in keys] for rows in tested]))
    make_folder(target)
    write_atomic(target / "ranks.png", to_png(ranking_chart(ranking, keys)))
    write_text_atomic(target / "ranks.md", _markdown(keys, ranking, len(boards)))
    return keys, ranking


def searches(outputs: Sequence[Path], key: str, target: Path) -> Path:
    """Draw one row's search in several experiments, such as bayes, random and grid at the same budget.

    Writes `search.png` into `target`, a line per experiment named by its strategy, and returns its path.

    Raises
    ------
    PipelineError
        When an experiment has no such row, or no journal of it.
    """
    named: dict[str, Trials] = {}
    scoring = "accuracy"
    for output in outputs:
        board = read_leaderboard(output)
        trials = read_trials(board, output).get(key)
        if trials is None:
            raise PipelineError(
                f"{output}: has no trials of {key}; its rows are {', '.join(row.key for row in board.rows)}"
            )
        strategy = str(board.provenance.get("config", {}).get("tuning", {}).get("strategy", output.name))
        named[strategy if strategy not in named else f"{strategy} ({output.name})"] = trials
        scoring = board.scoring
    make_folder(target)
    write_atomic(target / "search.png", to_png(tuning_chart(named, scoring)))
    return target / "search.png"


def _markdown(keys: Sequence[str], ranking: Ranking, n: int) -> str:
    order = np.argsort(ranking.average_ranks, kind="stable").tolist()
    table = tabulate(
        [[f"{ranking.average_ranks[i]:.2f}", keys[i]] for i in order],
        headers=["average rank", "row"],
        tablefmt="github",
        disable_numparse=True,
    )
    told_apart = "ranks differ by more than chance" if ranking.p_value < 0.05 else "no evidence that ranks differ"
    lines = [
        f"- {n} data sets; Friedman's test with the correction of Iman and Davenport: p = {ranking.p_value:.3g}, {told_apart}."
    ]
    lines.append(f"- Nemenyi's critical difference at 5 %: {ranking.critical_difference:.2f} ranks.")
    lines += [f"- Not told apart: {', '.join(keys[i] for i in group)}." for group in ranking.groups]
    return "\n".join(["# Ranks over data sets", "", table, "", *lines, ""])
