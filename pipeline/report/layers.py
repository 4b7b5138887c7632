"""The section on layers: which of a network's hold the signal, and whether several side by side hold more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from pipeline.evaluation import METRICS
from pipeline.experiment import Artifacts
from pipeline.heads.layer_profile import LayerProfile, gap, read_profiles, what_to_take
from pipeline.report.drawing import Chart, Palette, chart, figure, plain_text, tip
from pipeline.report.material import Material
from pipeline.report.names import shorten_all

LABEL_CHARACTERS = 28


def show(material: Material) -> tuple[Mapping[str, Chart], Mapping[str, Any]] | None:
    """Return a chart and a table for every network whose profile is of the leaderboard's images."""
    tasks = {row.task for row in material.leaderboard.rows}
    found = [one for one in read_profiles(Artifacts(material.output).layers) or () if one.task in tasks]
    if not found:
        return None
    drawn = {f"layers-{number}" if number else "layers": layer_chart(one) for number, one in enumerate(found)}
    scores = [METRICS[one.metric] for one in found]
    told = [what_to_take(one) for one in found]
    return drawn, {"profiles": list(zip(drawn, found, scores, told, strict=True)), "gap": gap}


@chart
def layer_chart(palette: Palette, found: LayerProfile) -> Figure:
    """Draw the score of every layer with its interval, from the image to the answer, and below those side by side.

    Filled with the accent are those of which nothing says that they are worse than the best; the dashed line is the usual layer.
    """
    metric = METRICS[found.metric]
    single = sum(len(row.embeddings) == 1 for row in found.rows)
    places = [place + 0.6 * (place >= single) for place in range(len(found.rows))]
    label = f"Score of every layer of {found.network}"
    made = figure(palette, label, height=1.0 + 0.3 * len(places))
    axes = made.subplots()
    axes.axvline(100 * found.row(found.usual).score, color=palette.muted, lw=1, ls=(0, (4, 3)))
    line = [100 * row.score for row in found.rows[:single]]
    axes.plot(line, places[:single], "-", color=palette.grid, lw=1.5, zorder=1)
    for place, row in zip(places, found.rows, strict=True):
        colour = palette.accent if row.tied else palette.muted
        text = f"{row.name}: {metric.text(row.score)} {metric.interval_text(row.interval)}, {row.dim:,} numbers"
        axes.plot([100 * end for end in row.interval], [place, place], color=colour, solid_capstyle="round")
        axes.plot(100 * row.score, place, "o", color=colour, ms=6, gid=tip(text))
    names = shorten_all([row.name for row in found.rows], LABEL_CHARACTERS)
    axes.set_yticks(places, [plain_text(name) for name in names])
    axes.set_ylim(places[-1] + 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{metric.title} of ridge out of fold, %", loc="right")
    return made
