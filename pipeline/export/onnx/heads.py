"""Fitted heads as ONNX: calibrated predictions from vectors, for any kind of target.

Vectors and the scaler are float32 and everything after them float64, as in scikit-learn. Estimators with few operations are
converted here, and those for which skl2onnx deviates from scikit-learn: neighbours (by up to 0.2 of a probability), kernels (in
float32), and perceptrons for several labels or numbers. The rest, such as trees, is converted by skl2onnx.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC

from pipeline.data.classes import SMALLEST
from pipeline.data.targets import Classification, MultiLabel
from pipeline.errors import BundleError, first_line
from pipeline.evaluation.calibration import AHEAD, MOST_REST, SIGMOIDS, Calibrator
from pipeline.export.bundle import SMALLEST_PROBABILITY, ModelBundle
from pipeline.export.onnx.graph import FLOAT, OPSETS, STRING, Graph
from pipeline.heads.cosine import CosineVote

OutputColumns = tuple[str, str]
"""The name of an output, float64 of shape (n, columns), and its kind: `probability`, `decision` or `number`."""
Outputs = dict[str, tuple[Any, list[Any]]]
"""Name -> type and shape."""


def add_answer(g: Graph, bundle: ModelBundle, vectors: Sequence[str], prefix: str = "") -> Outputs:
    """Add a bundle's predictions from its parts' vectors, float32 (n, dim) each, as outputs with a prefix; BundleError if unsupported."""
    target, parts, strings = bundle.target, dict[str, str](), dict[str, tuple[str, list[Any]]]()
    if bundle.members:
        of_members = [
            _probabilities(g, one, *_columns(g, one.estimator, x))
            for one, x in zip(bundle.members, vectors, strict=True)
        ]
        likely = [each for each in of_members if each]
        mean = g("Div", reduce(partial(g, "Add"), likely), float(len(likely)))
        parts["probabilities"] = _calibrated(g, bundle.calibrator, mean, "probability") if bundle.calibrator else mean
        strings["label"] = g("Gather", np.array(target.classes), g("ArgMax", mean, axis=1, keepdims=0)), ["n"]
    else:
        columns, kind = _columns(g, bundle.estimator, vectors[0])
        if isinstance(target, Classification):
            names = np.array(target.classes)[np.asarray(bundle.estimator.classes_, np.int64)]
            strings["label"] = g("Gather", names, g("ArgMax", columns, axis=1, keepdims=0)), ["n"]
            found = _probabilities(g, bundle, columns, kind)
            parts |= {"probabilities": found} if found else {}
        elif isinstance(target, MultiLabel):
            if kind == "probability":
                p = g("Clip", columns, SMALLEST, 1 - SMALLEST)
                columns = g("Log", g("Div", p, g("Sub", 1.0, p)))
            parts["probabilities"] = _calibrated(
                g, bundle.calibrator or Calibrator(SIGMOIDS, (1.0,)), columns, "decision"
            )
            present = g("GreaterOrEqual", parts["probabilities"], np.array(target.thresholds or 0.5))
            strings["labels"] = g("Where", present, np.array([target.classes]), np.array("")), ["n", target.width]
        else:
            numbers = parts["number"] = g("Add", g("Mul", columns, np.array(target.scale)), np.array(target.centre))
            if target.half:
                half = np.array(target.half)
                parts |= {"low": g("Sub", numbers, half), "high": g("Add", numbers, half)}
    for name, (made, _) in strings.items():
        g("Identity", made, named=prefix + name)
    for name, made in parts.items():
        g("Cast", made, named=prefix + name, to=FLOAT)
    floats = {prefix + name: (FLOAT, ["n", target.width]) for name in parts}
    return {prefix + name: (STRING, shape) for name, (_, shape) in strings.items()} | floats


def _probabilities(g: Graph, bundle: ModelBundle, columns: str, kind: str) -> str:
    """Return the probabilities of the target's classes, 0 for those not in the head's training; '' if it has no probabilities."""
    if bundle.calibrator is not None:
        columns = _calibrated(g, bundle.calibrator, columns, kind)
    elif kind == "decision":
        return ""
    places = np.eye(bundle.target.width)[np.asarray(bundle.estimator.classes_, np.int64)]
    return columns if len(places) == bundle.target.width else str(g("MatMul", columns, places))


def _calibrated(g: Graph, calibrator: Calibrator, columns: str, kind: str) -> str:
    """Return `Calibrator.probabilities` of `bundle.logits`."""
    slopes, offsets = np.array(calibrator.slopes), np.array(calibrator.offsets)
    if kind == "probability":
        columns = g("Log", g("Clip", columns, SMALLEST_PROBABILITY, 1.0))
    if calibrator.method == SIGMOIDS:
        return str(g("Sigmoid", g("Add", g("Mul", columns, slopes), offsets)))
    if calibrator.method == "margins":
        rest = g("Clip", g("Sub", columns, g("Round", columns)), -MOST_REST, MOST_REST)
        found = g("Div", g("Mul", 3.0, rest), g("Sub", 1.0, g("Mul", 3.0, g("Abs", rest))))
        leads = g("Equal", columns, g("ReduceMax", columns, [1]))
        columns = g("Where", leads, g("Add", g("ReduceMax", found, [1]), AHEAD), found)
    return str(g("Softmax", g("Mul", columns, slopes), axis=1))


def _columns(g: Graph, estimator: Any, x: str) -> OutputColumns:
    """Return the output columns of a fitted estimator for vectors, as targets need them."""
    steps = [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]
    for step in steps[:-1]:
        if isinstance(step, StandardScaler):
            x = g("Div", g("Sub", x, step.mean_.astype(np.float32)), step.scale_.astype(np.float32))
        elif isinstance(step, PCA):
            linear = step.components_.T / (np.sqrt(step.explained_variance_) if step.whiten else 1.0)
            x = g("Cast", _affine(g, x, linear, -(step.mean_ @ linear)), to=FLOAT)
        else:
            raise BundleError(f"a {type(step).__name__} before a head cannot be exported to ONNX")
    convert = next((convert for kinds, convert in _CONVERTERS if type(steps[-1]) in kinds), _by_skl2onnx)
    return convert(g, steps[-1], x)


def _affine(g: Graph, x: str, weights: NDArray[Any], bias: NDArray[Any]) -> str:
    return str(g("Add", g("MatMul", g.double(x), weights.astype(np.float64)), bias.astype(np.float64)))


def _linear(g: Graph, model: Any, x: str) -> OutputColumns:
    """Return probabilities if the model has them, else decision values of each class, for two classes (-d, d), or numbers."""
    weights, bias = np.atleast_2d(model.coef_).T, np.atleast_1d(model.intercept_)
    is_likely, is_class = hasattr(model, "predict_proba"), hasattr(model, "classes_")
    if weights.shape[1] == 1 and is_class:
        both = np.array([-0.5, 0.5]) if is_likely else np.array([-1.0, 1.0])
        weights, bias = weights * both, bias * both
    scores = _affine(g, x, weights, bias)
    return (
        (g("Softmax", scores, axis=1), "probability") if is_likely else (scores, "decision" if is_class else "number")
    )


def _each_label(g: Graph, model: Any, x: str) -> OutputColumns:
    """Return decision values of a linear model or SVC for each label; labels that all images or none have are constants."""
    none = np.zeros(model.n_features_in_)
    if any(isinstance(one, SVC) for one in model.estimators_):
        columns = [
            g("Gather", _kernel(g, one, x)[0], np.array([1]), axis=1)
            if isinstance(one, SVC)
            else _affine(g, x, none[:, None], one.y_)
            for one in model.estimators_
        ]
        return g("Concat", *columns, axis=1), "decision"
    parts = [
        (one.coef_[0], one.intercept_[0]) if hasattr(one, "coef_") else (none, one.y_[0]) for one in model.estimators_
    ]
    weights, bias = (np.array(column) for column in zip(*parts, strict=True))
    return _affine(g, x, weights.T, bias), "decision"


def _each_number(g: Graph, model: Any, x: str) -> OutputColumns:
    return g("Concat", *(_columns(g, part, x)[0] for part in model.estimators_), axis=1), "number"


def _centroids(g: Graph, model: Any, x: str) -> OutputColumns:
    """Return the softmax of negative squared distances, without the term that all have in common."""
    scale = np.where(model.within_class_std_dev_ != 0, model.within_class_std_dev_, 1.0)
    centroids = model.centroids_ / scale
    bias = 2 * np.log(model.class_prior_) - (centroids**2).sum(axis=1)
    return g("Softmax", _affine(g, x, 2 * centroids.T / scale[:, None], bias), axis=1), "probability"


def _products(g: Graph, x: str, references: NDArray[Any]) -> str:
    return str(g("MatMul", x, g("Transpose", references.astype(np.float64), perm=[1, 0])))


def _squared_distances(g: Graph, x: str, references: NDArray[Any]) -> str:
    lengths = g("Add", g("ReduceSumSquare", x, [1]), (references.astype(np.float64) ** 2).sum(axis=1))
    return str(g("Max", g("Sub", lengths, g("Mul", 2.0, _products(g, x, references))), 0.0))


def _kernel(g: Graph, model: Any, x: str) -> OutputColumns:
    """Return decision values or numbers; for three classes or more, votes plus margins of all pairs, as in `decision_function`."""
    if model.kernel != "rbf":
        raise BundleError(f"a kernel {model.kernel!r} cannot be exported to ONNX, only rbf can")
    vectors, dual, bias = model.support_vectors_, np.asarray(model.dual_coef_), np.asarray(model.intercept_)
    kernel = g("Exp", g("Mul", -float(model._gamma), _squared_distances(g, g.double(x), vectors)))
    if isinstance(model, SVR):
        return _affine(g, kernel, dual.T, bias), "number"
    count = len(model.classes_)
    if count == 2:
        return _affine(g, kernel, dual.T * [-1.0, 1.0], bias * [-1.0, 1.0]), "decision"
    of_class, pairs = np.repeat(np.arange(count), model.n_support_), list(combinations(range(count), 2))
    weights, first, second = (
        np.zeros((rows, columns)) for rows, columns in ((len(vectors), len(pairs)), *((len(pairs), count),) * 2)
    )
    for place, (i, j) in enumerate(pairs):
        weights[of_class == i, place] = dual[j - 1, of_class == i]
        weights[of_class == j, place] = dual[i, of_class == j]
        first[place, i] = second[place, j] = 1
    decisions = _affine(g, kernel, weights, bias)
    won = g.double(g("GreaterOrEqual", decisions, 0.0))
    votes = g("Add", g("MatMul", won, first), g("MatMul", g("Sub", 1.0, won), second))
    sums = g("MatMul", decisions, first - second)
    return g("Add", votes, g("Div", sums, g("Mul", 3.0, g("Add", g("Abs", sums), 1.0)))), "decision"


def _perceptron(g: Graph, model: Any, x: str) -> OutputColumns:
    if model.activation != "relu":
        raise BundleError(f"a perceptron of {model.activation!r} cannot be exported to ONNX, only relu can")
    for place, (weights, bias) in enumerate(zip(model.coefs_, model.intercepts_, strict=True)):
        x = _affine(g, g("Relu", x) if place else x, weights, bias)
    if isinstance(model, MLPRegressor):
        return x, "number"
    if model.out_activation_ == "logistic" and model.n_outputs_ == 1:
        return g("Softmax", g("Mul", x, np.array([-0.5, 0.5])), axis=1), "probability"
    return g("Sigmoid", x) if model.out_activation_ == "logistic" else g("Softmax", x, axis=1), "probability"


def _unit(g: Graph, x: str) -> str:
    length = g("Sqrt", g("ReduceSumSquare", x, [1]))
    return str(g("Div", x, g("Where", g("Equal", length, 0.0), 1.0, length)))


def _mean(g: Graph, weights: str, values: NDArray[np.float64], rows: str) -> str:
    """Return the mean over k references, at `rows` (n, k), of their `values` (references, columns), with weights (n, k)."""
    weights = g("Unsqueeze", weights, [2])
    total = g("ReduceSum", g("Mul", g("Gather", values, rows), weights), [1], keepdims=0)
    return str(g("Div", total, g("ReduceSum", weights, [1], keepdims=0)))


def _neighbours(g: Graph, model: Any, x: str) -> OutputColumns:
    """Return the mean label or number of the nearest training images, with weights 1 or 1 / distance."""
    metric, x, references = model.effective_metric_, g.double(x), np.asarray(model._fit_X)
    if metric not in ("euclidean", "cosine") or model.weights not in ("uniform", "distance"):
        raise BundleError(f"neighbours can be exported to ONNX for euclidean and cosine, not for {metric!r}")
    if metric == "cosine":
        lengths = np.linalg.norm(references.astype(np.float64), axis=1, keepdims=True)
        directions = _products(g, _unit(g, x), references / np.where(lengths > 0, lengths, 1.0))
        distances = g("Max", g("Sub", 1.0, directions), 0.0)
    else:
        distances = g("Sqrt", _squared_distances(g, x, references))
    nearest, rows = g("TopK", distances, [min(model.n_neighbors, len(references))], outputs=2, axis=1, largest=0)
    here = g("Equal", nearest, 0.0)
    weights = g("Add", g("Mul", nearest, 0.0), 1.0)
    if model.weights == "distance":  # if any are at distance 0, only these count
        far, at_all = g("Div", 1.0, g("Where", here, 1.0, nearest)), g("ReduceMax", g.double(here), [1])
        weights = g("Where", g("Greater", at_all, 0.0), g.double(here), far)
    y = np.asarray(model._y).reshape(len(references), -1)
    if isinstance(model, KNeighborsRegressor):
        return _mean(g, weights, y.astype(np.float64), rows), "number"
    if isinstance(model.classes_, list):  # several labels
        values = (
            np.stack([np.asarray(known)[codes] == 1 for known, codes in zip(model.classes_, y.T, strict=True)], 1) * 1.0
        )
        return _mean(g, weights, values, rows), "probability"
    return _mean(g, weights, np.eye(len(model.classes_))[y[:, 0]], rows), "probability"


def _cosine_vote(g: Graph, model: CosineVote, x: str) -> OutputColumns:
    """Return the weighted votes of the neighbours, including all references tied with the last of them."""
    count = len(model.references_)
    cosines = _products(g, _unit(g, g.double(g("Sub", x, model.mean_))), model.references_)
    nearest, _ = g("TopK", cosines, [min(model.n_neighbors or count, count)], outputs=2, axis=1)
    weights = g("Exp", g("Div", g("Sub", cosines, g("ReduceMax", nearest, [1])), float(model.temperature)))
    weights = g("Where", g("Less", cosines, g("ReduceMin", nearest, [1])), 0.0, weights)
    votes = g("MatMul", weights, np.eye(len(model.classes_))[model.codes_])
    return g("Div", votes, g("ReduceSum", votes, [1])), "probability"


def _by_skl2onnx(g: Graph, model: Any, x: str) -> OutputColumns:
    """Return the probabilities of any other estimator, or else its decision values or numbers."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    is_class, is_likely = hasattr(model, "classes_"), hasattr(model, "predict_proba")
    options = {id(model): {"zipmap": False, **({} if is_likely else {"raw_scores": True})}} if is_class else None
    given = [("vectors", FloatTensorType([None, model.n_features_in_]))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = to_onnx(model, initial_types=given, options=options, target_opset=OPSETS)
        columns = g.double(g.add(written, x)[-1])
    except Exception as error:  # it may raise anything for an unsupported estimator
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BundleError(f"a {type(model).__name__} cannot be written by skl2onnx ({reason})") from None
    if isinstance(getattr(model, "classes_", None), list):  # absence and presence of each label: (k, n, 2)
        columns = g("Transpose", g("Gather", columns, np.array(1), axis=2), perm=[1, 0])
    return columns, "probability" if is_likely else "decision" if is_class else "number"


_CONVERTERS: Sequence[tuple[tuple[type, ...], Callable[[Graph, Any, str], OutputColumns]]] = (
    ((LogisticRegression, RidgeClassifier, LinearSVC, LinearDiscriminantAnalysis, Ridge), _linear),
    ((OneVsRestClassifier,), _each_label),
    ((NearestCentroid,), _centroids),
    ((SVC, SVR), _kernel),
    ((MultiOutputRegressor,), _each_number),
    ((MLPClassifier, MLPRegressor), _perceptron),
    ((KNeighborsClassifier, KNeighborsRegressor), _neighbours),
    ((CosineVote,), _cosine_vote),
)
"""Types of estimators -> their converter."""
