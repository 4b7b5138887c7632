"""Numbers from predictions: scores with intervals, honest comparison, calibration, and the learning curve.

Needs scikit-learn, no torch, no plots. `Predictions` is what a head said of images, `METRICS` has a row per score, `scores`
gives all of one head, and `compare` says which heads are worse than the best.

    predictions.py  what a head said, in memory and in a file        intervals.py   how far a share or a mean can be trusted
    metric.py       the table of scores, and how each is resampled   scoring.py     all scores of one head, class by class
    comparison.py   who is better, corrected for many pairs and for having been picked
    calibration.py  scores into probabilities, and how true they are  learning_curve.py  accuracy by images
    strangeness.py  how strange an image is, sets of labels           picking.py    what to label next
    audit.py        labels, near-duplicates and outliers to look at   fewshot.py    a handful of images of each class
    advice.py       what fine-tuning should bring                     logme.py      which features should transfer
    domains.py      how far apart two sources lie, ways to adapt
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
