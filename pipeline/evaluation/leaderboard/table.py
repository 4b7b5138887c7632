"""The leaderboard: one row per (embedding, head), ordered and won by cross-validation only.

Stage two (`train_heads`) fills `LeaderboardRow` and `Leaderboard`; test scores are shown and choose nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pipeline.data.targets import Target, target_of
from pipeline.errors import PipelineError, number_of
from pipeline.evaluation import ACCURACY, METRICS, Metric, Scores, metrics_for
from pipeline.evaluation.leaderboard.rows import LeaderboardRow, Leaks, Nested, Verdict, nested_choice
from pipeline.experiment import LEADERBOARD, Artifacts, from_plain, parse_document, read_document, to_document

if TYPE_CHECKING:
    import pandas as pd

APART = "Ranked apart, on other images"
ADAPTED = "Adapted to new domains, without their labels"


@dataclass(frozen=True)
class Leaderboard:
    """Rows ordered by cross-validation, best first, with the provenance needed to make them again.

    Rows that are cross-validated on other images than the best stand behind all others, whatever they score.

    `provenance` holds plain values: config, seed, versions, store digests, index fingerprint, date, command, and notes on
    what was left out.
    """

    rows: tuple[LeaderboardRow, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None
    leaks: Leaks | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.rows, key=lambda row: (not row.sound, -row.cv_mean, row.simplicity, row.key))
        if ordered:
            # The images of most rows; those of a fine-tuned network only where no other backbone is there.
            first = min(
                ordered,
                key=lambda row: (bool(row.adapted), row.baseline, row.unseen_rows is not None, row.chose_rows > 0),
            )
            ordered.sort(key=lambda row: (row.images != first.images, row.images))
        object.__setattr__(self, "rows", tuple(ordered))

    @property
    def best(self) -> LeaderboardRow:
        """The row with the highest cross-validation mean whose saved fit is sound; the simpler of two equal ones."""
        if not self.rows:
            raise PipelineError("the leaderboard has no rows; run `manyheads heads` first")
        return self.rows[0]

    @property
    def ranked(self) -> tuple[LeaderboardRow, ...]:
        """The rows that are cross-validated on the same images as the best."""
        return tuple(row for row in self.rows if row.images == self.best.images)

    @property
    def apart(self) -> tuple[tuple[LeaderboardRow, ...], ...]:
        """The rows that are cross-validated on other images, those of fine-tuned networks, by their images."""
        others = [row for row in self.rows if row.images != self.best.images]
        return tuple(tuple(rows) for _, rows in groupby(others, lambda row: row.images))

    def row(self, key: str) -> LeaderboardRow:
        """Return the row named `embedding/head`."""
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(key)

    def to_json(self) -> str:
        """Return the whole leaderboard as JSON text; `from_json` gives an equal one back."""
        record = {
            "best": self.best.key if self.rows else None,
            "rows": [row.to_record() for row in self.rows],
            "verdict": dataclasses.asdict(self.verdict) if self.verdict else None,
            "leaks": dataclasses.asdict(self.leaks) if self.leaks else None,
            "provenance": self.provenance,
        }
        return to_document(LEADERBOARD, record)

    @staticmethod
    def from_json(text: str) -> Leaderboard:
        """Read what `to_json` wrote.

        Raises
        ------
        PipelineError
            When the text is damaged, or no leaderboard of this version.
        """
        path = Path("leaderboard.json")
        return _leaderboard_of(parse_document(text, LEADERBOARD, path), path)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame of the rows, the best first; scores as users know them, a loss above 0."""
        import pandas as pd

        sign, scores = -1 if self.metric.lower_is_better else 1, metrics_for(self.target)
        same = self.verdict.no_evidence if self.verdict else ()
        found = []
        for row in self.rows:
            tests = {} if row.test is None else {f"test_{metric.name}": row.test[metric.name] for metric in scores}
            low, high = (None if row.test is None else row.test.of(self.told_by)[1]) or (None, None)
            found.append(
                {
                    "embedding": row.embedding,
                    "head": row.head,
                    f"cv_{self.scoring}": sign * row.cv_mean,
                    "cv_std": row.cv_std,
                    **{name: value for name, value in tests.items() if value is not None},
                    "test_low": low,
                    "test_high": high,
                    "fit_seconds": row.fit_seconds,
                    "predict_seconds": row.predict_seconds,
                    "trials": row.trials,
                    "best": row.key == self.best.key,
                    "as_good_as_best": row.key == self.best.key or row.key in same,
                    "recommended": self.verdict is not None and row.key == self.verdict.recommended,
                    "note": row.note,
                    "licence": row.license,
                    "bundle": row.bundle,
                    "params": dict(row.params),
                }
            )
        return pd.DataFrame(found)

    def to_markdown(self) -> str:
        """Return the leaderboard as a Markdown table with the notes a reader needs below it."""
        above = [text for line in self.warnings() for text in (f"> {line}", "")]
        lines = ["# Leaderboard", "", *above, self._table(self.ranked, wide=True), ""]
        lines += [f"- {line}" for line in self.notes()]
        for rows in self.apart:
            lines += ["", f"## {apart_title(rows)}", "", apart_text(rows), "", self._table(rows, wide=True)]
        return "\n".join([*lines, ""])

    def to_text(self) -> str:
        """Return the leaderboard for a terminal."""
        above = [*self.warnings(), ""] if self.warnings() else []
        lines = [*above, self._table(self.ranked), ""]
        for rows in self.apart:
            lines += [f"{apart_title(rows)}: {apart_text(rows)}", "", self._table(rows), ""]
        return "\n".join([*lines, *self.notes()])

    def _table(self, rows: Sequence[LeaderboardRow], wide: bool = False) -> str:
        """Draw rows for Markdown (`wide`) or for a terminal; what nobody asked for has no column."""
        found = [(column, [column[3](self, row) for row in rows]) for column in columns(self)]
        asked = {name for name, _ in REPEATS}
        shown = [(column, cells) for column, cells in found if column[0] not in asked or any(cells)]
        if wide:
            shown[0] = (shown[0][0], [mark.replace("*", "\\*") for mark in shown[0][1]])
            heads = [f"**{row.head}**" if row.key == self.best.key else row.head for row in rows]
            shown[2] = (shown[2][0], heads)
        return tabulate(
            list(zip(*(cells for _, cells in shown), strict=True)),
            headers=[long if wide else short for (long, short, *_), _ in shown],
            tablefmt="github" if wide else "simple",
            disable_numparse=True,
            colalign=[column[2] for column, _ in shown],
        )

    def warnings(self) -> list[str]:
        """Return what must be known before the table is read, one sentence each: what may be wrong with the data and with rows.

        Leaks, last fits unlike those on folds, warnings in fits, tests unlike what cross-validation promised.
        """
        if not self.rows:
            return []
        recommended = self.verdict.recommended if self.verdict else self.best.key
        looked_at = [row for row in self.rows if row.key in (self.best.key, recommended)]
        lines = [
            *(self.leaks.lines(looked_at, self.told_by) if self.leaks else []),
            *filter(None, map(self._unlike_folds, self.rows)),
        ]
        for side, meaning in SURPRISES.items():
            named = [
                f"{row.key} {100 * row.test.accuracy:.1f}, expected {100 * row.expected_test[0]:.1f} to {100 * row.expected_test[1]:.1f}"
                for row in self.rows
                if row.test is not None and row.expected_test is not None and row.surprise == side
            ]
            if named:
                lines.append(
                    f"Test accuracy {side} the 99.9 % interval that cross-validation lets expect: {'; '.join(named)}: {meaning}."
                )
        warned = [
            f"{row.key} {where} {', '.join(f'{count} x {name}' for name, count in found.items())}"
            for row in self.rows
            if row.last_fit is not None
            for where, found in (("last fit", row.last_fit.warnings), ("fits on folds", row.last_fit.fold_warnings))
            if found
        ]
        return [*lines, f"Warnings while fitting: {'; '.join(warned)}."] if warned else lines

    def _unlike_folds(self, row: LeaderboardRow) -> str | None:
        """Say that the fit on all images is below those on folds, or was at first; None where it is not."""
        fit, text = row.last_fit, self.metric.text
        if fit is None or (fit.sound and fit.tries == 1):
            return None
        lowest = text(min(fit.fold_scores, default=fit.score))
        tried = "one try" if fit.tries == 1 else f"{fit.tries} tries"
        if fit.sound:
            return (
                f"{row.key}: the fit on all training images was below cross-validation's and was made again with another seed "
                f"({tried}); it scores {text(fit.score)} on them, and cross-validation's fits at least {lowest} on theirs."
            )
        return (
            f"{row.key}: a bad fit. Fitted on all training images it scores {text(fit.score)} on them, and cross-validation's fits "
            f"at least {lowest} on theirs ({tried}, the best kept): ranked last and never recommended."
        )

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
            lines.append(
                f"Test: {test.n:,} images{of}, in brackets the 95 % interval{' (Wilson)' * (self.told_by is ACCURACY)}."
            )
        if any(row.untrained for row in self.rows):
            lines.append(
                "untrained: the backbone has random weights and saw no image before; a control, not a contender."
            )
        other = next((row for rows in self.apart for row in rows if row.unseen_rows is not None and row.bundle), None)
        if other is not None:
            lines.append(f"To label with a row that stands apart, give `manyheads predict` its folder, {other.bundle}.")
        if best.unseen_rows is not None:
            lines.append(f"All of them: {apart_text(self.ranked)}")
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
        licenses: dict[tuple[str, str], set[str]] = {}
        for row in self.rows:
            if not (row.baseline or row.untrained) and row.license:
                licenses.setdefault((row.backbone, row.license), set()).add(row.embedding)
        if licenses:
            told = "; ".join(f"{_network(names)} {license}" for (_, license), names in licenses.items())
            lines.append(f"Licences of the weights: {told}.")
        if best.baseline or best.untrained:
            lines.append(f"No trained backbone beats the {best.kind} row {best.key} on these images.")
        return lines + [str(note) for note in self.provenance.get("notes", ())]

    def _verdict_notes(self, verdict: Verdict) -> list[str]:
        lines = []
        others = [key for key in verdict.no_evidence if key != self.best.key]
        if others:
            lines.append(
                f"~ marks {number_of(len(others), 'more row')} with no evidence of a difference from the best "
                "(paired, out of fold, corrected for all pairs of rows)."
            )
        lines.append(verdict.advice)
        recommended = self.row(verdict.recommended)
        if recommended.key != self.best.key and recommended.bundle is not None and not recommended.constant:
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
        chosen = nested_choice(self.ranked)
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
    def target(self) -> Target:
        """What is said of an image."""
        return target_of(self.provenance.get("target", {"classes": ()}))

    @property
    def told_by(self) -> Metric:
        """The score that the test is told by first."""
        return metrics_for(self.target)[0]

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


