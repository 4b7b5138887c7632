"""The leaderboard: one row per (embedding, head), ranked by cross-validation only; and an overview of several targets.

Stage two (`train_heads`) makes it; test scores are shown but not used for selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pipeline.data.targets import Target, target_of
from pipeline.errors import PipelineError, number_of
from pipeline.evaluation import ACCURACY, METRICS, Metric, Scores, metrics_for
from pipeline.evaluation.leaderboard.rows import LeaderboardRow, Leaks, Nested, Recommendation, nested_choice
from pipeline.experiment import LEADERBOARD, Artifacts, from_plain, read_document, to_document

if TYPE_CHECKING:
    import pandas as pd

APART = {
    "domains": (
        "Adapted to new domains, without their labels",
        "the head of a row above, each half of the new domains' test images adapted by the features of the other half, never by a label. "
        "Cross-validation cannot judge that, so these rows are no candidates; the notes say what each brought.",
    ),
    "views": (
        "With views of the images",
        "the best head of a network, averaged over views of an image, learned from views of the training images, or both, in folds of "
        "whole images. These rows are no candidates; the notes say what each brought and costs.",
    ),
}
"""Headings and explanations of rows that are variants of others, by `LeaderboardRow.apart`."""


@dataclass(frozen=True)
class Leaderboard:
    """Rows ordered by cross-validation, best first, with the provenance needed to reproduce them.

    Rows that are cross-validated on other images than the best come last, whatever their scores. `provenance` holds plain values:
    config, seed, versions, store digests, index fingerprint, date, command, and notes on what was left out.
    """

    rows: tuple[LeaderboardRow, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    recommendation: Recommendation | None = None
    leaks: Leaks | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.rows, key=lambda row: (not row.sound, -row.cv_mean, row.simplicity, row.key))
        if ordered:
            # Rank first the images that most rows use; those of a fine-tuned network only without another backbone.
            first = min(
                ordered,
                key=lambda row: (bool(row.apart), row.baseline, row.unseen_rows is not None, row.chose_rows > 0),
            )
            ordered.sort(key=lambda row: (row.images != first.images, row.images))
        object.__setattr__(self, "rows", tuple(ordered))

    @property
    def best(self) -> LeaderboardRow:
        """The row with the highest cross-validation score and a sound saved fit; of equal rows the simpler."""
        if not self.rows:
            raise PipelineError("the leaderboard has no rows; run `manyheads heads` first")
        return self.rows[0]

    @property
    def recommended(self) -> LeaderboardRow:
        """The row to use; the best if there is no recommendation."""
        return self.row(self.recommendation.recommended) if self.recommendation else self.best

    @property
    def ranked(self) -> tuple[LeaderboardRow, ...]:
        """The rows that are cross-validated on the same images as the best."""
        return tuple(row for row in self.rows if row.images == self.best.images)

    @property
    def apart(self) -> tuple[tuple[LeaderboardRow, ...], ...]:
        """The rows that are not ranked with the best: variants, and rows of fine-tuned networks, grouped by their images."""
        others = self.rows[len(self.ranked) :]
        return tuple(tuple(rows) for _, rows in groupby(others, lambda row: row.images))

    def row(self, key: str) -> LeaderboardRow:
        """Return the row named `embedding/head`; KeyError where there is none."""
        return {row.key: row for row in self.rows}[key]

    @property
    def target(self) -> Target:
        """The target that is predicted."""
        return target_of(self.provenance.get("target", {"classes": ()}))

    @property
    def test_metric(self) -> Metric:
        """The main metric of the test."""
        return metrics_for(self.target)[0]

    @property
    def scoring(self) -> str:
        """The name of the tuned metric, in which cross-validation scores are."""
        return str(self.provenance.get("scoring", "accuracy"))

    @property
    def metric(self) -> Metric:
        """The tuned metric, by which rows are ordered and compared."""
        return METRICS[self.scoring]

    def to_json(self) -> str:
        """Return the whole leaderboard as JSON text."""
        record = {
            "best": self.best.key if self.rows else None,
            "rows": list(map(LeaderboardRow.to_record, self.rows)),
            "verdict": asdict(self.recommendation) if self.recommendation else None,
            "leaks": asdict(self.leaks) if self.leaks else None,
            "provenance": self.provenance,
        }
        return to_document(LEADERBOARD, record)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame of the rows, the best first; scores as users know them, a loss above 0."""
        import pandas as pd

        found = []
        for row in self.rows:
            cells: dict[str, Any] = {
                "embedding": row.embedding,
                "head": row.head,
                f"cv_{self.scoring}": self.metric.sign * row.cv_mean,
                "cv_std": row.cv_std,
            }
            for metric in metrics_for(self.target):
                if row.test is not None and row.test[metric.name] is not None:
                    cells[f"test_{metric.name}"] = row.test[metric.name]
            low, high = (None if row.test is None else row.test.of(self.test_metric)[1]) or (None, None)
            cells |= {
                "test_low": low,
                "test_high": high,
                "fit_seconds": row.fit_seconds,
                "predict_seconds": row.predict_seconds,
                "trials": row.trials,
                "best": row.key == self.best.key,
                "as_good_as_best": bool(self.mark(row)),
                "recommended": self.recommendation is not None and row.key == self.recommendation.recommended,
                "note": row.note,
                "licence": row.license,
                "bundle": row.bundle,
                "params": dict(row.params),
            }
            found.append(cells)
        return pd.DataFrame(found)

    def to_markdown(self) -> str:
        """Return the leaderboard as a Markdown table with warnings above and notes below."""
        lines = ["# Leaderboard", ""]
        for line in self.warnings():
            lines += [f"> {line}", ""]
        lines += [self._table(self.ranked, "github"), ""]
        lines += map("- {}".format, self.notes())
        for rows in self.apart:
            title, words = apart_words(rows)
            lines += ["", f"## {title}", "", words, "", self._table(rows, "github")]
        return "\n".join([*lines, ""])

    def to_text(self) -> str:
        """Return the leaderboard for a terminal."""
        above = self.warnings()
        lines = [*above, *([""] if above else []), self._table(self.ranked), ""]
        for rows in self.apart:
            lines += [": ".join(apart_words(rows)), "", self._table(rows), ""]
        return "\n".join([*lines, *self.notes()])

    def _table(self, rows: Sequence[LeaderboardRow], style: str = "simple") -> str:
        """Render rows in a style of tabulate, with columns for the repeated searches that were requested."""
        test_metric, metric, lines = self.test_metric, self.metric, []
        # Where cross-validation is in accuracy too, the header need not name it.
        short = (
            "" if metric is test_metric is ACCURACY else " acc." if test_metric is ACCURACY else f" {test_metric.title}"
        )
        asked = [name for name in ("nested", "seeds") if any(getattr(row, name) for row in rows)]
        others = {
            other.column: other for other in metrics_for(self.target) if other.column and other is not test_metric
        }
        headers = ["", "embedding", "head", f"CV {metric.title}", *asked, f"test{short} [95 %]"]
        headers += [*others, "fit s", "pred. s", "trials", "note"]
        for row in rows:
            cells = [self.mark(row), row.embedding, row.head, cross_validated(row, self.scoring)]
            cells += [repeated(row, name, metric)[0] for name in asked]
            cells.append(test_text(row.test, test_metric))
            for other in others.values():
                value = None if row.test is None else row.test[other.name]
                cells.append("" if value is None else other.user_text(value))
            cells += [seconds(row.fit_seconds), seconds(row.predict_seconds), str(row.trials), row.note]
            lines.append(cells)
        if style == "github":
            for cells in lines:
                cells[0], cells[2] = ("\\*", f"**{cells[2]}**") if cells[0] == "*" else (cells[0], cells[2])
        aligned = ["left" if name in ("", "embedding", "head", "note") else "right" for name in headers]
        return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=aligned)

    def mark(self, row: LeaderboardRow) -> str:
        """`*` for the best row, `~` for one with no evidence of a difference from it."""
        if row.key == self.best.key:
            return "*"
        return "~" if self.recommendation and row.key in self.recommendation.no_evidence else ""

    def warnings(self) -> list[str]:
        """Return the warnings to show above the table, one sentence each: leaks, bad fits, fit warnings, surprising tests."""
        if not self.rows:
            return []
        looked_at = list(dict.fromkeys([self.best.key, self.recommended.key]))
        lines, warned, text = [], [], self.metric.text
        if self.leaks:
            lines += self.leaks.lines(list(map(self.row, looked_at)), self.test_metric)
        for row in self.rows:
            fit = row.last_fit
            if fit is not None and not (fit.sound and fit.tries == 1):
                lowest = min(fit.fold_scores, default=fit.score)
                what = "fitted again with another seed" if fit.sound else "a bad fit, ranked last and never recommended"
                lines.append(
                    f"{row.key}: {what}: the fit on all training images scores {text(fit.score)} on them, and those of cross-validation "
                    f"at least {text(lowest)} on theirs (seeds tried: {fit.tries})."
                )
            for where, found in (("last fit", fit and fit.warnings), ("fits on folds", fit and fit.fold_warnings)):
                if found:
                    told = ", ".join(f"{count} x {name}" for name, count in found.items())
                    warned.append(f"{row.key} {where} {told}")
            if row.surprise and row.test and row.expected_test:
                score, low, high = map(ACCURACY.text, (row.test.accuracy, *row.expected_test))
                lines.append(
                    f"{row.key}: test accuracy {score} is {row.surprise} the 99.9 % interval that cross-validation lets expect, {low} to "
                    f"{high}: {SURPRISES[row.surprise]}."
                )
        return [*lines, f"Warnings while fitting: {'; '.join(warned)}."] if warned else lines

    def notes(self) -> list[str]:
        """Return the notes to show below the table, one sentence each."""
        if not self.rows:
            return ["No rows."]
        of_run = map(str, self.provenance.get("notes", ()))
        return [*self._score_notes(), *self._recommendation_notes(), *self._row_notes(), *of_run]

    def _score_notes(self) -> list[str]:
        """Explain the scores."""
        best, metric = self.best, self.metric
        better = ", lower is better" if metric.lower_is_better else ""
        lines = [
            f"Best by cross-validation: {best.key} ({metric.title} {cross_validated(best, self.scoring)}{better}). Test scores choose nothing.",
            f"±: the standard deviation of the scores of the {len(best.cv_scores)} folds; it says how they differ, and is no interval of "
            "the score.",
        ]
        if metric.needs_probabilities:
            lines.append(
                f"Cross-validation judges the heads' own probabilities, as the search did; the test's {metric.title} is of calibrated ones."
            )
        chosen = nested_choice(self.ranked)
        if chosen is not None:
            lines.append(
                f"nested: every search repeated within each of {len(chosen.outer)} outer folds; the mean on the images held out, which chose nothing. "
                f"Choosing the row within the folds too gives {_nested(chosen, metric)}, the unbiased score of this whole search "
                "(95 % interval by the corrected resampled t)."
            )
        seeds = next((row.seeds.seeds for row in self.rows if row.seeds), None)
        if seeds is not None:
            lines.append(
                f"seeds: cross-validation's mean ± standard deviation over seeds {seeds[0]} to {seeds[-1]}, each with its own "
                "folds and search; the test images stay the same."
            )
        return lines

    def _recommendation_notes(self) -> list[str]:
        """Say which row to use, and how optimistic the best score is."""
        found, best, recommended, lines = self.recommendation, self.best, self.recommended, []
        if found is None:
            return []
        others = len({*found.no_evidence} - {best.key})
        if others:
            lines.append(
                f"~ marks {number_of(others, 'more row')} with no evidence of a difference from the best "
                "(paired, out of fold, corrected for all pairs of rows)."
            )
        lines.append(found.advice)
        if recommended.key != best.key and recommended.bundle is not None and not recommended.constant:
            lines.append(
                f"`manyheads predict` takes the best row when it is given the output folder; for the recommended one give it {recommended.bundle} in there."
            )
        if found.optimism is not None:
            title, unit = self.metric.title, self.metric.unit
            luck = f"Picking the best of {found.optimism.candidates} rows flatters its cross-validation {title} by about {self.luck(found.optimism.bias)} {unit}"
            if found.trial_optimism is not None and best.trials > 1:
                least = "" if found.finished_trials in (None, best.trials) else "at least "
                luck += (
                    f", picking the best of its {best.trials} trials by {least}about {self.luck(found.trial_optimism)}"
                )
            lines.append(f"{luck}.")
        return lines

    def luck(self, bias: float) -> str:
        """Write the selection optimism of a score."""
        return self.metric.gap_text(max(bias, 0.0)).lstrip("+")

    def _row_notes(self) -> list[str]:
        """Describe the test and the kinds of rows."""
        best, lines, test = self.best, list[str](), None
        kinds, reduced, licences = set[str](), dict[str, int](), dict[str, dict[str, None]]()
        for row in self.rows:
            kinds.add("baseline" if row.baseline else "untrained" if row.untrained else "network")
            if row.license and not (row.baseline or row.untrained):
                licences.setdefault(row.license, {})[row.embedding] = None
            if row.components is not None:
                reduced[row.embedding] = row.components
            if row.test is not None and (test is None or row.test.n > test.n):
                test = row.test
        if test is not None:
            of = "" if test.units in (None, test.n) else f" of {test.units:,} groups, which the interval counts"
            lines.append(
                f"Test: {test.n:,} images{of}, in brackets the 95 % interval{' (Wilson)' * (self.test_metric is ACCURACY)}."
            )
        if "untrained" in kinds:
            lines.append(
                "untrained: the backbone has random weights and saw no image before; a control, not a contender."
            )
        other = next((rows[0] for rows in self.apart if rows[0].unseen_rows is not None and rows[0].bundle), None)
        if other is not None:
            lines.append(
                f"To label with a row that is ranked separately, give `manyheads predict` its folder, {other.bundle}."
            )
        if best.unseen_rows is not None:
            lines.append(f"All of them: {apart_words(self.ranked)[1]}")
        if reduced:
            told = ", ".join(f"up to {count} of {name}" for name, count in reduced.items())
            lines.append(
                f"Heads work on principal components, found within each fold's training images: {told}; fewer where a fold has fewer "
                "training images."
            )
        if "baseline" in kinds:
            lines.append("baseline: works without any backbone; a backbone that does not beat it does not help.")
        if licences:
            told = "; ".join(f"{licence} ({', '.join(names)})" for licence, names in licences.items())
            lines.append(f"Licences of the weights: {told}.")
        if best.baseline or best.untrained:
            lines.append(f"No trained backbone beats the {best.kind} row {best.key} on these images.")
        return lines


