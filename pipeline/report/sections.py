"""The page's sections, from top to bottom: each turns material into HTML and is left out where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipeline.evaluation import (
    ACCURACY,
    Calibration,
    Interval,
    Metric,
    Predictions,
    Scores,
    confusion_matrix,
    measure_calibration,
    per_class,
)
from pipeline.evaluation.leaderboard.imbalance import effects
from pipeline.evaluation.leaderboard.rows import LeaderboardRow, Verdict
from pipeline.evaluation.leaderboard.table import Leaderboard, seconds
from pipeline.report import charts, confusion, tables
from pipeline.report.drawing import CATEGORIES, Chart, to_svg
from pipeline.report.galleries import label_issues, mistakes, near_duplicates, outliers, space_map
from pipeline.report.material import CURVE_HEAD, Material

MOST_SEARCHES = len(CATEGORIES)
"""Searches in the tuning chart: each has a colour of its own."""
MOST_NAMED = 3
"""Rows that a caption names; of more it says how many."""

CHARTS = {
    "leaderboard": "Test accuracy and cross-validation of every row",
    "differences": "How far every row lies behind the best",
    "tuning": "Best score so far, trial by trial",
    "confusion": "Confusion matrix",
    "reliability": "How often predictions are right against how sure they are",
    "learning_curve": "Accuracy against the number of labelled images",
    "cost": "Test accuracy against time per image",
    "map": "Map of the images; arrow keys go from dot to dot",
}
"""What a screen reader calls each chart."""


@dataclass(frozen=True)
class Section:
    """One section: its anchor, its name in the navigation, its HTML."""

    name: str
    title: str
    body: str


def title(material: Material) -> str:
    """Return what the page is about: the data set's name, as far as the config tells it."""
    dataset = material.leaderboard.provenance.get("config", {}).get("dataset", {})
    name = dataset.get("name") or (Path(dataset["path"]).name if dataset.get("path") else dataset.get("source"))
    return str(name or material.output.resolve().name)


def charts_of(material: Material) -> dict[str, Chart]:
    """Return every chart that the material has the numbers for, by name; the page and the PNG files share them."""
    board, best = material.leaderboard, material.best
    group = board.verdict.no_evidence if board.verdict else (board.best.key,)
    found: dict[str, Chart] = {"leaderboard": charts.accuracy_chart(board.ranked, group, board.scoring)}
    if board.verdict and len(board.verdict.differences) > 1:
        rows = {row.key: row for row in board.rows}
        found["differences"] = charts.difference_chart(board.verdict.differences, rows, board.scoring)
    searches = {row.key: material.trials[row.key] for row in _searched(material)}
    if searches:
        several = len({key.split("/")[0] for key in searches}) > 1
        named = {
            key.replace("-penultimate/", "/") if several else key.split("/")[-1]: searches[key]
            for key in list(searches)[:MOST_SEARCHES]
        }
        found["tuning"] = charts.tuning_chart(named, board.scoring)
    if best is not None:
        matrix = confusion_matrix(best.test)
        found["confusion"] = confusion.confusion_chart(matrix, best.classes)
        on_test = _calibration(best.test)
        if on_test is not None:
            held_out = _calibration(best.out_of_fold) if best.out_of_fold else None
            found["reliability"] = charts.reliability_chart(held_out, on_test)
    if material.curve is not None and len(material.curve.points) > 1:
        found["learning_curve"] = charts.learning_chart(material.curve, CURVE_HEAD.name)
    if any(row.test for row in board.rows):
        found["cost"] = charts.cost_chart(board.rows, max(row.test.n for row in board.rows if row.test))
    if material.map is not None and material.index is not None:
        labels = material.index.labels[material.map.rows].astype(str).tolist()
        found["map"] = charts.map_chart(material.map, labels, material.index.classes)
    return found


def _searched(material: Material) -> list[LeaderboardRow]:
    return [row for row in material.leaderboard.rows if len(material.trials.get(row.key, ())) > 1]


def make(material: Material) -> list[Section]:
    """Return the sections that have something to show."""
    names = (
        CHARTS if material.leaderboard.metric is ACCURACY else {**CHARTS, "leaderboard": "Test accuracy of every row"}
    )
    drawn = {name: to_svg(chart, name, names[name]) for name, chart in charts_of(material).items()}
    makers: tuple[tuple[str, str, Callable[[Material, Mapping[str, str]], str]], ...] = (
        ("leaderboard", "Leaderboard", _leaderboard),
        ("difference", "Difference", _difference),
        ("tuning", "Tuning", _tuning),
        ("classes", "Classes", _classes),
        ("calibration", "Calibration", _calibration_section),
        ("cost", "Labels and cost", _growth),
        ("map", "Map", lambda material, drawn: space_map(material, drawn.get("map"))),
        ("mistakes", "Mistakes", lambda material, _: mistakes(material)),
        ("labels", "Labels", lambda material, _: label_issues(material)),
        ("near-duplicates", "Near-duplicates", lambda material, _: near_duplicates(material)),
        ("outliers", "Outliers", lambda material, _: outliers(material)),
        ("reproduce", "Reproduce", lambda material, _: tables.reproduce(material)),
    )
    made = [Section(name, text, body) for name, text, maker in makers if (body := maker(material, drawn))]
    return made