SURPRISES = {
    "above": "the test is easier: look for copies",
    "below": "the fit or the test images differ",
}
"""What a test accuracy outside of its interval means."""


def nested_text(nested: Nested | None, scoring: str) -> str:
    """Return a nested score with its interval."""
    if nested is None:
        return ""
    metric = METRICS[scoring]
    return f"{metric.text(nested.mean)} {metric.interval_text(nested.interval)}"


def apart_title(rows: Sequence[LeaderboardRow]) -> str:
    """Return the heading of rows that stand apart."""
    return ADAPTED if rows[0].adapted else APART


def apart_text(rows: Sequence[LeaderboardRow]) -> str:
    """Say which images rows are fitted and judged on, and how they can be compared with others; all rows on the same images."""
    row = rows[0]
    if row.adapted:
        return (
            "the head of a row above, as it does on the same test images after it is adapted. Each half of the new domains' test images "
            "is adapted by the features of the other half: no image's own, and no label of theirs. Cross-validation on the training "
            "images cannot judge that, so these rows are no candidates; what each brought is said below."
        )
    if row.unseen_rows is None:
        return "heads fitted and cross-validated on all training images: compare them with the others by the test."
    others = f"on a fine-tuned network, fitted on the {row.unseen_rows:,} training images that it has not learned from"
    some = "All" if row.chose_rows == row.unseen_rows else f"{row.chose_rows:,}"
    if row.chose_rows:
        return (
            f"heads {others}. {some} of them chose the network's weights, so that cross-validation on them would flatter: "
            "it orders these rows and is not shown. Compare them with the others by the test, which chose nothing."
        )
    return f"heads {others} and that did not choose its weights, cross-validated on those only: compare them with the others by the test."


