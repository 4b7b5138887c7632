"""What a search writes to its journal: who it is, and each fit in a form that can stand in for the fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import sklearn

from pipeline.config import TuningConfig
from pipeline.data.targets import record_of
from pipeline.experiment import TRIALS, read_lines
from pipeline.heads.head import Params, identity
from pipeline.heads.tuning.features import Features, blocks, on_disk
from pipeline.heads.tuning.records import FoldOutcome, Problem
from pipeline.io.digests import bytes_digest, canonical_json, parts_digest

SOLVERS_VERSION, ON_DISK_VERSION = 8, 2
"""Raised when an evaluator or a strategy changes what a search finds, so that old journals are not continued."""


def search_identity(problem: Problem, tuning: TuningConfig) -> dict[str, Any]:
    """Everything that determines what a search finds, and nothing else: no number of jobs, no path."""
    folds = b"".join(np.ascontiguousarray(part).tobytes() + b"/" for pair in problem.folds for part in pair)
    budget = {"seconds": tuning.seconds} if tuning.seconds is not None else {"trials": tuning.trials}
    # On disk the same optimum is found to fewer digits than a resumed search must repeat.
    place = {"on_disk": ON_DISK_VERSION} if on_disk(problem.X) else {}
    reduced = {} if tuning.pca is None else {"pca": tuning.pca, "whiten": tuning.whiten}
    return {
        **place,
        "features": [list(problem.X.shape), str(problem.X.dtype), _digest(problem.X)],
        "labels": [*record_of(problem.target).values(), bytes_digest(problem.y.tobytes())],
        "folds": bytes_digest(folds),
        "head": identity(problem.head, problem.seed),
        "tuning": {"strategy": tuning.strategy, "scoring": tuning.scoring, **reduced, **budget},
        "seed": problem.seed,
        "versions": {
            "scikit-learn": sklearn.__version__,
            "scikit-optimize": _version_of_skopt(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "solvers": SOLVERS_VERSION,
        },
    }


def _version_of_skopt() -> str | None:
    try:
        return version("scikit-optimize")
    except PackageNotFoundError:
        return None


def _digest(X: Features) -> str:
    return parts_digest(np.ascontiguousarray(block).view(np.uint8).reshape(-1).data for _, block in blocks(X))


def fit_key(rung: int, params: Params, fold: int) -> str:
    """Return what tells one fit of a search from another."""
    return canonical_json([rung, dict(params), fold])


def trial_key(rung: int, params: Params) -> str:
    """Return what tells one candidate on a rung from another."""
    return canonical_json([rung, dict(params)])


def fit_event(
    number: int, params: Params, fold: int, outcome: FoldOutcome, rung: int, elapsed: float
) -> dict[str, Any]:
    """Return the journal's record of one fit."""
    return {
        "event": "fit",
        "trial": number,
        "params": dict(params),
        "rung": rung,
        "fold": fold,
        "score": None if math.isnan(outcome.score) else outcome.score,
        "fit_seconds": round(outcome.fit_seconds, 6),
        "score_seconds": round(outcome.score_seconds, 6),
        "warnings": dict(outcome.warnings),
        "error": outcome.error,
        "elapsed": elapsed,
    }


def replay(event: Mapping[str, Any]) -> FoldOutcome:
    """Return what a recorded fit gave, without its predictions."""
    kept = {key: event[key] for key in ("fit_seconds", "score_seconds", "warnings", "error")}
    return FoldOutcome(predictions=None, score=math.nan if event["score"] is None else float(event["score"]), **kept)


def seconds_of_trials(journal: Path) -> float:
    """Return how long a finished search took for its trials, without what comes after them; 0 where there is none."""
    if not journal.exists():
        return 0.0
    events = read_lines(journal, TRIALS).records
    return max(
        (event["elapsed"] for event in events if event.get("event") == "trial" and event["rung"] == 0), default=0.0
    )