def header(material: Material) -> str:
    """Return the top of the page: what was compared, and the four numbers to take home."""
    board = material.leaderboard
    best, verdict, images, metric = board.best, board.verdict, board.provenance.get("images", {}), board.metric
    parts = [f"{len(board.rows)} rows, each a head on an embedding"]
    if images:
        parts += [
            f"{images.get('train', 0):,} training and {images.get('test', 0):,} test images",
            f"{images.get('classes')} classes",
        ]
    parts.append(str(board.provenance.get("date", ""))[:10])
    tuned = "" if metric is ACCURACY else f" by {metric.title}"
    by = "cross-validation" if metric is ACCURACY else f"cross-validated {metric.title}"
    cards = [_card(f"Best by {by}", _name(best.head), f"on {best.embedding}", named=True)]
    if best.test:
        cards.append(_test_card(best.test, metric))
    if verdict:
        group = len(verdict.no_evidence)
        cards.append(
            _card(
                "No evidence of a difference",
                f"{group} <small>of {len(board.ranked)} rows</small>",
                f"may be as good as the best{tuned}",
            )
        )
        chosen = board.row(verdict.recommended)
        cards.append(_card("Recommended", _name(chosen.head), f"on {chosen.embedding}", named=True))
    warning = ""
    if best.untrained or best.baseline:
        kind = "an untrained backbone (random weights)" if best.untrained else "a baseline without any backbone"
        warning = f'<p class="callout warn">The best row uses {kind}: no trained backbone of this leaderboard does better on these images{tuned}.</p>'
    lead = " · ".join(escape(part) for part in parts if part)
    return f'<h1>{escape(title(material))}</h1><p class="lead">{lead}</p><div class="cards">{"".join(cards)}</div>{warning}'


def _test_card(test: Scores, metric: Metric) -> str:
    """Return the best row's test score in the score that was tuned; its accuracy where it gives no probabilities."""
    value, interval = test.of(metric)
    if value is None or interval is None:
        metric, value, interval = ACCURACY, test.accuracy, test.interval
    sign = -1.0 if metric.lower_is_better else 1.0
    percent = "" if metric.lower_is_better else " %"
    span = _span(metric, (sign * interval[0], sign * interval[1]))
    right = f"{test.correct:,} of {test.n:,} right"
    return _card(
        f"Its test {metric.title}{', lower is better' if metric.lower_is_better else ''}",
        f"{metric.text(sign * value)}{percent} <small>{span}</small>",
        f"{right}, 95 % interval" if metric is ACCURACY else f"95 % interval; {right}",
    )


def _span(metric: Metric, interval: Interval) -> str:
    """Write an interval of scores in words, the lower number first."""
    return metric.interval_text(interval).strip("[]").replace(", ", " to ")


def _card(label: str, value: str, more: str, named: bool = False) -> str:
    return f'<div class="card"><div class="label">{label}</div><div class="value{" name" if named else ""}">{value}</div><div class="more">{escape(more)}</div></div>'


def _name(head: str) -> str:
    return escape(head.replace("_", " "))


def _leaderboard(material: Material, drawn: Mapping[str, str]) -> str:
    board = material.leaderboard
    reason = f'<p class="callout">{_advice(board.verdict)}</p>' if board.verdict else ""
    order = (
        "cross-validation"
        if board.metric is ACCURACY
        else f"cross-validated {board.metric.title}{', the lowest first,' if board.metric.lower_is_better else ''}"
    )
    lines = "<br>".join(map(escape, board.warnings()))
    warning = f'<p class="callout warn">{lines}</p>' if lines else ""
    # What to use, ~ and ± are said above the table, where the page has a blue edge for the sign.
    notes = "".join(f"<li>{escape(note)}</li>" for note in board.notes() if not note.startswith(("Use ", "~", "±")))
    return (
        "<h2>Leaderboard</h2>"
        '<p class="quiet">Each row is a head, the classifier, fitted on an embedding, the numbers that a frozen network makes of an image. '
        f"Ordered by {order} on the training images; test images choose nothing. A blue edge marks rows with no evidence of a difference from the best (paired, out of fold, corrected for all pairs of rows). "
        "± is the standard deviation of the folds' scores: how they differ, and no interval of the score.</p>"
        f"{warning}{reason}{tables.leaderboard(board)}"
        f'<details><summary>How to read this</summary><ul class="quiet">{notes}</ul></details>'
    )


