"""The records of a leaderboard: a row, what repeats say of it, the verdict on all rows; and their way through JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.metrics import Difference, Optimism, Paired, Scores, repeated_interval
from pipeline.metrics.intervals import Interval

CONSTANT_GUESS = "majority"
"""The embedding's name in the row of the guess that looks at no image."""


@dataclass(frozen=True)
class Nested:
    """A row's search repeated within every outer fold, so that no image judged what it helped to choose.

    `inner` has the best mean that each search reported on its own training images, `outer` what its winner then scored
    on the images held out: one number per outer fold.
    """

    inner: tuple[float, ...]
    outer: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The unbiased score: the mean of `outer`."""
        return float(np.mean(self.outer))

    @property
    def interval(self) -> Interval:
        """Its 95 % interval, the variance over folds corrected for the training images they share."""
        return repeated_interval(self.outer)


@dataclass(frozen=True)
class Seeds:
    """The same search with other seeds for folds, search and head; the test images stay. One number per seed."""

    seeds: tuple[int, ...]
    cv_means: tuple[float, ...]
    test_accuracies: tuple[float, ...]

    @property
    def cv(self) -> tuple[float, float]:
        """Mean and standard deviation of the cross-validation means."""
        return float(np.mean(self.cv_means)), float(np.std(self.cv_means, ddof=1))

    @property
    def test(self) -> tuple[float, float]:
        """Mean and standard deviation of the test accuracies."""
        return float(np.mean(self.test_accuracies)), float(np.std(self.test_accuracies, ddof=1))


@dataclass(frozen=True)
class LeaderboardRow:
    """One tuned head on one embedding.

    `cv_mean` is the score of all held-out answers, `cv_std` the standard deviation of `cv_scores`, the fold scores at the chosen
    parameters; higher is better, so a log loss is negated. `bundle` is the bundle's folder relative to the output folder. `simplicity` ranks the head's kind, lowest
    is simplest, and with `dim` what a row costs. `embed_seconds` is what one image costs before any head, where it is known. `nested` and `seeds` are there
    on request.
    """

    embedding: str
    backbone: str
    layer: str
    head: str
    untrained: bool
    baseline: bool
    cv_mean: float
    cv_std: float
    cv_scores: tuple[float, ...]
    test: Scores | None
    fit_seconds: float
    predict_seconds: float
    trials: int
    params: Mapping[str, Any] = field(default_factory=dict)
    bundle: str | None = None
    simplicity: int = 0
    dim: int | None = None
    search_seconds: float | None = None
    embed_seconds: float | None = None
    unseen_rows: int | None = None
    """Training images that a fine-tuned network has not learned from, the only ones its heads used; None for others."""
    components: int | None = None
    """Principal components that the head works on; None where it works on the features themselves."""
    nested: Nested | None = None
    seeds: Seeds | None = None
    reweighted: Scores | None = None
    """Out of fold with the head's class weights switched, where classes are uneven and the head takes them."""

    @property
    def key(self) -> str:
        """The row's name: `embedding/head`."""
        return f"{self.embedding}/{self.head}"

    def to_record(self) -> dict[str, Any]:
        """Return the row as plain values for JSON."""
        return dict(plain(dataclasses.asdict(self)))

    @staticmethod
    def from_record(raw: Mapping[str, Any]) -> LeaderboardRow:
        """Return the row that `to_record` wrote."""
        test = Scores(**_tuples(raw["test"])) if raw["test"] is not None else None
        nested = Nested(**_tuples(raw["nested"])) if raw.get("nested") else None
        seeds = Seeds(**_tuples(raw["seeds"])) if raw.get("seeds") else None
        reweighted = Scores(**_tuples(raw["reweighted"])) if raw.get("reweighted") else None
        changed = {"test": test, "nested": nested, "seeds": seeds, "reweighted": reweighted}
        return LeaderboardRow(**{**raw, "cv_scores": tuple(raw["cv_scores"]), **changed})

    @property
    def note(self) -> str:
        """What a reader must know about the embedding before comparing, in a word, or nothing."""
        if self.unseen_rows is not None:
            return "fine-tuned"
        return "baseline" if self.baseline else "untrained" if self.untrained else ""


@dataclass(frozen=True)
class Verdict:
    """What paired comparison says about the rows, in the score that was tuned; `judge` makes it from the predictions.

    `differences` are to the best row, for every row with out-of-fold predictions. `optimism` is for picking the best of the
    rows, `trial_optimism` for picking the best of the trials of the best row's own search: of `finished_trials` of them,
    those that were fitted on every fold (None where unknown).
    """

    differences: tuple[Difference, ...]
    recommended: str
    reason: str
    optimism: Optimism | None = None
    trial_optimism: float | None = None
    finished_trials: int | None = None

    @property
    def advice(self) -> str:
        """What to use, and why."""
        return self.reason if self.reason.startswith("Use ") else f"Use {self.recommended}. {self.reason}"

    @property
    def no_evidence(self) -> tuple[str, ...]:
        """Keys of the rows for which nothing shows that they are worse than the best, the best among them."""
        return tuple(row.key for row in self.differences if row.no_evidence)

    @staticmethod
    def from_record(raw: Mapping[str, Any]) -> Verdict:
        """Return the verdict that a leaderboard's JSON holds."""
        return Verdict(
            tuple(_difference(row) for row in raw["differences"]),
            raw["recommended"],
            raw["reason"],
            Optimism(**_tuples(raw["optimism"])) if raw["optimism"] else None,
            raw["trial_optimism"],
            raw.get("finished_trials"),
        )


def plain(value: Any) -> Any:
    """Return the value made of what JSON knows: numpy scalars and arrays become Python's, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def _difference(raw: Mapping[str, Any]) -> Difference:
    paired = {name: Paired(**_paired(raw[name])) if raw[name] else None for name in ("test", "folds")}
    return Difference(**{**_tuples(raw), **paired})


def _paired(raw: Mapping[str, Any]) -> dict[str, Any]:
    # JSON has no infinity: an interval without an end was written as null.
    low, high = raw["interval"]
    return {**raw, "interval": (-np.inf if low is None else low, np.inf if high is None else high)}


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into the tuples the records hold."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def nested_choice(rows: Sequence[LeaderboardRow]) -> Nested | None:
    """Return the nested score of the whole search: within each outer fold the row is chosen by its inner score too.

    None unless every row has been searched within the same number of outer folds.
    """
    found = [row.nested for row in rows if row.nested is not None]
    if not found or len(found) < len(rows) or len({len(nested.outer) for nested in found}) > 1:
        return None
    inner, outer = (np.array([getattr(nested, name) for nested in found]) for name in ("inner", "outer"))
    chosen, fold = np.argmax(inner, axis=0), np.arange(inner.shape[1])
    return Nested(tuple(inner[chosen, fold].tolist()), tuple(outer[chosen, fold].tolist()))
