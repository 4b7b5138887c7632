"""The page's sections: the targets that each applies to, its charts, and the arguments of its macro in `templates/sections.html`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.classes import MultiLabel
from pipeline.data.index import LABEL
from pipeline.data.targets import LEVEL, TARGETS, Classification, Regression
from pipeline.errors import PipelineError
from pipeline.evaluation import Calibration, Interval, Predictions, measure_calibration
from pipeline.evaluation.domains import Domains
from pipeline.evaluation.intervals import share_interval
from pipeline.evaluation.leaderboard import Leaderboard, LeaderboardRow, Trials
from pipeline.evaluation.leaderboard.recommendation import effects
from pipeline.evaluation.metric import METRICS, metrics_for
from pipeline.evaluation.scoring import ClassScores, confusion_matrix, per_class
from pipeline.experiment import BUNDLE, Artifacts, from_plain, read_document
from pipeline.heads.layer_profile import gap, read_profiles, what_to_take
from pipeline.report import charts
from pipeline.report.drawing import CATEGORIES, Chart, shorten_all
from pipeline.report.material import CURVE_HEAD, Material
from pipeline.report.pictures import gallery, in_words

MOST_SEARCHES = len(CATEGORIES)
"""Most searches in the tuning chart, one for each colour."""
MOST_CLASSES = 25
"""Most classes or labels in a table that is not folded."""
WORST_CLASSES = 15
"""Classes shown above a folded table."""
MOST_LISTED = 12
"""Most confusions in the table next to the matrix."""
MOST_PICTURES = 24
MOST_PAIRS = 18
MOST_COLUMNS = 4
"""Most numbers with charts; the table has all."""
CHIP = 28
"""Most characters of a class name on the map's buttons."""
CARD = "MODEL_CARD.md"

Shown = tuple[Mapping[str, Chart], Mapping[str, Any]]
"""A section's charts by name, drawn on the page and as `plots/NAME.png`, and the other arguments of its macro."""


@dataclass(frozen=True)
class PageSection:
    """One part of the page: `show` returns its content, or None where there is nothing to show."""

    name: str
    """Its anchor; its macro is NAME_section."""
    heading: str
    """Its name in the navigation; '' for the top of the page."""
    targets: tuple[str, ...]
    """Kinds of target whose pages have it."""
    show: Callable[[Material], Shown | None]


def title(material: Material) -> str:
    """Return the page's title: the data set's name, and the label column's if the config names one."""
    dataset = material.leaderboard.provenance.get("config", {}).get("dataset", {})
    columns = [name for name in dataset.get("label_columns", ()) if name != LABEL]
    return ": ".join([name_of_data(material.leaderboard, material.output), *columns[:1]])


def name_of_data(board: Leaderboard, output: Path) -> str:
    """Return the data set's name from the config, or the output folder's name."""
    dataset = board.provenance.get("config", {}).get("dataset", {})
    name = dataset.get("name") or (Path(dataset["path"]).name if dataset.get("path") else dataset.get("source"))
    return str(name or output.resolve().name)


def shown(material: Material) -> dict[PageSection, Shown]:
    """Return the sections of an experiment's page and their content, from top to bottom."""
    found = {}
    for section in SECTIONS:
        part = section.show(material) if material.target in section.targets else None
        if part is not None:
            found[section] = part
    return found


def predict_command(output: Path, row: LeaderboardRow, best: LeaderboardRow) -> str:
    """Return the command that labels new images with a row."""
    folder = output if row.key == best.key or row.bundle is None else output / row.bundle
    return f"manyheads predict {quote(str(folder))} IMAGES --output labels.csv"


