"""The page's tables as HTML."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from statistics import median

from pipeline.config import Artifacts
from pipeline.metrics import Calibration, ClassScores, Interval
from pipeline.report.imbalance import Effect
from pipeline.report.leaderboard import REPEATS, Leaderboard, seconds
from pipeline.report.material import Material
from pipeline.report.rows import LeaderboardRow

Cell = tuple[str, float | None]
"""HTML and the number it is sorted by; None for text."""


def table(headers: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return a table that sorts when a header is clicked; each row has a CSS class and cells."""
    numeric = [bool(rows) and rows[0][1][column][1] is not None for column in range(len(headers))]
    head = "".join(
        f'<th class="n">{name}</th>' if is_number else f"<th>{name}</th>"
        for name, is_number in zip(headers, numeric, strict=True)
    )
    body = "".join(f'<tr class="{name}">{"".join(_cell(cell) for cell in cells)}</tr>' for name, cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: Cell) -> str:
    text, value = cell
    return f"<td>{text}</td>" if value is None else f'<td class="n" data-v="{value:.10g}">{text}</td>'


def _missing() -> Cell:
    return ('<span class="quiet">–</span>', -1e9)


def leaderboard(board: Leaderboard) -> str:
    """Return the leaderboard, best row first."""
    group = board.verdict.no_evidence if board.verdict else (board.best.key,)
    tests = [row.test for row in board.rows if row.test]
    # A hopeless row's interval would squeeze all others into a corner.
    lows, high = [test.interval[0] for test in tests], max((test.interval[1] for test in tests), default=1.0)
    span = (max(min(lows), 4 * median(lows) - 3 * high) if lows else 0.0, high)
    rows = []
    for row in board.rows:
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
        "Head",
        "Embedding",
        "Cross-validation",
        *asked,
        "Test accuracy",
        "95 % interval",
        "Balanced",
        "Macro F1",
        "Log loss",
        "Fit s",
        "Trials",
    ]
    return table(headers, rows)


def _leaderboard_cells(row: LeaderboardRow, board: Leaderboard, span: Interval) -> list[Cell]:
    tags = ""
    if row.key == board.best.key:
        tags += ' <span class="tag blue">best</span>'
    if board.verdict and row.key == board.verdict.recommended:
        tags += ' <span class="tag green">recommended</span>'
    note = f' <span class="tag">{row.note}</span>' if row.note else ""
    loss = board.scoring == "log_loss"
    validation = (
        f"{row.cv_mean:.3f} ± {row.cv_std:.3f}" if loss else f"{100 * row.cv_mean:.1f} ± {100 * row.cv_std:.1f}"
    )
    test = row.test
    cells: list[Cell] = [
        (f'<span class="nowrap">{escape(row.head.replace("_", " "))}</span>{tags}', None),
        (f'<span class="embedding">{escape(row.embedding)}</span>{note}', None),
        (validation, row.cv_mean),
    ]
    for name, text in REPEATS:
        repeated = getattr(row, name)
        if repeated is not None:
            cells.append((text(row, board.scoring), repeated.mean if name == "nested" else repeated.cv[0]))
        elif any(getattr(other, name) for other in board.rows):
            cells.append(_missing())
    if test is None:
        cells += [_missing()] * 5
    else:
        cells += [
            (f"{100 * test.accuracy:.1f}", test.accuracy),
            (_range(test.accuracy, test.interval, span), test.interval[0]),
            (f"{100 * test.balanced_accuracy:.1f}", test.balanced_accuracy),
            (f"{100 * test.macro_f1:.1f}", test.macro_f1),
            (f"{test.log_loss:.3f}", test.log_loss) if test.log_loss is not None else _missing(),
        ]
    return [*cells, (seconds(row.fit_seconds), row.fit_seconds), (str(row.trials), float(row.trials))]


def _range(value: float, interval: Interval, span: Interval) -> str:
    def place(share: float) -> float:
        return min(100.0, max(0.0, 100 * (share - span[0]) / max(span[1] - span[0], 1e-9)))

    left, right = place(interval[0]), place(interval[1])
    text = f"{100 * value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
    return f'<span class="range tip" data-tip="{text}"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i><b style="left:{place(value):.1f}%"></b></span>'


