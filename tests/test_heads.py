"""Heads: the table's promises, what a config may change in a row, and what a user is told when it may not."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import pipeline as package
from pipeline import config as configuration
from pipeline.config import HeadConfig
from pipeline.errors import HeadError
from pipeline.heads import (
    HEADS,
    Categorical,
    Head,
    Integer,
    Real,
    as_layer,
    configure,
    identity,
    resolve,
    resolve_all,
)


def features(classes: int = 3, rows: int = 120, seed: int = 0):
    X, y = make_classification(rows, 10, n_informative=6, n_classes=classes, class_sep=1.5, random_state=seed)
    return X.astype(np.float32), np.array([f"class {label}" for label in y], dtype=object)


def test_an_unknown_head_is_told_with_a_guess():
    with pytest.raises(HeadError) as caught:
        resolve_all((HeadConfig(name="knm"), HeadConfig(name="ridge", class_weight="balanced")))
    assert caught.value.problems == (
        "unknown head 'knm', did you mean 'knn'?; allowed: prototypes, nearest_centroid, ridge, logistic_regression, "
        "lda, linear_svm, decision_tree, knn, cosine_knn, random_forest, rbf_svm, mlp, tabicl, or package.module:ATTRIBUTE",
    )


def test_a_name_of_a_built_in_head_stands_in_its_row_and_nowhere_else():
    sources = [path for path in Path(package.__file__).parent.rglob("*.py") if path.name != "table.py"]
    sources = [path for path in sources if path.parent.name != "fewshot"]  # whose methods are its own
    words = {
        word for path in sources for word in re.findall(r"""["']([a-z_]+)["']""", path.read_text(encoding="utf-8"))
    }
    assert not words & set(HEADS)


def test_simplicity_orders_the_heads_from_centroids_to_networks():
    ranked = sorted(HEADS.values(), key=lambda head: head.simplicity)
    assert [head.name for head in ranked[:4]] == ["nearest_centroid", "prototypes", "ridge", "logistic_regression"]
    assert len({head.simplicity for head in ranked}) == len(ranked)


@pytest.mark.parametrize("head", HEADS.values(), ids=lambda head: head.name)
def test_every_head_learns_and_keeps_its_promises(head: Head):
    X, y = features()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        pipeline = configure(head, head.defaults, seed=1).fit(X, y)
    assert pipeline.score(X, y) > 0.7
    assert hasattr(pipeline, "predict_proba") == head.probabilities
    assert ("class_weight" in pipeline[-1].get_params()) == head.takes_class_weight
    assert set(head.defaults) == set(head.space)
    assert all(head.defaults[key] in dimension for key, dimension in head.space.items())
    assert identity(pickle.loads(pickle.dumps(head)), 1) == identity(head, 1)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("head", HEADS.values(), ids=lambda head: head.name)
def test_the_same_seed_gives_the_same_head(head: Head):
    X, y = features()
    fits = [configure(head, head.defaults, seed=5).fit(X, y) for _ in range(2)]
    assert np.array_equal(fits[0].predict(X), fits[1].predict(X))
    assert identity(head, 5) == identity(head, 5)
    if "head__random_state" in fits[0].get_params():
        assert identity(head, 5) != identity(head, 6)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.linear])
def test_a_linear_head_as_a_layer_says_what_the_head_says(name: str, classes: int):
    X, y = features(classes)
    pipeline = configure(HEADS[name], HEADS[name].defaults, 0).fit(X, y)
    weights, bias = as_layer(pipeline)
    scores = X @ weights.T + bias
    assert weights.shape == (classes, 10)
    assert np.array_equal(pipeline.classes_[scores.argmax(axis=1)], pipeline.predict(X))
    decision = pipeline.decision_function(X)
    own = scores[:, 1] - scores[:, 0] if classes == 2 else scores
    np.testing.assert_allclose(own, decision, atol=1e-4)
    if HEADS[name].probabilities:
        softmax = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(softmax, pipeline.predict_proba(X), atol=1e-5)


