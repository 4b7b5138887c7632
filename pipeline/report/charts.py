"""The charts: each function takes its numbers and returns a `Chart`, which draws itself on the page or on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipeline.evaluation import ACCURACY, METRICS, Calibration, Difference, LearningCurve, Metric, pareto
from pipeline.evaluation.leaderboard.judge import Trials
from pipeline.evaluation.leaderboard.rows import LeaderboardRow
from pipeline.evaluation.leaderboard.table import seconds
from pipeline.report.drawing import Chart, Palette, figure, plain_text, tip
from pipeline.report.material import Map
from pipeline.report.names import shorten_all

MOST_ROWS = 30
"""Rows of a leaderboard drawn; the table has them all."""
LEGEND_CHARACTERS = 52
"""Of a name in a legend below a chart: what a phone's width holds."""
LABEL_CHARACTERS = 24
"""Of an embedding's name beside a row."""


def accuracy_chart(rows: Sequence[LeaderboardRow], group: Sequence[str], scoring: str) -> Chart:
    """Draw each row's test accuracy with its interval; the no-evidence group is filled.

    The cross-validation mean is drawn beside it where it is an accuracy too; another score is in the tooltip only.
    """
    metric = METRICS[scoring]
    named = "" if metric is ACCURACY else f"{metric.title} "

    def draw(palette: Palette) -> Figure:
        shown = rows[:MOST_ROWS]
        made = figure(palette, height=_height(shown))
        axes = made.subplots()
        floor = 100 * _floor([row.test.interval[0] for row in shown if row.test])
        for place, row in enumerate(shown):
            colour = palette.accent if row.key in group else palette.muted
            if row.test is not None:
                low, high = row.test.interval
                text = f"{row.key}: test {_points(row.test.accuracy)} [{_points(low)}, {_points(high)}], cross-validation {named}{_score(row.cv_mean, metric)}"
                if 100 * row.test.accuracy < floor:
                    axes.plot(floor, place, "<", color=colour, ms=6, gid=tip(text))
                    continue
                axes.plot([max(floor, 100 * low), 100 * high], [place, place], color=colour, solid_capstyle="round")
                axes.plot(100 * row.test.accuracy, place, "o", color=colour, ms=6, gid=tip(text))
            if metric is ACCURACY and 100 * row.cv_mean >= floor:
                axes.plot(100 * row.cv_mean, place, "|", color=palette.ink, ms=9, mew=1.5)
        _row_names(axes, shown)
        label = "accuracy, %:  ● test  — its 95 % interval"
        axes.set_xlabel(label + ("  | cross-validation" if metric is ACCURACY else ""), loc="right")
        return made

    return draw


def difference_chart(differences: Sequence[Difference], rows: Mapping[str, LeaderboardRow], scoring: str) -> Chart:
    """Draw how far each row lies behind the best one, with simultaneous 95 % intervals; 0 is the best row.

    Left is worse, also of a loss, whose numbers say by how much it is above the best row's.
    """
    metric = METRICS[scoring]
    scale = abs(metric.scale)

    def draw(palette: Palette) -> Figure:
        shown = [item for item in differences if item.key in rows][:MOST_ROWS]
        made = figure(palette, height=_height([rows[item.key] for item in shown]))
        axes = made.subplots()
        axes.axvline(0, color=palette.ink, lw=1)
        floor = scale * _floor([-item.interval[1] for item in shown])
        for place, item in enumerate(shown):
            colour = palette.accent if item.no_evidence else palette.muted
            low, high = (scale * end for end in item.interval)
            verdict = "no evidence of a difference" if item.no_evidence else "worse than the best"
            text = f"{item.key}: {_behind(item, metric)}, p = {item.p_value:.3f}, {verdict}"
            if -scale * item.difference < floor:
                axes.plot(floor, place, "<", color=colour, ms=6, gid=tip(text))
                continue
            axes.plot([max(floor, -high), -low], [place, place], color=colour, solid_capstyle="round")
            axes.plot(-scale * item.difference, place, "o", color=colour, ms=6, gid=tip(text))
        _row_names(axes, [rows[item.key] for item in shown])
        axes.xaxis.set_major_locator(MaxNLocator(6))
        _as_a_loss_is_known(axes.xaxis, metric)
        axes.set_xlabel(_behind_label(metric), loc="right")
        return made

    return draw


