"""The leaderboard and its views: JSON is the truth; Markdown, the terminal table and one HTML page are drawn from it.

Stage two builds `Leaderboard(rows, provenance)`, then writes `to_json()` and `to_markdown()` and shows `to_text()`.
`build(output)` makes `report.html` from the saved artifacts alone; matplotlib is imported only then.
"""

from __future__ import annotations

from pipeline.report.leaderboard import Leaderboard, LeaderboardRow

__all__ = ["Leaderboard", "LeaderboardRow"]
