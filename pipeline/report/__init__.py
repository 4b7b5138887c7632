"""The report page of an experiment, its charts for papers, and several experiments side by side, all from saved artifacts.

`build(output)` makes `report.html`, `plots/*.png` and `audit/*.csv`; matplotlib is imported only then.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["build"]


def build(output: Path) -> Path:
    """Build the report page of an experiment and return its path.

    Raises
    ------
    PipelineError
        When there is no leaderboard yet, or it is of another version.
    """
    from pipeline.report.page import build as build_page

    return build_page(output)
