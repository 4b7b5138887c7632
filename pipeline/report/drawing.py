"""Convert matplotlib figures to SVG in the page's colours and to PNG for papers; shorten names.

Charts are drawn with the colours of a `Palette`. For the page each colour is a placeholder that becomes a CSS variable, so that
the style sheet decides on light and dark; for papers the colours are real.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

CATEGORIES = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951"),
    *("#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0"),
)
"""Observable's ten colours, distinguishable on light and on dark."""


@dataclass(frozen=True)
class Palette:
    """The colours a chart is drawn with."""

    ink: str
    muted: str
    grid: str
    surface: str
    accent: str
    bad: str
    categories: tuple[str, ...]

    def category(self, number: int) -> str:
        """Return a category's colour; colours repeat after the last."""
        return self.categories[number % len(self.categories)]


PAPER = Palette("#1b1f24", "#5b6470", "#dfe3e8", "#ffffff", "#3b5bdb", "#d9480f", CATEGORIES)
_NAMES = ("ink", "muted", "grid", "surface", "accent", "bad")
_VARIABLES = (*_NAMES, *(f"c{number}" for number in range(len(CATEGORIES))))
_STAND_INS = tuple(f"#0102{number:02x}" for number in range(3, 3 + len(_VARIABLES)))
SCREEN = Palette(**dict(zip(_NAMES, _STAND_INS, strict=False)), categories=_STAND_INS[len(_NAMES) :])

Chart = Callable[[Palette], Figure]
"""A function that draws a figure in the colours of a palette."""


def figure(palette: Palette, label: str, width: float = 4.6, height: float = 3.5) -> tuple[Figure, Axes]:
    """Return an empty figure, sizes in inches, and its axes. On a phone 4.6 inches are 336 CSS pixels, so text needs 10 points or more.

    `label` is the chart's name for screen readers.
    """
    made = Figure(figsize=(width, height), layout="constrained", label=label)
    made.patch.set_alpha(0.0 if palette is SCREEN else 1.0)
    return made, made.subplots()


def to_svg(chart: Chart, name: str) -> str:
    """Draw a chart as an SVG element; `tip` ids become tooltips, placeholder colours become CSS variables."""
    nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    data, label = _drawn(chart, SCREEN, format="svg", metadata=nothing)
    text = data.decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for size in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    # Two decimals of a point suffice; tooltips keep their digits.
    text = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), text)
    # The page sets its own font.
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    # Ids are unique only within one SVG; a page has many.
    text = re.sub(r'\bid="(?!tip:)([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'id="tip:([^"]*)"', r'class="tip" data-tip="\1"', text)
    for stand_in, variable in zip(_STAND_INS, _VARIABLES, strict=True):
        text = text.replace(stand_in, f"var(--{variable})")
    named = f'aria-label="{html.escape(label)}" data-chart="{html.escape(name)}"'
    return text.replace("<svg ", f'<svg class="chart" role="group" {named} ', 1)


def to_png(chart: Chart) -> bytes:
    """Draw a chart for paper, 200 dots per inch."""
    return _drawn(chart, PAPER, format="png", dpi=200, metadata={"Software": None})[0]


def plain_text(text: str) -> str:
    """Escape text so that matplotlib does not read it as mathematics."""
    return text.replace("$", r"\$")


def tip(text: str) -> str:
    """Return the id that gives an artist a tooltip on the page."""
    return f"tip:{text}"


def _drawn(chart: Chart, palette: Palette, **how: Any) -> tuple[bytes, str]:
    """Return the drawing as the bytes of a file, and its label."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_style(palette)), warnings.catch_warnings():
        # The browser has fonts for the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        made = chart(palette)
        made.savefig(buffer, **how)
    return buffer.getvalue(), str(made.get_label())


def _style(palette: Palette) -> Any:
    # Any: matplotlib's type for settings names every one of them.
    return {
        "font.size": 10,
        "text.color": palette.ink,
        "axes.axisbelow": True,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": palette.muted,
        "axes.labelsize": 10,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": palette.grid,
        "grid.linewidth": 0.6,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "manyheads",
        "xtick.color": palette.muted,
        "xtick.labelcolor": palette.muted,
        "xtick.major.size": 0,
        "ytick.color": palette.muted,
        "ytick.labelcolor": palette.ink,
        "ytick.major.size": 0,
    }


GAP = "…"


def shorten_all(names: Sequence[str], length: int) -> list[str]:
    """Shorten names to about `length` characters, keeping different names different.

    Where one is too long, the words that all names begin or end with are dropped first ("…blue circle…" for many photographs of
    something on a plain background), then the middle, as names mostly differ at their ends; equal results are numbered.
    """
    unique = list(dict.fromkeys(names))
    if all(len(name) <= length for name in unique):
        return list(names)
    front = _shared(unique)
    back = _shared([name[front:][::-1] for name in unique])
    if len(unique) < 2 or min(map(len, unique)) <= front + back:
        front = back = 0
    found, seen, room = {}, Counter[str](), length - bool(front) - bool(back)
    for name in unique:
        text = name[front : len(name) - back]
        if len(text) > room:
            half = room // 2
            text = text[:half].rstrip() + GAP + text[len(text) - (room - half - 1) :].lstrip()
        text = GAP * bool(front) + text + GAP * bool(back)
        seen[text] += 1
        found[name] = text if seen[text] == 1 else f"{text} ({seen[text]})"
    return [found[name] for name in names]


def _shared(texts: Sequence[str]) -> int:
    """Return the length of the whole words that all texts begin with."""
    beginning = commonprefix(list(texts))  # noqa: RUF071 - these are texts, not paths
    return max(beginning.rfind(sign) + 1 for sign in " -_/.")
