"""The leaderboard: one row per head on an embedding, and the verdict on them. JSON is the truth, tables are drawn from it.

    rows.py   what is known of a row, and of the verdict
    table.py  Leaderboard: the rows in order, as JSON, Markdown and text; several targets side by side
    judge.py  who is no worse than the best, what to use, how flattering the best score is, what uneven classes do

Stage two builds `judge(Leaderboard(rows, provenance), output)` and writes it; the report page shows it.
"""

from pipeline.evaluation.leaderboard.judge import Trials, judge, read_predictions, read_trials
from pipeline.evaluation.leaderboard.rows import LastFit, LeaderboardRow, Leaks, Nested, Seeds, Verdict
from pipeline.evaluation.leaderboard.table import Leaderboard, read_leaderboard

__all__ = [
    "LastFit",
    "Leaderboard",
    "LeaderboardRow",
    "Leaks",
    "Nested",
    "Seeds",
    "Trials",
    "Verdict",
    "judge",
    "read_leaderboard",
    "read_predictions",
    "read_trials",
]
