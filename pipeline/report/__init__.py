"""The report page of an experiment, its charts for papers, and several experiments side by side, all from saved artifacts.

Both functions take the output folder and return the page's path; both raise PipelineError where there is no leaderboard, or
one of another version. matplotlib is imported only where something is drawn.
"""

from __future__ import annotations

from pathlib import Path


def build(output: Path) -> Path:
    """Make `report.html`, `plots/*.png` and `audit/*.csv`."""
    from pipeline.report.page import build as build_page

    return build_page(output)


def refresh(output: Path) -> Path:
    """Make them where they, or what they are made of, have changed."""
    from pipeline.report.inputs import PAGE, is_current

    output = Path(output)
    return output / PAGE if is_current(output) else build(output)