SURPRISES = {
    "above": "the test is easier: look for copies",
    "below": "the fit or the test images differ",
}
"""Likely reasons for a test accuracy outside its prediction interval."""


def apart_words(rows: Sequence[LeaderboardRow]) -> tuple[str, str]:
    """Return the heading of a group of separately ranked rows, and how to compare them with the others."""
    row = rows[0]
    if row.apart:
        return APART[row.apart]
    words = "heads fitted and cross-validated on all training images: compare them with the others by the test."
    if row.unseen_rows is not None:
        words = f"heads on a fine-tuned network, fitted on the {row.unseen_rows:,} training images that it has not learned from"
        some = "All" if row.chose_rows == row.unseen_rows else f"{row.chose_rows:,}"
        words += (
            f". {some} of them chose the network's weights, so that cross-validation on them would flatter: it orders these rows and "
            "is not shown. Compare them with the others by the test, which chose nothing."
            if row.chose_rows
            else " and that did not choose its weights, cross-validated on those only: compare them with the others by the test."
        )
    return "Ranked apart, on other images", words


def cross_validated(row: LeaderboardRow, scoring: str) -> str:
    """Return the cross-validation score and its spread over the folds; a dash where it would be biased."""
    return "–" if row.chose_rows or row.apart == "domains" else _spread(row.cv_mean, row.cv_std, METRICS[scoring])


