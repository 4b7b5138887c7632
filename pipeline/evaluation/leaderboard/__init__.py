"""The leaderboard: one row per head on an embedding, and a recommendation. Stored as JSON, from which tables are rendered.

    rows.py            the records of a row and of the recommendation
    table.py           Leaderboard: the rows in order, as JSON, Markdown and text; several targets side by side
    recommendation.py  comparison with the best row, the recommended row, selection optimism, effects of class imbalance

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
