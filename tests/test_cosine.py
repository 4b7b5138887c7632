"""Votes by cosine are what their sources say, and come back from a file that cannot run code."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.neighbors import KNeighborsClassifier

from pipeline.data.targets import Classification
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle
from pipeline.heads import HEADS, configure
from pipeline.heads.cosine import CosineVote


@pytest.fixture(scope="module")
def data():
    X, y = make_classification(150, 10, n_informative=6, n_classes=3, class_sep=1.5, random_state=0)
    return X[:100].astype(np.float32), y[:100], X[100:].astype(np.float32)


def test_neighbours_vote_with_the_exponential_of_their_cosine(data, monkeypatch):
    X, y, X_test = data
    monkeypatch.setattr("pipeline.heads.cosine.BLOCK_NUMBERS", 700)  # several blocks
    theirs = KNeighborsClassifier(7, metric="cosine", weights=lambda distance: np.exp(-distance / 0.2)).fit(X, y)
    ours = CosineVote(n_neighbors=7, temperature=0.2).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X_test), theirs.predict_proba(X_test), atol=1e-5)
    assert (CosineVote(n_neighbors=1, temperature=1e-3).fit(X, y).predict(X) == y).all()


def test_a_prototype_is_the_mean_of_the_directions_of_its_class(data):
    X, y, X_test = data
    centred = X - X.mean(axis=0)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    means = np.stack([units[y == label].mean(axis=0) for label in range(3)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    test = X_test - X.mean(axis=0)
    weights = np.exp(test / np.linalg.norm(test, axis=1, keepdims=True) @ means.T / 0.1)
    ours = CosineVote(n_neighbors=None, temperature=0.1, centre=True, prototypes=True).fit(X, y)
    np.testing.assert_allclose(ours.predict_proba(X_test), weights / weights.sum(axis=1, keepdims=True), atol=1e-4)


def test_fewer_rows_than_neighbours_and_a_row_of_zeros_are_no_error(data):
    X, y, _ = data
    few = CosineVote(n_neighbors=200).fit(X[:9], y[:9])
    assert np.isfinite(few.predict_proba(np.zeros((1, 10), np.float32))).all()


@pytest.mark.parametrize("name", ["prototypes", "cosine_knn", "lda"])
def test_a_saved_head_runs_no_code_and_says_the_same(name, data, tmp_path):
    X, y, X_test = data
    pipeline = configure(HEADS[name], HEADS[name].defaults, 0).fit(X, y)
    made = ModelBundle(name, {}, Classification(("a", "b", "c")), {}, pipeline, {})
    bundles.save(made, tmp_path)
    assert (tmp_path / "head.skops").exists()
    labels, probabilities = bundles.load(tmp_path).predict(X_test)
    expected = made.predict(X_test)
    assert (labels == expected[0]).all()
    np.testing.assert_array_equal(probabilities, expected[1])