def _spread(mean: float, deviation: float, metric: Metric) -> str:
    return f"{metric.text(mean)} ± {metric.user_text(deviation)}"


def _nested(nested: Nested, metric: Metric) -> str:
    return f"{metric.text(nested.mean)} {metric.interval_text(nested.interval)}"


def repeated(row: LeaderboardRow, name: str, metric: Metric) -> tuple[str, float | None]:
    """Return the text and the score of a row's repeated search, `nested` or `seeds`; '' and None where it was not requested."""
    if name == "nested":
        return ("", None) if row.nested is None else (_nested(row.nested, metric), row.nested.mean)
    return ("", None) if row.seeds is None else (_spread(*row.seeds.cv, metric), row.seeds.cv[0])


def test_text(test: Scores | None, metric: Metric) -> str:
    """Return a test score with its interval; nothing where there is none."""
    value, interval = (None, None) if test is None else test.of(metric)
    if value is None or interval is None:
        return ""
    return f"{metric.user_text(value)} [{metric.user_text(interval[0])}, {metric.user_text(interval[1])}]"


def read_leaderboard(output: Path) -> Leaderboard:
    """Read an experiment's leaderboard; PipelineError when there is none, or it is of another version."""
    path = Artifacts(output).leaderboard
    return leaderboard_of(read_document(path, LEADERBOARD), path)


