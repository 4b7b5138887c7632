"""Numbers from predictions: scores with intervals, honest comparison, calibration, and the learning curve.

Needs scikit-learn, no torch, no plots. `Predictions` holds one head's predictions, `METRICS` has a row per metric, `scores`
computes all scores of one head, and `compare` finds the heads that are worse than the best.

    predictions.py  a head's predictions, in memory and in a file    intervals.py   confidence intervals of shares and means
    metric.py       the table of metrics, and their resampling       scoring.py     all scores of one head, and per class
    comparison.py   paired tests, corrected for multiple comparisons and for selection
    calibration.py  fit and measure probabilities                    learning_curve.py  accuracy by number of images
    strangeness.py  out-of-distribution scores, label sets           picking.py     which images to label next
    audit.py        label issues, near-duplicates, outliers          fewshot.py     few-shot episodes
    advice.py       the expected gain of fine-tuning                 logme.py       transferability of features
    domains.py      distances between domains, adaptation
    leaderboard/    rows, the recommendation, the table
"""

from pipeline.evaluation.calibration import Calibration, fit_calibrator, measure_calibration
from pipeline.evaluation.comparison import Difference, Optimism, Paired, compare, paired_answers
from pipeline.evaluation.intervals import Interval, wilson
from pipeline.evaluation.learning_curve import LearningCurve
from pipeline.evaluation.metric import ACCURACY, METRICS, Metric, counted, metric_of, metrics_for
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
    "Scores",
    "compare",
    "confusion_matrix",
    "counted",
    "fit_calibrator",
    "joined",
    "measure_calibration",
    "metric_of",
    "metrics_for",
    "paired_answers",
    "per_class",
    "scores",
    "wilson",
]
