"""The report page: one HTML file with its charts, images, styles and script inside.

`build` gathers the material, draws the charts once for the page and once as PNG, and writes `report.html`, `plots/`,
`audit/` and a `MODEL_CARD.md` for each bundle. `sections` says what each section is given; `templates` has their words, the look and the behaviour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.evaluation import ACCURACY, Interval, Metric, audit, metrics_for
from pipeline.evaluation.leaderboard.overview import HEADERS, overview
from pipeline.evaluation.leaderboard.table import (
    apart_text,
    apart_title,
    cross_validated,
    read_leaderboard,
    seconds,
    test_text,
)
from pipeline.io.files import make_folder, write_atomic, write_text_atomic
from pipeline.report import card, sections
from pipeline.report.browse import MOST_INSIDE, carried
from pipeline.report.charts import MOST_ROWS
from pipeline.report.drawing import to_png, to_svg
from pipeline.report.inputs import PAGE, digest_inputs, write_record
from pipeline.report.material import CURVE_HEAD, Material, gather
from pipeline.report.sections import Section, Shown

TEMPLATES = Path(__file__).parent / "templates"


def build(output: Path) -> Path:
    """Write the report of an experiment, and a card beside each bundle; return the page's path. PipelineError without a leaderboard."""
    output = Path(output)
    inputs = digest_inputs(output)  # first, so that what changes meanwhile makes the page old
    material = gather(output)
    shown, tables = sections.shown(material), audit.to_csv(material.label_issues, material.findings)
    write_text_atomic(output / PAGE, render(material, shown))
    made = {f"plots/{name}.png": to_png(chart) for charts, _ in shown.values() for name, chart in charts.items()}
    made |= {
        path: _fill("model-card.md", material, given).encode("utf-8") for path, given in card.facts(material).items()
    }
    made |= {f"audit/{name}": text.encode("utf-8") for name, text in tables.items()}
    for name, data in made.items():
        make_folder((output / name).parent)
        write_atomic(output / name, data)
    write_record(output, inputs, [output / name for name in (PAGE, *made)])
    return output / PAGE


def build_overview(output: Path, pages: Mapping[str, Path]) -> Path:
    """Write the page of several targets, a table with a link to the page of each, and return its path."""
    boards = {name: read_leaderboard(page.parent) for name, page in pages.items()}
    links = {name: quote(page.relative_to(output).as_posix()) for name, page in pages.items()}
    title = sections.name_of_data(next(iter(boards.values())), output)
    given = {
        "title": title,
        "headers": HEADERS,
        "rows": overview(boards),
        "links": links,
    }
    write_text_atomic(output / PAGE, fill("targets.html", given))
    return output / PAGE


def fill(name: str, given: Mapping[str, object]) -> str:
    """Return a page of its own as HTML text, by its template and what that asks for."""
    return _environment().get_template(name).render({"parts": (), "images": None, **_look(), **given})


def render(material: Material, shown: Mapping[Section, Shown] | None = None) -> str:
    """Return the page as HTML text; the same material gives the same text. `shown` spares looking what its sections show."""
    found = sections.shown(material) if shown is None else shown
    parts = [(section, _filled(section, material, part)) for section, part in found.items()]
    named = [path for _, given in found.values() for path in given.get("pictures", ())]
    return _fill("page.html", material, {"parts": parts, "images": carried(material, named), **_look()})


def _look() -> dict[str, Markup]:
    """Return the look and the behaviour of a page."""
    files = {"style": "style.css", "script": "script.js"}
    return {name: Markup((TEMPLATES / file).read_text(encoding="utf-8")) for name, file in files.items()}


def section(name: str, material: Material) -> Markup:
    """Return one of `SECTIONS` as HTML, nothing where it has nothing to show."""
    found = next(section for section in sections.SECTIONS if section.name == name)
    part = found.show(material)
    return Markup("") if part is None else _filled(found, material, part)


def _filled(section: Section, material: Material, part: Shown) -> Markup:
    charts, given = part
    drawn = {name: Markup(to_svg(chart, name)) for name, chart in charts.items()}
    return Markup(_fill(f"{section.name}.html", material, {"drawn": drawn, **given}))


def _fill(name: str, material: Material, given: Mapping[str, object]) -> str:
    board, title = material.leaderboard, sections.title(material)
    metric, best = board.metric, board.best
    unit = "%" if metric is ACCURACY else f"{metric.title}{metric.percent and ', %'}"
    known = {"material": material, "board": board, "best": best, "title": title}
    known |= {"metric": metric, "told": board.told_by, "unit": unit}
    return _environment().get_template(name).render(**known, **given)


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    indented = partial(json.dumps, indent=2, ensure_ascii=False)
    made.filters.update(seconds=seconds, thousands="{:,}".format, percent=_percent, within=_within)
    made.filters.update(pixels=lambda size: " x ".join(map(str, size)) if isinstance(size, list) else size)
    made.filters.update(short=_short, indented=indented, titled=_titled)
    made.globals.update(
        accuracy=ACCURACY,
        apart_title=apart_title,
        most_rows=MOST_ROWS,
        most_inside=MOST_INSIDE,
        curve_head=CURVE_HEAD.name,
    )
    made.globals.update(
        apart_text=apart_text,
        cross_validated=cross_validated,
        metrics_for=metrics_for,
        test_text=test_text,
        span=_span,
        gap_end=_gap_end,
    )
    return made


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}"


def _titled(metric: Metric, alone: bool = True) -> str:
    """Return the header of a metric's column, with a capital where it stands alone."""
    title = metric.title[0].upper() + metric.title[1:] if alone else metric.title
    return f"{title}{metric.percent and ', %'}"


def _span(metric: Metric, interval: Interval) -> str:
    """Write an interval of scores in words, the lower number first."""
    return metric.interval_text(interval).strip("[]").replace(", ", " to ")


def _within(value: float, span: Interval) -> float:
    """Return where a value lies in a span, in per cent; at its ends where it lies beyond them."""
    return min(100.0, max(0.0, 100 * (value - span[0]) / max(span[1] - span[0], 1e-9)))


def _gap_end(metric: Metric, end: float) -> str:
    """Write an end of a difference's interval, which may be open."""
    return metric.gap_text(end) if abs(end) < 1e6 else "-∞" if end < 0 else "+∞"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
