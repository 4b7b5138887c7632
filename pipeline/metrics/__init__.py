"""Scores with intervals, honest comparison, calibration, and the learning curve: numbers from predictions, no files.

Needs numpy, scipy and nothing else at import; works where torch cannot be imported. Two names for stage two:
`scores(y_true, y_pred, probabilities, classes)` gives one head's test scores, and `Predictions` is what it writes beside
each bundle so that heads can be compared image by image afterwards.
"""

from pipeline.metrics.intervals import Interval, bootstrap_interval, mean_interval, wilson
from pipeline.metrics.predictions import Predictions, PredictionSet
from pipeline.metrics.scoring import Scores, confusion_matrix, per_class, scores

__all__ = [
    "Interval",
    "PredictionSet",
    "Predictions",
    "Scores",
    "bootstrap_interval",
    "confusion_matrix",
    "mean_interval",
    "per_class",
    "scores",
    "wilson",
]
