"""The page's sections, from top to bottom: each turns material into HTML and is left out where there is nothing to show."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pipeline.metrics import (
    Calibration,
    PredictionSet,
    class_columns,
    confusion_matrix,
    measure_calibration,
    per_class,
)
from pipeline.report import charts, tables
from pipeline.report.drawing import CATEGORIES, Chart, to_svg
from pipeline.report.galleries import copies, mistakes, strangers, suspects
from pipeline.report.imbalance import effects
from pipeline.report.leaderboard import seconds
from pipeline.report.material import CURVE_HEAD, Material
from pipeline.report.pictures import sheet

MOST_SEARCHES = 10
"""Searches in the tuning chart: the best rows'."""


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
    found: dict[str, Chart] = {"leaderboard": charts.accuracy_chart(board.rows, group, board.scoring)}
    if board.verdict and len(board.verdict.differences) > 1:
        found["differences"] = charts.difference_chart(board.verdict.differences, {row.key: row for row in board.rows})
    searches = {row.key: material.trials[row.key] for row in board.rows if len(material.trials.get(row.key, ())) > 1}
    if searches:
        several = len({key.split("/")[0] for key in searches}) > 1
        named = {
            key.replace("-penultimate/", "/") if several else key.split("/")[-1]: searches[key]
            for key in list(searches)[:MOST_SEARCHES]
        }
        found["tuning"] = charts.tuning_chart(named, board.scoring)
    if best is not None:
        matrix = confusion_matrix(best.test.y_true, best.test.y_pred, best.classes)
        found["confusion"] = charts.confusion_chart(matrix, best.classes)
        on_test = _calibration(best.test, best.classes)
        if on_test is not None:
            held_out = _calibration(best.out_of_fold, best.classes) if best.out_of_fold else None
            found["reliability"] = charts.reliability_chart(held_out, on_test)
    if material.curve is not None and len(material.curve.points) > 1:
        found["learning_curve"] = charts.learning_chart(material.curve, CURVE_HEAD)
    if any(row.test for row in board.rows):
        found["cost"] = charts.cost_chart(board.rows, max(row.test.n for row in board.rows if row.test))
    if material.map is not None and material.index is not None:
        labels = material.index.labels[material.map.rows].astype(str).tolist()
        found["map"] = charts.map_chart(material.map, labels, material.index.classes)
    return found


def make(material: Material) -> list[Section]:
    """Return the sections that have something to show."""
    drawn = {name: to_svg(chart, name) for name, chart in charts_of(material).items()}
    makers: tuple[tuple[str, str, Callable[[Material, Mapping[str, str]], str]], ...] = (
        ("leaderboard", "Leaderboard", _leaderboard),
        ("difference", "Difference", _difference),
        ("tuning", "Tuning", _tuning),
        ("classes", "Classes", _classes),
        ("calibration", "Calibration", _calibration_section),
        ("cost", "Labels and cost", _growth),
        ("map", "Map", _map),
        ("mistakes", "Mistakes", lambda material, _: mistakes(material)),
        ("labels", "Labels", lambda material, _: suspects(material)),
        ("copies", "Copies", lambda material, _: copies(material)),
        ("outliers", "Outliers", lambda material, _: strangers(material)),
        ("reproduce", "Reproduce", lambda material, _: tables.reproduce(material)),
    )
    made = [Section(name, text, body) for name, text, maker in makers if (body := maker(material, drawn))]
    return made


