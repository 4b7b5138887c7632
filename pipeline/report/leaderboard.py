"""The leaderboard: one row per (embedding, head), ordered and won by cross-validation only.

Stage two (`train_heads`) fills `LeaderboardRow` and `Leaderboard`; test scores are shown and choose nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from pipeline.config import Artifacts
from pipeline.errors import PipelineError
from pipeline.metrics import Difference, Optimism, Paired, Scores

FORMAT = "manyheads leaderboard"
VERSION = 1


@dataclass(frozen=True)
class LeaderboardRow:
    """One tuned head on one embedding.

    `cv_mean` and `cv_std` are over `cv_scores`, the fold scores at the chosen parameters; higher is better, so a log loss
    is negated. `bundle` is the bundle's folder relative to the output folder. `simplicity` ranks the head's kind, lowest
    is simplest. `embed_seconds` is what one image costs before any head, where it is known.
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
        return LeaderboardRow(**{**raw, "cv_scores": tuple(raw["cv_scores"]), "test": test})

    @property
    def note(self) -> str:
        """What a reader must know about the embedding before comparing: `untrained`, `baseline`, or nothing."""
        return "baseline" if self.baseline else "untrained" if self.untrained else ""


@dataclass(frozen=True)
class Verdict:
    """What paired comparison says about the rows; `report.judge` makes it from the predictions beside the bundles.

    `differences` are to the best row, for every row with out-of-fold predictions. `optimism` is for picking the best of the
    rows, `trial_optimism` for picking the best of the trials of the best row's own search (None where unknown).
    """

    differences: tuple[Difference, ...]
    recommended: str
    reason: str
    optimism: Optimism | None = None
    trial_optimism: float | None = None

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
        )