def cards(material: Material) -> dict[str, dict[str, Any]]:
    """Return the content of each bundle's model card by its path below the output folder; missing bundles have none."""
    board, kinds, found = material.leaderboard, material.kinds, dict[str, dict[str, Any]]()
    classes = () if kinds is None else kinds.classes
    counts = Counter(() if kinds is None else zip(kinds.labels.tolist(), kinds.splits.tolist(), strict=True))
    for row in board.rows:
        try:
            record = read_document(material.output / str(row.bundle) / "bundle.json", BUNDLE)
        except (PipelineError, OSError):
            continue
        said = material.predictions.get(row.key)
        found[f"{row.bundle}/{CARD}"] = {
            "row": row,
            "record": record,
            "spec": (record.get("embedding") or {}).get("spec", {}),
            "weakest": known_least(said.test)[:3] if said and board.target.exclusive else (),
            "counts": [
                (name, counts[name, "train"] + counts[name, "validation"], counts[name, "test"]) for name in classes
            ],
            "unknown": board.provenance.get("unknown", {}).get(row.key),
            "command": predict_command(material.output, row, board.best),
        }
    return found


def _first(material: Material) -> Shown:
    """Return the first screen: the recommended row, its test, whether a network helps, and next steps."""
    board, test = material.leaderboard, material.best.test if material.best else None
    row = board.recommended
    floor = next((one for one in board.ranked if one.baseline and one.test), None)
    differences = board.recommendation.differences if board.recommendation else ()
    return {}, {
        "row": row,
        "floor": None if row.baseline or row.untrained else floor,
        "ahead": any(floor is not None and one.key == floor.key and not one.no_evidence for one in differences),
        "command": predict_command(material.output, row, board.best),
        "place": quote(str(material.output)),
        "leaks": board.leaks.test if board.leaks else 0,
        "issues": material.label_issues,
        "curve": material.curve,
        "weakest": next(iter(known_least(test)), None) if test else None,
        "confused": largest(confusion_matrix(test), test.classes) if test and test.target.exclusive else (),
    }


def known_least(test: Predictions) -> list[ClassScores]:
    """Return the scores of classes, lowest recall first, or of labels, lowest average precision first; [] for numbers."""
    if test.target.kind == "regression" or (not test.target.exclusive and test.probabilities is None):
        return []
    found = [one for one in per_class(test) if one.support]
    exclusive = test.target.exclusive
    return sorted(found, key=lambda one: (one.recall if exclusive else one.average_precision, one.label))


def _leaderboard(material: Material) -> Shown:
    board = material.leaderboard
    # The page explains the recommendation, ~ (a blue edge here) and ± above the table.
    above = ("Use ", "~", "±")
    asked = [name for name in ("nested", "seeds") if any(getattr(row, name) for row in board.rows)]
    notes = [note for note in board.notes() if not note.startswith(above)]
    columns = [metric for metric in metrics_for(board.target) if metric.column and metric is not board.test_metric]
    return {}, {"notes": notes, "asked": asked, "ends": _ends(board), "columns": columns}


def _ends(board: Leaderboard) -> Interval:
    """Return the scores at both ends of the leaderboard's bars."""
    spans = np.array([span for row in board.rows if row.test and (span := row.test.of(board.test_metric)[1])])
    if not len(spans):
        return (0.0, 1.0)
    lows, highs = spans.T.tolist()
    low, high = min(lows), max(highs)
    # The interval of a very bad row would squeeze all others into a corner.
    if board.test_metric.lower_is_better:
        return (low, min(high, 4 * median(highs) - 3 * low))
    return (max(low, 4 * median(lows) - 3 * high), high)


def _difference(material: Material) -> Shown:
    board, recommendation = material.leaderboard, material.leaderboard.recommendation
    group = recommendation.no_evidence if recommendation else (board.best.key,)
    found = {
        "leaderboard": partial(
            charts.score_chart, rows=board.ranked, group=group, scoring=board.scoring, test_metric=board.test_metric
        )
    }
    if recommendation and len(recommendation.differences) > 1:
        rows = {row.key: row for row in board.rows}
        found["differences"] = partial(
            charts.difference_chart, differences=recommendation.differences, rows=rows, scoring=board.scoring
        )
    return found, {}


def _layers(material: Material) -> Shown | None:
    """Return a chart and a table for every network with a layer profile on the leaderboard's images."""
    tasks = {row.task for row in material.leaderboard.rows}
    found = [one for one in read_profiles(Artifacts(material.output).layers) or () if one.task in tasks]
    drawn = {
        f"layers-{number}" if number else "layers": partial(charts.layer_chart, found=one)
        for number, one in enumerate(found)
    }
    told = [(name, one, METRICS[one.metric], what_to_take(one)) for name, one in zip(drawn, found, strict=True)]
    return (drawn, {"profiles": told, "gap": gap}) if found else None


