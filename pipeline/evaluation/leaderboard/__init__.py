"""The leaderboard: one row per head on an embedding, and the verdict on them. JSON is the truth, tables are drawn from it.

    rows.py       what is known of a row, and of the verdict
    table.py      Leaderboard: the rows in order, as JSON, Markdown and text
    judge.py      who is no worse than the best, what to use, and how flattering the best score is
    overview.py   several targets side by side
    imbalance.py  what class weights and prior correction do where classes are uneven

Stage two builds `judge(Leaderboard(rows, provenance), output)` and writes it; the report page shows it.
"""

from pipeline.evaluation.leaderboard.judge import judge
from pipeline.evaluation.leaderboard.rows import LeaderboardRow, Nested, Seeds, Verdict
from pipeline.evaluation.leaderboard.table import Leaderboard, read_leaderboard

__all__ = ["Leaderboard", "LeaderboardRow", "Nested", "Seeds", "Verdict", "judge", "read_leaderboard"]
