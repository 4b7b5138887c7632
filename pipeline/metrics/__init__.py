"""Scores with intervals, honest comparison, calibration, and the learning curve: numbers from predictions.

Needs numpy and scipy, no torch, no plots. Two names for stage two: `scores(y_true, y_pred, probabilities, classes)` gives
one head's test scores, and `Predictions` is what it writes beside each bundle so that heads can be compared image by image.
"""

from pipeline.metrics.calibration import (
    Calibration,
    Calibrator,
    ReliabilityBin,
    correct_priors,
    estimate_priors,
    fit_calibrator,
    measure_calibration,
    scores_as_columns,
)
from pipeline.metrics.comparison import (
    Difference,
    Paired,
    Ranking,
    bootstrap_difference,
    compare,
    corrected_t,
    exchange_test,
    holm,
    mcnemar,
    paired_answers,
    paired_bootstrap,
    paired_test,
    rank_over_datasets,
)
from pipeline.metrics.intervals import Interval, bootstrap_interval, mean_interval, repeated_interval, wilson
from pipeline.metrics.learning_curve import (
    CurvePoint,
    HeldBack,
    LearningCurve,
    PowerLaw,
    curve_from_scores,
    curve_scores,
    curve_sizes,
    measure_curve,
    pareto,
)
from pipeline.metrics.metric import ACCURACY, METRICS, Answers, Metric
from pipeline.metrics.optimism import Optimism, selection_optimism, trial_optimism
from pipeline.metrics.predictions import Predictions, PredictionSet
from pipeline.metrics.scoring import ClassScores, Scores, class_columns, confusion_matrix, per_class, scores

__all__ = [
    "ACCURACY",
    "METRICS",
    "Answers",
    "Calibration",
    "Calibrator",
    "ClassScores",
    "CurvePoint",
    "Difference",
    "HeldBack",
    "Interval",
    "LearningCurve",
    "Metric",
    "Optimism",
    "Paired",
    "PowerLaw",
    "PredictionSet",
    "Predictions",
    "Ranking",
    "ReliabilityBin",
    "Scores",
    "bootstrap_difference",
    "bootstrap_interval",
    "class_columns",
    "compare",
    "confusion_matrix",
    "correct_priors",
    "corrected_t",
    "curve_from_scores",
    "curve_scores",
    "curve_sizes",
    "estimate_priors",
    "exchange_test",
    "fit_calibrator",
    "holm",
    "mcnemar",
    "mean_interval",
    "measure_calibration",
    "measure_curve",
    "paired_answers",
    "paired_bootstrap",
    "paired_test",
    "pareto",
    "per_class",
    "rank_over_datasets",
    "repeated_interval",
    "scores",
    "scores_as_columns",
    "selection_optimism",
    "trial_optimism",
    "wilson",
]