def test_a_range_is_replaced_and_keeps_its_prior():
    head = resolve(HeadConfig(name="rbf_svm", space={"C": (100, 1e5)}))
    assert (head.space["C"].low, head.space["C"].high, head.space["C"].prior) == (100, 1e5, "log-uniform")
    assert head.defaults["C"] == 100
    assert head.space["gamma"] is HEADS["rbf_svm"].space["gamma"]
    assert HEADS["rbf_svm"].space["C"].low == 0.1
    assert identity(head, 0) != identity(HEADS["rbf_svm"], 0)


def test_choices_are_replaced_and_one_value_fixes_a_parameter():
    head = resolve(HeadConfig(name="knn", space={"weights": ("uniform",), "metric": ("cosine", "euclidean")}))
    assert "weights" not in head.space
    assert head.fixed == {"weights": "uniform"}
    assert list(head.space["metric"].categories) == ["cosine", "euclidean"]
    assert configure(head, head.defaults, 0)[-1].weights == "uniform"


def test_class_weight_is_set_where_it_can_be():
    head = resolve(HeadConfig(name="linear_svm", class_weight="balanced"))
    assert head.build(0)[-1].class_weight == "balanced"
    assert HEADS["linear_svm"].build(0)[-1].class_weight is None
    assert pickle.loads(pickle.dumps(head)).build(0)[-1].class_weight == "balanced"


def test_all_problems_of_a_head_are_told_at_once():
    wrong = HeadConfig(
        name="knn",
        space={
            "neighbours": (1, 5),
            "n_neighbors": (5.5, 9),
            "weights": ("unifrom", "distance"),
            "metric": (1, 2),
        },
        class_weight="balanced",
    )
    with pytest.raises(HeadError) as caught:
        resolve(wrong)
    assert str(caught.value).splitlines() == [
        "head knn: 5 problems",
        "  space.neighbours: unknown parameter, did you mean 'n_neighbors'?; this head is searched over n_neighbors, weights, metric",
        "  space.n_neighbors: expected [low, high] in whole numbers, such as [1, 64], got [5.5, 9]",
        "  space.weights: 'unifrom' is not a choice, did you mean 'uniform'?; allowed: uniform, distance",
        "  space.metric: 1 is not a choice; expected a list such as ['euclidean', 'cosine']",
        "  class_weight: 'balanced' is not possible with this head; heads that take it: ridge, logistic_regression, "
        "linear_svm, decision_tree, random_forest, rbf_svm",
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0, 1), "is searched on a logarithmic scale, so low must be above 0, got [0, 1]"),
        ((2, 1), "expected [low, high] in numbers, such as [1e-06, 100.0], got [2, 1]"),
        ((1, 2, 3), "expected [low, high] in numbers, such as [1e-06, 100.0], got [1, 2, 3]"),
        ((True, 2), "expected [low, high] in numbers, such as [1e-06, 100.0], got [True, 2]"),
        ((), "expected [low, high] in numbers, such as [1e-06, 100.0], got []"),
    ],
)
def test_ranges_that_are_no_ranges(values, text):
    with pytest.raises(HeadError) as caught:
        resolve(HeadConfig(name="logistic_regression", space={"C": values}))
    assert caught.value.problems == (f"space.C: {text}",)


OWN_HEADS = """
from sklearn.naive_bayes import GaussianNB
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import Pipeline
from pipeline.heads import Head, Real

def build(seed):
    return Pipeline([("head", GaussianNB())])

BAYES = Head("naive_bayes", build, {"var_smoothing": Real(1e-12, 1e-3, prior="log-uniform")}, {"var_smoothing": 1e-9}, probabilities=True)
FLAWED = Head("naive bayes", build, {"smoothing": Real(1, 2)}, {"smoothing": 3.0, "more": 1})
ODD = Head("odd", build, {"var_smoothing": (1e-12, 1e-3)}, {"var_smoothing": 1e-9})
NO_HEAD = 3
"""