def _tuning(material: Material) -> Shown | None:
    trials = material.trials
    found = [(row, trials[row.key]) for row in material.leaderboard.rows if len(trials.get(row.key, ())) > 1]
    if not found:
        return None
    several, drawn, searches = len({row.embedding for row, _ in found}) > 1, dict[str, Trials](), []
    for row, made in found:
        ended = Counter(trial["status"] for trial in made)
        searches.append((row, len(made), ended["stopped"], ended["failed"]))
        if len(drawn) < MOST_SEARCHES:
            drawn[row.key.replace("-penultimate/", "/") if several else row.head] = made
    tuning = material.leaderboard.provenance.get("config", {}).get("tuning", {})
    chart = partial(charts.tuning_chart, searches=drawn, scoring=material.leaderboard.scoring)
    return {"tuning": chart}, {"tuning": tuning, "searches": searches, "most": MOST_SEARCHES}


@dataclass(frozen=True)
class Confusion:
    """How many images of one class, and which share of it, are predicted as another."""

    true: str
    said: str
    count: int
    share: float


def largest(matrix: NDArray[np.int64], classes: Sequence[str]) -> list[Confusion]:
    """Return the confusions of a matrix, int64 of shape (n, n), most frequent first."""
    wrong = matrix - np.diag(np.diag(matrix))
    places = np.argwhere(wrong)
    order = np.argsort(-wrong[wrong > 0], kind="stable")
    return [
        Confusion(classes[row], classes[column], int(wrong[row, column]), float(wrong[row, column] / matrix[row].sum()))
        for row, column in places[order].tolist()
    ]


def _classes(material: Material) -> Shown | None:
    best = material.best
    if best is None:
        return None
    rows, matrix = per_class(best.test), confusion_matrix(best.test)
    # A class neither among test images nor predictions has no F1 and comes last.
    worst = sorted(rows, key=lambda row: (not row.support + row.predicted, row.f1))[:WORST_CLASSES]
    confused = largest(matrix, best.classes)
    return {"confusion": partial(charts.confusion_chart, matrix=matrix, classes=best.classes)}, {
        "wide": len(matrix) > charts.MOST_SMALL,
        "confused": confused[:MOST_LISTED],
        "confusions": len(confused),
        "rows": rows,
        "worst": worst if len(rows) > MOST_CLASSES else None,
        "imbalance": effects(material.leaderboard, best),
    }


def _reliability(material: Material) -> Shown | None:
    def measured(part: Predictions | None) -> Calibration | None:
        if part is None or part.probabilities is None or len(part.classes) < 2:
            return None
        return measure_calibration(part.probabilities, part.y_true, units=part.units)

    best = material.best
    on_test = measured(best.test) if best else None
    if best is None or on_test is None:
        return None
    rows = []
    for row in material.leaderboard.rows:
        found = measured(material.predictions[row.key].test) if row.key in material.predictions else None
        if found is not None:
            rows.append((row, found))
    return {"reliability": partial(charts.reliability_chart, out_of_fold=measured(best.out_of_fold), test=on_test)}, {
        "measured": rows
    }


def _numbers(material: Material) -> Shown | None:
    """Return predicted and true numbers, coverage of intervals, and the images with the largest errors."""
    best = material.best
    if best is None or not isinstance(best.test.target, Regression):
        return None
    test, target, drawn, rows = best.test, best.test.target, dict[str, Chart](), []
    true, said = (part.reshape(len(test), target.width) for part in (test.y_true, test.y_pred))
    inside = target.inside(true, said)
    for place, name in enumerate(target.columns):
        span = share_interval(inside[:, place], test.units)
        outside = sum(bool(target.note(place, number)) for number in said[:, place].tolist())
        rows.append((name, target.half[place], float(inside[:, place].mean()), span, outside))
        if place < MOST_COLUMNS:
            drawn[f"predicted-{place}"] = partial(charts.numbers_chart, test=test, place=place, residuals=False)
            drawn[f"residuals-{place}"] = partial(charts.numbers_chart, test=test, place=place, residuals=True)
    off = (np.abs(said - true) / target.scale).max(axis=1)
    worst = np.argsort(-off, kind="stable")[:MOST_PICTURES]
    return drawn, {"rows": rows, "total": len(test), "level": LEVEL, **_told(material, test, worst)}