def cross_validated(row: LeaderboardRow, scoring: str) -> str:
    """Return the cross-validation score and its spread over the folds; a dash where it cannot judge the row."""
    if row.chose_rows or row.adapted:
        return "–"
    metric = METRICS[scoring]
    return f"{metric.text(row.cv_mean)} ± {metric.user_text(row.cv_std)}"


def seeds_text(row: LeaderboardRow, scoring: str) -> str:
    """Return the mean and spread over seeds."""
    if row.seeds is None:
        return ""
    (mean, spread), metric = row.seeds.cv, METRICS[scoring]
    return f"{metric.text(mean)} ± {metric.user_text(spread)}"


REPEATS: tuple[tuple[str, Callable[[LeaderboardRow, str], str]], ...] = (
    ("nested", lambda row, scoring: nested_text(row.nested, scoring)),
    ("seeds", seeds_text),
)
"""Columns that are there on request: the field of the row, and its text."""


Column = tuple[str, str, str, Callable[[Leaderboard, LeaderboardRow], str]]
"""Header in Markdown and in a terminal, which is narrow; alignment; text."""


def columns(board: Leaderboard) -> list[Column]:
    """Return the columns of a leaderboard; of the test those of the scores that serve its target."""
    title, told_by = board.metric.title, board.told_by
    # Where everything else is accuracy too, the narrow table need not say so.
    short = "" if board.metric is told_by is ACCURACY else " acc." if told_by is ACCURACY else f" {told_by.title}"
    tested: list[Column] = [
        (*metric.column, "right", partial(_one_score, metric))
        for metric in metrics_for(board.target)
        if metric.column and metric is not told_by
    ]
    return [
        ("", "", "left", Leaderboard.mark),
        ("embedding", "embedding", "left", lambda board, row: row.embedding),
        ("head", "head", "left", lambda board, row: row.head),
        (f"cross-validation ({title})", f"CV {title}", "right", lambda _, row: cross_validated(row, board.scoring)),
        ("nested", "nested", "right", lambda board, row: nested_text(row.nested, board.scoring)),
        ("seeds", "seeds", "right", lambda board, row: seeds_text(row, board.scoring)),
        (
            f"test {told_by.title} [95 %]",
            f"test{short} [95 %]",
            "right",
            lambda board, row: test_text(row.test, told_by),
        ),
        *tested,
        ("fit s", "fit s", "right", lambda board, row: seconds(row.fit_seconds)),
        ("predict s", "pred. s", "right", lambda board, row: seconds(row.predict_seconds)),
        ("trials", "trials", "right", lambda board, row: str(row.trials)),
        ("note", "note", "left", lambda board, row: row.note),
    ]


