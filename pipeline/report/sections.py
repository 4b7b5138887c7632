"""The page's sections, from top to bottom: each says what its template is given; one with nothing to show is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline.data.index import LABEL
from pipeline.evaluation import (
    Calibration,
    Interval,
    Predictions,
    class_columns,
    confusion_matrix,
    measure_calibration,
    per_class,
)
from pipeline.evaluation.leaderboard.imbalance import effects
from pipeline.evaluation.leaderboard.judge import Trials
from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import REPEATS, Leaderboard
from pipeline.report import charts, confusion
from pipeline.report.drawing import CATEGORIES, Chart
from pipeline.report.material import CURVE_HEAD, Material
from pipeline.report.names import shorten_all
from pipeline.report.pictures import gallery, sheet

MOST_SEARCHES = len(CATEGORIES)
"""Searches in the tuning chart: each has a colour of its own."""
MOST_CLASSES = 25
"""Classes up to which the table has them all at once."""
WORST_CLASSES = 15
"""Of more classes, those shown before the table is unfolded."""
MOST_PICTURES = 24
MOST_PAIRS = 18
CHIP = 28
"""Characters of a class on the map's buttons."""

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

Drawn = Mapping[str, str]
"""Charts as SVG elements, by name."""


def title(material: Material) -> str:
    """Return what the page is about: the data set's name, and the column's where the manifest names one."""
    dataset = material.leaderboard.provenance.get("config", {}).get("dataset", {})
    columns = [name for name in dataset.get("label_columns", ()) if name != LABEL]
    return ": ".join([name_of_data(material.leaderboard, material.output), *columns[:1]])


def name_of_data(board: Leaderboard, output: Path) -> str:
    """Return the data set's name, as far as the config tells it."""
    dataset = board.provenance.get("config", {}).get("dataset", {})
    name = dataset.get("name") or (Path(dataset["path"]).name if dataset.get("path") else dataset.get("source"))
    return str(name or output.resolve().name)


