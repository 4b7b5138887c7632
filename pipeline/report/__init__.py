"""The report page of an experiment, its charts for papers, and several experiments side by side, all from saved artifacts.

`build(output)` makes `report.html`, `plots/*.png` and `audit/*.csv`; matplotlib is imported only then. `refresh(output)`
makes them where something they are made of has changed.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.experiment import Artifacts

__all__ = ["build", "refresh"]


def build(output: Path) -> Path:
    """Build the report page of an experiment and return its path.

    Raises
    ------
    PipelineError
        When there is no leaderboard yet, or it is of another version.
    """
    from pipeline.report.page import build as build_page
    from pipeline.report.page import build_overview

    if each := Artifacts(output).each_target():
        return build_overview(output, {name: build_page(folder) for name, folder in each.items()})
    return build_page(output)


def refresh(output: Path) -> Path:
    """Return the path of an experiment's report page, built again only where it or what it is made of has changed.

    Raises
    ------
    PipelineError
        When there is no leaderboard yet, or it is of another version.
    """
    from pipeline.report.inputs import PAGE, is_current

    if each := Artifacts(output).each_target():
        from pipeline.report.page import build_overview

        return build_overview(output, {name: refresh(folder) for name, folder in each.items()})
    return output / PAGE if is_current(output) else build(output)