def differences(board: Leaderboard) -> str:
    """Return the paired comparisons of every row with the best one; empty without a verdict."""
    if board.verdict is None:
        return ""
    rows = []
    for item in board.verdict.differences:
        if item.key == board.best.key:
            continue
        cells: list[Cell] = [
            (escape(item.key), None),
            (_signed(item.difference, item.interval), item.difference),
            (_p(item.p_value), item.p_value),
        ]
        for paired in (item.test, item.folds):
            cells += (
                [(_signed(paired.difference, paired.interval), paired.difference), (_p(paired.p_value), paired.p_value)]
                if paired
                else [_missing(), _missing()]
            )
        rows.append(("group" if item.no_evidence else "", cells))
    headers = [
        "Best minus this row, points",
        "Out of fold",
        "p, all pairs",
        "Test images",
        "McNemar, Holm",
        "Folds",
        "Corrected t, Holm",
    ]
    return table(headers, rows) if rows else ""


def searches(material: Material) -> str:
    """Return what each search tried and found."""
    rows = []
    for row in material.leaderboard.rows:
        trials = material.trials.get(row.key)
        if not trials or len(trials) < 2:
            continue
        failed = sum(trial["status"] == "failed" for trial in trials)
        stopped = sum(trial["status"] == "stopped" for trial in trials)
        params = ", ".join(f"{name} = {_short(value)}" for name, value in row.params.items())
        spent = row.search_seconds or 0.0
        cells: list[Cell] = [
            (
                f'<span class="tip" data-tip="{escape(row.key)}">{escape(row.head.replace("_", " "))}</span><br><span class="quiet">{escape(params)}</span>',
                None,
            ),
            (f"{100 * row.cv_mean:.1f}", row.cv_mean),
            (str(len(trials)), float(len(trials))),
            (f"{stopped} / {failed}", float(stopped + failed)),
            (seconds(spent), spent),
        ]
        rows.append(("", cells))
    return table(["Search, best parameters", "CV", "Trials", "Stopped / failed", "Seconds"], rows)


def classes(rows: Sequence[ClassScores]) -> str:
    """Return precision, recall and F1 class by class."""
    made = []
    for row in rows:
        cells: list[Cell] = [
            (escape(row.label), None),
            (f"{row.support:,}", float(row.support)),
            (f"{100 * row.precision:.1f}", row.precision),
            (f"{100 * row.recall:.1f}", row.recall),
            (f"{100 * row.interval[0]:.0f}–{100 * row.interval[1]:.0f}", row.interval[0]),
            (f"{100 * row.f1:.1f}", row.f1),
        ]
        made.append(("", cells))
    return table(["Class", "Images", "Precision", "Recall", "95 %", "F1"], made)


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
    sides = [f"{name}, {where}" for where in ("out of fold", "test") for name in ("Accuracy", "balanced", "macro F1")]
    return table(["Treatment", *sides], rows)


def calibration(rows: Sequence[tuple[LeaderboardRow, Calibration]]) -> str:
    """Return how far each row's probabilities can be believed, on the test images."""
    made = []
    for row, found in rows:
        cells: list[Cell] = [
            (f'{escape(row.head.replace("_", " "))}<br><span class="quiet">{escape(row.embedding)}</span>', None),
            (f"{100 * found.ece:.1f}", found.ece),
            (f"{found.brier:.3f}", found.brier),
            (f"{found.log_loss:.3f}", found.log_loss),
        ]
        made.append(("", cells))
    return table(["Row", "Calibration error, %", "Brier", "Log loss"], made)


def reproduce(material: Material) -> str:
    """Return what is needed to make the experiment again."""
    provenance = dict(material.leaderboard.provenance)
    provenance.pop("notes", None)
    config = provenance.pop("config", None)
    config_file = Artifacts(material.output).config
    command = provenance.pop("command", None) or f"manyheads features {config_file}\nmanyheads heads {config_file}"
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


def _signed(value: float, interval: Interval) -> str:
    low, high = (f"{100 * end:+.1f}" if abs(end) < 1e6 else "∞" for end in interval)
    return f"{100 * value:+.1f} <span class='quiet'>[{low}, {high}]</span>"


def _p(value: float) -> str:
    return "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