def header(material: Material) -> str:
    """Return the top of the page: what was compared, and the four numbers to take home."""
    board = material.leaderboard
    best, verdict, images = board.best, board.verdict, board.provenance.get("images", {})
    parts = [f"{len(board.rows)} rows"]
    if images:
        parts += [
            f"{images.get('train', 0):,} training and {images.get('test', 0):,} test images",
            f"{images.get('classes')} classes",
        ]
    parts.append(str(board.provenance.get("date", ""))[:10])
    cards = [_card("Best by cross-validation", _name(best.head), f"on {best.embedding}", named=True)]
    if best.test:
        low, high = best.test.interval
        cards.append(
            _card(
                "Its test accuracy",
                f"{100 * best.test.accuracy:.1f} % <small>{100 * low:.1f} to {100 * high:.1f}</small>",
                f"{best.test.correct:,} of {best.test.n:,} right, 95 % interval",
            )
        )
    if verdict:
        group = len(verdict.no_evidence)
        cards.append(
            _card(
                "No evidence of a difference",
                f"{group} <small>of {len(board.rows)} rows</small>",
                "may be as good as the best",
            )
        )
        chosen = board.row(verdict.recommended)
        cards.append(_card("Recommended", _name(chosen.head), f"on {chosen.embedding}", named=True))
    warning = ""
    if best.untrained or best.baseline:
        kind = "an untrained backbone (random weights)" if best.untrained else "a baseline without any backbone"
        warning = f'<p class="callout warn">The best row uses {kind}: no trained backbone of this leaderboard does better on these images.</p>'
    lead = " · ".join(escape(part) for part in parts if part)
    return f'<h1>{escape(title(material))}</h1><p class="lead">{lead}</p><div class="cards">{"".join(cards)}</div>{warning}'


def _card(label: str, value: str, more: str, named: bool = False) -> str:
    return f'<div class="card"><div class="label">{label}</div><div class="value{" name" if named else ""}">{value}</div><div class="more">{escape(more)}</div></div>'


def _name(head: str) -> str:
    return escape(head.replace("_", " "))


def _leaderboard(material: Material, drawn: Mapping[str, str]) -> str:
    board = material.leaderboard
    reason = (
        f'<p class="callout"><b>Recommended: {escape(board.verdict.recommended)}.</b> {escape(board.verdict.reason)}</p>'
        if board.verdict
        else ""
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in board.notes() if not note.startswith("Recommended"))
    return (
        "<h2>Leaderboard</h2>"
        '<p class="quiet">Ordered by cross-validation; test images choose nothing. A blue edge marks rows with no evidence of a difference from the best.</p>'
        f'{reason}<div class="scroll">{tables.leaderboard(board)}</div>'
        f'<details><summary>How to read this</summary><ul class="quiet">{notes}</ul></details>'
    )


def _difference(material: Material, drawn: Mapping[str, str]) -> str:
    board = material.leaderboard
    text = (
        '<p class="quiet">All rows are compared on the same images. An interval that reaches 0 means that the row may be as good as the best; '
        "intervals hold for all pairs of rows at once, so that the best of many is not taken for better than it is.</p>"
    )
    left = f"<h3>Accuracy</h3>{drawn['leaderboard']}"
    right = f"<h3>Behind the best, out of fold</h3>{drawn['differences']}" if "differences" in drawn else ""
    table = tables.differences(board)
    more = (
        f'<details><summary>Paired tests on test images and folds</summary><div class="scroll">{table}</div></details>'
        if table
        else ""
    )
    return f'<h2>Is the difference real?</h2>{text}<div class="two"><div>{left}</div><div>{right}</div></div>{_optimism(material)}{more}'


def _optimism(material: Material) -> str:
    verdict = material.leaderboard.verdict
    if verdict is None or verdict.optimism is None:
        return ""
    found = verdict.optimism
    text = (
        f"Picking the best of {found.candidates} rows: {100 * found.apparent:.1f} % out of fold as measured, about {100 * found.corrected:.1f} % "
        f"({100 * found.interval[0]:.1f} to {100 * found.interval[1]:.1f}) once the luck of having been picked is taken off."
    )
    if verdict.trial_optimism is not None:
        text += f" Picking the best of its {material.leaderboard.best.trials} trials adds about {100 * verdict.trial_optimism:.1f} points of such luck."
    return f'<p class="callout">{escape(text)}</p>'


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
    return f'<h2>Tuning</h2><p class="quiet">{escape(how)} Lines are the best so far, dots single trials.</p><div class="two"><div>{drawn["tuning"]}</div><div class="scroll">{tables.searches(material)}</div></div>'


