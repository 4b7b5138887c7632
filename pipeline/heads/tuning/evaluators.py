"""The table of evaluators, by the name a head gives in `Head.evaluator`."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.heads import Params
from pipeline.heads.fast.forests import FOREST
from pipeline.heads.fast.kernel import RBF_SVM
from pipeline.heads.fast.linear import LINEAR_SVM, LOGISTIC_REGRESSION, RIDGE
from pipeline.heads.tuning.evaluation import Evaluator, Rung, generic
from pipeline.heads.tuning.on_disk import evaluator_on_disk
from pipeline.heads.tuning.records import Problem

GENERIC = Evaluator(generic)

FIRST_EPOCHS = 12
"""What a perceptron is first judged after; most take five times as many."""


def _width(problem: Problem, params: Params) -> float:
    """Return what an epoch costs: an affine function of the hidden units, found by timing."""
    return 64.0 + float({**problem.head.fixed, **problem.head.defaults, **params}["hidden_layer_sizes"])


MLP = Evaluator(generic, rungs=(Rung(lambda problem, params: {"max_iter": FIRST_EPOCHS}, budget=4.0),), cost=_width)

EVALUATORS: Mapping[str, Evaluator] = {
    "generic": GENERIC,
    "logistic_regression": LOGISTIC_REGRESSION,
    "linear_svm": LINEAR_SVM,
    "ridge": RIDGE,
    "rbf_svm": RBF_SVM,
    "forest": FOREST,
    "mlp": MLP,
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
