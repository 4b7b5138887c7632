"""The first screen: what to use, how sure that is, whether a network helps, and what to do next, with links to what shows why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from pipeline.evaluation import Predictions, confusion_matrix, per_class
from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.scoring import ClassScores
from pipeline.report.confusion import largest
from pipeline.report.drawing import Chart
from pipeline.report.material import Material
from pipeline.report.per_label import LabelScores, label_scores


def predict_command(output: Path, row: LeaderboardRow, best: LeaderboardRow) -> str:
    """Return the line that labels new images with a row."""
    folder = output if row.key == best.key or row.bundle is None else output / row.bundle
    return f"manyheads predict {quote(str(folder))} IMAGES --output labels.csv"


def show(material: Material) -> tuple[Mapping[str, Chart], Mapping[str, Any]]:
    """Return what the top of the page is given."""
    board, test = material.leaderboard, material.best.test if material.best else None
    row = board.row(board.verdict.recommended) if board.verdict else board.best
    floor = max((one for one in board.ranked if one.baseline and one.test), key=lambda one: one.cv_mean, default=None)
    behind = {one.key for one in board.verdict.differences if not one.no_evidence} if board.verdict else set()
    return {}, {
        "row": row,
        "floor": None if row.baseline or row.untrained else floor,
        "ahead": floor is not None and floor.key in behind,
        "command": predict_command(material.output, row, board.best),
        "place": quote(str(material.output)),
        "leaks": board.leaks.test if board.leaks else 0,
        "issues": material.label_issues,
        "curve": material.curve,
        "weakest": known_least(test)[0] if test and known_least(test) else None,
        "confused": largest(confusion_matrix(test), test.classes) if test and test.target.exclusive else (),
    }


def known_least(test: Predictions) -> list[ClassScores | LabelScores]:
    """Return the scores of classes, lowest recall first, or of labels, lowest average precision first; of numbers none."""
    if test.target.exclusive:
        return sorted((one for one in per_class(test) if one.support), key=lambda one: (one.recall, one.label))
    if test.target.kind != "multilabel" or test.probabilities is None:
        return []
    found = [(one.average_precision, one.label, one) for one in label_scores(test) if one.average_precision is not None]
    return [one for *_, one in sorted(found, key=lambda each: each[:2])]
