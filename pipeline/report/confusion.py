"""Which classes are taken for which: the matrix, as large as can be read, and what it leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pipeline.report.drawing import Palette, chart, figure, plain_text, tip
from pipeline.report.names import shorten_all

MOST_CELLS = 25
"""Classes of a confusion matrix drawn: with more of them no label can be read."""
MOST_SMALL = 12
"""Classes up to which the matrix is as small as other charts; a larger one is twice as wide, so that counts can be read."""
MOST_LISTED = 12
"""Confusions in the table beside it."""
LABEL = 18
"""Characters of a label beside the matrix; the tooltips have the whole names."""


@dataclass(frozen=True)
class Confusion:
    """How many images of one class, and which share of its images, are taken for another."""

    true: str
    said: str
    count: int
    share: float


def largest(matrix: NDArray[np.int64], classes: Sequence[str]) -> list[Confusion]:
    """Return which classes are taken for which, the most images first, of a matrix, int64 of shape (n, n)."""
    wrong = matrix - np.diag(np.diag(matrix))
    places = np.argwhere(wrong)
    order = np.argsort(-wrong[wrong > 0], kind="stable")
    return [
        Confusion(classes[row], classes[column], int(wrong[row, column]), float(wrong[row, column] / matrix[row].sum()))
        for row, column in places[order].tolist()
    ]


def most_confused(matrix: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the classes that are drawn, int64 of shape (k,), in their order: all, or those with most mistakes, either way round.

    matrix : ndarray of shape (n_classes, n_classes), int64, rows are the true classes
    """
    wrong = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)
    return np.sort(np.argsort(-wrong, kind="stable")[:MOST_CELLS])


def left_out(matrix: NDArray[np.int64]) -> str:
    """Return what a reader must know of a matrix, int64 (n, n), too large to be drawn whole; nothing where it is whole."""
    kept = most_confused(matrix)
    if len(kept) == len(matrix):
        return ""
    cells = matrix[np.ix_(kept, kept)]
    drawn, mistakes = int(cells.sum() - np.trace(cells)), int(matrix.sum() - np.trace(matrix))
    return (
        f"Drawn are the {len(kept)} classes with most mistakes of {len(matrix)}, and with them {drawn:,} of {mistakes:,} mistakes; "
        "in the others a class that is not drawn has a part."
    )


@chart
def confusion_chart(palette: Palette, matrix: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, int64 (n, n), each row as shares of its true class; of many classes those with most mistakes."""
    kept = most_confused(matrix)
    cells, names = matrix[np.ix_(kept, kept)], [classes[place] for place in kept]
    shares = cells / np.maximum(matrix.sum(axis=1)[kept][:, None], 1)
    many = len(names) > MOST_SMALL
    made = figure(palette, "Confusion matrix", **({"width": 9.8, "height": 8.8} if many else {"height": 4.7}))
    axes = made.subplots()
    axes.grid(False)
    for row, column in np.argwhere(cells > 0).tolist():
        right = row == column
        share = float(shares[row, column])
        # A count on a wrong cell is read on half a colour, on light and on dark.
        strength = share if right else min(0.6, 3 * share)
        found = "right" if right else f"taken for {names[column]}"
        colour = palette.accent if right else palette.bad
        text = f"{names[row]} {found}: {cells[row, column]} ({100 * share:.0f} %)"
        corner, alpha = (column - 0.46, row - 0.46), max(0.12, strength)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, lw=0, color=colour, alpha=alpha, gid=tip(text)))
        colour = palette.surface if right and share > 0.78 else palette.ink
        axes.text(column, row, str(cells[row, column]), ha="center", va="center", color=colour)
    labels = [plain_text(name) for name in shorten_all(names, LABEL)]
    turned = 0 if max(map(len, labels)) <= 2 else 90 if many else 45
    side = "right" if turned == 45 else "center"
    axes.set_xticks(range(len(names)), labels, rotation=turned, ha=side, color=palette.ink)
    axes.set_yticks(range(len(names)), labels)
    end = len(names) - 0.5
    axes.set(xlim=(-0.5, end), ylim=(end, -0.5), aspect="equal", xlabel="predicted class")
    # On paper there is no caption.
    part = "" if len(names) == len(matrix) else f": the {len(names)} of {len(matrix)} with most mistakes"
    axes.set_ylabel(f"true class{part}")
    axes.spines[:].set_visible(False)
    return made
