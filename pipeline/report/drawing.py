"""From a matplotlib figure to an SVG that follows the page's colours, and to a PNG for papers.

Charts are drawn once with the colours of a `Palette`. For the page each colour is a stand-in that becomes a CSS variable,
so light and dark are a matter of style; for paper they are real colours.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure

CATEGORIES = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
)
"""Observable's ten colours: told apart on light and on dark."""


@dataclass(frozen=True)
class Palette:
    """The colours a chart is drawn with."""

    ink: str
    muted: str
    grid: str
    surface: str
    accent: str
    good: str
    bad: str
    categories: tuple[str, ...]


PAPER = Palette("#1b1f24", "#5b6470", "#dfe3e8", "#ffffff", "#3b5bdb", "#2b8a3e", "#d9480f", CATEGORIES)
_STAND_INS = tuple(f"#0102{number:02x}" for number in range(3, 3 + 7 + len(CATEGORIES)))
SCREEN = Palette(
    ink=_STAND_INS[0],
    muted=_STAND_INS[1],
    grid=_STAND_INS[2],
    surface=_STAND_INS[3],
    accent=_STAND_INS[4],
    good=_STAND_INS[5],
    bad=_STAND_INS[6],
    categories=_STAND_INS[7:],
)
_VARIABLES = dict(
    zip(
        _STAND_INS,
        ["ink", "muted", "grid", "surface", "accent", "good", "bad", *(f"c{i}" for i in range(len(CATEGORIES)))],
        strict=True,
    )
)

Chart = Callable[[Palette], Figure]
"""Draws itself with the colours it is given."""

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "axes.labelsize": 9.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "svg.hashsalt": "manyheads",
    "figure.constrained_layout.use": True,
}


def figure(palette: Palette, width: float = 4.9, height: float = 3.5) -> Figure:
    """Return an empty figure; width and height in inches. 4.9 inches are a phone's width in CSS pixels."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.patch.set_alpha(0.0 if palette is SCREEN else 1.0)
    return made


def to_svg(chart: Chart, name: str, label: str = "") -> str:
    """Draw a chart as an SVG element; `tip` ids become tooltips, stand-in colours become CSS variables.

    `label` is what a screen reader calls the chart.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_style(SCREEN)), warnings.catch_warnings():
        # A glyph that matplotlib's font lacks is set by the browser in a font that has it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        chart(SCREEN).savefig(
            buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Hundredths of a point cannot be seen; tooltips keep their digits.
    text = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    # The page sets its own font.
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    # Ids are unique in one SVG only; a page has many.
    text = re.sub(r'\bid="(?!tip:)([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'id="tip:([^"]*)"', r'class="tip" data-tip="\1"', text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text.replace(
        "<svg ",
        f'<svg class="chart" role="group" aria-label="{html.escape(label or name)}" data-chart="{html.escape(name)}" ',
        1,
    )


def to_png(chart: Chart) -> bytes:
    """Draw a chart for paper, 200 dots per inch."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_style(PAPER)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        chart(PAPER).savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def plain_text(text: str) -> str:
    """Return text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def tip(text: str) -> str:
    """Return the id by which an artist gets a tooltip on the page."""
    return f"tip:{text}"


def _style(palette: Palette) -> Any:
    # Any: matplotlib's type for settings names every one of them.
    return {
        **STYLE,
        "text.color": palette.ink,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": "none",
        "xtick.color": palette.muted,
        "ytick.color": palette.muted,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.ink,
        "grid.color": palette.grid,
    }