@dataclass(frozen=True)
class Leaderboard:
    """Rows ordered by cross-validation, best first, with the provenance needed to make them again.

    `provenance` holds plain values: config, seed, versions, store digests, index fingerprint, date, command.
    """

    rows: tuple[LeaderboardRow, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.rows, key=lambda row: (-row.cv_mean, row.simplicity, row.key))
        object.__setattr__(self, "rows", tuple(ordered))

    @property
    def best(self) -> LeaderboardRow:
        """The row with the highest cross-validation mean; the simpler of two equal ones. Test scores play no part."""
        if not self.rows:
            raise PipelineError("the leaderboard has no rows; run `manyheads heads` first")
        return self.rows[0]

    def row(self, key: str) -> LeaderboardRow:
        """Return the row named `embedding/head`."""
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(key)

    def to_json(self) -> str:
        """Return the whole leaderboard as JSON text; `from_json` gives an equal one back."""
        record = {
            "format": FORMAT,
            "version": VERSION,
            "best": self.best.key if self.rows else None,
            "rows": [row.to_record() for row in self.rows],
            "verdict": dataclasses.asdict(self.verdict) if self.verdict else None,
            "provenance": self.provenance,
        }
        return json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Leaderboard:
        """Read what `to_json` wrote.

        Raises
        ------
        PipelineError
            When the text is no leaderboard of this version.
        """
        try:
            record = json.loads(text)
            found = (record["format"], record["version"])
        except (ValueError, KeyError, TypeError):
            raise PipelineError("leaderboard.json: not a leaderboard; run `manyheads heads` again") from None
        if found != (FORMAT, VERSION):
            raise PipelineError(
                f"leaderboard.json: found {found[0]!r} version {found[1]}, expected {FORMAT!r} version {VERSION}; run `manyheads heads` again"
            )
        verdict = record["verdict"]
        return Leaderboard(
            tuple(LeaderboardRow.from_record(raw) for raw in record["rows"]),
            record["provenance"],
            Verdict.from_record(verdict) if verdict else None,
        )

    def to_markdown(self) -> str:
        """Return the leaderboard as a Markdown table with the notes a reader needs below it."""
        table = tabulate(
            self._cells(bold="**"), headers=HEADERS, tablefmt="github", disable_numparse=True, colalign=ALIGN
        )
        return "\n".join(["# Leaderboard", "", table, "", *(f"- {line}" for line in self.notes()), ""])

    def to_text(self) -> str:
        """Return the leaderboard for a terminal."""
        table = tabulate(self._cells(), headers=SHORT_HEADERS, tablefmt="simple", disable_numparse=True, colalign=ALIGN)
        return "\n".join([table, "", *self.notes()])

    def notes(self) -> list[str]:
        """Return what must be said beside the table, one sentence each."""
        if not self.rows:
            return ["No rows."]
        best, lines = self.best, []
        lines.append(
            f"Best by cross-validation: {best.key} ({_percent(best.cv_mean, self.scoring)} ± {_percent(best.cv_std, self.scoring)}). Test scores choose nothing."
        )
        if self.verdict:
            lines += self._verdict_notes(self.verdict)
        if any(row.test for row in self.rows):
            lines.append(
                f"Test: {max(row.test.n for row in self.rows if row.test)} images, in brackets the 95 % interval (Wilson)."
            )
        if any(row.untrained for row in self.rows):
            lines.append(
                "untrained: the backbone has random weights and saw no image before; a control, not a contender."
            )
        if any(row.baseline for row in self.rows):
            lines.append("baseline: a floor without any backbone; a backbone that does not beat it does not help.")
        if best.baseline or best.untrained:
            lines.append(f"No trained backbone beats the {best.note} row {best.key} on these images.")
        return lines

    def _verdict_notes(self, verdict: Verdict) -> list[str]:
        lines = []
        others = [key for key in verdict.no_evidence if key != self.best.key]
        if others:
            lines.append(
                f"~ marks {len(others)} more {_plural('row', len(others))} with no evidence of a difference from the best "
                "(paired, out of fold, corrected for all pairs of rows)."
            )
        lines.append(f"Recommended: {verdict.recommended}. {verdict.reason}")
        if verdict.optimism is not None:
            trials = verdict.trial_optimism
            lines.append(
                f"Picking the best of {verdict.optimism.candidates} rows flatters its cross-validation accuracy by about "
                f"{100 * max(verdict.optimism.bias, 0.0):.1f} points"
                + (
                    f", picking the best of its {self.best.trials} trials by about {100 * trials:.1f}."
                    if trials is not None
                    else "."
                )
            )
        return lines

    @property
    def scoring(self) -> str:
        """What the cross-validation scores measure."""
        return str(self.provenance.get("scoring", "accuracy"))

    def mark(self, row: LeaderboardRow) -> str:
        """`*` for the best row, `~` for one with no evidence of a difference from it."""
        if row.key == self.best.key:
            return "*"
        return "~" if self.verdict and row.key in self.verdict.no_evidence else ""

    def _cells(self, bold: str = "") -> list[list[str]]:
        cells = []
        for row in self.rows:
            first = bold if row.key == self.best.key else ""
            test = row.test
            cells.append(
                [
                    self.mark(row).replace("*", "\\*" if bold else "*"),
                    row.embedding,
                    f"{first}{row.head}{first}",
                    f"{_percent(row.cv_mean, self.scoring)} ± {_percent(row.cv_std, self.scoring)}",
                    f"{100 * test.accuracy:.1f} [{100 * test.interval[0]:.1f}, {100 * test.interval[1]:.1f}]"
                    if test
                    else "",
                    f"{100 * test.balanced_accuracy:.1f}" if test else "",
                    f"{100 * test.macro_f1:.1f}" if test else "",
                    f"{test.log_loss:.3f}" if test and test.log_loss is not None else "",
                    seconds(row.fit_seconds),
                    seconds(row.predict_seconds),
                    str(row.trials),
                    row.note,
                ]
            )
        return cells


HEADERS = (
    "",
    "embedding",
    "head",
    "cross-validation",
    "test accuracy [95 %]",
    "balanced",
    "macro F1",
    "log loss",
    "fit s",
    "predict s",
    "trials",
    "note",
)
SHORT_HEADERS = (
    "",
    "embedding",
    "head",
    "CV",
    "test [95 %]",
    "bal.",
    "F1",
    "loss",
    "fit s",
    "pred. s",
    "trials",
    "note",
)
"""The terminal is narrow."""
ALIGN = ("left", "left", "left", "right", "right", "right", "right", "right", "right", "right", "right", "left")


def read_leaderboard(output: Path) -> Leaderboard:
    """Read an experiment's leaderboard.

    Raises
    ------
    PipelineError
        When there is none, or it is of another version.
    """
    path = Artifacts(output).leaderboard
    try:
        return Leaderboard.from_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise PipelineError(f"{path}: missing; run `manyheads heads` first") from None


def seconds(value: float) -> str:
    """Return a duration in seconds with as many digits as it deserves."""
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 0.095
        else f"{value:.3f}"
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


def _percent(value: float, scoring: str) -> str:
    return f"{value:.3f}" if scoring == "log_loss" else f"{100 * value:.1f}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def by_embedding(rows: Sequence[LeaderboardRow]) -> dict[str, list[LeaderboardRow]]:
    """Group rows by embedding, keeping their order."""
    groups: dict[str, list[LeaderboardRow]] = {}
    for row in rows:
        groups.setdefault(row.embedding, []).append(row)
    return groups
