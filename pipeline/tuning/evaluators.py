"""The table of evaluators, by the name a head gives in `Head.evaluator`."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.tuning.evaluation import Evaluator, generic
from pipeline.tuning.forests import FOREST
from pipeline.tuning.kernel import RBF_SVM
from pipeline.tuning.linear import LINEAR_SVM, LOGISTIC_REGRESSION, RIDGE
from pipeline.tuning.on_disk import evaluator_on_disk
from pipeline.tuning.records import Problem

GENERIC = Evaluator(generic)

EVALUATORS: Mapping[str, Evaluator] = {
    "generic": GENERIC,
    "logistic_regression": LOGISTIC_REGRESSION,
    "linear_svm": LINEAR_SVM,
    "ridge": RIDGE,
    "rbf_svm": RBF_SVM,
    "forest": FOREST,
}


def evaluator_for(problem: Problem) -> Evaluator:
    """Return the head's evaluator, or the generic one where it is unknown or cannot serve.

    Raises
    ------
    HeadError
        When the features are on disk and the head cannot be fitted there.
    """
    if problem.on_disk:
        return evaluator_on_disk(problem.head)
    evaluator = EVALUATORS.get(problem.head.evaluator, GENERIC)
    return evaluator if evaluator.usable(problem) else GENERIC
