"""The charts: each function draws data in the colours of a palette; a `partial` with its data is a `Chart`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pipeline.data.targets import Regression
from pipeline.evaluation import Calibration, Interval, LearningCurve, Predictions
from pipeline.evaluation.comparison import Difference, Ranking
from pipeline.evaluation.leaderboard import LeaderboardRow, Trials
from pipeline.evaluation.leaderboard.table import seconds
from pipeline.evaluation.learning_curve import pareto
from pipeline.evaluation.metric import ACCURACY, METRICS, Metric
from pipeline.heads.layer_profile import LayerProfile
from pipeline.report.drawing import Palette, figure, plain_text, shorten_all, tip
from pipeline.report.material import Map

if TYPE_CHECKING:
    from pipeline.evaluation.fewshot import FewShot

MOST_ROWS = 30
"""Most rows of a leaderboard in a chart; the table has them all."""
MOST_CELLS = 25
"""Most classes in a confusion matrix: with more, labels are illegible."""
MOST_SMALL = 12
"""Most classes in a matrix of normal size; larger matrices are twice as wide, so that counts are legible."""
MOST_DOTS = 600
"""Most test images in a chart of numbers, evenly sampled: each has a tooltip."""
LEGEND, LAYER, EMBEDDING, CLASS = 48, 28, 20, 18
"""Most characters of a name in a legend (a phone's width), and beside rows and cells; tooltips have full names."""
DASHED = (0, (4, 3))


def score_chart(
    palette: Palette, rows: Sequence[LeaderboardRow], group: Sequence[str], scoring: str, test_metric: Metric = ACCURACY
) -> Figure:
    """Draw each row's test score in the metric `test_metric` with its interval; the no-evidence group is in the accent colour.

    The cross-validation score is drawn too if it is in the same metric; otherwise only the tooltip has it.
    """
    metric, shown, scale = METRICS[scoring], rows[:MOST_ROWS], abs(test_metric.scale)
    same = metric is test_metric
    made, axes = _of_rows(palette, f"Test {test_metric.title} {'and cross-validation ' * same}of every row", shown)
    tested = _tested(shown, test_metric)
    floor = scale * _floor([low for _, low, _ in tested.values()], test_metric)
    for place, row in enumerate(shown):
        seen = True
        if row.key in tested:
            value, low, high = tested[row.key]
            ends, sign = (high, low) if test_metric.lower_is_better else (low, high), test_metric.percent
            span = f"[{test_metric.text(ends[0])}{sign}, {test_metric.text(ends[1])}{sign}]"
            text = (
                f"{row.key}: test {_tuned(value, test_metric)} {span}, cross-validation {_tuned(row.cv_mean, metric)}"
            )
            colour = palette.accent if row.key in group else palette.muted
            seen = _dot(axes, place, scale * value, (scale * low, scale * high), floor, colour, text)
        if seen and same and scale * row.cv_mean >= floor:
            axes.plot(scale * row.cv_mean, place, "|", color=palette.ink, ms=9, mew=1.5)
    _as_a_loss_is_known(axes.xaxis, test_metric)
    axes.set_xlabel(f"{test_metric.header}:  ● test  — its 95 % interval{'  | cross-validation' * same}", loc="right")
    return made


def difference_chart(
    palette: Palette, differences: Sequence[Difference], rows: Mapping[str, LeaderboardRow], scoring: str
) -> Figure:
    """Draw how far each row lies behind the best one, with simultaneous 95 % intervals; 0 is the best row.

    Left is worse, for a loss too, whose axis shows the excess over the best row's loss.
    """
    metric = METRICS[scoring]
    scale, sign = abs(metric.scale), -metric.sign
    shown = [item for item in differences if item.key in rows][:MOST_ROWS]
    made, axes = _of_rows(palette, "How far every row lies behind the best", [rows[item.key] for item in shown])
    axes.axvline(0, color=palette.ink, lw=1)
    floor = scale * _floor([-item.interval[1] for item in shown], metric)
    unit = "" if metric.unit == metric.title else metric.unit
    for place, item in enumerate(shown):
        low, high = item.interval
        verdict = "no evidence of a difference" if item.no_evidence else "worse than the best"
        ends = (low, high) if metric.lower_is_better else (-high, -low)
        gap, *span = map(metric.gap_text, (sign * item.difference, *ends))
        behind = f"{metric.title} {gap}{unit and ' '}{unit} [{', '.join(span)}]"
        text = f"{item.key}: {behind}, p = {item.p_value:.3f}, {verdict}"
        colour = palette.accent if item.no_evidence else palette.muted
        _dot(axes, place, -scale * item.difference, (-scale * high, -scale * low), floor, colour, text)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    _as_a_loss_is_known(axes.xaxis, metric)
    where = "above the best row's" if metric.lower_is_better else "from the best row"
    axes.set_xlabel(f"{metric.title}{unit and ', '}{unit} {where}, out of fold", loc="right")
    return made


def tuning_chart(palette: Palette, searches: Mapping[str, Trials], scoring: str) -> Figure:
    """Draw every trial's score and the best so far, one line per search; up is better, for a loss too."""
    metric = METRICS[scoring]
    scale, labels = abs(metric.scale), shorten_all(list(searches), LEGEND)
    columns = 2 if max(map(len, labels), default=0) <= LEGEND // 2 else 1
    height = 3.3 + 0.21 * -(-len(searches) // columns)
    made, axes = figure(palette, "Best score so far, trial by trial", height=height)
    lowest = []
    for number, (name, trials) in enumerate(searches.items()):
        means = np.array([trial["mean"] for trial in trials], dtype=np.float64)  # None is NaN
        if not np.isfinite(means).any():
            continue
        colour, count, best = palette.category(number), np.arange(1, len(means) + 1), np.fmax.accumulate(means)
        axes.step(count, scale * best, where="post", color=colour, label=plain_text(labels[number]))
        axes.plot(count, scale * means, ".", color=colour, ms=4, alpha=0.55)
        text = f"{name}: best {_tuned(float(best[-1]), metric)} after {len(means)} trials"
        axes.plot(count[-1], scale * best[-1], "o", color=colour, ms=5, gid=tip(text))
        lowest.append(float(np.nanmin(best)))
    if lowest:
        # Very bad trials and searches would flatten the part that matters.
        floor, top = scale * _floor(lowest, metric), axes.get_ylim()[1]
        axes.set_ylim(floor - 0.1 * (top - floor) - 1e-3, top)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=f"{metric.title}, cross-validation{metric.percent and ', %'}")
    _as_a_loss_is_known(axes.yaxis, metric)
    if len(searches) > 1:
        made.legend(loc="outside lower center", ncols=columns)
    return made


def layer_chart(palette: Palette, found: LayerProfile) -> Figure:
    """Draw the score of every layer with its interval, from input to output, and of concatenated layers below.

    Rows with no evidence that they are worse than the best have the accent colour; the dashed line is the default layer.
    """
    metric = METRICS[found.metric]
    single = sum(len(row.embeddings) == 1 for row in found.rows)
    places = [place + 0.6 * (place >= single) for place in range(len(found.rows))]
    made, axes = figure(palette, f"Score of every layer of {found.network}", height=1.0 + 0.3 * len(places))
    axes.axvline(100 * found.row(found.usual).score, color=palette.muted, lw=1, ls=DASHED)
    line = [100 * row.score for row in found.rows[:single]]
    axes.plot(line, places[:single], "-", color=palette.grid, lw=1.5, zorder=1)
    for place, row in zip(places, found.rows, strict=True):
        text = f"{row.name}: {metric.text(row.score)} {metric.interval_text(row.interval)}, {row.dim:,} numbers"
        low, high = (100 * end for end in row.interval)
        colour = palette.accent if row.tied else palette.muted
        _dot(axes, place, 100 * row.score, (low, high), -np.inf, colour, text)
    _lines(axes, places, shorten_all([row.name for row in found.rows], LAYER))
    axes.set_ylim(places[-1] + 0.5, -0.5)
    axes.set_xlabel(f"{metric.title} of ridge out of fold, %", loc="right")
    return made


def confusion_chart(palette: Palette, matrix: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, int64 (n, n), with rows as shares of the true class; of many classes those with most mistakes."""
    mistakes = matrix.sum(axis=0) + matrix.sum(axis=1) - 2 * np.diag(matrix)  # false positives and false negatives
    kept = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CELLS])
    cells, names = matrix[np.ix_(kept, kept)], [classes[place] for place in kept]
    shares = cells / np.maximum(matrix.sum(axis=1)[kept][:, None], 1)
    many = len(names) > MOST_SMALL
    made, axes = figure(palette, "Confusion matrix", *((9.8, 8.8) if many else (4.6, 4.7)))
    axes.grid(False)
    for row, column in np.argwhere(cells > 0).tolist():
        right, share = row == column, float(shares[row, column])
        found = "right" if right else f"taken for {names[column]}"
        text = f"{names[row]} {found}: {cells[row, column]} ({100 * share:.0f} %)"
        # Wrong cells stay pale enough for a legible count, on light and on dark.
        alpha = max(0.12, share if right else min(0.6, 3 * share))
        colour, corner = palette.accent if right else palette.bad, (column - 0.46, row - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, lw=0, color=colour, alpha=alpha, gid=tip(text)))
        colour = palette.surface if right and share > 0.78 else palette.ink
        axes.text(column, row, str(cells[row, column]), ha="center", va="center", color=colour)
    labels = list(map(plain_text, shorten_all(names, CLASS)))
    turned = 0 if max(map(len, labels)) <= 2 else 90 if many else 45
    side = "right" if turned == 45 else "center"
    axes.set_xticks(range(len(names)), labels, rotation=turned, ha=side, color=palette.ink)
    axes.set_yticks(range(len(names)), labels)
    end = len(names) - 0.5
    axes.set(xlim=(-0.5, end), ylim=(end, -0.5), aspect="equal", xlabel="predicted class")
    # The PNG for papers has no caption.
    part = "" if len(names) == len(matrix) else f": the {len(names)} of {len(matrix)} with most mistakes"
    axes.set_ylabel(f"true class{part}")
    axes.spines[:].set_visible(False)
    return made


def reliability_chart(palette: Palette, out_of_fold: Calibration | None, test: Calibration) -> Figure:
    """Draw accuracy against confidence, with Wilson intervals on the test images."""
    made, axes = figure(palette, "How often predictions are right against how sure they are", height=4.0)
    axes.plot([0, 100], [0, 100], color=palette.muted, lw=1, ls=DASHED)
    if out_of_fold is not None:
        line = 100 * np.array([(item.confidence, item.accuracy) for item in out_of_fold.bins]).T
        axes.plot(*line, "-", color=palette.muted, lw=1.2, label="out of fold")
    for item in test.bins:
        sure, low, high = 100 * item.confidence, 100 * item.interval[0], 100 * item.interval[1]
        text = f"{item.count} images, sure to {sure:.1f} %: {100 * item.accuracy:.1f} % right [{low:.0f}, {high:.0f}]"
        _upright(axes, sure, item.accuracy, item.interval, palette.accent, text, lw=1, alpha=0.6)
    axes.plot([], [], "o-", color=palette.accent, label="test, 95 % interval")
    lowest = 100 * max(0, min(min(b.confidence, b.interval[0]) for b in test.bins) - 0.05)
    ends = (lowest, 101)
    axes.set(xlim=ends, ylim=ends, xlabel="how sure the head is, %", ylabel="how often it is right, %")
    axes.legend(loc="upper left")
    return made


def numbers_chart(palette: Palette, test: Predictions, place: int, residuals: bool) -> Figure:
    """Draw predicted against true numbers of the test images, or residuals against predictions.

    On the solid line both are equal; between the dashed lines are about nine in ten images.
    """
    target = test.target
    assert isinstance(target, Regression)
    name = plain_text("the number" if target.width == 1 else target.columns[place])
    made, axes = figure(palette, f"Residuals of {name}" if residuals else f"Predicted against true, {name}")
    rows = np.unique(np.linspace(0, len(test) - 1, min(len(test), MOST_DOTS)).round().astype(int))
    true, said = (part.reshape(len(test), target.width)[rows, place] for part in (test.y_true, test.y_pred))
    x, y = (said, said - true) if residuals else (true, said)
    ends, half = np.array([x.min(), x.max()]), target.half[place]
    for shift, style in ((0.0, "-"), (half, "--"), (-half, "--")):
        axes.plot(ends, shift + (0 * ends if residuals else ends), style, color=palette.muted, lw=1)
    for path, one, other, across, up in zip(np.asarray(test.paths)[rows], said, true, x, y, strict=True):
        colour = palette.accent if abs(one - other) <= half else palette.ink
        text = f"{path}: predicted {one:.4g}, true {other:.4g}"
        axes.plot(across, up, "o", color=colour, ms=3.5, alpha=0.6, gid=tip(text))
    axes.set_xlabel(f"{'predicted' if residuals else 'true'}, {name}")
    axes.set_ylabel("too high by" if residuals else "predicted")
    return made


def learning_chart(palette: Palette, curve: LearningCurve, head: str) -> Figure:
    """Draw accuracy against the number of labelled images: measurements, fitted law, forecast and its test on held-back sizes."""
    made, axes = figure(palette, "Accuracy against the number of labelled images")
    points = curve.points
    table = np.array([(point.size, point.accuracy, *point.interval) for point in points])
    sizes, shares = table[:, 0].astype(int), 100 * table[:, 1:].T
    axes.fill_between(sizes, shares[1], shares[2], color=palette.accent, alpha=0.18, lw=0)
    axes.plot(sizes, shares[0], color=palette.accent, label=f"measured ({head}), 95 % interval")
    for point in points:
        text = f"{point.size:,} images: {_within(point.accuracy, point.interval)}, {len(point.scores)} draws"
        axes.plot(point.size, 100 * point.accuracy, "o", color=palette.accent, ms=5, gid=tip(text))
    if curve.law is not None:
        ahead = np.geomspace(sizes[0], max(item.size for item in curve.forecast), 60)
        label = "fitted curve, carried on"
        axes.plot(ahead, 100 * curve.law.accuracy(ahead), color=palette.muted, lw=1.2, ls=DASHED, label=label)
    for item in (*curve.held_back, *curve.forecast):
        colour, what, measured = palette.muted, "forecast for", ""
        if item.measured is not None:
            colour, what = palette.categories[1], "forecast without the largest sizes, for"
            measured = f"; measured {100 * item.measured:.1f} %"
        text = f"{what} {item.size:,} images: {_within(item.predicted, item.interval)}{measured}"
        _upright(axes, item.size, item.predicted, item.interval, colour, text, "D", 4.5)
    if curve.held_back:
        axes.plot([], [], "D-", color=palette.categories[1], ms=4.5, label="forecast from smaller sizes alone")
    _counts(axes, [*sizes[:: max(1, len(sizes) // 4)], *[item.size for item in curve.forecast[-1:]]])
    axes.set_ylim(top=min(101.0, axes.get_ylim()[1]))
    axes.set(xlabel="number of labelled images", ylabel="accuracy, %")
    axes.legend(loc="lower right")
    return made


def few_shot_chart(palette: Palette, result: FewShot) -> Figure:
    """Draw each method's accuracy against the number of images per class; an error bar is its 95 % interval over episodes."""
    label = "Accuracy against the number of labelled images per class, method by method"
    made, axes = figure(palette, label, height=3.8)
    for number, method in enumerate(result.methods):
        colour, points = palette.category(number), [point for point in result.points if point.method == method]
        # Shifted sideways, so that equal points do not hide each other.
        places = [point.shots * 1.03 ** (number - (len(result.methods) - 1) / 2) for point in points]
        axes.plot(places, [100 * point.accuracy for point in points], color=colour, lw=1.2, label=plain_text(method))
        for place, point in zip(places, points, strict=True):
            text = f"{method}, {point.shots} per class: {_within(point.accuracy, point.interval)}"
            _upright(axes, place, point.accuracy, point.interval, colour, text, size=4.5)
    _counts(axes, result.shots)
    axes.set(xlabel="labelled images per class", ylabel="accuracy, %")
    axes.legend(loc="lower right")
    return made


def priced(rows: Sequence[LeaderboardRow], test_metric: Metric = ACCURACY) -> list[LeaderboardRow]:
    """Return the rows that the cost chart shows: those with a score and a time, without outliers that would squeeze the others."""
    tested = _tested(rows, test_metric)
    floor, timed = _floor([low for _, low, _ in tested.values()], test_metric), any(row.embed_seconds for row in rows)
    return [
        row for row in rows if row.key in tested and tested[row.key][0] >= floor and (row.embed_seconds or not timed)
    ]


def cost_chart(palette: Palette, rows: Sequence[LeaderboardRow], images: int, test_metric: Metric = ACCURACY) -> Figure:
    """Draw the test score against time per image (embedding and head); the Pareto-optimal rows are joined."""
    shown = priced(rows, test_metric)
    names = list(dict.fromkeys(row.head for row in shown))
    height = 3.3 + 0.21 * -(-len(names) // 2)
    made, axes = figure(palette, f"Test {test_metric.title} against time per image", height=height)
    cost = [1000 * ((row.embed_seconds or 0.0) + row.predict_seconds / max(images, 1)) for row in shown]
    tested, scale = _tested(shown, test_metric), abs(test_metric.scale)
    value = [tested[row.key][0] for row in shown]
    best = pareto(cost, value)
    edge = sorted((c, scale * v) for c, v, kept in zip(cost, value, best, strict=True) if kept)
    axes.step(*np.transpose(edge), where="post", color=palette.muted, lw=1, ls=DASHED)
    for row, c, v, kept in zip(shown, cost, value, best, strict=True):
        text = f"{row.key}: {test_metric.text(v)}{test_metric.percent} at {c:.3g} ms per image, fit in {seconds(row.fit_seconds)} s{', on the edge' * kept}"
        sign, size, alpha = "s" if row.baseline else "o", 8 if kept else 6, 1.0 if kept else 0.75
        colour = palette.category(names.index(row.head))
        axes.plot(c, scale * v, sign, color=colour, ms=size, alpha=alpha, gid=tip(text))
    for number, name in enumerate(names):
        axes.plot([], [], "o", color=palette.category(number), label=plain_text(name))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    what = "embedding and head" if any(row.embed_seconds for row in rows) else "head alone"
    axes.set(xlabel=f"time per image, milliseconds: {what}", ylabel=f"test {test_metric.header}")
    _as_a_loss_is_known(axes.yaxis, test_metric)
    made.legend(loc="outside lower center", ncols=2)
    return made


def map_chart(palette: Palette, space: Map, codes: Sequence[int]) -> Figure:
    """Draw the embedding space, a dot per image in the order of `space.rows`, coloured by its class index."""
    made, axes = figure(palette, "Map of the images; arrow keys go from dot to dot", width=7.6, height=4.6)
    # The view fits the bulk of the images; outliers are drawn at its edge.
    low, middle, high = np.quantile(space.points, [0.02, 0.5, 0.98], axis=0)
    reach = 1.35 * np.maximum(high - middle, middle - low) + 1e-9
    points = np.clip(space.points, middle - reach, middle + reach)
    # One collection: the page finds dot i of the SVG by its order.
    colours = [palette.category(code) for code in codes]
    axes.scatter(points[:, 0], points[:, 1], s=20, c=colours, alpha=0.85, lw=0, gid="dots")
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.03 * (high - low) + 1e-9
    (left, bottom), (right, top) = low - margin, high + margin
    axes.set(xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return made


def ranking_chart(palette: Palette, ranking: Ranking, names: Sequence[str]) -> Figure:
    """Draw a critical-difference diagram: average ranks over data sets, bars joining ranks that do not differ significantly."""
    made, axes = figure(palette, "Average ranks over data sets", height=1.4 + 0.22 * len(names))
    for depth, head in enumerate(np.argsort(ranking.average_ranks, kind="stable")):
        rank = ranking.average_ranks[head]
        axes.plot([rank, rank], [0, -1 - depth], color=palette.muted, lw=1)
        text = f" {plain_text(names[head])}  {rank:.2f}"
        axes.text(rank, -1 - depth, text, va="center", ha="left", color=palette.ink, fontsize=8)
        axes.plot(rank, 0, "o", color=palette.accent, ms=5, gid=tip(f"{names[head]}: average rank {rank:.2f}"))
    for number, group in enumerate(ranking.groups):
        ends = [ranking.average_ranks[head] for head in group]
        bar = [0.45 + 0.35 * number] * 2
        axes.plot([min(ends), max(ends)], bar, color=palette.accent, lw=4, solid_capstyle="round")
    top = 1.3 + 0.35 * len(ranking.groups)
    axes.plot([1, 1 + ranking.critical_difference], [top, top], color=palette.ink, lw=1.5)
    axes.text(1, top + 0.2, f"critical difference {ranking.critical_difference:.2f}", fontsize=8, color=palette.ink)
    axes.set(ylim=(-1 - len(names), top + 1), xlim=(0.8, len(names) + 1.2), yticks=[])
    axes.set_xlabel("average rank (1 is best)")
    axes.spines["left"].set_visible(False)
    return made


def _dot(axes: Axes, place: float, value: float, interval: Interval, floor: float, colour: str, text: str) -> bool:
    """Draw a row's value with its interval; where it is below `floor`, draw a triangle and return False."""
    if value < floor:
        axes.plot(floor, place, "<", color=colour, ms=6, gid=tip(text))
        return False
    axes.plot([max(floor, interval[0]), interval[1]], [place, place], color=colour, solid_capstyle="round")
    axes.plot(value, place, "o", color=colour, ms=6, gid=tip(text))
    return True


def _upright(
    axes: Axes,
    x: float,
    share: float,
    span: Interval,
    colour: str,
    text: str,
    sign: str = "o",
    size: float = 5,
    **line: Any,
) -> None:
    """Draw a share in per cent with its vertical interval."""
    axes.plot([x, x], [100 * span[0], 100 * span[1]], color=colour, **{"lw": 1.2, **line})
    axes.plot(x, 100 * share, sign, color=colour, ms=size, gid=tip(text))


def _tested(rows: Sequence[LeaderboardRow], test_metric: Metric) -> dict[str, tuple[float, float, float]]:
    """Return each row's test score and interval ends by key, higher being better; rows without a score are left out."""
    found = {}
    for row in rows:
        value, span = (None, None) if row.test is None else row.test.of(test_metric)
        if value is not None and span is not None:
            found[row.key] = (-value, -span[1], -span[0]) if test_metric.lower_is_better else (value, *span)
    return found


def _floor(values: Sequence[float], metric: Metric) -> float:
    """Return the start of an axis: below the bulk of the values, so that a few very low ones do not squeeze the rest."""
    if not values:
        return 0.0
    middle, top = float(np.median(values)), max(values)
    return max(min(values), middle - 3 * (top - middle) - (0.0 if metric.in_units else 0.02))


def _of_rows(palette: Palette, label: str, rows: Sequence[LeaderboardRow]) -> tuple[Figure, Axes]:
    """Return an empty figure with a line per row, labelled by its head, and by its embedding if there are several."""
    names, embeddings = [row.head for row in rows], [row.embedding.removesuffix("-penultimate") for row in rows]
    several = len(set(embeddings)) > 1
    if several:
        names = list(map("{}\n{}".format, names, shorten_all(embeddings, EMBEDDING)))
    made, axes = figure(palette, label, height=0.9 + (0.38 if several else 0.27) * len(rows))
    _lines(axes, range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return made, axes


def _lines(axes: Axes, places: Sequence[float], names: Sequence[str]) -> None:
    """Label the lines of a chart."""
    axes.set_yticks(places, list(map(plain_text, names)), linespacing=1.2)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def _counts(axes: Axes, ticks: Sequence[int]) -> None:
    """Make the x axis a logarithmic one of image counts."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, list(map("{:,}".format, ticks)))
    axes.minorticks_off()


def _within(share: float, interval: Interval) -> str:
    return f"{100 * share:.1f} % [{100 * interval[0]:.1f} %, {100 * interval[1]:.1f} %]"


def _tuned(score: float, metric: Metric) -> str:
    return f"{metric.title} {metric.text(score)}{metric.percent}"


def _as_a_loss_is_known(axis: Axis, metric: Metric) -> None:
    """Label an axis of minus a loss with the loss itself, so that better stays up or to the right."""
    if metric.lower_is_better:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(0.0 - value, 6) + 0.0:g}"))
