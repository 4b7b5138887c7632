"""Comparison of experiments: ranks of their rows over data sets, and searches of different strategies.

One data set cannot show which head is better in general; average ranks over several can, with a critical difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tabulate import tabulate

from pipeline.errors import PipelineError
from pipeline.evaluation.comparison import rank_over_datasets
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard, read_trials
from pipeline.io.files import make_folder, write_atomic, write_text_atomic
from pipeline.report.charts import ranking_chart, tuning_chart
from pipeline.report.drawing import to_png


def compare(outputs: Sequence[Path], target: Path, row: str | None = None) -> list[str]:
    """Compare experiments and return what to print: ranks over several data sets, or searches on one.

    Experiments are on one data set if they have the same images, labels and folds. Ranks are written to `ranks.md` and `ranks.png`
    in `target`, the searches of `row` (default: the first shared row) to `search.png`. PipelineError when there are fewer than two
    experiments, they were tuned for different metrics, or have too little in common.
    """
    if len(outputs) < 2:
        raise PipelineError(f"{len(outputs)} experiment given; a comparison needs at least 2 output folders")
    boards = [read_leaderboard(output) for output in outputs]
    if len({board.scoring for board in boards}) > 1:
        raise PipelineError(
            "the experiments were tuned for different scores; run them with the same tuning.scoring",
            [f"{output}: {board.scoring}" for output, board in zip(outputs, boards, strict=True)],
        )
    one = len({board.provenance.get("task") for board in boards}) == 1
    return _searches(outputs, boards, target, row) if one or row is not None else _ranks(boards, target)


def _ranks(boards: Sequence[Leaderboard], target: Path) -> list[str]:
    """Rank the rows that all experiments share by the tuned metric on the test images."""
    metric = boards[0].metric
    tested: list[dict[str, float]] = []
    for board in boards:
        found = {row.key: row.test.of(metric)[0] for row in board.rows if row.test}
        tested.append({key: metric.sign * score for key, score in found.items() if score is not None})
    keys = [key for key in tested[0] if all(key in rows for rows in tested)]
    if len(keys) < 2:
        raise PipelineError(
            f"{len(boards)} experiments with {len(keys)} rows in common; ranking needs at least 2 of both: run the same "
            "embeddings and heads on several data sets"
        )
    ranking = rank_over_datasets(np.array([[rows[key] for key in keys] for rows in tested]))
    order = np.argsort(ranking.average_ranks, kind="stable").tolist()
    lines = [[f"{ranking.average_ranks[place]:.2f}", keys[place]] for place in order]
    told_apart = "ranks differ by more than chance" if ranking.p_value < 0.05 else "no evidence that ranks differ"
    text = "\n".join(
        [
            "# Ranks over data sets",
            "",
            tabulate(lines, headers=["average rank", "row"], tablefmt="github", disable_numparse=True),
            "",
            f"- {len(boards)} data sets, ranked by {metric.title} on the test images; Friedman's test with the "
            f"correction of Iman and Davenport: p = {ranking.p_value:.3g}, {told_apart}.",
            f"- Nemenyi's critical difference at 5 %: {ranking.critical_difference:.2f} ranks.",
            *(f"- Not told apart: {', '.join(keys[place] for place in group)}." for group in ranking.groups),
            "",
        ]
    )
    make_folder(target)
    write_atomic(target / "ranks.png", to_png(partial(ranking_chart, ranking=ranking, names=keys)))
    write_text_atomic(target / "ranks.md", text)
    return [text, f"diagram  {target / 'ranks.png'}"]


def _searches(outputs: Sequence[Path], boards: Sequence[Leaderboard], target: Path, row: str | None) -> list[str]:
    """Draw one row's search in every experiment, a line each, labelled by strategy and folder."""
    every = [{found.key for found in board.rows} for board in boards]
    shared = [found.key for found in boards[0].rows if found.trials > 1 and all(found.key in keys for keys in every)]
    if not shared:
        raise PipelineError("the experiments have no searched row in common; give them the same embeddings and heads")
    key, searches = row or shared[0], {}
    for output, board in zip(outputs, boards, strict=True):
        trials = read_trials(board, output).get(key)
        if trials is None:
            rows = ", ".join(found.key for found in board.rows)
            raise PipelineError(f"{output}: has no trials of {key}; its rows are {rows}")
        strategy = board.provenance.get("config", {}).get("tuning", {}).get("strategy", "search")
        searches[f"{strategy} ({output.name})"] = trials
    make_folder(target)
    write_atomic(target / "search.png", to_png(partial(tuning_chart, searches=searches, scoring=boards[0].scoring)))
    return [f"plot     {target / 'search.png'} ({key})"]
