"""Replay: recompute every number of a leaderboard from the stored features, in a temporary folder, and compare.

Durations are not compared: they depend on the machine.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copy2, copytree
from typing import Any

from pipeline.config import Config
from pipeline.embed.records import read_asked_records
from pipeline.errors import number_of
from pipeline.evaluation.leaderboard import Leaderboard, read_leaderboard
from pipeline.experiment import STORES, Artifacts
from pipeline.stages import targets, train_heads

NO_RESULTS = ("fit_seconds", "predict_seconds", "search_seconds", "embed_seconds")
"""Fields of a row that are not compared."""

CONDITIONS = ("seed", "scoring", "folds", "images", "index", "task", "stores", "precision", "versions", "machine")
"""Fields of a leaderboard's provenance whose changes are reported."""


@dataclass(frozen=True)
class Replay:
    """The comparison of one leaderboard with its recomputation."""

    output: Path
    numbers: int
    """Number of values compared."""
    differences: tuple[str, ...]
    """A line per changed value, and per row that only one of the two has."""
    conditions: tuple[str, ...]
    """Lines on changed inputs, settings and versions."""

    @property
    def ok(self) -> bool:
        """Whether all numbers are equal."""
        return not self.differences

    def summary_lines(self) -> list[str]:
        """Return the differences, and the changed conditions."""
        count = number_of(self.numbers, "number")
        different = f"{number_of(len(self.differences), 'difference')}, {count} compared"
        found = f"reproduced, all {count} equal" if self.ok else different
        return [f"{self.output}: {found}", *(f"  {line}" for line in (*self.differences, *self.conditions))]


def run(config: Config) -> list[Replay]:
    """Recompute the leaderboard of a config's output folder, or of each target, and compare; the folder is not changed."""
    return [_replay(alone) for alone in targets.experiments(config).values()]


def _replay(config: Config) -> Replay:
    files = Artifacts(config.output, config.store)
    before = read_leaderboard(files.root)
    records = read_asked_records(files.features, config)
    tuning = config.tuning
    if tuning.budget is not None:  # the number of trials within a time budget is not reproducible
        trials = before.provenance["config"]["tuning"]["trials"]
        tuning = tuning.model_copy(update={"trials": trials, "budget": None})
    with tempfile.TemporaryDirectory(prefix="manyheads-replay-") as folder:
        scratch = Path(folder, "output")  # the results of stage one, next to links to the feature stores
        copytree(files.dataset, scratch / files.dataset.name)
        copy2(files.features, scratch)
        places = dict.fromkeys(
            map(os.path.realpath, (files.stores, *(files.find_store(each.store).parent for each in records)))
        )
        for link, place in zip((Path(folder, STORES), scratch / STORES), places, strict=False):
            os.symlink(place, link)
        changed = {"output": str(scratch), "store": None, "tuning": tuning}
        after = train_heads.run(config.model_copy(update=changed)).leaderboard
    old, new = (dict(_leaves(_results(board))) for board in (before, after))
    found = [
        f"{place}: was {old.get(place, 'absent')}, is {new.get(place, 'absent')}"
        for place in dict.fromkeys([*old, *new])
        if old.get(place) != new.get(place)
    ]
    compared = sum(isinstance(value, (int, float)) and not isinstance(value, bool) for value in old.values())
    return Replay(files.root, compared, tuple(found), tuple(_changed(before, after)))


def _results(board: Leaderboard) -> dict[str, Any]:
    """Return a leaderboard's rows, by name, and its overall results as plain values."""
    told = json.loads(board.to_json())
    rows = {
        f"{row['embedding']}/{row['head']}": {key: value for key, value in row.items() if key not in NO_RESULTS}
        for row in told["rows"]
    }
    return {**rows, **{key: told[key] for key in ("best", "verdict", "leaks")}}


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every scalar value with its location: `hog/knn: cv_scores[2]`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{place}{': ' if ':' not in place else '.'}{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{place}[{number}]")
    else:
        yield place, value


def _changed(before: Leaderboard, after: Leaderboard) -> Iterator[str]:
    old, new = (dict(_leaves({key: board.provenance.get(key) for key in CONDITIONS})) for board in (before, after))
    for place in dict.fromkeys([*old, *new]):
        if old.get(place) is not None and old[place] != new.get(place):
            yield f"made with {place} {old[place]}, now {new.get(place, 'absent')}"
