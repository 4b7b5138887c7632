"""Bundles: what is saved predicts the same when loaded; what is not ours, damaged or unsafe is refused in one line."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from pipeline import bundle as bundles
from pipeline.bundle import ModelBundle
from pipeline.digests import file_digest
from pipeline.errors import BundleError
from pipeline.heads import HEADS, configure

CLASSES = ("a,b", "käse", "shirt")
DIM = 6


class HomeMade(ClassifierMixin, BaseEstimator):
    """A user's own estimator, of a type that nobody has reviewed."""

    def fit(self, X: NDArray[np.float32], y: NDArray[np.int64]) -> HomeMade:
        self.classes_ = np.unique(y)
        return self

    def predict(self, X: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.full(len(X), self.classes_[0])


@pytest.fixture(scope="module")
def data() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    X = rng.normal(size=(90, DIM)) + 2 * np.eye(3, DIM)[y]
    return X.astype(np.float32), y


def make(estimator: Any) -> ModelBundle:
    return ModelBundle("any", {"C": 1.0}, CLASSES, {"name": "embedding"}, estimator, {"seed": 0})


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", HEADS)
def test_every_built_in_head_is_saved_safely_and_predicts_the_same(
    name: str, data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = data
    head = HEADS[name]
    before = make(configure(head, head.defaults, seed=0).fit(X, y))
    bundles.save(before, tmp_path)
    after = bundles.load(tmp_path)
    assert (tmp_path / "head.skops").is_file()
    assert after.classes == CLASSES
    labels, probabilities = before.predict(X)
    labels_after, probabilities_after = after.predict(X)
    assert list(labels) == list(labels_after)
    assert np.mean(labels == np.asarray(CLASSES, dtype=object)[y]) > 0.6
    if head.probabilities:
        assert probabilities is not None
        assert probabilities_after is not None
        np.testing.assert_array_equal(probabilities, probabilities_after)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)  # those of the mlp are float32
    else:
        assert probabilities is None


def test_a_class_the_head_never_saw_has_probability_zero(
    data: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    X, y = data
    head = HEADS["logistic_regression"]
    estimator = configure(head, head.defaults, seed=0).fit(X[y != 1], y[y != 1])
    labels, probabilities = make(estimator).predict(X)
    assert set(labels) == {"a,b", "shirt"}
    assert probabilities is not None
    assert probabilities.shape == (90, 3)
    assert not probabilities[:, 1].any()


def test_an_unknown_type_is_saved_by_joblib_and_loaded_only_when_trusted(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = data
    bundles.save(make(HomeMade().fit(X, y)), tmp_path)
    assert json.loads((tmp_path / "bundle.json").read_text())["runs_code_when_loaded"] is True
    with pytest.raises(BundleError) as caught:
        bundles.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/head.joblib: a joblib file, which can run any code when it is loaded; "
        "add --trust only if you know who made it"
    )
    assert set(bundles.load(tmp_path, trust_code=True).predict(X)[0]) == {"a,b"}


def test_a_head_of_a_users_own_module_is_loaded_where_the_module_is(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = data
    (tmp_path / "module_of_a_user.py").write_text(
        "from sklearn.naive_bayes import GaussianNB\nclass Own(GaussianNB): pass\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    bundles.save(make(importlib.import_module("module_of_a_user").Own().fit(X, y)), tmp_path / "bundle")
    sys.path.pop()
    del sys.modules["module_of_a_user"]
    with pytest.raises(BundleError) as caught:
        bundles.load(tmp_path / "bundle", trust_code=True)
    assert str(caught.value) == (
        f"{tmp_path}/bundle/head.joblib: its head is of a module of yours that cannot be imported "
        "(No module named 'module_of_a_user'); run the command in the folder where that module is"
    )
    monkeypatch.chdir(tmp_path)
    assert type(bundles.load(tmp_path / "bundle", trust_code=True).estimator).__name__ == "Own"


def test_a_head_saved_anew_in_the_other_format_leaves_no_old_file(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = data
    bundles.save(make(HomeMade().fit(X, y)), tmp_path)
    bundles.save(make(configure(HEADS["ridge"], {"alpha": 1.0}, 0).fit(X, y)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.json", "head.skops"]


def ridge_bundle(folder: Path, data: tuple[NDArray[np.float32], NDArray[np.int64]]) -> dict[str, Any]:
    bundles.save(make(configure(HEADS["ridge"], {"alpha": 1.0}, 0).fit(*data)), folder)
    return dict(json.loads((folder / "bundle.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "bundle version 2 found, this program reads version 1"),
        ({"format": "other"}, "not a bundle of ours; expected format 'manyheads bundle'"),
        ({"versions": {"scikit-learn": "0.24.1"}}, "saved with scikit-learn 0.24.1, this is"),
        ({"file": "../../etc/passwd"}, "incomplete (missing: a known head file)"),
        ({"file_digest": "00"}, "damaged (its digest is not the one in bundle.json)"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    document = ridge_bundle(tmp_path, data) | change
    (tmp_path / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        bundles.load(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_head_is_found(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    ridge_bundle(tmp_path, data)
    path = tmp_path / "head.skops"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(BundleError, match="damaged"):
        bundles.load(tmp_path)


def test_a_pickle_named_as_skops_is_refused(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    document = ridge_bundle(tmp_path, data)
    joblib.dump({"any": "pickle"}, tmp_path / "head.skops")
    document["file_digest"] = file_digest(tmp_path / "head.skops")
    (tmp_path / "bundle.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BundleError, match=r"head\.skops: cannot be read"):
        bundles.load(tmp_path)


def test_no_bundle_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        bundles.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: no bundle here (bundle.json is missing); `manyheads heads` writes bundles"


def test_vectors_of_another_length_are_refused(data: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    X, y = data
    bundle = make(configure(HEADS["ridge"], {"alpha": 1.0}, 0).fit(X, y))
    with pytest.raises(BundleError, match="head 'any' takes vectors of 6 numbers, got 5"):
        bundle.predict(X[:, :5])
