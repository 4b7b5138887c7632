"""The page's sections: each says which targets it serves, which charts it has, and what its template is given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline.data.index import LABEL
from pipeline.data.targets import TARGETS, Classification, MultiLabel, Regression
from pipeline.evaluation import (
    Calibration,
    Interval,
    Predictions,
    confusion_matrix,
    measure_calibration,
    metrics_for,
    per_class,
)
from pipeline.evaluation.domains import Domains
from pipeline.evaluation.leaderboard.imbalance import effects
from pipeline.evaluation.leaderboard.table import REPEATS, Leaderboard
from pipeline.experiment import from_plain
from pipeline.report import charts, confusion, first, layers, numbers, per_label
from pipeline.report.drawing import CATEGORIES, Chart
from pipeline.report.material import CURVE_HEAD, Material
from pipeline.report.names import shorten_all
from pipeline.report.pictures import gallery

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

Shown = tuple[Mapping[str, Chart], Mapping[str, Any]]
"""A section's charts by name, drawn on the page and as `plots/NAME.png`, and what else its template is given."""


@dataclass(frozen=True)
class Section:
    """One part of the page: `show` returns what its template is given, or None where there is nothing to show."""

    name: str
    """Its anchor, and its template NAME.html."""
    heading: str
    """Its name in the navigation; the top of the page has none."""
    targets: tuple[str, ...]
    """The kinds of target it serves; pages of others do not have it."""
    show: Callable[[Material], Shown | None]


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


def shown(material: Material) -> dict[Section, Shown]:
    """Return the sections of an experiment's page, from top to bottom, with what they show."""
    found = [(section, section.show(material)) for section in SECTIONS if material.target in section.targets]
    return {section: part for section, part in found if part is not None}


def _leaderboard(material: Material) -> Shown:
    board = material.leaderboard
    # What to use, ~ and ± are said above the table, where the page has a blue edge for the sign.
    above = ("Use ", "~", "±")
    asked = [(name, text) for name, text in REPEATS if any(getattr(row, name) for row in board.rows)]
    notes = [note for note in board.notes() if not note.startswith(above)]
    columns = [metric for metric in metrics_for(board.target) if metric.column and metric is not board.told_by]
    return {}, {"notes": notes, "asked": asked, "ends": _ends(board), "columns": columns}


def _ends(board: Leaderboard) -> Interval:
    """Return the scores at the ends of the bars in the leaderboard."""
    spans = [row.test.of(board.told_by)[1] for row in board.rows if row.test]
    lows, highs = [span[0] for span in spans if span], [span[1] for span in spans if span]
    if not lows:
        return (0.0, 1.0)
    low, high = min(lows), max(highs)
    # A hopeless row's interval would squeeze all others into a corner.
    if board.told_by.lower_is_better:
        return (low, min(high, 4 * median(highs) - 3 * low))
    return (max(low, 4 * median(lows) - 3 * high), high)


def _difference(material: Material) -> Shown:
    board, verdict = material.leaderboard, material.leaderboard.verdict
    group = verdict.no_evidence if verdict else (board.best.key,)
    found = {"leaderboard": charts.score_chart(board.ranked, group, board.scoring, board.told_by)}
    if verdict and len(verdict.differences) > 1:
        rows = {row.key: row for row in board.rows}
        found["differences"] = charts.difference_chart(verdict.differences, rows, board.scoring)
    return found, {}


def _tuning(material: Material) -> Shown | None:
    tuning = material.leaderboard.provenance.get("config", {}).get("tuning", {})
    trials = material.trials
    found = [(row, trials[row.key]) for row in material.leaderboard.rows if len(trials.get(row.key, ())) > 1]
    if not found:
        return None
    several = len({row.embedding for row, _ in found}) > 1
    drawn = {
        row.key.replace("-penultimate/", "/") if several else row.head: trials for row, trials in found[:MOST_SEARCHES]
    }
    ended = [Counter(trial["status"] for trial in trials) for _, trials in found]
    searches = [
        (row, len(trials), count["stopped"], count["failed"]) for (row, trials), count in zip(found, ended, strict=True)
    ]
    chart = charts.tuning_chart(drawn, material.leaderboard.scoring)
    return {"tuning": chart}, {"tuning": tuning, "searches": searches, "most": MOST_SEARCHES}


def _classes(material: Material) -> Shown | None:
    best = material.best
    if best is None:
        return None
    rows = per_class(best.test)
    # A class that is neither among the test images nor among the answers has no F1, and is not the worst.
    worst = sorted(rows, key=lambda row: (not row.support + row.predicted, row.f1))[:WORST_CLASSES]
    matrix = confusion_matrix(best.test)
    confused = confusion.largest(matrix, best.classes)
    return {"confusion": confusion.confusion_chart(matrix, best.classes)}, {
        "left_out": confusion.left_out(matrix),
        "wide": len(matrix) > confusion.MOST_SMALL,
        "confused": confused[: confusion.MOST_LISTED],
        "confusions": len(confused),
        "rows": rows,
        "worst": worst if len(rows) > MOST_CLASSES else None,
        "imbalance": effects(material.leaderboard, best),
    }


def _calibration(part: Predictions | None) -> Calibration | None:
    if part is None or part.probabilities is None or len(part.classes) < 2:
        return None
    return measure_calibration(part.probabilities, part.y_true, units=part.units)


