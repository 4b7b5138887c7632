"""The leaderboard and its views: JSON is the truth; Markdown, the terminal table and one HTML page are drawn from it.

Stage two builds `judge(Leaderboard(rows, provenance), output)`, writes `to_json()` and `to_markdown()`, shows `to_text()`.
`build(output)` makes `report.html`, `plots/*.png` and `doctor/*.csv` from the saved artifacts alone; matplotlib is imported
only then.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.report.judge import judge
from pipeline.report.leaderboard import Leaderboard
from pipeline.report.rows import LeaderboardRow, Nested, Seeds, Verdict

__all__ = ["Leaderboard", "LeaderboardRow", "Nested", "Seeds", "Verdict", "build", "judge"]


def build(output: Path) -> Path:
    """Build the report page of an experiment and return its path.

    Raises
    ------
    PipelineError
        When there is no leaderboard yet, or it is of another version.
    """
    from pipeline.report.page import build as build_page

    return build_page(output)