def _told(material: Material, test: Predictions, rows: NDArray[np.intp]) -> dict[str, Any]:
    """Return paths, predictions and true labels in words, and pictures, of some rows, intp of shape (k,)."""
    paths = np.asarray(test.paths)[rows].tolist()
    words = [[in_words(answer) for answer in part[rows]] for part in (test.predicted, test.labels)]
    return {"found": list(zip(paths, *words, strict=True)), "pictures": gallery(material.index, paths)}


def _labels(material: Material) -> Shown | None:
    """Return the scores of each of several labels, and the images with the largest errors."""
    best = material.best
    if best is None or best.test.probabilities is None or not isinstance(best.test.target, MultiLabel):
        return None
    test, rows = best.test, per_class(best.test)
    worst = sorted(rows, key=lambda row: 2.0 if row.average_precision is None else row.average_precision)
    missed = np.where(test.y_true != test.y_pred, np.abs(best.test.probabilities - test.y_true), 0.0).sum(axis=1)
    order = np.argsort(-missed, kind="stable")[: min(MOST_PICTURES, np.count_nonzero(missed))]
    return {}, {
        "rows": rows,
        "worst": worst[:WORST_CLASSES] if len(rows) > MOST_CLASSES else None,
        "wrong": int(np.sum(~test.correct)),
        "total": len(test),
        **_told(material, test, order),
    }


def _growth(material: Material) -> Shown | None:
    rows, test_metric, found = material.leaderboard.rows, material.leaderboard.test_metric, dict[str, Chart]()
    if material.curve is not None and len(material.curve.points) > 1:
        found["learning_curve"] = partial(charts.learning_chart, curve=material.curve, head=CURVE_HEAD.name)
    shown = charts.priced(rows, test_metric)
    if shown:
        found["cost"] = partial(
            charts.cost_chart, rows=rows, images=max(row.test.n for row in shown if row.test), test_metric=test_metric
        )
    return (found, {"curve": material.curve, "unpriced": len(rows) - len(shown)}) if found else None


def _advice(material: Material) -> Shown | None:
    return None if material.advice is None else ({}, {"advice": material.advice})


def _few_shot(material: Material) -> Shown | None:
    result = material.few_shot
    return None if result is None else ({"few_shot": partial(charts.few_shot_chart, result=result)}, {"result": result})


def _unknown(material: Material) -> Shown | None:
    """Return how well the best row detects images of left-out classes."""
    board = material.leaderboard
    record = board.provenance.get("unknown", {}).get(board.best.key)
    return None if record is None else ({}, {"record": {"sets": None, **record}, "names": list(record["auroc"])})


def _domains(material: Material) -> Shown | None:
    """Return the distances between domains, the best row's accuracy in each, and the effects of adaptation."""
    record = material.leaderboard.provenance.get("domains")
    if record is None:
        return None
    found: Domains = from_plain(Domains, record["more"])
    classes = [(each.name, one) for each in found.each for one in each.classes]
    classes.sort(key=lambda item: item[1].label)
    return {}, {"domains": found, "new": [each.name for each in found.each if each.new], "all": classes}


def _map(material: Material) -> Shown | None:
    """Return the map of the embedding; `pictures.carried` has the images at its dots for the page's script."""
    space, index, kinds = material.map, material.index, material.kinds
    if space is None or index is None or kinds is None:
        return None
    first = [material.codes[path][0] for path in index.paths[space.rows].tolist()]
    chips = list(zip(kinds.classes, shorten_all(kinds.classes, CHIP), strict=True))
    given = {"space": space, "total": len(index), "chips": chips, "colours": len(CATEGORIES)}
    return {"map": partial(charts.map_chart, space=space, codes=first)}, given