def charts_of(material: Material) -> dict[str, Chart]:
    """Return every chart that the material has the numbers for, by name; the page and the PNG files share them."""
    board, best = material.leaderboard, material.best
    group = board.verdict.no_evidence if board.verdict else (board.best.key,)
    found: dict[str, Chart] = {"leaderboard": charts.accuracy_chart(board.ranked, group, board.scoring)}
    if board.verdict and len(board.verdict.differences) > 1:
        rows = {row.key: row for row in board.rows}
        found["differences"] = charts.difference_chart(board.verdict.differences, rows, board.scoring)
    searched = _searched(material)
    if searched:
        several = len({row.embedding for row, _ in searched}) > 1
        named = {
            row.key.replace("-penultimate/", "/") if several else row.head: trials
            for row, trials in searched[:MOST_SEARCHES]
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
    tested = [row.test.n for row in board.rows if row.test]
    if tested:
        found["cost"] = charts.cost_chart(board.rows, max(tested))
    if material.map is not None and material.index is not None:
        labels = material.index.labels[material.map.rows].astype(str).tolist()
        found["map"] = charts.map_chart(material.map, labels, material.index.classes)
    return found


def _searched(material: Material) -> list[tuple[LeaderboardRow, Trials]]:
    trials = material.trials
    return [(row, trials[row.key]) for row in material.leaderboard.rows if len(trials.get(row.key, ())) > 1]


def _leaderboard(material: Material, drawn: Drawn) -> dict[str, Any]:
    board = material.leaderboard
    # What to use, ~ and ± are said above the table, where the page has a blue edge for the sign.
    above = ("Use ", "~", "±")
    asked = [(name, text) for name, text in REPEATS if any(getattr(row, name) for row in board.rows)]
    notes = [note for note in board.notes() if not note.startswith(above)]
    return {"notes": notes, "asked": asked, "ends": _ends(board)}


def _ends(board: Leaderboard) -> Interval:
    """Return the accuracies at the ends of the bars in the leaderboard."""
    tests = [row.test.interval for row in board.rows if row.test]
    if not tests:
        return (0.0, 1.0)
    # A hopeless row's interval would squeeze all others into a corner.
    lows, high = [low for low, _ in tests], max(high for _, high in tests)
    return (max(min(lows), 4 * median(lows) - 3 * high), high)


def _tuning(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    tuning = material.leaderboard.provenance.get("config", {}).get("tuning", {})
    searches = []
    for row, trials in _searched(material):
        ended = Counter(trial["status"] for trial in trials)
        searches.append((row, len(trials), ended["stopped"], ended["failed"]))
    return {"tuning": tuning, "searches": searches, "most": MOST_SEARCHES} if searches else None


def _classes(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    best = material.best
    if best is None:
        return None
    rows = per_class(best.test)
    # A class that is neither among the test images nor among the answers has no F1, and is not the worst.
    worst = sorted(rows, key=lambda row: (not row.support + row.predicted, row.f1))[:WORST_CLASSES]
    matrix = confusion_matrix(best.test)
    return {
        "left_out": confusion.left_out(matrix),
        "rows": rows,
        "worst": worst if len(rows) > MOST_CLASSES else None,
        "imbalance": effects(material.leaderboard, best),
    }


def _calibration(part: Predictions) -> Calibration | None:
    if part.probabilities is None or len(part.classes) < 2:
        return None
    return measure_calibration(part.probabilities, part.y_true, units=part.units)


def _reliability(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    predicted = [(row, material.predictions.get(row.key)) for row in material.leaderboard.rows]
    measured = [(row, _calibration(found.test)) for row, found in predicted if found]
    known = [(row, found) for row, found in measured if found]
    return {"measured": known} if "reliability" in drawn else None


def _growth(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    _, unpriced = charts.priced(material.leaderboard.rows)
    return {"curve": material.curve, "unpriced": unpriced} if {"cost", "learning_curve"} & {*drawn} else None


def _map(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    """Give the map of the embedding, with what the page's script needs to show the image at a dot."""
    space, index = material.map, material.index
    if "map" not in drawn or space is None or index is None:
        return None
    picture, columns = sheet(index, space.rows.tolist())
    data = {
        "paths": index.paths[space.rows].tolist(),
        "splits": index.splits[space.rows].tolist(),
        "codes": class_columns(index.labels[space.rows].astype(str), index.classes).tolist(),
        "classes": list(index.classes),
        "columns": columns,
        "sheet": picture,
    }
    chips = list(zip(index.classes, shorten_all(index.classes, CHIP), strict=True))
    return {"space": space, "total": len(index), "chips": chips, "colours": len(CATEGORIES), "data": data}


def _mistakes(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    """Give the test images on which the best row was most sure and wrong."""
    best = material.best
    if best is None:
        return None
    part, p = best.test, best.test.probabilities
    paths, wrong, sure, own = (
        np.asarray(part.paths),
        np.flatnonzero(~part.correct),
        np.ones(len(part)),
        np.zeros(len(part)),
    )
    if p is not None:
        sure, own = p.max(axis=1), p[np.arange(len(part)), part.y_true].astype(np.float64)
    order = wrong[np.argsort(-(sure - own)[wrong], kind="stable")][:MOST_PICTURES]
    columns = (paths, part.predicted, part.labels, sure)
    found = list(zip(*(column[order].tolist() for column in columns), strict=True))
    pictures = gallery(material.index, paths[order].tolist())
    return {"found": found, "known": p is not None, "wrong": len(wrong), "total": len(sure), "pictures": pictures}


def _label_issues(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    """Give training images whose label the head does not believe, and on how many of all it is right."""
    issues, best = material.findings.label_issues, material.best
    shown = issues.found[:MOST_PICTURES]
    right = None if best is None or best.out_of_fold is None else float(best.out_of_fold.correct.mean())
    pictures = gallery(material.index, [item.path for item in shown])
    return {"issues": issues, "shown": shown, "right": right, "pictures": pictures} if shown else None


def _near_duplicates(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    """Give pairs of images that are nearly the same, those across splits first."""
    found = material.findings.near_duplicates
    shown = found[:MOST_PAIRS]
    pictures = gallery(material.index, [path for pair in shown for path in (pair.path, pair.other)])
    across = sum(pair.across for pair in found)
    return {"total": len(found), "across": across, "shown": shown, "pictures": pictures} if shown else None


def _outliers(material: Material, drawn: Drawn) -> dict[str, Any] | None:
    """Give images that are far from every other."""
    found = material.findings.outliers
    shown = found[: MOST_PICTURES // 2]
    pictures = gallery(material.index, [item.path for item in shown])
    return {"total": len(found), "shown": shown, "pictures": pictures} if shown else None


def _nothing_more(material: Material, drawn: Drawn) -> dict[str, Any]:
    return {}


SECTIONS: Mapping[str, tuple[str, Callable[[Material, Drawn], dict[str, Any] | None]]] = {
    "leaderboard": ("Leaderboard", _leaderboard),
    "difference": ("Difference", _nothing_more),
    "tuning": ("Tuning", _tuning),
    "classes": ("Classes", _classes),
    "calibration": ("Calibration", _reliability),
    "cost": ("Labels and cost", _growth),
    "map": ("Map", _map),
    "mistakes": ("Mistakes", _mistakes),
    "labels": ("Labels", _label_issues),
    "near-duplicates": ("Near-duplicates", _near_duplicates),
    "outliers": ("Outliers", _outliers),
    "reproduce": ("Reproduce", _nothing_more),
}
"""By anchor and template: the name in the navigation, and what the template is given; None where there is nothing to show."""