def _classes(material: Material, drawn: Mapping[str, str]) -> str:
    best = material.best
    if best is None:
        return ""
    rows = per_class(best.test.y_true, best.test.y_pred, best.classes)
    return (
        f'<h2>Class by class</h2><p class="quiet">{escape(material.leaderboard.best.key)} on the test images. Rows of the matrix are true classes; blue is right, orange is wrong.</p>'
        f'<div class="two"><div>{drawn["confusion"]}</div><div class="scroll">{tables.classes(rows)}</div></div>{_imbalance(material)}'
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
    return f'<h3>Uneven classes</h3><p class="quiet">{text}</p><div class="scroll">{tables.imbalance(found)}</div>'


def _calibration(part: PredictionSet, classes: tuple[str, ...]) -> Calibration | None:
    if part.probabilities is None or len(classes) < 2:
        return None
    y = class_columns(part.y_true, classes)
    known = y >= 0
    return measure_calibration(part.probabilities[known], y[known]) if known.any() else None


def _calibration_section(material: Material, drawn: Mapping[str, str]) -> str:
    if "reliability" not in drawn:
        return ""
    rows = [
        (row, found)
        for row in material.leaderboard.rows
        if row.key in material.predictions
        and (found := _calibration(material.predictions[row.key].test, material.predictions[row.key].classes))
    ]
    return (
        '<h2>Can its probabilities be believed?</h2><p class="quiet">A dot on the dashed line is right as often as it says. '
        "Probabilities were fitted on out-of-fold scores, never on test images.</p>"
        f'<div class="two"><div>{drawn["reliability"]}</div><div class="scroll">{tables.calibration(rows)}</div></div>'
    )


def _growth(material: Material, drawn: Mapping[str, str]) -> str:
    parts = []
    curve = material.curve
    if "learning_curve" in drawn and curve is not None:
        text = f"Measured with {CURVE_HEAD}, in each of five draws on another fifth of the training images, held out."
        if curve.forecast:
            ahead = curve.forecast[0]
            text += f" With twice the labels, {ahead.size:,}, about {100 * ahead.predicted:.1f} % ({100 * ahead.interval[0]:.1f} to {100 * min(ahead.interval[1], 1):.1f}) is to be expected."
        if curve.held_back:
            inside = sum(item.inside for item in curve.held_back)
            text += f" Tested: forecasts from smaller sizes alone held for {inside} of the {len(curve.held_back)} largest sizes."
        parts.append(
            f'<div><h3>Would more labels help?</h3>{drawn["learning_curve"]}<p class="quiet">{escape(text)}</p></div>'
        )
    if "cost" in drawn:
        best = material.leaderboard.best
        text = f"The dashed line joins rows that none beats in both. The best row was fitted in {seconds(best.fit_seconds)} s. Squares are baselines."
        parts.append(f'<div><h3>What does accuracy cost?</h3>{drawn["cost"]}<p class="quiet">{escape(text)}</p></div>')
    return f'<h2>Labels and cost</h2><div class="two">{"".join(parts)}</div>' if parts else ""


def _map(material: Material, drawn: Mapping[str, str]) -> str:
    space, index = material.map, material.index
    if "map" not in drawn or space is None or index is None:
        return ""
    picture, columns = sheet(index, space.rows.tolist())
    labels = index.labels[space.rows].astype(str)
    data = {
        "paths": index.paths[space.rows].tolist(),
        "splits": index.splits[space.rows].tolist(),
        "codes": class_columns(labels, index.classes).tolist(),
        "classes": list(index.classes),
        "columns": columns,
        "sheet": picture,
    }
    chips = "".join(
        f'<button aria-pressed="false"><i style="background:var(--c{number % len(CATEGORIES)})"></i>{escape(label)}</button>'
        for number, label in enumerate(index.classes)
    )
    total = (
        f"{len(space.rows):,} of {len(index):,} images"
        if len(space.rows) < len(index)
        else f"all {len(index):,} images"
    )
    return (
        f'<h2>Map of the embedding</h2><p class="quiet">{escape(material.embedding or "")}, {space.method} of {total}. Point at a dot to see its image; choose a class to see it alone.</p>'
        f'<div class="chips" id="map-classes">{chips}</div><div class="map">{drawn["map"]}</div>'
        f'<script type="application/json" id="map-data">{_json(data)}</script>'
    )


def _json(value: object) -> str:
    """Return JSON that cannot end its script element."""
    return (
        json.dumps(value, ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
