"""The budget of all searches together: how many trials of every row fit into it, all rows having the same number.

Trials are measured by passes over all rows: the first of one trial each, and as long as there is time for more, one of as many as
the last pass says there is time for. Nothing but the number of trials of the last pass goes into its rows: a config that has it as
`tuning.trials` gives the same leaderboard, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config import TuningConfig
from pipeline.errors import PipelineError
from pipeline.experiment import BUDGET, read_document, write_document


class Pass(NamedTuple):
    """So many trials of every row, the seconds of all rows together, and the part of them that more trials make longer."""

    trials: int
    seconds: float
    searching: float


def trials_within(tuning: TuningConfig, key: str, file: Path, measure: Callable[[int], Pass]) -> tuple[int, list[str]]:
    """Return how many trials every row is to have, and a line that says what the budget cut, where it did.

    `measure` makes all rows with so many trials; `file` keeps what was measured for the question that `key` names, so that a run
    that was stopped goes on, and a second one has nothing to do.
    """
    asked, limit = tuning.trials, tuning.budget_seconds
    if limit is None:
        return asked, []
    passes = _read(file, key)
    while (trials := next_trials(passes, asked, limit)) is not None:
        passes.append(measure(trials))
        write_document(file, BUDGET, {"key": key, "passes": passes})
    trials, spent = passes[-1].trials, sum(each.seconds for each in passes)
    if trials == asked:
        return trials, []
    over = ", which is more than that: no row can have less than one" * (trials == 1 and spent > limit)
    return trials, [
        f"The budget of {tuning.budget} cut the search: {trials} of {asked} trials for every row, in {spent:.0f} s{over}. "
        "More time may find better parameters."
    ]


def next_trials(passes: Sequence[Pass], asked: int, limit: float) -> int | None:
    """Return the trials of the next pass, at the rate of the last; None where there is no time for twice as many, or all are done."""
    if not passes:
        return 1
    trials, seconds, searching = passes[-1]
    left = limit - sum(each.seconds for each in passes) - (seconds - searching)
    more = min(asked, int(left * trials / searching)) if searching else asked
    return more if trials < more and (more == asked or more >= 2 * trials) else None


def _read(file: Path, key: str) -> list[Pass]:
    try:
        found = read_document(file, BUDGET)
        return [Pass(*each) for each in found["passes"]] if found["key"] == key else []
    except (PipelineError, KeyError, TypeError):
        return []
