"""The built-in heads, one row each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sklearn.base import clone
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

from pipeline.heads.cosine import CosineVote
from pipeline.heads.fast import linear
from pipeline.heads.fast.discriminant import LDA
from pipeline.heads.fast.forests import FOREST
from pipeline.heads.fast.kernel import RBF_SVM
from pipeline.heads.head import Head
from pipeline.heads.perceptron import MLP, fit_keeping_best
from pipeline.heads.space import Categorical, Integer, Real


def _alone(model: Any, seed: int) -> Pipeline:
    model = clone(model)
    return Pipeline([("head", model.set_params(random_state=seed) if "random_state" in model.get_params() else model)])


def _scaled(model: Any, seed: int) -> Pipeline:
    return Pipeline([("scaler", StandardScaler()), *_alone(model, seed).steps])


def _log(low: float, high: float) -> Real:
    return Real(low, high, prior="log-uniform")


RIDGE = Head(
    name="ridge",
    build=partial(_scaled, RidgeClassifier()),
    space={"alpha": _log(1e-2, 1e6)},
    defaults={"alpha": 100.0},
    simplicity=1,
    linear=True,
    takes_class_weight=True,
    evaluator=linear.RIDGE,
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
    evaluator=linear.LOGISTIC_REGRESSION,
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
        evaluator=LDA,
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
        evaluator=linear.LINEAR_SVM,
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
    Head(
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
    ),
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
        evaluator=FOREST,
    ),
    Head(
        name="rbf_svm",
        # Of classes with equally many votes libsvm takes the first; the scores, and probabilities made of them, know better.
        build=partial(_scaled, SVC(cache_size=500, break_ties=True)),
        space={"C": _log(1e-1, 1e3), "gamma": _log(1e-5, 1e-1)},
        # Scaled features have a mean squared norm of their dimension; 0.002 is scikit-learn's "scale" at 512.
        defaults={"C": 10.0, "gamma": 0.002},
        simplicity=7,
        takes_class_weight=True,
        evaluator=RBF_SVM,
    ),
    Head(
        name="mlp",
        # A thousandth of a nat per image is less than any score shows, and waiting for less took half of the time.
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
        fit=fit_keeping_best,
    ),
)

HEADS: Mapping[str, Head] = {row.name: row for row in _ROWS}
"""The built-in heads by name."""
