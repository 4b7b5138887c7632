"""How predicted numbers lie beside the true ones: charts, how often intervals hold, and the images that are furthest off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.data.numbers import LEVEL, Regression
from pipeline.evaluation import Predictions
from pipeline.evaluation.intervals import share_interval
from pipeline.report.drawing import Chart, Palette, chart, figure, plain_text, tip
from pipeline.report.material import Material
from pipeline.report.names import in_words
from pipeline.report.pictures import gallery

MOST_DOTS = 600
"""Test images in a chart, evenly chosen of more: each has a tooltip."""
MOST_PICTURES = 24
MOST_COLUMNS = 4
"""Numbers that have charts; the table has all."""


def show(material: Material) -> tuple[Mapping[str, Chart], Mapping[str, Any]] | None:
    """Return what the section shows of the best row's test images."""
    best = material.best
    if best is None or not isinstance(best.test.target, Regression):
        return None
    test, target = best.test, best.test.target
    true, said = (part.reshape(len(test), target.width) for part in (test.y_true, test.y_pred))
    inside = target.inside(true, said)
    drawn, rows = {}, []
    for place, name in enumerate(target.columns):
        low, high = share_interval(inside[:, place], test.units)
        outside = sum(bool(target.note(place, number)) for number in said[:, place].tolist())
        rows.append((name, target.half[place], float(inside[:, place].mean()), (low, high), outside))
        if place < MOST_COLUMNS:
            drawn[f"predicted-{place}"] = predicted_chart(test, place)
            drawn[f"residuals-{place}"] = residual_chart(test, place)
    off = (np.abs(said - true) / target.scale).max(axis=1)
    worst = np.argsort(-off, kind="stable")[:MOST_PICTURES]
    paths = np.asarray(test.paths)[worst].tolist()
    found = [(path, in_words(said[row]), in_words(true[row])) for path, row in zip(paths, worst, strict=True)]
    pictures = gallery(material.index, paths)
    return drawn, {"rows": rows, "found": found, "total": len(test), "pictures": pictures, "level": LEVEL}


@chart
def predicted_chart(palette: Palette, test: Predictions, place: int) -> Figure:
    """Draw each test image's predicted number above its true one; on the line they are equal, between the dashed ones in nine of ten."""
    return _scattered(palette, test, place, residuals=False)


@chart
def residual_chart(palette: Palette, test: Predictions, place: int) -> Figure:
    """Draw by how much each test image's number is predicted too high, beside what is predicted."""
    return _scattered(palette, test, place, residuals=True)


def _scattered(palette: Palette, test: Predictions, place: int, residuals: bool) -> Figure:
    target = test.target
    assert isinstance(target, Regression)
    name = plain_text("the number" if target.width == 1 else target.columns[place])
    label = f"Residuals of {name}" if residuals else f"Predicted against true, {name}"
    made = figure(palette, label)
    axes = made.subplots()
    rows = np.unique(np.linspace(0, len(test) - 1, min(len(test), MOST_DOTS)).round().astype(int))
    true, said = (part.reshape(len(test), target.width)[rows, place] for part in (test.y_true, test.y_pred))
    x, y = (said, said - true) if residuals else (true, said)
    ends = np.array([x.min(), x.max()])
    for shift, style in ((0.0, "-"), (target.half[place], "--"), (-target.half[place], "--")):
        axes.plot(ends, shift + (0 * ends if residuals else ends), style, color=palette.muted, lw=1)
    inside = np.abs(said - true) <= target.half[place]
    for row, across, up, held in zip(rows, x, y, inside, strict=True):
        text = f"{np.asarray(test.paths)[row]}: predicted {_number(test.y_pred, row, place)}, true {_number(test.y_true, row, place)}"
        axes.plot(across, up, "o", color=palette.accent if held else palette.ink, ms=3.5, alpha=0.6, gid=tip(text))
    axes.set(
        xlabel=f"predicted, {name}" if residuals else f"true, {name}",
        ylabel="too high by" if residuals else "predicted",
    )
    return made


def _number(numbers: Any, row: int, place: int) -> str:
    """Write one of the numbers of an array of shape (n,) or (n, k)."""
    return f"{numbers.reshape(len(numbers), -1)[row, place]:.4g}"
