"""The journal of a search: one JSON line per event, on disk before the search goes on, with enough of each fit to resume from it.

The first line identifies the search by everything that determines its results. A journal of another search is renamed to
`.old`, a damaged one to `.damaged`, so no result is ever lost; an incomplete last line, left by a kill, is removed. A lock,
which ends with its process, restricts a journal to one process at a time.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import TuningConfig
from pipeline.data.targets import record_of
from pipeline.errors import HeadError
from pipeline.experiment import MADE_BY, TRIALS, Lines, made_by, parse_lines, read_lines, to_lines
from pipeline.heads.head import Params, identity
from pipeline.heads.tuning.evaluation import FoldOutcome, Problem
from pipeline.heads.tuning.features import blocks, on_disk
from pipeline.io import files
from pipeline.io.digests import bytes_digest, canonical_json, fingerprint, parts_digest
from pipeline.io.process import version

log = logging.getLogger(__name__)

KEPT = ("fit_seconds", "score_seconds", "warnings", "error")
"""The fields of a fit in the journal, besides its score."""

SOLVERS_VERSION, ON_DISK_VERSION = 8, 2
"""Increased when a change to an evaluator or strategy changes results, so that old journals are not resumed."""


def search_identity(problem: Problem, tuning: TuningConfig) -> dict[str, Any]:
    """Return everything that determines the results of a search, and nothing else, such as the number of jobs or a path."""
    folds = b"".join(np.ascontiguousarray(part).tobytes() + b"/" for pair in problem.folds for part in pair)
    features = (np.ascontiguousarray(block).view(np.uint8).reshape(-1).data for _, block in blocks(problem.X))
    # On disk, the optimum differs in its last digits, so journals in memory and on disk must not be mixed.
    place = {"on_disk": ON_DISK_VERSION} if on_disk(problem.X) else {}
    reduced = {} if tuning.pca is None else {"pca": tuning.pca}
    versions = {name: version(name) for name in ("scikit-learn", "scikit-optimize", "numpy", "scipy")}
    return {
        **place,
        "features": [list(problem.X.shape), str(problem.X.dtype), parts_digest(features)],
        "labels": [*record_of(problem.target).values(), bytes_digest(problem.y.tobytes())],
        "folds": bytes_digest(folds),
        "head": identity(problem.head, problem.seed),
        "tuning": {"strategy": tuning.strategy, "scoring": tuning.scoring, "trials": tuning.trials, **reduced},
        "seed": problem.seed,
        "versions": {**versions, "solvers": SOLVERS_VERSION},
    }


def key(rung: int, params: Params, *fold: int) -> str:
    """Return the key of a candidate on a rung, or with `fold` that of its fit on a fold."""
    return canonical_json([rung, dict(params), *fold])


def fit_event(
    number: int, params: Params, fold: int, outcome: FoldOutcome, rung: int, elapsed: float
) -> dict[str, Any]:
    """Return the journal's record of one fit."""
    kept = {key: getattr(outcome, key) for key in KEPT}
    score = None if math.isnan(outcome.score) else outcome.score
    record = {"event": "fit", "trial": number, "params": dict(params), "rung": rung, "fold": fold, "elapsed": elapsed}
    return {**record, "score": score, **kept}


def replay(event: Mapping[str, Any]) -> FoldOutcome:
    """Return the outcome of a recorded fit, without its predictions."""
    score = math.nan if event["score"] is None else float(event["score"])
    return FoldOutcome(predictions=None, score=score, **{key: event[key] for key in KEPT})


def seconds_of_trials(journal: Path) -> float:
    """Return the seconds that a finished search spent on its first-rung trials; 0 if there is no journal."""
    events = read_lines(journal, TRIALS).records if journal.exists() else ()
    ended = (event["elapsed"] for event in events if event.get("event") == "trial" and event["rung"] == 0)
    return max(ended, default=0.0)


class Journal:
    """An open journal: the events of earlier runs, to which new ones are appended."""

    def __init__(self, path: Path, descriptor: int, lines: Lines) -> None:
        self._path, self._descriptor, self._digest = path, descriptor, lines.digest
        self.events: tuple[Mapping[str, Any], ...] = lines.records[1:]

    @staticmethod
    def open(path: Path, identity: Mapping[str, Any]) -> Journal:
        """Open the journal of the search with this identity, or create it.

        HeadError if the file cannot be written, or another process is writing it.
        """
        header = {"format": TRIALS.format, "version": TRIALS.version, MADE_BY: made_by()}
        header |= {"digest": fingerprint(identity), "identity": identity}
        try:
            files.make_folder(path.parent)
            descriptor = _open_alone(path)
            with open(descriptor, "rb", closefd=False) as file:
                lines = parse_lines(file.read())
            found = lines.records[0] if lines.records else {}
            ours = all(found.get(key) == header[key] for key in ("format", "version", "digest"))
            if lines.damaged or (found and not ours):
                aside, good = path.with_name(f"{path.name}.damaged"), len(lines.records)
                if found and not ours:
                    aside, why = path.with_name(f"{path.name}.old"), _changed(found.get("identity"), identity)
                    log.info("%s: a new search begins, because %s changed; the old one is in %s", path, why, aside.name)
                else:
                    problem = f"line {good + 1} is damaged; the search resumes from the {good} lines before it"
                    log.warning("%s: %s, and the original file is kept in %s", path, problem, aside.name)
                files.SYSTEM["rename"](path, aside)
                other, descriptor = descriptor, _open_alone(path)
                files.close_alone(other)
            elif lines.rest:
                files.SYSTEM["ftruncate"](descriptor, lines.length)
        except OSError as error:
            raise _unwritable(path, error) from error
        kept = lines if ours else Lines()
        journal = Journal(path, descriptor, kept)
        if lines.damaged and ours:  # the valid lines of a damaged journal are copied to the new one
            journal._digest = ""
            journal.append(kept.records)
        elif not ours:
            journal.append([header])
        return journal

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Append events in a single write and wait until they are on disk; HeadError on failure, for instance on a full disk."""
        data, digest = to_lines(events, self._digest)
        try:
            files.write_all(self._descriptor, data)
            files.sync(self._descriptor)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        self._digest = digest

    def close(self) -> None:
        """Close the file and release its lock."""
        files.close_alone(self._descriptor)


def _unwritable(path: Path, error: OSError) -> HeadError:
    return HeadError(
        f"{path}: the trials cannot be written to it ({error.strerror}); free space or choose another output folder, "
        "and run again: trials written so far are kept"
    )


def _open_alone(path: Path) -> int:
    try:
        return files.open_alone(path, os.O_APPEND)
    except BlockingIOError:
        raise HeadError(
            f"{path}: another process is tuning with this file; wait until it ends, or choose another output folder"
        ) from None


def _changed(before: Any, now: Mapping[str, Any]) -> str:
    """Return the names of the identity fields in which two searches differ."""
    before = before if isinstance(before, Mapping) else {}
    return ", ".join(sorted(key for key in {*before, *now} if before.get(key) != now.get(key)))