def tuning_chart(searches: Mapping[str, Trials], scoring: str) -> Chart:
    """Draw every trial's score and the best so far, one line per search; up is better, also of a loss."""
    metric = METRICS[scoring]
    scale = abs(metric.scale)
    named = "" if metric is ACCURACY else f"{metric.title} "

    def draw(palette: Palette) -> Figure:
        labels = shorten_all(list(searches), LEGEND_CHARACTERS)
        columns = 2 if max(map(len, labels), default=0) <= LEGEND_CHARACTERS // 2 else 1
        made = figure(palette, height=3.3 + 0.21 * -(-len(searches) // columns))
        axes = made.subplots()
        lowest = []
        for number, (name, trials) in enumerate(searches.items()):
            colour = palette.categories[number % len(palette.categories)]
            means = np.array([np.nan if trial["mean"] is None else trial["mean"] for trial in trials], dtype=np.float64)
            if not np.isfinite(means).any():
                continue
            count = np.arange(1, len(means) + 1)
            best = np.fmax.accumulate(means)
            axes.step(count, scale * best, where="post", color=colour, label=plain_text(labels[number]))
            axes.plot(count, scale * means, ".", color=colour, ms=4, alpha=0.55)
            axes.plot(
                count[-1],
                scale * best[-1],
                "o",
                color=colour,
                ms=5,
                gid=tip(f"{name}: best {named}{_score(float(best[-1]), metric)} after {len(means)} trials"),
            )
            lowest.append(float(np.nanmin(best)))
        if lowest:
            # Failed, hopeless trials and searches would flatten the part that matters.
            floor, top = scale * _floor(lowest), axes.get_ylim()[1]
            axes.set_ylim(floor - 0.1 * (top - floor) - 1e-3, top)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trial")
        _as_a_loss_is_known(axes.yaxis, metric)
        axes.set_ylabel(f"{metric.title}, cross-validation{'' if metric.lower_is_better else ', %'}")
        if len(searches) > 1:
            made.legend(loc="outside lower center", ncols=columns)
        return made

    return draw


def reliability_chart(out_of_fold: Calibration | None, test: Calibration) -> Chart:
    """Draw how often predictions were right against how sure they were, with Wilson intervals on the test images."""

    def draw(palette: Palette) -> Figure:
        made = figure(palette, height=4.0)
        axes = made.subplots()
        axes.plot([0, 100], [0, 100], color=palette.muted, lw=1, ls=(0, (4, 3)))
        if out_of_fold is not None:
            axes.plot(
                [100 * b.confidence for b in out_of_fold.bins],
                [100 * b.accuracy for b in out_of_fold.bins],
                "-",
                color=palette.muted,
                lw=1.2,
                label="out of fold",
            )
        for item in test.bins:
            axes.plot(
                [100 * item.confidence] * 2,
                [100 * item.interval[0], 100 * item.interval[1]],
                color=palette.accent,
                lw=1,
                alpha=0.6,
            )
            text = f"{item.count} images, sure to {100 * item.confidence:.1f} %: {100 * item.accuracy:.1f} % right [{100 * item.interval[0]:.0f}, {100 * item.interval[1]:.0f}]"
            axes.plot(100 * item.confidence, 100 * item.accuracy, "o", color=palette.accent, ms=5, gid=tip(text))
        axes.plot([], [], "o-", color=palette.accent, label="test, 95 % interval")
        lowest = min([b.confidence for b in test.bins] + [b.interval[0] for b in test.bins])
        axes.set_xlim(100 * max(0, lowest - 0.05), 101)
        axes.set_ylim(100 * max(0, lowest - 0.05), 101)
        axes.set_xlabel("how sure the head is, %")
        axes.set_ylabel("how often it is right, %")
        axes.legend(loc="upper left")
        return made

    return draw


def learning_chart(curve: LearningCurve, head: str) -> Chart:
    """Draw accuracy against the number of labelled images, the fitted law, its forecast, and its test."""

    def draw(palette: Palette) -> Figure:
        made = figure(palette)
        axes = made.subplots()
        sizes = np.array([point.size for point in curve.points])
        axes.fill_between(
            sizes,
            [100 * p.interval[0] for p in curve.points],
            [100 * p.interval[1] for p in curve.points],
            color=palette.accent,
            alpha=0.18,
            lw=0,
        )
        axes.plot(
            sizes,
            [100 * p.accuracy for p in curve.points],
            color=palette.accent,
            label=f"measured ({head}), 95 % interval",
        )
        for point in curve.points:
            text = f"{point.size:,} images: {_points(point.accuracy)} [{_points(point.interval[0])}, {_points(point.interval[1])}], {len(point.scores)} draws"
            axes.plot(point.size, 100 * point.accuracy, "o", color=palette.accent, ms=5, gid=tip(text))
        if curve.law is not None:
            ahead = np.geomspace(sizes[0], max(item.size for item in curve.forecast), 60)
            axes.plot(
                ahead,
                100 * curve.law.accuracy(ahead),
                color=palette.muted,
                lw=1.2,
                ls=(0, (4, 3)),
                label="fitted curve, carried on",
            )
        for item in (*curve.held_back, *curve.forecast):
            colour = palette.muted if item.measured is None else palette.categories[1]
            text = f"{'forecast for' if item.measured is None else 'forecast without the largest sizes, for'} {item.size:,} images: {_points(item.predicted)} [{_points(item.interval[0])}, {_points(item.interval[1])}]"
            text += "" if item.measured is None else f"; measured {_points(item.measured)}"
            axes.plot([item.size] * 2, [100 * end for end in item.interval], color=colour, lw=1.2)
            axes.plot(item.size, 100 * item.predicted, "D", color=colour, ms=4.5, gid=tip(text))
        if curve.held_back:
            axes.plot([], [], "D-", color=palette.categories[1], ms=4.5, label="forecast from smaller sizes alone")
        axes.set_xscale("log")
        ticks = [*sizes[:: max(1, len(sizes) // 4)], *[item.size for item in curve.forecast[-1:]]]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
        axes.set_xlabel("number of labelled images")
        axes.set_ylabel("accuracy, %")
        axes.legend(loc="lower right")
        return made

    return draw


@dataclass(frozen=True)
class Priced:
    """Rows divided by what the cost chart can say of them; `whole` when the time of the embedding is known and counted."""

    shown: tuple[LeaderboardRow, ...]
    untested: tuple[LeaderboardRow, ...]
    untimed: tuple[LeaderboardRow, ...]
    low: tuple[LeaderboardRow, ...]
    floor: float
    whole: bool


def priced(rows: Sequence[LeaderboardRow]) -> Priced:
    """Divide rows into those that the cost chart shows and those it cannot, or only by squeezing all others."""
    tested = [row for row in rows if row.test is not None]
    whole = any(row.embed_seconds for row in rows)
    floor = _floor([row.test.interval[0] for row in tested if row.test])
    timed = [row for row in tested if not whole or row.embed_seconds]
    low = [row for row in timed if row.test and row.test.accuracy < floor]
    return Priced(
        shown=tuple(row for row in timed if row not in low),
        untested=tuple(row for row in rows if row.test is None),
        untimed=tuple(row for row in tested if row not in timed),
        low=tuple(low),
        floor=floor,
        whole=whole,
    )


def cost_chart(rows: Sequence[LeaderboardRow], images: int) -> Chart:
    """Draw accuracy against time per image (embedding and head); rows that none beats in both are joined."""

    def draw(palette: Palette) -> Figure:
        found = priced(rows)
        names = list(dict.fromkeys(row.head for row in found.shown))
        made = figure(palette, height=3.3 + 0.21 * -(-len(names) // 2))
        axes = made.subplots()
        shown, known = found.shown, found.whole
        cost = [1000 * ((row.embed_seconds or 0.0) + row.predict_seconds / max(images, 1)) for row in shown]
        value = [row.test.accuracy for row in shown if row.test is not None]
        best = pareto(cost, value)
        edge = sorted((c, 100 * v) for c, v, kept in zip(cost, value, best, strict=True) if kept)
        axes.step([c for c, _ in edge], [v for _, v in edge], where="post", color=palette.muted, lw=1, ls=(0, (4, 3)))
        for row, c, v, kept in zip(shown, cost, value, best, strict=True):
            colour = palette.categories[names.index(row.head) % len(palette.categories)]
            text = f"{row.key}: {_points(v)} at {c:.3g} ms per image, fit in {seconds(row.fit_seconds)} s{', on the edge' if kept else ''}"
            axes.plot(
                c,
                100 * v,
                "s" if row.baseline else "o",
                color=colour,
                ms=8 if kept else 6,
                alpha=1.0 if kept else 0.75,
                gid=tip(text),
            )
        for number, name in enumerate(names):
            axes.plot(
                [],
                [],
                "o",
                color=palette.categories[number % len(palette.categories)],
                label=plain_text(name.replace("_", " ")),
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("time per image, milliseconds: " + ("embedding and head" if known else "head alone"))
        axes.set_ylabel("test accuracy, %")
        made.legend(loc="outside lower center", ncols=2)
        return made

    return draw


def map_chart(space: Map, labels: Sequence[str], classes: Sequence[str]) -> Chart:
    """Draw the embedding space, a dot per image in the order of `space.rows`, coloured by class."""

    def draw(palette: Palette) -> Figure:
        made = figure(palette, width=7.6, height=4.6)
        axes = made.subplots()
        place = {label: number for number, label in enumerate(classes)}
        codes = np.array([place[label] for label in labels])
        # The view is of the bulk of the images; the few that lie far out stand at its edge.
        low, middle, high = np.quantile(space.points, [0.02, 0.5, 0.98], axis=0)
        reach = 1.35 * np.maximum(high - middle, middle - low) + 1e-9
        points = np.clip(space.points, middle - reach, middle + reach)
        # One collection: the page finds dot i of the SVG by its order.
        colours = [palette.categories[code % len(palette.categories)] for code in codes]
        axes.scatter(points[:, 0], points[:, 1], s=20, c=colours, alpha=0.85, lw=0, gid="dots")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        low, high = points.min(axis=0), points.max(axis=0)
        margin = 0.03 * (high - low) + 1e-9
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
        return made

    return draw


def _floor(values: Sequence[float]) -> float:
    """Return where an axis may begin: below the bulk of the values, so that a hopeless few do not squeeze the rest."""
    if not values:
        return 0.0
    middle, top = float(np.median(values)), max(values)
    return max(min(values), middle - 3 * (top - middle) - 0.02)


def _height(rows: Sequence[LeaderboardRow]) -> float:
    """Return the inches of a chart with a line per row, or two where the embedding is named too."""
    return 0.9 + (0.38 if len({row.embedding for row in rows}) > 1 else 0.27) * len(rows)


def _row_names(axes: Axes, rows: Sequence[LeaderboardRow]) -> None:
    names = [row.head.replace("_", " ") for row in rows]
    if len({row.embedding for row in rows}) > 1:
        short = shorten_all([row.embedding.removesuffix("-penultimate") for row in rows], LABEL_CHARACTERS)
        names = [f"{name}\n{embedding}" for name, embedding in zip(names, short, strict=True)]
    axes.set_yticks(range(len(rows)), [plain_text(name) for name in names], fontsize=8.5, linespacing=1.2)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _points(share: float) -> str:
    return f"{100 * share:.1f} %"


def _score(score: float, metric: Metric) -> str:
    return metric.text(score) if metric.lower_is_better else f"{metric.text(score)} %"


def _behind(item: Difference, metric: Metric) -> str:
    """Say how far a row lies from the best: below 0 where it is worse, but a loss is worse above 0."""
    low, high = item.interval
    ends = (low, high) if metric.lower_is_better else (-high, -low)
    named = "" if metric is ACCURACY else f"{metric.title} "
    gap = item.difference if metric.lower_is_better else -item.difference
    return f"{named}{metric.gap_text(gap)} {metric.unit} [{metric.gap_text(ends[0])}, {metric.gap_text(ends[1])}]"


def _behind_label(metric: Metric) -> str:
    if metric.lower_is_better:
        return f"{metric.title}, {metric.unit} above the best row's, out of fold"
    named = "" if metric is ACCURACY else f"{metric.title}, "
    return f"{named}percentage points from the best row, out of fold"


def _as_a_loss_is_known(axis: Axis, metric: Metric) -> None:
    """Number an axis of minus a loss by the loss itself, so that better stays up or to the right."""
    if metric.lower_is_better:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(0.0 - value, 6) + 0.0:g}"))
