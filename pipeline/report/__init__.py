"""The report page of an experiment, its charts for papers, and several experiments side by side, all from saved artifacts.

Both functions take the output folder and return the page's path; both raise PipelineError where there is no leaderboard, or
one of another version. Of several targets each has its page, and the folder's is a table of them. matplotlib is imported only
where something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.experiment import Artifacts


def build(output: Path) -> Path:
    """Make `report.html`, `plots/*.png` and `audit/*.csv`."""
    from pipeline.report.page import build as build_page

    return _of_each_target(output, build_page)


def refresh(output: Path) -> Path:
    """Make them where they, or what they are made of, have changed."""
    from pipeline.report.inputs import PAGE, is_current

    return _of_each_target(output, lambda folder: folder / PAGE if is_current(folder) else build(folder))


def _of_each_target(output: Path, make: Callable[[Path], Path]) -> Path:
    each = Artifacts(output).each_target()
    if not each:
        return make(Path(output))
    from pipeline.report.page import build_overview

    return build_overview(output, {name: make(folder) for name, folder in each.items()})
