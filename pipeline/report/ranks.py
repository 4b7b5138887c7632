"""The critical-difference diagram: average ranks over data sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pipeline.evaluation import Ranking
from pipeline.report.drawing import Chart, Palette, figure, plain_text, tip


def ranking_chart(ranking: Ranking, names: Sequence[str]) -> Chart:
    """Draw a critical-difference diagram: average ranks over data sets, bars join what cannot be told apart."""

    def draw(palette: Palette) -> Figure:
        made = figure(palette, height=1.4 + 0.22 * len(names))
        axes = made.subplots()
        order = np.argsort(ranking.average_ranks, kind="stable")
        for depth, head in enumerate(order):
            rank = ranking.average_ranks[head]
            axes.plot([rank, rank], [0, -1 - depth], color=palette.muted, lw=1)
            axes.text(
                rank,
                -1 - depth,
                f" {plain_text(names[head])}  {rank:.2f}",
                va="center",
                ha="left",
                color=palette.ink,
                fontsize=8,
            )
            axes.plot(rank, 0, "o", color=palette.accent, ms=5, gid=tip(f"{names[head]}: average rank {rank:.2f}"))
        for number, group in enumerate(ranking.groups):
            ends = [ranking.average_ranks[head] for head in group]
            axes.plot(
                [min(ends), max(ends)], [0.45 + 0.35 * number] * 2, color=palette.accent, lw=4, solid_capstyle="round"
            )
        top = 1.3 + 0.35 * len(ranking.groups)
        axes.plot([1, 1 + ranking.critical_difference], [top, top], color=palette.ink, lw=1.5)
        axes.text(1, top + 0.2, f"critical difference {ranking.critical_difference:.2f}", fontsize=8, color=palette.ink)
        axes.set_ylim(-1 - len(names), top + 1)
        axes.set_xlim(0.8, len(names) + 1.2)
        axes.set_yticks([])
        axes.set_xlabel("average rank (1 is best)")
        axes.spines["left"].set_visible(False)
        return made

    return draw
