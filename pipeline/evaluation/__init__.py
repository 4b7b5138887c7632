"""Numbers from predictions: scores with intervals, honest comparison, calibration, and the learning curve.

Needs scikit-learn, no torch, no plots. `Predictions` is what a head said of images, `METRICS` has a row per score, `scores`
gives all of one head, and `compare` says which heads are worse than the best.

    predictions.py     what a head said, in memory and in a file        expected.py  where a test accuracy should lie
    metric.py          the table of scores, and how each is resampled    scoring.py  all scores of one head, class by class
    intervals.py       how far a share or a mean can be trusted
    comparison.py      who is better, corrected for many pairs           optimism.py  what a winner owes to being picked
    calibration.py     scores into probabilities, and how true they are  learning_curve.py  accuracy by images
    audit.py           labels, near-duplicates and outliers to look at   leaderboard/  rows, the verdict, the table
"""

from pipeline.data.classes import class_columns
from pipeline.evaluation.calibration import Calibration, fit_calibrator, measure_calibration
from pipeline.evaluation.comparison import Difference, Paired, Ranking, compare, paired_answers, rank_over_datasets
from pipeline.evaluation.intervals import Interval, wilson
from pipeline.evaluation.learning_curve import LearningCurve, curve_from_scores, curve_scores, curve_sizes, pareto
from pipeline.evaluation.metric import ACCURACY, METRICS, Metric, counted, metric_of, metrics_for
from pipeline.evaluation.optimism import Optimism
from pipeline.evaluation.predictions import HeadPredictions, Predictions, joined
from pipeline.evaluation.scoring import ClassScores, Scores, confusion_matrix, per_class, scores

__all__ = [
    "ACCURACY",
    "METRICS",
    "Calibration",
    "ClassScores",
    "Difference",
    "HeadPredictions",
    "Interval",
    "LearningCurve",
    "Metric",
    "Optimism",
    "Paired",
    "Predictions",
    "Ranking",
    "Scores",
    "class_columns",
    "compare",
    "confusion_matrix",
    "counted",
    "curve_from_scores",
    "curve_scores",
    "curve_sizes",
    "fit_calibrator",
    "joined",
    "measure_calibration",
    "metric_of",
    "metrics_for",
    "paired_answers",
    "pareto",
    "per_class",
    "rank_over_datasets",
    "scores",
    "wilson",
]
