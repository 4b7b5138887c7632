"""The leaderboard: one row per (embedding, head), ordered and won by cross-validation only; and several targets side by side.

Stage two (`train_heads`) fills `LeaderboardRow` and `Leaderboard`; test scores are shown and choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby, takewhile
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

APART = "Ranked apart, on other images"
APARTS = {
    "domains": (
        "Adapted to new domains, without their labels",
        "the head of a row above, as it does on the same test images after it is adapted. Each half of the new domains' test images "
        "is adapted by the features of the other half: no image's own, and no label of theirs. Cross-validation on the training "
        "images cannot judge that, so these rows are no candidates; what each brought is said in the notes.",
    ),
    "views": (
        "With views of the images",
        "the best head of a network, at the same parameters, averaged over views of an image, learned from the views of the training "
        "images, or both. Folds are of images, so that no view of an image that is judged was learned from. These rows are no "
        "candidates; what each brought and costs is said in the notes.",
    ),
}
"""Headings and words on rows that are made of others, by `LeaderboardRow.apart`."""


@dataclass(frozen=True)
class Leaderboard:
    """Rows ordered by cross-validation, best first, with the provenance needed to make them again.

    Rows that are cross-validated on other images than the best stand behind all others, whatever they score.

    `provenance` holds plain values: config, seed, versions, store digests, index fingerprint, date, command, and notes on
    what was left out.
    """

    rows: tuple[LeaderboardRow, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    recommendation: Recommendation | None = None
    leaks: Leaks | None = None

    def __post_init__(self) -> None:
        ordered = sorted(self.rows, key=lambda row: (not row.sound, -row.cv_mean, row.simplicity, row.key))
        if ordered:
            # The images of most rows; those of a fine-tuned network only where no other backbone is there.
            first = min(
                ordered,
                key=lambda row: (bool(row.apart), row.baseline, row.unseen_rows is not None, row.chose_rows > 0),
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
    def recommended(self) -> LeaderboardRow:
        """The row to use; the best where there is no recommendation."""
        return self.row(self.recommendation.recommended) if self.recommendation else self.best

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
        """Return the row named `embedding/head`; KeyError where there is none."""
        return {row.key: row for row in self.rows}[key]

    @property
    def target(self) -> Target:
        """What is said of an image."""
        return target_of(self.provenance.get("target", {"classes": ()}))

    @property
    def told_by(self) -> Metric:
        """The score that the test is told by first."""
        return metrics_for(self.target)[0]

    @property
    def scoring(self) -> str:
        """What the cross-validation scores measure."""
        return str(self.provenance.get("scoring", "accuracy"))

    @property
    def metric(self) -> Metric:
        """The score that was tuned, by which rows are ordered and compared."""
        return METRICS[self.scoring]

    def to_json(self) -> str:
        """Return the whole leaderboard as JSON text."""
        record = {
            "best": self.best.key if self.rows else None,
            "rows": [row.to_record() for row in self.rows],
            "verdict": asdict(self.recommendation) if self.recommendation else None,
            "leaks": asdict(self.leaks) if self.leaks else None,
            "provenance": self.provenance,
        }
        return to_document(LEADERBOARD, record)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas DataFrame of the rows, the best first; scores as users know them, a loss above 0."""
        import pandas as pd

        sign, scores = -1 if self.metric.lower_is_better else 1, metrics_for(self.target)
        found = []
        for row in self.rows:
            tests = {} if row.test is None else {f"test_{metric.name}": row.test[metric.name] for metric in scores}
            low, high = (None if row.test is None else row.test.of(self.told_by)[1]) or (None, None)
            cells = {
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
        """Return the leaderboard as a Markdown table with the notes a reader needs below it."""
        above = [text for line in self.warnings() for text in (f"> {line}", "")]
        lines = ["# Leaderboard", "", *above, self._table(self.ranked, wide=True), ""]
        lines += [f"- {line}" for line in self.notes()]
        for rows in self.apart:
            lines += ["", f"## {apart_title(rows)}", "", apart_text(rows), "", self._table(rows, wide=True)]
        return "\n".join([*lines, ""])

    def to_text(self) -> str:
        """Return the leaderboard for a terminal."""
        above = self.warnings()
        lines = [*above, *([""] if above else []), self._table(self.ranked), ""]
        for rows in self.apart:
            lines += [f"{apart_title(rows)}: {apart_text(rows)}", "", self._table(rows), ""]
        return "\n".join([*lines, *self.notes()])

    def _table(self, rows: Sequence[LeaderboardRow], wide: bool = False) -> str:
        """Draw rows for Markdown (`wide`) or for a terminal; what nobody asked for has no column."""
        cells, asked = [self._cells(row, wide) for row in rows], {name for name, _ in REPEATS}
        shown = [name for name in next(iter(cells), {}) if name not in asked or any(row[name] for row in cells)]
        return tabulate(
            [[row[name] for name in shown] for row in cells],
            headers=shown,
            tablefmt="github" if wide else "simple",
            disable_numparse=True,
            colalign=["left" if name in ("", "embedding", "head", "note") else "right" for name in shown],
        )

    def _cells(self, row: LeaderboardRow, wide: bool) -> dict[str, str]:
        """Return a row's cells by their headers; of the test those of the scores that serve the target."""
        told_by, metric, test = self.told_by, self.metric, row.test
        # Where everything else is accuracy too, the narrow table need not say so.
        short = "" if metric is told_by is ACCURACY else " acc." if told_by is ACCURACY else f" {told_by.title}"
        scores = {
            other.column[not wide]: ""
            if test is None or test[other.name] is None
            else other.user_text(test.values[other.name])
            for other in metrics_for(self.target)
            if other.column and other is not told_by
        }
        return {
            "": self.mark(row).replace("*", "\\*" if wide else "*"),
            "embedding": row.embedding,
            "head": f"**{row.head}**" if wide and row.key == self.best.key else row.head,
            f"cross-validation ({metric.title})" if wide else f"CV {metric.title}": cross_validated(row, self.scoring),
            **{name: text(row, self.scoring) for name, text in REPEATS},
            f"test {told_by.title} [95 %]" if wide else f"test{short} [95 %]": test_text(test, told_by),
            **scores,
            "fit s": seconds(row.fit_seconds),
            "predict s" if wide else "pred. s": seconds(row.predict_seconds),
            "trials": str(row.trials),
            "note": row.note,
        }

    def mark(self, row: LeaderboardRow) -> str:
        """`*` for the best row, `~` for one with no evidence of a difference from it."""
        if row.key == self.best.key:
            return "*"
        return "~" if self.recommendation and row.key in self.recommendation.no_evidence else ""

    def warnings(self) -> list[str]:
        """Return what must be known before the table is read, one sentence each: what may be wrong with the data and with rows.

        Leaks, last fits unlike those on folds, warnings in fits, tests unlike what cross-validation promised.
        """
        if not self.rows:
            return []
        looked_at = [row for row in self.rows if row.key in (self.best.key, self.recommended.key)]
        lines = self.leaks.lines(looked_at, self.told_by) if self.leaks else []
        lines += filter(None, map(self._unlike_folds, self.rows))
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
        notes = [*self._score_notes(), *self._recommendation_notes(), *self._repeat_notes(), *self._row_notes()]
        return notes + [str(note) for note in self.provenance.get("notes", ())]

    def _score_notes(self) -> list[str]:
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
        return lines

    def _recommendation_notes(self) -> list[str]:
        recommendation, metric, recommended = self.recommendation, self.metric, self.recommended
        if recommendation is None:
            return []
        others, lines = sum(key != self.best.key for key in recommendation.no_evidence), []
        if others:
            lines.append(
                f"~ marks {number_of(others, 'more row')} with no evidence of a difference from the best "
                "(paired, out of fold, corrected for all pairs of rows)."
            )
        lines.append(recommendation.advice)
        if recommended.key != self.best.key and recommended.bundle is not None and not recommended.constant:
            lines.append(
                f"`manyheads predict` takes the best row when it is given the output folder; for the recommended one give it {recommended.bundle} in there."
            )
        if recommendation.optimism is not None:
            lines.append(
                f"Picking the best of {recommendation.optimism.candidates} rows flatters its cross-validation {metric.title} by about "
                f"{_luck(metric, recommendation.optimism.bias)} {metric.unit}{self._trials_text(recommendation)}."
            )
        return lines

    def _trials_text(self, recommendation: Recommendation) -> str:
        """Say what picking the best trial adds, and of how many trials that is known."""
        trials, finished, found = self.best.trials, recommendation.finished_trials, recommendation.trial_optimism
        if trials == 1 or (found is None and finished is None):
            return ""
        if found is None:
            return f"; what picking the best of its {trials} trials adds is not known, as only one was fitted on every fold"
        luck = _luck(self.metric, found)
        if finished in (None, trials):
            return f", picking the best of its {trials} trials by about {luck}"
        return f", picking the best of its {trials} trials by at least about {luck} (from the {finished} that were fitted on every fold)"

    def _repeat_notes(self) -> list[str]:
        lines, chosen = [], nested_choice(self.ranked)
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

    def _row_notes(self) -> list[str]:
        """Say what the rows were tested on and are made of."""
        best, rows, lines = self.best, self.rows, []
        test = max((row.test for row in rows if row.test), key=lambda test: test.n, default=None)
        if test is not None:
            of = "" if test.units in (None, test.n) else f" of {test.units:,} groups, which the interval counts"
            lines.append(
                f"Test: {test.n:,} images{of}, in brackets the 95 % interval{' (Wilson)' * (self.told_by is ACCURACY)}."
            )
        if any(row.untrained for row in rows):
            lines.append(
                "untrained: the backbone has random weights and saw no image before; a control, not a contender."
            )
        other = next((row for apart in self.apart for row in apart if row.unseen_rows is not None and row.bundle), None)
        if other is not None:
            lines.append(f"To label with a row that stands apart, give `manyheads predict` its folder, {other.bundle}.")
        if best.unseen_rows is not None:
            lines.append(f"All of them: {apart_text(self.ranked)}")
        reduced = {row.embedding: row.components for row in rows if row.components is not None}
        if reduced:
            lines.append(
                "Heads work on principal components, found within each fold's training images: "
                + ", ".join(f"up to {count} of {name}" for name, count in reduced.items())
                + "; fewer where a fold has fewer training images."
            )
        if any(row.baseline for row in rows):
            lines.append("baseline: a floor without any backbone; a backbone that does not beat it does not help.")
        licenses: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if not (row.baseline or row.untrained) and row.license:
                licenses.setdefault((row.backbone, row.license), []).append(row.embedding)
        if licenses:
            told = "; ".join(f"{_network(names)} {license}" for (_, license), names in licenses.items())
            lines.append(f"Licences of the weights: {told}.")
        if best.baseline or best.untrained:
            lines.append(f"No trained backbone beats the {best.kind} row {best.key} on these images.")
        return lines


SURPRISES = {
    "above": "the test is easier: look for copies",
    "below": "the fit or the test images differ",
}
"""What a test accuracy outside of its interval means."""


def apart_title(rows: Sequence[LeaderboardRow]) -> str:
    """Return the heading of rows that stand apart."""
    return APARTS[rows[0].apart][0] if rows[0].apart else APART


def apart_text(rows: Sequence[LeaderboardRow]) -> str:
    """Say which images rows are fitted and judged on, and how they can be compared with others; all rows on the same images."""
    row = rows[0]
    if row.apart:
        return APARTS[row.apart][1]
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


def nested_text(nested: Nested | None, scoring: str) -> str:
    """Return a nested score with its interval, nothing where there is none."""
    metric = METRICS[scoring]
    return "" if nested is None else f"{metric.text(nested.mean)} {metric.interval_text(nested.interval)}"


def cross_validated(row: LeaderboardRow, scoring: str) -> str:
    """Return the cross-validation score and its spread over the folds; a dash where it cannot judge the row."""
    return "–" if row.chose_rows or row.apart == "domains" else _spread((row.cv_mean, row.cv_std), METRICS[scoring])


def _spread(found: tuple[float, float], metric: Metric) -> str:
    return f"{metric.text(found[0])} ± {metric.user_text(found[1])}"


REPEATS: tuple[tuple[str, Callable[[LeaderboardRow, str], str]], ...] = (
    ("nested", lambda row, scoring: nested_text(row.nested, scoring)),
    ("seeds", lambda row, scoring: _spread(row.seeds.cv, METRICS[scoring]) if row.seeds else ""),
)
"""Columns that are there on request: the field of the row, and its text."""


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
            tuple(LeaderboardRow.from_record(raw) for raw in record["rows"]),
            record["provenance"],
            from_plain(Recommendation | None, record["verdict"]),
            from_plain(Leaks | None, record.get("leaks")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise LEADERBOARD.damaged(path, "it does not hold what a leaderboard of this version does") from None


def seconds(value: float) -> str:
    """Return a duration in seconds with as many digits as it deserves."""
    digits = sum(value < least for least in (100, 10, 0.095))
    return f"{value:.{digits}f}"


def _luck(metric: Metric, bias: float) -> str:
    return metric.gap_text(max(bias, 0.0)).lstrip("+")


def _network(embeddings: Sequence[str]) -> str:
    """Return what the layers of one network have in common in their names."""
    parts = zip(*(name.split("-") for name in embeddings), strict=False)
    return "-".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts)) or min(embeddings)


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
    """Return the best row of each of several targets on the same images, in cells as `HEADERS` names them."""

    def tested(board: Leaderboard, row: LeaderboardRow | None) -> str:
        if row is None or row.test is None:
            return "–"
        named = "" if board.told_by is board.metric else f"{board.told_by.title} "
        return named + test_text(row.test, board.told_by)

    return [
        (
            name,
            f"{board.provenance.get('images', {}).get('train', 0):,}",
            f"{board.metric.title} {cross_validated(board.best, board.scoring)}",
            tested(board, board.best),
            tested(board, next((row for row in board.rows if row.constant), None)),
            board.best.key,
            "" if board.recommended is board.best else board.recommended.key,
        )
        for name, board in boards.items()
    ]


def overview_text(boards: Mapping[str, Leaderboard]) -> str:
    """Return the overview as a table for a terminal."""
    return tabulate(overview(boards), HEADERS, disable_numparse=True)