def leaderboard_of(record: Mapping[str, Any], path: Path) -> Leaderboard:
    """Return the leaderboard that a document holds; `path` names it in errors."""
    try:
        return Leaderboard(
            tuple(map(LeaderboardRow.from_record, record["rows"])),
            record["provenance"],
            from_plain(Recommendation | None, record["verdict"]),
            from_plain(Leaks | None, record.get("leaks")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise LEADERBOARD.damaged(path, "it does not hold what a leaderboard of this version does") from None


def seconds(value: float) -> str:
    """Write a duration in seconds, with fewer decimals the longer it is."""
    digits = (value < 100) + (value < 10) + (value < 0.095)
    return f"{value:.{digits}f}"


HEADERS = (
    "target",
    "training images",
    "cross-validation",
    "test [95 %]",
    "a constant guess",
    "best row",
    "recommended instead",
)


def overview(boards: Mapping[str, Leaderboard]) -> list[tuple[str, ...]]:
    """Return table cells, in the columns of `HEADERS`, with the best row of each of several targets."""
    lines = []
    for name, board in boards.items():
        best, told = board.best, board.test_metric
        named = "" if told is board.metric else f"{told.title} "
        guess = next((row for row in board.rows if row.constant), None)
        tests = [
            f"{named}{test_text(row.test, told)}" if row is not None and row.test else "–" for row in (best, guess)
        ]
        lines.append(
            (
                name,
                f"{board.provenance.get('images', {}).get('train', 0):,}",
                f"{board.metric.title} {cross_validated(best, board.scoring)}",
                *tests,
                best.key,
                "" if board.recommended is best else board.recommended.key,
            )
        )
    return lines


def overview_text(boards: Mapping[str, Leaderboard]) -> str:
    """Return the overview as a table for a terminal."""
    return tabulate(overview(boards), HEADERS, disable_numparse=True)
