"""The leaderboard: one row per (embedding, head), ordered and won by cross-validation only.

Stage two (`train_heads`) fills `LeaderboardRow` and `Leaderboard`; test scores are shown and choose nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipeline.config import Artifacts
from pipeline.errors import PipelineError
from pipeline.leaderboard.rows import CONSTANT_GUESS, LeaderboardRow, Nested, Verdict, nested_choice, plain
from pipeline.metrics import ACCURACY, METRICS, Metric

FORMAT = "manyheads leaderboard"
VERSION = 1


@dataclass(frozen=True)
class Leaderboard:
    """Rows ordered by cross-validation, best first, with the provenance needed to make them again.

    `provenance` holds plain values: config, seed, versions, store digests, index fingerprint, date, command, and notes on
    what was left out.
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
        table = self._table("github", f"cross-validation ({self.metric.title})", HEADERS, bold="**")
        return "\n".join(["# Leaderboard", "", table, "", *(f"- {line}" for line in self.notes()), ""])

    def to_text(self) -> str:
        """Return the leaderboard for a terminal."""
        headers = [*SHORT_HEADERS]
        if self.metric is not ACCURACY:  # where everything else is accuracy too, the narrow table need not say so
            headers[headers.index("test [95 %]")] = "test acc. [95 %]"
        return "\n".join([self._table("simple", f"CV {self.metric.title}", headers), "", *self.notes()])

    def _table(self, form: str, score: str, headers: Sequence[str], bold: str = "") -> str:
        asked = [(name, text) for name, text in REPEATS if any(getattr(row, name) for row in self.rows)]
        cells = self._cells(bold)
        for row, line in zip(self.rows, cells, strict=True):
            line[4:4] = [text(row, self.scoring) for _, text in asked]
        names = [*headers[:3], score, *(name for name, _ in asked), *headers[3:]]
        align = [*ALIGN[:4], *("right" for _ in asked), *ALIGN[4:]]
        return tabulate(cells, headers=names, tablefmt=form, disable_numparse=True, colalign=align)

    def notes(self) -> list[str]:
        """Return what must be said beside the table, one sentence each."""
        if not self.rows:
            return ["No rows."]
        best, lines, metric = self.best, [], self.metric
        better = ", lower is better" if metric.lower_is_better else ""
        lines.append(
            f"Best by cross-validation: {best.key} ({metric.title} {cross_validated(best, self.scoring)}{better}). Test scores choose nothing."
        )
        lines.append(
            f"±: the standard deviation of the scores of the {len(best.cv_scores)} folds; it says how they differ, and is no interval of "
            "the score."
        )
        if metric.needs_probabilities:
            lines.append(
                f"Cross-validation judges the heads' own probabilities, as the search did; the test's {metric.title} is of calibrated ones."
            )
        if self.verdict:
            lines += self._verdict_notes(self.verdict)
        lines += self._repeat_notes()
        if any(row.test for row in self.rows):
            test = max((row.test for row in self.rows if row.test), key=lambda test: test.n)
            of = "" if test.units in (None, test.n) else f" of {test.units:,} groups, which the interval counts"
            lines.append(f"Test: {test.n:,} images{of}, in brackets the 95 % interval (Wilson).")
        if any(row.untrained for row in self.rows):
            lines.append(
                "untrained: the backbone has random weights and saw no image before; a control, not a contender."
            )
        unseen = sorted({row.unseen_rows for row in self.rows if row.unseen_rows is not None})
        if unseen:
            lines.append(
                f"fine-tuned: the network has learned from training images; its heads were fitted and cross-validated on the "
                f"other {', '.join(f'{count:,}' for count in unseen)} only, so its cross-validation is of other images than the rest."
            )
        reduced = {row.embedding: row.components for row in self.rows if row.components is not None}
        if reduced:
            whitened = ", whitened" if self.provenance.get("config", {}).get("tuning", {}).get("whiten") else ""
            lines.append(
                f"Heads work on principal components{whitened}, found within each fold's training images: "
                + ", ".join(f"up to {count} of {name}" for name, count in reduced.items())
                + "; fewer where a fold has fewer training images."
            )
        if any(row.baseline for row in self.rows):
            lines.append("baseline: a floor without any backbone; a backbone that does not beat it does not help.")
        if best.baseline or best.untrained:
            lines.append(f"No trained backbone beats the {best.note} row {best.key} on these images.")
        return lines + [str(note) for note in self.provenance.get("notes", ())]

    def _verdict_notes(self, verdict: Verdict) -> list[str]:
        lines = []
        others = [key for key in verdict.no_evidence if key != self.best.key]
        if others:
            lines.append(
                f"~ marks {len(others)} more {_plural('row', len(others))} with no evidence of a difference from the best "
                "(paired, out of fold, corrected for all pairs of rows)."
            )
        lines.append(verdict.advice)
        recommended = self.row(verdict.recommended)
        if (
            recommended.key != self.best.key
            and recommended.bundle is not None
            and recommended.embedding != CONSTANT_GUESS
        ):
            lines.append(
                f"`manyheads predict` takes the best row when it is given the output folder; for the recommended one give it {recommended.bundle} in there."
            )
        if verdict.optimism is not None:
            metric = self.metric
            lines.append(
                f"Picking the best of {verdict.optimism.candidates} rows flatters its cross-validation {metric.title} by about "
                f"{_luck(metric, verdict.optimism.bias)} {metric.unit}{self._trials_text(verdict)}."
            )
        return lines

    def _trials_text(self, verdict: Verdict) -> str:
        """Say what picking the best trial adds, and of how many trials that is known."""
        trials, finished = self.best.trials, verdict.finished_trials
        if trials == 1:
            return ""
        if verdict.trial_optimism is None:
            return (
                ""
                if finished is None
                else f"; what picking the best of its {trials} trials adds is not known, as only one was fitted on every fold"
            )
        luck = _luck(self.metric, verdict.trial_optimism)
        if finished is None or finished == trials:
            return f", picking the best of its {trials} trials by about {luck}"
        return f", picking the best of its {trials} trials by at least about {luck} (from the {finished} that were fitted on every fold)"

    def _repeat_notes(self) -> list[str]:
        lines = []
        chosen = nested_choice(self.rows)
        if chosen is not None:
            lines.append(
                f"nested: every search repeated within each of {len(chosen.outer)} outer folds; the mean on the images held out, which chose nothing. "
                f"Choosing the row within the folds too gives {nested_text(chosen, self.scoring)}, the unbiased score of this whole search "
                "(95 % interval by the corrected resampled t)."
            )
        repeated = next((row.seeds for row in self.rows if row.seeds), None)
        if repeated is not None:
            lines.append(
                f"seeds: cross-validation's mean ± standard deviation over seeds {repeated.seeds[0]} to {repeated.seeds[-1]}, each with its own "
                "folds and search; the test images stay the same."
            )
        return lines

    @property
    def metric(self) -> Metric:
        """The score that was tuned, by which rows are ordered and compared."""
        return METRICS[self.scoring]

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
                    cross_validated(row, self.scoring),
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


def nested_text(nested: Nested | None, scoring: str) -> str:
    """Return a nested score with its interval."""
    if nested is None:
        return ""
    metric = METRICS[scoring]
    return f"{metric.text(nested.mean)} {metric.interval_text(nested.interval)}"


def cross_validated(row: LeaderboardRow, scoring: str) -> str:
    """Return the cross-validation score and its spread over the folds."""
    metric = METRICS[scoring]
    return f"{metric.text(row.cv_mean)} ± {metric.spread_text(row.cv_std)}"


def seeds_text(row: LeaderboardRow, scoring: str) -> str:
    """Return the mean and spread over seeds."""
    if row.seeds is None:
        return ""
    (mean, spread), metric = row.seeds.cv, METRICS[scoring]
    return f"{metric.text(mean)} ± {metric.spread_text(spread)}"


REPEATS: tuple[tuple[str, Callable[[LeaderboardRow, str], str]], ...] = (
    ("nested", lambda row, scoring: nested_text(row.nested, scoring)),
    ("seeds", seeds_text),
)
"""Columns that are there on request: the field of the row, and its text."""


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


def _luck(metric: Metric, bias: float) -> str:
    return metric.gap_text(max(bias, 0.0)).lstrip("+")


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
