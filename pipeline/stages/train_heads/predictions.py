"""What a tuned head said of every image, and the calibrator that turns its scores into probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.svm import SVC, NuSVC

from pipeline.evaluation import METRICS, Predictions, PredictionSet
from pipeline.evaluation.calibration import Calibrator, fit_calibrator
from pipeline.export import bundle as bundles
from pipeline.heads.tuning import TuningRun
from pipeline.stages.train_heads.task import Task


def calibrator_of(tuned: TuningRun, task: Task) -> Calibrator | None:
    """Fit what turns the head's scores into probabilities, on rows it had not seen."""
    out_of_fold = tuned.out_of_fold
    if out_of_fold.scores is None or len(tuned.classes) < 2:
        return None
    place = {code: column for column, code in enumerate(tuned.classes.tolist())}
    columns = np.array([place[code] for code in task.y_train.tolist()])
    votes = out_of_fold.kind == "decision" and len(tuned.classes) > 2 and _counts_votes(tuned.pipeline[-1])
    method = "margins" if votes else "temperature"
    return fit_calibrator(bundles.logits(out_of_fold.scores, out_of_fold.kind), columns, method)


def _counts_votes(model: Any) -> bool:
    """Whether the scores of a fitted model are counts of pairs it decides, as those of scikit-learn's SVC are."""
    return isinstance(model, (SVC, NuSVC)) and model.decision_function_shape == "ovr"


def predictions_of(
    tuned: TuningRun,
    task: Task,
    labels: NDArray[np.object_],
    probabilities: NDArray[np.float64] | None,
    calibrator: Calibrator | None,
) -> Predictions:
    """Collect what the head said of every image, for the report and for paired comparison."""
    names = np.asarray(task.classes, dtype=str)
    out_of_fold = tuned.out_of_fold
    held_out = None
    if out_of_fold.scores is not None and calibrator is not None:
        held_out = np.zeros((len(task.train), len(task.classes)), dtype=np.float32)
        held_out[:, tuned.classes] = calibrator.probabilities(bundles.logits(out_of_fold.scores, out_of_fold.kind))
    tested = None if probabilities is None else probabilities.astype(np.float32)
    return Predictions(
        task.classes,
        PredictionSet(
            task.test.paths.astype(str),
            names[task.y_test],
            labels.astype(str),
            tested,
            units=task.test.fold_groups(),
        ),
        PredictionSet(
            task.train.paths.astype(str),
            names[task.y_train],
            names[tuned.classes[out_of_fold.predictions]],
            held_out,
            out_of_fold.folds,
            _as_searched(tuned, task),
            task.groups,
        ),
    )


def _as_searched(tuned: TuningRun, task: Task) -> NDArray[np.float32] | None:
    """Return the probabilities before calibration where the search was scored by them: shape (n, n_classes), float32."""
    if not METRICS[tuned.scoring].needs_probabilities:
        return None
    found = np.zeros((len(task.train), len(task.classes)), dtype=np.float32)
    found[:, tuned.classes] = tuned.out_of_fold.scores
    return found