def _advice(verdict: Verdict) -> str:
    """Return what to use and why, what to use in bold."""
    said = f"Use {verdict.recommended}"
    return f"<b>{escape(said)}</b>{escape(verdict.advice.removeprefix(said))}"


def _difference(material: Material, drawn: Mapping[str, str]) -> str:
    board, metric = material.leaderboard, material.leaderboard.metric
    text = (
        f'<p class="quiet">All rows are compared on the same images{_compared_in(metric)}. An interval that reaches 0 means that the row may be as good as the best; '
        "intervals hold for all pairs of rows at once, so that the best of many is not taken for better than it is. "
        "Out of fold: every training image is judged by a head that was fitted without it. A triangle stands for a row too far left to be drawn."
        f"{_rows_left_out(len(board.ranked))}</p>"
    )
    same = metric is ACCURACY
    left = f"<h3>{'Accuracy' if same else 'Test accuracy'}</h3>{drawn['leaderboard']}"
    right = (
        f"<h3>Behind the best{'' if same else f' by {metric.title}'}, out of fold</h3>{drawn['differences']}"
        if "differences" in drawn
        else ""
    )
    table = tables.differences(board)
    more = f"<details><summary>Paired tests on test images and folds</summary>{table}</details>" if table else ""
    return f'<h2>Is the difference real?</h2>{text}<div class="two charts"><div>{left}</div><div>{right}</div></div>{_optimism(material)}{more}'


def _compared_in(metric: Metric) -> str:
    if metric is ACCURACY:
        return ""
    left = "; less is better, and left is worse" if metric.lower_is_better else ""
    return f" in {metric.title}, the score that was tuned{left}"


def _rows_left_out(count: int) -> str:
    if count <= charts.MOST_ROWS:
        return ""
    return f" Drawn are the {charts.MOST_ROWS} best rows of {count}, for want of room; the tables have all."


def _optimism(material: Material) -> str:
    verdict = material.leaderboard.verdict
    if verdict is None or verdict.optimism is None:
        return ""
    found, metric = verdict.optimism, material.leaderboard.metric
    named, percent = "" if metric is ACCURACY else f"{metric.title} ", "" if metric.lower_is_better else " %"
    text = (
        f"Picking the best of {found.candidates} rows: {named}{metric.text(found.apparent)}{percent} out of fold as measured, "
        f"about {metric.text(found.corrected)}{percent} ({_span(metric, found.interval)}) once the luck of having been picked is taken off."
    )
    return f'<p class="callout">{escape(text + _trial_luck(material.leaderboard, verdict))}</p>'


def _trial_luck(board: Leaderboard, verdict: Verdict) -> str:
    """Say what picking the best trial adds, and of how many trials that is known."""
    trials, finished = board.best.trials, verdict.finished_trials
    if trials == 1:
        return ""
    picking = f"picking the best of its {trials} trials adds"
    if verdict.trial_optimism is None:
        return "" if finished is None else f" What {picking} is not known, as only one was fitted on every fold."
    luck = f"about {board.metric.gap_text(verdict.trial_optimism).lstrip('+')} {board.metric.unit} of such luck"
    if finished is None or finished == trials:
        return f" {picking.capitalize()} {luck}."
    return f" {picking.capitalize()} at least {luck} (from the {finished} that were fitted on every fold)."


def _tuning(material: Material, drawn: Mapping[str, str]) -> str:
    if "tuning" not in drawn:
        return ""
    board = material.leaderboard
    tuning = board.provenance.get("config", {}).get("tuning", {})
    how = (
        f"Strategy {tuning.get('strategy')}, {tuning.get('folds')} folds, the same for every head; the first trial is the head's defaults."
        if tuning
        else ""
    )
    text = f"{how} Lines are the best so far, dots single trials; trials far below are cut off."
    if board.metric.lower_is_better:
        text += f" Less {board.metric.title} is better, and is further up."
    count = len(_searched(material))
    if count > MOST_SEARCHES:
        text += f" Drawn are the {MOST_SEARCHES} best searches of {count}, as many as there are colours to tell apart; the table has all."
    return f'<h2>Tuning</h2><p class="quiet">{escape(text)}</p><div class="two"><div>{drawn["tuning"]}</div><div>{tables.searches(material)}</div></div>'


