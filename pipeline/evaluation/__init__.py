"""Scores with intervals, honest comparison, calibration, and the learning curve: numbers from predictions.

Needs scikit-learn, no torch, no plots. Two names for stage two: `scores(y_true, y_pred, probabilities, classes)` gives
one head's test scores, and `Predictions` is what it writes beside each bundle so that heads can be compared image by image.
"""

from pipeline.evaluation.calibration import (
    Calibration,
    Calibrator,
    ReliabilityBin,
    correct_priors,
    fit_calibrator,
    measure_calibration,
    scores_as_columns,
)
from pipeline.evaluation.comparison import (
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
    rank_over_datasets,
)
from pipeline.evaluation.intervals import Interval, mean_interval, repeated_interval, share_interval, tango, wilson
from pipeline.evaluation.learning_curve import (
    CurvePoint,
    HeldBack,
    LearningCurve,
    PowerLaw,
    curve_from_scores,
    curve_scores,
    curve_sizes,
    pareto,
)
from pipeline.evaluation.metric import ACCURACY, METRICS, Metric, counted
from pipeline.evaluation.optimism import Optimism, selection_optimism, trial_optimism
from pipeline.evaluation.predictions import HeadPredictions, Predictions, class_columns, joined
from pipeline.evaluation.scoring import (
    ClassScores,
    Scores,
    confusion_matrix,
    per_class,
    scores,
)

Answers = Predictions
PredictionSet = Predictions

__all__ = [
    "ACCURACY",
    "METRICS",
    "Answers",
    "Calibration",
    "Calibrator",
    "ClassScores",
    "CurvePoint",
    "Difference",
    "HeadPredictions",
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
    "class_columns",
    "compare",
    "confusion_matrix",
    "correct_priors",
    "corrected_t",
    "counted",
    "curve_from_scores",
    "curve_scores",
    "curve_sizes",
    "exchange_test",
    "fit_calibrator",
    "holm",
    "joined",
    "mcnemar",
    "mean_interval",
    "measure_calibration",
    "paired_answers",
    "pareto",
    "per_class",
    "rank_over_datasets",
    "repeated_interval",
    "scores",
    "scores_as_columns",
    "selection_optimism",
    "share_interval",
    "tango",
    "trial_optimism",
    "wilson",
]