def _mistakes(material: Material) -> Shown | None:
    """Return the best row's most confident mistakes on test images, with explanations if there are any."""
    best = material.best
    if best is None:
        return None
    found, wrong = worst(best.test)
    why = {path: material.why[path] for path, said, *_ in found if material.why.get(path, {}).get("said") == said}
    given = {"found": found, "known": best.test.probabilities is not None, "wrong": wrong, "total": len(best.test)}
    return {}, {**given, "why": why, "pictures": gallery(material.index, [path for path, *_ in found])}


def worst(part: Predictions) -> tuple[list[tuple[str, str, str, float]], int]:
    """Return a head's most confident mistakes as (path, prediction, label, confidence), and the number of all mistakes."""
    p, wrong = part.probabilities, np.flatnonzero(~part.correct)
    sure, own = np.ones(len(part)), np.zeros(len(part))
    if p is not None:
        sure, own = p.max(axis=1), p[np.arange(len(part)), part.y_true].astype(np.float64)
    order = wrong[np.argsort(-(sure - own)[wrong], kind="stable")][:MOST_PICTURES]
    columns = (np.asarray(part.paths), part.predicted, part.labels, sure)
    return list(zip(*(column[order].tolist() for column in columns), strict=True)), len(wrong)


def _to_look_at(material: Material, found: Sequence[Any], most: int, **more: Any) -> Shown | None:
    """Return the first findings of an audit with their pictures."""
    shown = found[:most]
    paths = [path for item in shown for path in (item.path, getattr(item, "other", None)) if path]
    given = {"total": len(found), "shown": shown, "pictures": gallery(material.index, paths), **more}
    return ({}, given) if shown else None


def _label_issues(material: Material) -> Shown | None:
    """Return training images whose labels the head doubts, and its out-of-fold accuracy."""
    issues, best = material.label_issues, material.best
    right = None if best is None or best.out_of_fold is None else float(best.out_of_fold.correct.mean())
    return _to_look_at(material, issues.found, MOST_PICTURES, issues=issues, right=right)


def _near_duplicates(material: Material) -> Shown | None:
    """Return pairs of near-duplicates, those across splits first."""
    found = material.findings.near_duplicates
    return _to_look_at(material, found, MOST_PAIRS, across=sum(pair.across for pair in found))


def _outliers(material: Material) -> Shown | None:
    """Return images that are far from all others."""
    return _to_look_at(material, material.findings.outliers, MOST_PICTURES // 2)


EVERY = tuple(TARGETS)
CLASSES = (Classification.kind,)

SECTIONS = (
    PageSection("header", "", EVERY, _first),
    PageSection("leaderboard", "Leaderboard", EVERY, _leaderboard),
    PageSection("difference", "Difference", EVERY, _difference),
    PageSection("layers", "Layers", CLASSES, _layers),
    PageSection("tuning", "Tuning", EVERY, _tuning),
    PageSection("classes", "Classes", CLASSES, _classes),
    PageSection("calibration", "Calibration", CLASSES, _reliability),
    PageSection("numbers", "Predicted and true", (Regression.kind,), _numbers),
    PageSection("per-label", "Label by label", (MultiLabel.kind,), _labels),
    PageSection("cost", "Labels and cost", EVERY, _growth),
    PageSection("advice", "Fine-tune?", CLASSES, _advice),
    PageSection("few-shot", "Few examples", CLASSES, _few_shot),
    PageSection("domains", "Domains", CLASSES, _domains),
    PageSection("unknown", "Unknown", CLASSES, _unknown),
    PageSection("map", "Images", EVERY, _map),
    PageSection("mistakes", "Mistakes", CLASSES, _mistakes),
    PageSection("labels", "Labels", CLASSES, _label_issues),
    PageSection("near-duplicates", "Near-duplicates", EVERY, _near_duplicates),
    PageSection("outliers", "Outliers", EVERY, _outliers),
    PageSection("reproduce", "Reproduce", EVERY, lambda material: ({}, {})),
)
"""The page from top to bottom. To add a section: a row here, its macro, and its function."""
