"""The report page: one HTML file with its charts, images, styles and script inside.

`build` gathers the material, draws the charts once for the page and once as PNG, and writes `report.html`, `plots/`,
`audit/` and a `MODEL_CARD.md` for each bundle. `report.json` records their inputs, so that an unchanged page is not rebuilt.
`sections` prepares the data of each section; `templates` has their text, style and script.
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
from pipeline.evaluation.leaderboard import read_leaderboard
from pipeline.evaluation.leaderboard import table as boards
from pipeline.evaluation.leaderboard.table import seconds
from pipeline.experiment import REPORT, write_document
from pipeline.io.files import make_folder, write_atomic, write_text_atomic
from pipeline.report import PAGE, RECORD, digest_inputs, digests, pictures, sections
from pipeline.report.charts import MOST_ROWS
from pipeline.report.drawing import to_png, to_svg
from pipeline.report.material import CURVE_HEAD, Material, gather
from pipeline.report.sections import PageSection, Shown

TEMPLATES = Path(__file__).parent / "templates"


def build(output: Path) -> Path:
    """Write the report of an experiment and a model card for each bundle; return the page's path. PipelineError without a leaderboard."""
    output = Path(output)
    inputs = digest_inputs(output)  # first, so that changes during the build make the page outdated
    material = gather(output)
    shown = sections.shown(material)
    made: dict[str, str | bytes] = {PAGE: render(material, shown)}
    for charts, _ in shown.values():
        for name, chart in charts.items():
            made[f"plots/{name}.png"] = to_png(chart)
    for path, given in sections.cards(material).items():
        made[path] = fill("model-card.md", _known(material) | given)
    for name, text in audit.to_csv(material.label_issues, material.findings).items():
        made[f"audit/{name}"] = text
    for name, data in made.items():
        make_folder((output / name).parent)
        write_atomic(output / name, data if isinstance(data, bytes) else data.encode("utf-8"))
    files = digests(output, map(output.joinpath, made))
    write_document(output / RECORD, REPORT, {"inputs": inputs, "files": files})
    return output / PAGE


def build_overview(output: Path, pages: Mapping[str, Path]) -> Path:
    """Write the overview page of several targets, with links to their pages, and return its path."""
    found = {name: read_leaderboard(page.parent) for name, page in pages.items()}
    given = {
        "title": sections.name_of_data(next(iter(found.values())), output),
        "headers": boards.HEADERS,
        "rows": boards.overview(found),
        "links": {name: quote(page.relative_to(output).as_posix()) for name, page in pages.items()},
    }
    write_text_atomic(output / PAGE, fill("targets.html", given))
    return output / PAGE


def fill(name: str, given: Mapping[str, object]) -> str:
    """Render a template as a page with the report's style and script."""
    style, script = (Markup((TEMPLATES / file).read_text(encoding="utf-8")) for file in ("style.css", "script.js"))
    look = {"parts": (), "images": None, "style": style, "script": script}
    return _environment().get_template(name).render({**look, **given})


def render(material: Material, shown: Mapping[PageSection, Shown] | None = None) -> str:
    """Return the page as HTML text; the same material gives the same text. `shown` is `sections.shown(material)` if known."""
    found = sections.shown(material) if shown is None else shown
    parts = [(section, filled(section, material, part)) for section, part in found.items()]
    named = [path for _, given in found.values() for path in given.get("pictures", ())]
    given = {"parts": parts, "images": pictures.carried(material, named), **_known(material)}
    return fill("page.html", given)


def filled(section: PageSection, material: Material, part: Shown) -> Markup:
    """Render a section as HTML."""
    charts, given = part
    drawn = {name: Markup(to_svg(chart, name)) for name, chart in charts.items()}
    macros = _environment().get_template("sections.html").make_module({**_known(material), "drawn": drawn, **given})
    return Markup(getattr(macros, f"{section.name.replace('-', '_')}_section")())


def _known(material: Material) -> dict[str, object]:
    board, metric = material.leaderboard, material.leaderboard.metric
    return {
        "material": material,
        "board": board,
        "best": board.best,
        "title": sections.title(material),
        "metric": metric,
        "test_metric": board.test_metric,
        "unit": "%" if metric is ACCURACY else metric.header,
    }


@cache
def _environment() -> Environment:
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
    made.filters.update(
        seconds=seconds,
        thousands="{:,}".format,
        percent=lambda share, digits=1: f"{100 * share:.{digits}f}",
        within=_within,
        pixels=lambda size: " x ".join(map(str, size)) if isinstance(size, list) else size,
        short=lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
        indented=partial(json.dumps, indent=2, ensure_ascii=False),
        titled=lambda metric: metric.header[0].upper() + metric.header[1:],
    )
    made.globals.update(
        accuracy=ACCURACY,
        most_rows=MOST_ROWS,
        most_inside=pictures.MOST_INSIDE,
        curve_head=CURVE_HEAD.name,
        metrics_for=metrics_for,
        boards=boards,
        span=_span,
        gap_end=_gap_end,
    )
    return made


def _span(metric: Metric, interval: Interval) -> str:
    """Write an interval of scores in words, the lower number first."""
    return metric.interval_text(interval).strip("[]").replace(", ", " to ")


def _within(value: float, span: Interval) -> float:
    """Return the position of a value in a span in per cent, clipped to its ends."""
    return min(100.0, max(0.0, 100 * (value - span[0]) / max(span[1] - span[0], 1e-9)))


def _gap_end(metric: Metric, end: float) -> str:
    """Write an end of a difference's interval, which may be open."""
    return metric.gap_text(end) if abs(end) < 1e6 else "-∞" if end < 0 else "+∞"