@pytest.fixture
def own_heads(tmp_path, monkeypatch):
    (tmp_path / "own_heads_for_test.py").write_text(OWN_HEADS)
    monkeypatch.chdir(tmp_path)
    return "own_heads_for_test"


def test_a_users_own_head_is_imported_from_the_current_folder(own_heads):
    head = resolve(HeadConfig(name=f"{own_heads}:BAYES", space={"var_smoothing": (1e-10, 1e-2)}))
    assert head.name == "naive_bayes"
    assert head.space["var_smoothing"].high == 1e-2
    X, y = features()
    assert configure(head, head.defaults, 0).fit(X, y).score(X, y) > 0.6


def test_a_users_own_head_is_imported_from_beside_the_config(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "heads_beside_the_config.py").write_text(OWN_HEADS)
    config = tmp_path / "configs" / "own.yaml"
    config.write_text("{output: o, backbones: [{name: resnet18}], heads: ['heads_beside_the_config:BAYES']}")
    monkeypatch.chdir(tmp_path)
    assert resolve_all(configuration.load(Path("configs/own.yaml")).heads)[0].name == "naive_bayes"


def test_what_is_wrong_with_a_users_own_head_is_told(own_heads):
    messages = {}
    for attribute in ("BAYS", "NO_HEAD", "FLAWED", "ODD"):
        with pytest.raises(HeadError) as caught:
            resolve(HeadConfig(name=f"{own_heads}:{attribute}"))
        messages[attribute] = str(caught.value)
    assert messages["BAYS"] == (
        "head 'own_heads_for_test:BAYS': 'own_heads_for_test' has no 'BAYS', did you mean 'BAYES'?"
    )
    assert messages["NO_HEAD"] == "head 'own_heads_for_test:NO_HEAD': is of type int, expected a pipeline.heads.Head"
    lines = messages["FLAWED"].splitlines()
    assert lines[0] == "head 'own_heads_for_test:FLAWED': 4 problems"
    assert lines[1] == "  name: 'naive bayes' cannot be part of a file name; use letters, digits, '.', '_' and '-'"
    assert lines[2] == "  defaults: expected a value for each parameter of the space, and for no other"
    assert lines[3] == "  defaults.smoothing: 3.0 is not in Real(low=1, high=2, prior='uniform')"
    assert lines[4].startswith("  build: a pipeline with the defaults cannot be built (ValueError: Invalid parameter")
    assert messages["ODD"].splitlines()[1:] == [
        "  space.var_smoothing: expected a Real, Integer or Categorical of pipeline.heads, got (1e-12, 0.001)"
    ]
    with pytest.raises(HeadError, match=r"module 'no_such_module' cannot be imported \(ModuleNotFoundError"):
        resolve(HeadConfig(name="no_such_module:HEAD"))


def test_problems_of_several_heads_are_told_together(own_heads):
    configs = [
        HeadConfig(name="mlp", class_weight="balanced"),
        HeadConfig(name="ridge", space={"C": (1, 2)}),
        HeadConfig(name="no_such_module:HEAD"),
    ]
    with pytest.raises(HeadError) as caught:
        resolve_all(configs)
    assert caught.value.message == "heads: 3 problems"
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["mlp", "ridge", "head 'no_such_module"]


def test_the_scaler_is_fitted_inside_the_pipeline():
    X, y = features()
    pipeline = configure(HEADS["ridge"], {}, 0).fit(X[:60], y[:60])
    assert isinstance(pipeline, Pipeline)
    assert isinstance(pipeline[0], StandardScaler)
    np.testing.assert_allclose(pipeline[0].mean_, X[:60].mean(axis=0), atol=1e-5)


def test_dimensions_are_of_the_three_kinds():
    for head in HEADS.values():
        assert all(isinstance(dimension, (Real, Integer, Categorical)) for dimension in head.space.values())