def _one_score(metric: Metric, board: Leaderboard, row: LeaderboardRow) -> str:
    value = None if row.test is None else row.test[metric.name]
    return "" if value is None else metric.user_text(value)


def test_text(test: Scores | None, metric: Metric) -> str:
    """Return a test score with its interval; nothing where there is none."""
    value, interval = (None, None) if test is None else test.of(metric)
    if value is None or interval is None:
        return ""
    return f"{metric.user_text(value)} [{metric.user_text(interval[0])}, {metric.user_text(interval[1])}]"


def read_leaderboard(output: Path) -> Leaderboard:
    """Read an experiment's leaderboard.

    Raises
    ------
    PipelineError
        When there is none, or it is of another version.
    """
    path = Artifacts(output).leaderboard
    return _leaderboard_of(read_document(path, LEADERBOARD), path)


def _leaderboard_of(record: Mapping[str, Any], path: Path) -> Leaderboard:
    try:
        return Leaderboard(
            tuple(LeaderboardRow.from_record(raw) for raw in record["rows"]),
            record["provenance"],
            from_plain(Verdict | None, record["verdict"]),
            from_plain(Leaks | None, record.get("leaks")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise LEADERBOARD.damaged(path, "it does not hold what a leaderboard of this version does") from None


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


def _network(embeddings: set[str]) -> str:
    """Return what the layers of one network have in common in their names."""
    parts = zip(*(name.split("-") for name in embeddings), strict=False)
    return "-".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts)) or min(embeddings)
