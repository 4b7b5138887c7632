"""The report page: one HTML file with its charts, images, styles and script inside.

`build` gathers the material, draws the charts once for the page and once as PNG, and writes `report.html`, `plots/` and
`audit/`. The sections are in `sections`; the look is `style.css`, the behaviour `script.js`.
"""

from __future__ import annotations

import html
import logging
from pathlib import Path

from pipeline.io.files import make_folder, write_atomic, write_text_atomic
from pipeline.report import sections
from pipeline.report.drawing import to_png
from pipeline.report.inputs import PAGE, digest_inputs, write_record
from pipeline.report.material import Material, gather

log = logging.getLogger(__name__)

HERE = Path(__file__).parent


def build(output: Path) -> Path:
    """Write the report of an experiment and return the page's path.

    Raises
    ------
    PipelineError
        When there is no leaderboard.
    """
    output = Path(output)
    inputs = digest_inputs(output)  # first, so that what changes meanwhile makes the page old
    material = gather(output)
    write_text_atomic(output / PAGE, render(material))
    written = [output / PAGE]
    for folder, files in (("plots", _plots(material)), ("audit", _tables(material))):
        make_folder(output / folder)
        for name, data in files.items():
            write_atomic(output / folder / name, data)
            written.append(output / folder / name)
    write_record(output, inputs, written)
    return output / PAGE


def render(material: Material) -> str:
    """Return the page as HTML text; the same material gives the same text."""
    parts = sections.make(material)
    body = [sections.header(material), *(f'<section id="{part.name}">{part.body}</section>' for part in parts)]
    filled = {
        "title": html.escape(sections.title(material)),
        "navigation": "".join(f'<a href="#{part.name}">{html.escape(part.title)}</a>' for part in parts),
        "style": (HERE / "style.css").read_text(encoding="utf-8"),
        "script": (HERE / "script.js").read_text(encoding="utf-8"),
        "body": "\n".join(body),
    }
    # Split first: what is filled in may itself hold braces.
    first, *rest = (HERE / "template.html").read_text(encoding="utf-8").split("{{")
    return first + "".join(filled[name] + text for name, text in (piece.split("}}", 1) for piece in rest))


def _plots(material: Material) -> dict[str, bytes]:
    return {f"{name}.png": to_png(chart) for name, chart in sections.charts_of(material).items()}


def _tables(material: Material) -> dict[str, bytes]:
    return {name: text.encode("utf-8") for name, text in material.findings.to_csv().items()}
