"""The built-in heads, one row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor, NearestCentroid
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from tabulate import tabulate

from pipeline.heads import in_context
from pipeline.heads.cosine import CosineVote
from pipeline.heads.fast import kernel, linear, screened
from pipeline.heads.head import Categorical, Dimension, Head, Integer, Real
from pipeline.heads.tuning.evaluation import Evaluator, generic


def _alone(model: Any, seed: int) -> Pipeline:
    model = clone(model)
    return Pipeline([("head", model.set_params(random_state=seed) if "random_state" in model.get_params() else model)])


def _scaled(model: Any, seed: int) -> Pipeline:
    return Pipeline([("scaler", StandardScaler()), *_alone(model, seed).steps])


def _log(low: float, high: float) -> Real:
    return Real(low, high, prior="log-uniform")


MLP = Evaluator("mlp", generic, screening=screened.FEW_EPOCHS)

RIDGE = Head(
    name="ridge",
    build=partial(_scaled, RidgeClassifier()),
    space={"alpha": _log(1e-2, 1e6)},
    defaults={"alpha": 100.0},
    simplicity=1,
    linear=True,
    takes_class_weight=True,
    evaluator=linear.evaluator("ridge", linear.decided, None, linear.unweighted),
)

LOGISTIC_REGRESSION = Head(
    name="logistic_regression",
    build=partial(_scaled, LogisticRegression(max_iter=1000)),
    space={"C": _log(1e-6, 1e2)},
    defaults={"C": 0.1},
    simplicity=2,
    probabilities=True,
    linear=True,
    takes_class_weight=True,
    evaluator=linear.evaluator("logistic_regression", linear.likely, linear.logistic_family),
)

KNN = Head(
    name="knn",
    build=partial(_scaled, KNeighborsClassifier()),
    space={
        "n_neighbors": Integer(1, 64, prior="log-uniform"),
        "weights": Categorical(("uniform", "distance")),
        "metric": Categorical(("euclidean", "cosine")),
    },
    defaults={"n_neighbors": 5, "weights": "distance", "metric": "cosine"},
    simplicity=5,
    probabilities=True,
)

_ROWS = (
    Head(
        name="prototypes",
        build=partial(_alone, CosineVote(n_neighbors=None, prototypes=True)),
        space={"temperature": _log(1e-2, 1e0), "centre": Categorical((True, False))},
        defaults={"temperature": 0.07, "centre": True},
        simplicity=0.5,
        probabilities=True,
    ),
    Head(
        name="nearest_centroid",
        build=partial(_scaled, NearestCentroid()),
        space={"shrink_threshold": Categorical((None, 0.1, 0.3, 1.0, 3.0))},
        defaults={"shrink_threshold": None},
        simplicity=0,
        probabilities=True,
    ),
    RIDGE,
    LOGISTIC_REGRESSION,
    Head(
        name="lda",
        # "auto" is Ledoit and Wolf's; all other shrinkages of a fold follow from one decomposition.
        build=partial(_scaled, LinearDiscriminantAnalysis(solver="lsqr")),
        space={"shrinkage": Categorical(("auto", 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0))},
        defaults={"shrinkage": "auto"},
        simplicity=2.5,
        probabilities=True,
        linear=True,
        evaluator=linear.LDA,
    ),
    Head(
        name="linear_svm",
        # The dual's coordinate descent needs far more than the default 1,000 passes at large C.
        build=partial(_scaled, LinearSVC(max_iter=5000)),
        space={"C": _log(1e-6, 1e1)},
        defaults={"C": 0.01},
        simplicity=3,
        linear=True,
        takes_class_weight=True,
        # At 2,500 x 512 and 20 classes LIBLINEAR takes twenty times as long to the same optimum.
        evaluator=linear.evaluator("linear_svm", linear.decided, linear.hinge_family, quicker=True),
    ),
    Head(
        name="decision_tree",
        build=partial(_alone, DecisionTreeClassifier()),
        space={
            "max_depth": Integer(2, 32),
            "min_samples_leaf": Integer(1, 64, prior="log-uniform"),
            "criterion": Categorical(("gini", "entropy")),
        },
        defaults={"max_depth": 16, "min_samples_leaf": 1, "criterion": "gini"},
        simplicity=4,
        probabilities=True,
        takes_class_weight=True,
    ),
    KNN,
    Head(
        name="cosine_knn",
        # The first trial is DINO's protocol: features as they are, 20 neighbours, a temperature of 0.07.
        build=partial(_alone, CosineVote()),
        space={
            "n_neighbors": Integer(1, 200, prior="log-uniform"),
            "temperature": _log(1e-2, 1e0),
            "centre": Categorical((False, True)),
        },
        defaults={"n_neighbors": 20, "temperature": 0.07, "centre": False},
        simplicity=5.5,
        probabilities=True,
    ),
    Head(
        name="random_forest",
        # Trees compare one feature with a threshold, so a scaler would change nothing. More trees are never worse on
        # average, so their number is not searched.
        build=partial(_alone, RandomForestClassifier(n_estimators=200)),
        space={"max_features": _log(0.005, 0.5), "min_samples_leaf": Integer(1, 16, prior="log-uniform")},
        defaults={"max_features": 0.05, "min_samples_leaf": 1},
        simplicity=6,
        probabilities=True,
        takes_class_weight=True,
        evaluator=screened.FOREST,
    ),
    Head(
        name="rbf_svm",
        # Without break_ties, libsvm picks the first of classes with equal votes, against the scores and the probabilities.
        build=partial(_scaled, SVC(cache_size=500, break_ties=True)),
        space={"C": _log(1e-1, 1e3), "gamma": _log(1e-5, 1e-1)},
        # Scaled features have a mean squared norm of their dimension; 0.002 is scikit-learn's "scale" at 512.
        defaults={"C": 10.0, "gamma": 0.002},
        simplicity=7,
        takes_class_weight=True,
        evaluator=kernel.RBF_SVM,
    ),
    Head(
        name="mlp",
        # A thousandth of a nat per image changes no score; a smaller tolerance doubled the time.
        build=partial(_scaled, MLPClassifier(max_iter=100, tol=1e-3)),
        space={
            "hidden_layer_sizes": Integer(32, 512, prior="log-uniform"),
            "alpha": _log(1e-6, 1e0),
            "learning_rate_init": _log(1e-4, 1e-2),
        },
        defaults={"hidden_layer_sizes": 128, "alpha": 1e-4, "learning_rate_init": 1e-3},
        simplicity=8,
        probabilities=True,
        evaluator=MLP,
        fit=screened.fit_keeping_best,
    ),
)

HEADS: Mapping[str, Head] = {row.name: row for row in _ROWS}
"""The built-in heads for classes by name."""
FOR_PHOTOS = ("logistic_regression", "linear_svm", "rbf_svm", "random_forest", "ridge", "knn")
"""The heads that are tuned for a folder of photos without a config."""


def constant_guess(y: NDArray[Any], width: int) -> Head:
    """The constant guess: the most frequent class of all training images, or the frequency of each label, equal in every fold.

    Fitted per fold, it could pick another class in each, namely the one held out least, and so be wrong most often.

    y : of all training images, indices of `width` classes, int64 of shape (n,), or the labels of each, bool of shape (n, width)
    """
    several = y.ndim > 1
    learned = y.astype(np.int64) if several else np.unique(y, return_inverse=True)[1]

    def build(seed: int) -> Pipeline:
        guess = DummyClassifier(strategy="prior", random_state=seed)
        if several or learned.max() + 1 == width:  # otherwise class indices would differ between folds and the last fit
            guess = FrozenEstimator(guess.fit(np.zeros((len(y), 1)), learned))
        return Pipeline([("head", guess)])

    name, kind = ("constant", "multilabel") if several else ("most_frequent", "classification")
    return Head(name, build, {}, {}, simplicity=-1, targets=(kind,), probabilities=True)


def _like(name: str, kind: str, evaluator: Evaluator | None = None, **more: Any) -> Head:
    """Return the head for another kind of target with the name and search space of a classification head, unless given in `more`."""
    bare = {"linear": False, "takes_class_weight": False, "fit": Pipeline.fit, "probabilities": kind == "multilabel"}
    return replace(HEADS[name], targets=(kind,), evaluator=evaluator, **{**bare, **more})


_of_numbers, _of_labels = partial(_like, kind="regression"), partial(_like, kind="multilabel")
OF_NUMBERS: Mapping[str, Head] = {
    row.name: row
    for row in (
        _of_numbers("ridge", build=partial(_scaled, Ridge()), evaluator=linear.RIDGE_OF_NUMBERS),
        _of_numbers("knn", build=partial(_scaled, KNeighborsRegressor())),
        _of_numbers(
            "random_forest",
            build=partial(_alone, RandomForestRegressor(n_estimators=200)),
            evaluator=screened.FOREST_OF_NUMBERS,
        ),
        # The target is scaled to unit standard deviation, so that C and epsilon do not depend on its unit.
        _of_numbers(
            "rbf_svm",
            build=partial(_scaled, SVR(cache_size=500)),
            space={**HEADS["rbf_svm"].space, "epsilon": _log(1e-3, 1.0)},
            defaults={"C": 1.0, "gamma": 0.002, "epsilon": 0.1},
            evaluator=kernel.RBF_SVM,
            fit=kernel.fit_each,
        ),
        _of_numbers(
            "mlp",
            build=partial(_scaled, MLPRegressor(max_iter=100, tol=1e-4)),
            evaluator=MLP,
            fit=screened.fit_keeping_best,
        ),
    )
}
"""The built-in heads for numbers by name."""

OF_LABELS: Mapping[str, Head] = {
    row.name: row
    for row in (
        _of_labels("ridge", evaluator=linear.RIDGE_LABELS),
        _of_labels("logistic_regression", evaluator=linear.LOGISTIC_LABELS, fit=linear.fit_each_label),
        _of_labels("linear_svm", evaluator=linear.HINGE_LABELS, fit=linear.fit_each_label),
        _of_labels("decision_tree"),
        _of_labels("knn"),
        _of_labels("random_forest", evaluator=screened.FOREST_OF_NUMBERS),
        _of_labels("rbf_svm", evaluator=kernel.RBF_SVM, fit=linear.fit_each_label),
        _of_labels("mlp", evaluator=MLP, fit=screened.fit_keeping_best),
    )
}
"""The built-in heads for several labels by name."""

MEAN = Head("constant", partial(_alone, DummyRegressor()), {}, {}, simplicity=-1, targets=("regression",))
"""The constant guess for numbers: the mean of the training images, fold by fold."""
TABICL = Head("tabicl", in_context.build, space={}, defaults={}, simplicity=9, probabilities=True)


@dataclass(frozen=True)
class HeadTable:
    """The heads of one kind of target by name, the head for baseline embeddings, and the constant guess."""

    heads: Mapping[str, Head]
    baseline: Head
    guess: Callable[[NDArray[Any], int], Head]
    """(y of all training images, the target's width) -> the constant guess."""
    optional: Mapping[str, Head] = field(default_factory=dict)
    """Heads that need an optional package and are tuned only if a config names them; `build` raises HeadError if it is missing."""

    @property
    def known(self) -> Mapping[str, Head]:
        """All heads that a config can name."""
        return {**self.heads, **self.optional}


TABLES: Mapping[str, HeadTable] = {
    "classification": HeadTable(HEADS, LOGISTIC_REGRESSION, constant_guess, {TABICL.name: TABICL}),
    "multilabel": HeadTable(OF_LABELS, OF_LABELS["logistic_regression"], constant_guess),
    "regression": HeadTable(OF_NUMBERS, OF_NUMBERS["ridge"], lambda y, width: MEAN),
}
"""The tables by kind of target, as named in `pipeline.data.targets`."""


def listed() -> list[str]:
    """Return a text table of the heads of each kind of target; the column `photos` marks those tuned for a folder of photos."""
    headers, lines = ("head", "probabilities", "photos", "tuned"), list[str]()
    for kind, table in TABLES.items():
        cells = []
        for head in table.known.values():
            photos = kind == "classification" and head.name in FOR_PHOTOS
            tuned = ", ".join(f"{name} {_range_text(dimension)}" for name, dimension in head.space.items())
            tuned = f"nothing; needs manyheads[{head.name}]" if head.name in table.optional else tuned
            cells.append((head.name, "yes" * head.probabilities, "yes" * photos, tuned))
        lines += [f"== {kind} ==", *tabulate(cells, headers, "simple", disable_numparse=True).splitlines(), ""]
    return [
        *lines,
        "probabilities: native ones; other heads get theirs by calibration. photos: tuned by `manyheads photos/`.",
        "In a config: heads: [ridge, {name: knn, space: {n_neighbors: [1, 20]}}]; a head of your own is module:NAME.",
    ]


def _range_text(dimension: Dimension) -> str:
    """Return the range of a parameter, or its choices."""
    if isinstance(dimension, Categorical):
        return "/".join(str(choice) for choice in dimension.categories)
    return f"{dimension.low:g} to {dimension.high:g}{' (log)' * (dimension.prior == 'log-uniform')}"