def _reliability(material: Material) -> Shown | None:
    best = material.best
    on_test = _calibration(best.test) if best else None
    if best is None or on_test is None:
        return None
    predicted = [(row, material.predictions.get(row.key)) for row in material.leaderboard.rows]
    measured = [(row, _calibration(found.test)) for row, found in predicted if found]
    chart = charts.reliability_chart(_calibration(best.out_of_fold), on_test)
    return {"reliability": chart}, {"measured": [(row, found) for row, found in measured if found]}


def _growth(material: Material) -> Shown | None:
    rows, told, found = material.leaderboard.rows, material.leaderboard.told_by, dict[str, Chart]()
    if material.curve is not None and len(material.curve.points) > 1:
        found["learning_curve"] = charts.learning_chart(material.curve, CURVE_HEAD.name)
    shown, unpriced = charts.priced(rows, told)
    if shown:
        found["cost"] = charts.cost_chart(rows, max(row.test.n for row in shown if row.test), told)
    return (found, {"curve": material.curve, "unpriced": unpriced}) if found else None


def _map(material: Material) -> Shown | None:
    """Give the map of the embedding; what the page's script needs to show the image at a dot is the page's, see `browse`."""
    space, index, kinds = material.map, material.index, material.kinds
    if space is None or index is None or kinds is None:
        return None
    first = [material.codes[path][0] for path in index.paths[space.rows].tolist()]
    chips = list(zip(kinds.classes, shorten_all(kinds.classes, CHIP), strict=True))
    return {"map": charts.map_chart(space, first)}, {
        "space": space,
        "total": len(index),
        "chips": chips,
        "colours": len(CATEGORIES),
    }


def _mistakes(material: Material) -> Shown | None:
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
    return {}, {"found": found, "known": p is not None, "wrong": len(wrong), "total": len(sure), "pictures": pictures}


def _label_issues(material: Material) -> Shown | None:
    """Give training images whose label the head does not believe, and on how many of all it is right."""
    issues, best = material.label_issues, material.best
    shown = issues.found[:MOST_PICTURES]
    right = None if best is None or best.out_of_fold is None else float(best.out_of_fold.correct.mean())
    pictures = gallery(material.index, [item.path for item in shown])
    return ({}, {"issues": issues, "shown": shown, "right": right, "pictures": pictures}) if shown else None


def _near_duplicates(material: Material) -> Shown | None:
    """Give pairs of images that are nearly the same, those across splits first."""
    found = material.findings.near_duplicates
    shown = found[:MOST_PAIRS]
    pictures = gallery(material.index, [path for pair in shown for path in (pair.path, pair.other)])
    across = sum(pair.across for pair in found)
    return ({}, {"total": len(found), "across": across, "shown": shown, "pictures": pictures}) if shown else None


def _outliers(material: Material) -> Shown | None:
    """Give images that are far from every other."""
    found = material.findings.outliers
    shown = found[: MOST_PICTURES // 2]
    pictures = gallery(material.index, [item.path for item in shown])
    return ({}, {"total": len(found), "shown": shown, "pictures": pictures}) if shown else None


def _advice(material: Material) -> Shown | None:
    """Give what to do next, where `manyheads advise` was asked."""
    return None if material.advice is None else ({}, {"advice": material.advice})


def _few_shot(material: Material) -> Shown | None:
    result = material.few_shot
    if result is None:
        return None
    return {"few_shot": charts.few_shot_chart(result)}, {"result": result}


def _unknown(material: Material) -> Shown | None:
    """Give how well images of classes that were left out are told from others, by the best row."""
    board = material.leaderboard
    record = board.provenance.get("unknown", {}).get(board.best.key)
    return None if record is None else ({}, {"record": {"sets": None, **record}, "names": list(record["auroc"])})


def _domains(material: Material) -> Shown | None:
    """Give how far domains are apart, how the best row does in each, and what adapting it brought."""
    record = material.leaderboard.provenance.get("domains")
    if record is None:
        return None
    found: Domains = from_plain(Domains, record)
    classes = [(each.name, one) for each in found.each for one in each.classes]
    classes.sort(key=lambda item: item[1].label)
    return {}, {"domains": found, "new": [each.name for each in found.each if each.new], "all": classes}


def _nothing_more(material: Material) -> Shown:
    return {}, {}


EVERY = tuple(TARGETS)
CLASSES = (Classification.kind,)

SECTIONS = (
    Section("header", "", EVERY, first.show),
    Section("leaderboard", "Leaderboard", EVERY, _leaderboard),
    Section("difference", "Difference", EVERY, _difference),
    Section("layers", "Layers", CLASSES, layers.show),
    Section("tuning", "Tuning", EVERY, _tuning),
    Section("classes", "Classes", CLASSES, _classes),
    Section("calibration", "Calibration", CLASSES, _reliability),
    Section("numbers", "Predicted and true", (Regression.kind,), numbers.show),
    Section("per-label", "Label by label", (MultiLabel.kind,), per_label.show),
    Section("cost", "Labels and cost", EVERY, _growth),
    Section("advice", "Fine-tune?", CLASSES, _advice),
    Section("few-shot", "Few examples", CLASSES, _few_shot),
    Section("domains", "Domains", CLASSES, _domains),
    Section("unknown", "Unknown", CLASSES, _unknown),
    Section("map", "Images", EVERY, _map),
    Section("mistakes", "Mistakes", CLASSES, _mistakes),
    Section("labels", "Labels", CLASSES, _label_issues),
    Section("near-duplicates", "Near-duplicates", EVERY, _near_duplicates),
    Section("outliers", "Outliers", EVERY, _outliers),
    Section("reproduce", "Reproduce", EVERY, _nothing_more),
)
"""The page from top to bottom. One more section is a row, its template, and the function that says what it shows."""