def _classes(material: Material, drawn: Mapping[str, str]) -> str:
    best = material.best
    if best is None:
        return ""
    rows = per_class(best.test)
    text = (
        f"{material.leaderboard.best.key} on the test images. Rows of the matrix are true classes; blue is right, orange is wrong, "
        "and the stronger the colour, the larger the share of the class. Precision: of the images given this label, those that are it; "
        f"recall: of the images that are it, those given the label; F1 joins the two. "
        f"{confusion.left_out(confusion_matrix(best.test))}"
    )
    return (
        f'<h2>Class by class</h2><p class="quiet">{escape(text)}</p>'
        f'<div class="two"><div>{drawn["confusion"]}</div><div>{tables.classes(rows)}</div></div>{_imbalance(material)}'
    )


def _imbalance(material: Material) -> str:
    found = effects(material.leaderboard, material.best) if material.best else ()
    if not found:
        return ""
    text = (
        "The classes differ in size, so a head that leans to the large ones scores well on accuracy alone. Prior correction divides the "
        "calibrated probabilities by how frequent each class was in training; it needs no new fit, and is worth its loss in accuracy "
        "only where every class matters equally."
    )
    return f'<h3>Uneven classes</h3><p class="quiet">{text}</p>{tables.imbalance(found)}'


def _calibration(part: Predictions) -> Calibration | None:
    if part.probabilities is None or len(part.classes) < 2:
        return None
    return measure_calibration(part.probabilities, part.y_true, units=part.units)


def _calibration_section(material: Material, drawn: Mapping[str, str]) -> str:
    if "reliability" not in drawn:
        return ""
    rows = [
        (row, found)
        for row in material.leaderboard.rows
        if row.key in material.predictions and (found := _calibration(material.predictions[row.key].test))
    ]
    return (
        '<h2>Can its probabilities be believed?</h2><p class="quiet">A dot on the dashed line is right as often as it says. '
        "Probabilities were fitted on out-of-fold scores, never on test images. The chart is of the best row. Calibration error: how far "
        "sureness and being right lie apart on average; Brier score and log loss also punish what is wrong. Of all three less is better.</p>"
        f'<div class="two"><div>{drawn["reliability"]}</div><div>{tables.calibration(rows)}</div></div>'
    )


def _growth(material: Material, drawn: Mapping[str, str]) -> str:
    parts = []
    curve = material.curve
    if "learning_curve" in drawn and curve is not None:
        text = f"Measured with {CURVE_HEAD.name} on {material.embedding}, in each of five draws on another fifth of the training images, held out."
        if material.leaderboard.metric is not ACCURACY:
            text += f" It is of accuracy, not of the {material.leaderboard.metric.title} that was tuned."
        if curve.forecast:
            ahead = curve.forecast[0]
            text += (
                f" With twice your {ahead.size // 2:,} labelled training images, about {100 * ahead.predicted:.1f} % "
                f"({100 * ahead.interval[0]:.1f} to {100 * min(ahead.interval[1], 1):.1f}) is to be expected of {CURVE_HEAD.name} on {material.embedding}."
            )
        if curve.held_back:
            inside = sum(item.inside for item in curve.held_back)
            text += f" Tested: forecasts from smaller sizes alone held for {inside} of the {len(curve.held_back)} largest sizes."
        parts.append(
            f'<div><h3>Would more labels help?</h3>{drawn["learning_curve"]}<p class="quiet">{escape(text)}</p></div>'
        )
    if "cost" in drawn:
        best = material.leaderboard.best
        text = f"The dashed line joins rows that no other beats in both. The best row was fitted in {seconds(best.fit_seconds)} s. Squares are baselines. {_unpriced(material)}"
        parts.append(f'<div><h3>What does accuracy cost?</h3>{drawn["cost"]}<p class="quiet">{escape(text)}</p></div>')
    return f'<h2>Labels and cost</h2><div class="two charts">{"".join(parts)}</div>' if parts else ""


def _unpriced(material: Material) -> str:
    """Say which rows the cost chart leaves out and why."""
    found = charts.priced(material.leaderboard.rows)
    reasons = (
        (found.low, f"below {100 * found.floor:.0f} %, where they would squeeze all others"),
        (found.untimed, "without a measured time per image"),
        (found.untested, "without a test score"),
    )
    parts = [f"{_counted(rows)} {reason}" for rows, reason in reasons if rows]
    return f"Not drawn: {'; '.join(parts)}." if parts else ""


def _counted(rows: Sequence[LeaderboardRow]) -> str:
    names = f" ({', '.join(row.key for row in rows)})" if len(rows) <= MOST_NAMED else ""
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'}{names}"
