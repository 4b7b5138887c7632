"""The leaderboard: one row per head on an embedding, and the recommendation on them. JSON is the truth, tables are drawn from it.

    rows.py            what is known of a row, and of the recommendation
    table.py           Leaderboard: the rows in order, as JSON, Markdown and text; several targets side by side
    recommendation.py  who is no worse than the best, what to use, how flattering the best score is, what uneven classes do

Stage two builds `recommend(Leaderboard(rows, provenance), output)` and writes it; the report page shows it.
"""

from pipeline.evaluation.leaderboard.recommendation import Trials, read_predictions, read_trials, recommend
from pipeline.evaluation.leaderboard.rows import LastFit, LeaderboardRow, Leaks, Nested, Recommendation, Seeds
from pipeline.evaluation.leaderboard.table import Leaderboard, read_leaderboard

__all__ = [
    "LastFit",
    "Leaderboard",
    "LeaderboardRow",
    "Leaks",
    "Nested",
    "Recommendation",
    "Seeds",
    "Trials",
    "read_leaderboard",
    "read_predictions",
    "read_trials",
    "recommend",
]
