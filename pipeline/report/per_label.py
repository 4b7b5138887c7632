"""Label by label: how well each of several labels is known, and the images whose labels are furthest off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from pipeline.data.labels import MultiLabel
from pipeline.evaluation import METRICS, Interval, Predictions, scores
from pipeline.report.drawing import Chart
from pipeline.report.material import Material
from pipeline.report.names import in_words
from pipeline.report.pictures import gallery

MOST_PICTURES = 24
MOST_LABELS = 25
"""Labels up to which the table has them all at once."""
WORST_LABELS = 15
"""Of more labels, those shown before the table is unfolded."""


@dataclass(frozen=True)
class LabelScores:
    """One row of the table; `average_precision` is None for a label that no image has."""

    label: str
    support: int
    predicted: int
    average_precision: float | None
    interval: Interval | None
    precision: float
    recall: float
    f1: float
    threshold: float


def show(material: Material) -> tuple[Mapping[str, Chart], Mapping[str, Any]] | None:
    """Return what the section shows of the best row's test images."""
    best = material.best
    if best is None or best.test.probabilities is None or not isinstance(best.test.target, MultiLabel):
        return None
    test, p = best.test, best.test.probabilities
    rows = label_scores(test)
    worst = sorted(rows, key=lambda row: 2.0 if row.average_precision is None else row.average_precision)[:WORST_LABELS]
    missed = np.where(test.y_true != test.y_pred, np.abs(p - test.y_true), 0.0).sum(axis=1)
    order = np.argsort(-missed, kind="stable")[: min(MOST_PICTURES, np.count_nonzero(missed))]
    columns = (np.asarray(test.paths), test.predicted, test.labels)
    found = [(path, in_words(said), in_words(true)) for path, said, true in zip(*(part[order].tolist() for part in columns), strict=True)]  # fmt: skip
    pictures = gallery(material.index, [path for path, *_ in found])
    return {}, {
        "rows": rows,
        "worst": worst if len(rows) > MOST_LABELS else None,
        "found": found,
        "wrong": int(np.sum(~test.correct)),
        "total": len(test),
        "pictures": pictures,
    }


def label_scores(said: Predictions) -> list[LabelScores]:
    """Return the scores of each label by itself, in the order of the labels; an undefined share is 0."""
    target = said.target
    assert isinstance(target, MultiLabel)
    assert said.probabilities is not None
    found = precision_recall_fscore_support(said.y_true, said.y_pred, zero_division=0.0)
    predicted, cuts = said.y_pred.sum(axis=0).tolist(), target.thresholds or (0.5,) * target.width
    rows = []
    for place, (name, precision, recall, f1, support) in enumerate(zip(target.classes, *found, strict=True)):
        y, guess, p = (part[:, [place]] for part in (said.y_true, said.y_pred, said.probabilities))
        alone = replace(said, y_true=y, y_pred=guess, probabilities=p, scores=None, target=MultiLabel((name,)))
        score, interval = scores(alone).of(METRICS["mean_average_precision"]) if support else (None, None)
        rows.append(
            LabelScores(
                name,
                int(support),
                predicted[place],
                score,
                interval,
                float(precision),
                float(recall),
                float(f1),
                cuts[place],
            )
        )
    return rows
