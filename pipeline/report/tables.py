"""The page's tables as HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from statistics import median

from pipeline.evaluation import ACCURACY, Calibration, ClassScores, Interval, Metric
from pipeline.evaluation.leaderboard.imbalance import Effect
from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import APART, REPEATS, Leaderboard, apart_text, cross_validated, seconds
from pipeline.report.material import Material

MOST_CLASSES = 25
"""Classes up to which the table has them all at once."""
WORST_CLASSES = 15
"""Of more classes, those shown before the table is unfolded."""

Cell = tuple[str, float | None]
"""HTML and the number it is sorted by; None for text."""


def table(name: str, headers: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return a table that sorts when a header is pressed; each row has a CSS class and cells, the first names it.

    `name` is what a screen reader calls the table. Where it is wider than the screen it scrolls.
    """
    # A unit alone on a line would be read as a name, and so would half a name.
    for text in (", %", ", s", "[95 %]", "macro F1", "log loss"):
        headers = [header.replace(text, text.replace(" ", "&nbsp;")) for header in headers]
    numeric = [bool(rows) and rows[0][1][column][1] is not None for column in range(len(headers))]
    head = "".join(
        f'<th scope="col" class="n">{text}</th>' if is_number else f'<th scope="col">{text}</th>'
        for text, is_number in zip(headers, numeric, strict=True)
    )
    body = "".join(
        f'<tr class="{kind}">{_first(cells[0])}{"".join(map(_cell, cells[1:]))}</tr>' for kind, cells in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _first(cell: Cell) -> str:
    return f'<th scope="row">{cell[0]}</th>'


def _cell(cell: Cell) -> str:
    text, value = cell
    return f"<td>{text}</td>" if value is None else f'<td class="n" data-v="{value:.10g}">{text}</td>'


def _named(row: LeaderboardRow, more: str = "") -> Cell:
    """Name a row by head and embedding, so that no two rows of a table are called the same."""
    head = f'<span class="nowrap">{escape(row.head.replace("_", " "))}</span>{more}'
    return (f'{head}<span class="quiet embedding">{escape(row.embedding)}</span>', None)


def _missing() -> Cell:
    return ('<span class="quiet">–</span>', -1e9)


def leaderboard(board: Leaderboard) -> str:
    """Return the leaderboard, best row first; rows on other images in tables of their own below."""
    parts = [_leaderboard(board, board.ranked, "Leaderboard")]
    for rows in board.apart:
        parts.append(
            f'<h3>{APART}</h3><p class="quiet">{escape(apart_text(rows))}</p>{_leaderboard(board, rows, APART)}'
        )
    return "".join(parts)


def _leaderboard(board: Leaderboard, shown: Sequence[LeaderboardRow], name: str) -> str:
    group = board.verdict.no_evidence if board.verdict else (board.best.key,)
    tests = [row.test for row in board.rows if row.test]
    # A hopeless row's interval would squeeze all others into a corner.
    lows, high = [test.interval[0] for test in tests], max((test.interval[1] for test in tests), default=1.0)
    span = (max(min(lows), 4 * median(lows) - 3 * high) if lows else 0.0, high)
    rows = []
    for row in shown:
        kind = " ".join(
            name
            for name, wanted in (
                ("best", row.key == board.best.key),
                ("group", row.key in group),
                ("quietly", row.key not in group),
            )
            if wanted
        )
        rows.append((kind, _leaderboard_cells(row, board, span)))
    asked = [name.capitalize() for name, _ in REPEATS if any(getattr(row, name) for row in board.rows)]
    headers = [
        "Head <span class='quiet'>and embedding</span>",
        f"Cross-validation, {unit(board.metric)}",
        "Test accuracy, % <span class='quiet'>[95 %]</span>",
        *asked,
        "Balanced accuracy, %",
        "Macro F1, %",
        "Log loss",
        "Fit, s",
        "Trials",
    ]
    return table(name, headers, rows)


def unit(metric: Metric) -> str:
    """Return what a cross-validation score is and is measured in."""
    if metric.lower_is_better:
        return metric.title
    return "%" if metric is ACCURACY else f"{metric.title}, %"


def _leaderboard_cells(row: LeaderboardRow, board: Leaderboard, span: Interval) -> list[Cell]:
    tags = [f'<span class="tag">{row.kind}</span>'] if row.kind else []
    tags += [f'<span class="tag orange">{mark}</span>' for mark in row.marks]
    if board.verdict and row.key == board.verdict.recommended:
        tags.insert(0, '<span class="tag green">recommended</span>')
    if row.key == board.best.key:
        tags.insert(0, '<span class="tag blue">best</span>')
    test, scoring, scale = row.test, board.scoring, board.metric.scale
    cells: list[Cell] = [
        _named(row, "".join(f" {tag}" for tag in tags)),
        (f'<span class="nowrap">{cross_validated(row, scoring)}</span>', scale * row.cv_mean)
        if not row.chose_rows
        else _missing(),
        (_tested(test.accuracy, test.interval, span), test.accuracy) if test else _missing(),
    ]
    for name, text in REPEATS:
        repeated = getattr(row, name)
        if repeated is not None:
            mean = repeated.mean if name == "nested" else repeated.cv[0]
            cells.append((text(row, scoring), scale * mean))
        elif any(getattr(other, name) for other in board.rows):
            cells.append(_missing())
    if test is None:
        cells += [_missing()] * 3
    else:
        cells += [
            (f"{100 * test.balanced_accuracy:.1f}", test.balanced_accuracy),
            (f"{100 * test.macro_f1:.1f}", test.macro_f1),
            (f"{test.log_loss:.3f}", test.log_loss) if test.log_loss is not None else _missing(),
        ]
    return [*cells, (seconds(row.fit_seconds), row.fit_seconds), (str(row.trials), float(row.trials))]


def _tested(value: float, interval: Interval, span: Interval) -> str:
    def place(share: float) -> float:
        return min(100.0, max(0.0, 100 * (share - span[0]) / max(span[1] - span[0], 1e-9)))

    left, right = place(interval[0]), place(interval[1])
    text = f"<span class='nowrap'>{100 * value:.1f}</span> <span class='quiet'>[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]</span>"
    return f'{text}<span class="range" aria-hidden="true"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i><b style="left:{place(value):.1f}%"></b></span>'


def differences(board: Leaderboard) -> str:
    """Return the paired comparisons of every row with the best one; empty without a verdict."""
    if board.verdict is None:
        return ""
    rows, metric = [], board.metric
    for item in board.verdict.differences:
        if item.key == board.best.key:
            continue
        cells: list[Cell] = [
            _named(board.row(item.key)),
            (_signed(item.difference, item.interval, metric), item.difference),
            (_p(item.p_value), item.p_value),
        ]
        for paired in (item.test, item.folds):
            cells += (
                [
                    (_signed(paired.difference, paired.interval, metric), paired.difference),
                    (_p(paired.p_value), paired.p_value),
                ]
                if paired
                else [_missing(), _missing()]
            )
        rows.append(("group" if item.no_evidence else "", cells))
    headers = [
        _gap_header(metric),
        "Out of fold <span class='quiet'>[95 %]</span>",
        "p, all pairs",
        "Test images <span class='quiet'>[95 %]</span>",
        "p, McNemar and Holm" if metric is ACCURACY else "p, randomisation and Holm",
        "Folds <span class='quiet'>[95 %]</span>",
        "p, corrected t and Holm",
    ]
    return table("Paired tests", headers, rows) if rows else ""


def _gap_header(metric: Metric) -> str:
    """Say what is taken from what, so that a positive number is in favour of the best row, of a loss too."""
    if metric.lower_is_better:
        return f"This row's {metric.title} minus the best row's, {metric.unit}"
    return f"Best minus this row, {'' if metric is ACCURACY else f'{metric.title}, '}percentage points"


def searches(material: Material) -> str:
    """Return what each search tried and found."""
    rows, metric = [], material.leaderboard.metric
    for row in material.leaderboard.rows:
        trials = material.trials.get(row.key)
        if not trials or len(trials) < 2:
            continue
        failed = sum(trial["status"] == "failed" for trial in trials)
        stopped = sum(trial["status"] == "stopped" for trial in trials)
        params = ", ".join(f"{name} = {_short(value)}" for name, value in row.params.items())
        spent = row.search_seconds or 0.0
        name, _ = _named(row)
        cells: list[Cell] = [
            (f'{name}<span class="quiet embedding">{escape(params)}</span>', None),
            (metric.text(row.cv_mean), metric.scale * row.cv_mean),
            (str(len(trials)), float(len(trials))),
            (f"{stopped} / {failed}", float(stopped + failed)),
            (seconds(spent), spent),
        ]
        rows.append(("", cells))
    headers = [
        "Search <span class='quiet'>and best parameters</span>",
        f"Best cross-validation, {unit(metric)}",
        "Trials",
        "Stopped / failed",
        "Time, s",
    ]
    return table("Searches", headers, rows)


def classes(rows: Sequence[ClassScores]) -> str:
    """Return precision, recall and F1 class by class; of many classes the worst first, and all of them folded away."""
    if len(rows) <= MOST_CLASSES:
        return _class_table("Classes", rows)
    # A class that is neither among the test images nor among the answers has no F1, and is not the worst.
    worst = sorted(rows, key=lambda row: (not row.support + row.predicted, row.f1))[:WORST_CLASSES]
    return (
        f"<h3>The {len(worst)} worst of {len(rows)} classes, lowest F1 first</h3>{_class_table('Worst classes', worst)}"
        f"<details><summary>All {len(rows)} classes</summary>{_class_table('All classes', rows)}</details>"
    )


def _class_table(name: str, rows: Sequence[ClassScores]) -> str:
    made = []
    for row in rows:
        interval = f"[{100 * row.interval[0]:.0f}, {100 * row.interval[1]:.0f}]"
        cells: list[Cell] = [
            (escape(row.label), None),
            (f"{row.support:,}", float(row.support)),
            (f"{100 * row.precision:.1f}", row.precision) if row.predicted else _missing(),
            (f"{100 * row.recall:.1f} <span class='quiet'>{interval}</span>", row.recall)
            if row.support
            else _missing(),
            (f"{100 * row.f1:.1f}", row.f1) if row.support + row.predicted else _missing(),
        ]
        made.append(("", cells))
    headers = ["Class", "Test images", "Precision, %", "Recall, % <span class='quiet'>[95 %]</span>", "F1, %"]
    return table(name, headers, made)


def imbalance(found: Sequence[Effect]) -> str:
    """Return what each treatment of uneven classes does to the scores."""
    rows = []
    for effect in found:
        cells: list[Cell] = [(escape(effect.name), None)]
        for part in (effect.out_of_fold, effect.test):
            if part is None:
                cells += [_missing()] * 3
                continue
            cells.append((f"{100 * part.accuracy:.1f}", part.accuracy))
            for value, (low, high) in (
                (part.balanced_accuracy, part.balanced_accuracy_interval),
                (part.macro_f1, part.macro_f1_interval),
            ):
                text = f"{100 * value:.1f} <span class='quiet'>[{100 * low:.1f}, {100 * high:.1f}]</span>"
                cells.append((text, value))
        rows.append(("", cells))
    sides = [
        f"{name}, {where}, %"
        for where in ("out of fold", "test")
        for name in ("Accuracy", "Balanced accuracy", "Macro F1")
    ]
    return table("Uneven classes", ["Treatment", *sides], rows)


def calibration(rows: Sequence[tuple[LeaderboardRow, Calibration]]) -> str:
    """Return how far each row's probabilities can be believed, on the test images."""
    made = []
    for row, found in rows:
        cells: list[Cell] = [
            _named(row),
            (f"{100 * found.ece:.1f}", found.ece),
            (f"{found.brier:.3f}", found.brier),
            (f"{found.log_loss:.3f}", found.log_loss),
        ]
        made.append(("", cells))
    return table(
        "Calibration",
        ["Head <span class='quiet'>and embedding</span>", "Calibration error, %", "Brier", "Log loss"],
        made,
    )


def reproduce(material: Material) -> str:
    """Return what is needed to make the experiment again."""
    provenance = dict(material.leaderboard.provenance)
    provenance.pop("notes", None)
    config = provenance.pop("config", None)
    command = provenance.pop("command", "")
    versions = provenance.pop("versions", {})
    digests = provenance.pop("stores", {})
    facts = "\n".join(f"{name}: {_short(value)}" for name, value in provenance.items() if not isinstance(value, dict))
    parts = [f"<h2>Make it again</h2><pre>{escape(str(command))}</pre>", f"<pre>{escape(facts)}</pre>" if facts else ""]
    for name, value in (("Config", config), ("Versions", versions), ("Feature stores", digests)):
        if value:
            text = json.dumps(value, indent=2, ensure_ascii=False)
            parts.append(f"<details><summary>{name}</summary><pre>{escape(text)}</pre></details>")
    parts += [f'<p class="quiet">{escape(note)}</p>' for note in material.missing]
    return "".join(parts)


def _signed(value: float, interval: Interval, metric: Metric) -> str:
    low, high = (metric.gap_text(end) if abs(end) < 1e6 else "-∞" if end < 0 else "+∞" for end in interval)
    return f"{metric.gap_text(value)} <span class='quiet'>[{low}, {high}]</span>"


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
