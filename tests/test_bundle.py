"""Bundles: what is saved predicts the same when loaded; what is not ours, damaged or unsafe is refused in one line."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from documents import rewrite
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

from pipeline.data.classes import Classification
from pipeline.errors import BundleError
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle, check_fitted
from pipeline.heads import HEADS, configure
from pipeline.io.digests import file_digest

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
    return ModelBundle("any", {"C": 1.0}, Classification(CLASSES), {"name": "embedding"}, estimator, {"seed": 0})


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
        f"{tmp_path}/head.joblib: can run any code when it is loaded; add --trust only if you know who made it"
    )
    assert set(bundles.load(tmp_path, trust_code=True).predict(X)[0]) == {"a,b"}


def test_trees_of_histograms_are_not_trusted_and_would_be_refused(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    fitted = HistGradientBoostingClassifier(max_iter=2).fit(*data)
    bundles.save(make(fitted), tmp_path)
    assert (tmp_path / "head.joblib").is_file()
    with pytest.raises(ValueError, match="it holds a TreePredictor that compiled code would use unchecked"):
        check_fitted(fitted)


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
        f"{tmp_path}/bundle/head.joblib: cannot be loaded (No module named 'module_of_a_user'); run it where your module is"
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
        ({"version": 2}, "is 'manyheads bundle' version 2, expected 'manyheads bundle' version 1"),
        ({"format": "other"}, "is 'other' version 1, expected 'manyheads bundle' version 1"),
        ({"versions": {"scikit-learn": "0.24.1"}}, "saved with scikit-learn 0.24.1, this is"),
        ({"file": "../../etc/passwd"}, "incomplete (missing: a known head file)"),
        ({"digests": {"head.skops": "00"}}, "is damaged: its digest is not the one in bundle.json"),
        ({"classes": "abc"}, "incomplete (missing: classes)"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    rewrite(tmp_path / "bundle.json", ridge_bundle(tmp_path, data) | change)
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
    rewrite(tmp_path / "bundle.json", document | {"digests": {"head.skops": file_digest(tmp_path / "head.skops")}})
    with pytest.raises(BundleError, match=r"head\.skops: cannot be read"):
        bundles.load(tmp_path)


def test_no_bundle_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        bundles.load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/bundle.json: missing; expected an experiment's output folder, in which `manyheads heads` "
        "writes bundles, or a bundle's folder"
    )


def test_vectors_of_another_length_are_refused(data: tuple[NDArray[np.float32], NDArray[np.int64]]) -> None:
    X, y = data
    bundle = make(configure(HEADS["ridge"], {"alpha": 1.0}, 0).fit(X, y))
    with pytest.raises(BundleError, match="head 'any' takes vectors of 6 numbers, got 5"):
        bundle.predict(X[:, :5])


def crafted(tree: Any, field: str, value: int) -> None:
    """Let the first node of a tree say something else."""
    state = tree.__getstate__()
    state["nodes"] = state["nodes"].copy()
    state["nodes"][field][0] = value
    tree.__setstate__(state)


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("left_child", 10**6, "a node of a tree has an invalid child"),
        ("right_child", -5, "a node of a tree has an invalid child"),
        ("left_child", 0, "a node of a tree has an invalid child"),  # its own child: predicting would never end
        ("feature", 10**6, "a node of a tree uses a feature that does not exist"),
        ("feature", -(10**6), "a node of a tree uses a feature that does not exist"),
    ],
)
@pytest.mark.parametrize("name", ["decision_tree", "random_forest"])
def test_a_crafted_tree_is_refused_before_it_is_walked(
    name: str, field: str, value: int, found: str, data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    fitted = configure(HEADS[name], {"n_estimators": 3} if name == "random_forest" else {}, seed=0).fit(*data)
    head = fitted[-1]
    crafted(head.tree_ if name == "decision_tree" else head.estimators_[-1].tree_, field, value)
    bundles.save(make(fitted), tmp_path)
    with pytest.raises(BundleError) as caught:
        bundles.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}/head.skops: cannot be read (ValueError: {found})"


def test_a_forest_whose_trees_look_at_other_features_is_refused(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = data
    wide = RandomForestClassifier(2, random_state=0).fit(np.hstack([X, X]), y)
    wide.n_features_in_ = DIM
    bundles.save(make(wide), tmp_path)
    with pytest.raises(BundleError, match="a tree has other features than its ensemble"):
        bundles.load(tmp_path)


def test_the_search_tree_of_neighbours_is_built_again_from_its_points(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    X, y = data
    fitted = KNeighborsClassifier(3, algorithm="kd_tree", leaf_size=5).fit(X, y)
    before = fitted.predict_proba(X)
    state = list(fitted._tree.__getstate__())
    state[1] = np.full_like(state[1], 10**9)  # rows of points, far outside
    fitted._tree.__setstate__(tuple(state))
    bundles.save(make(fitted), tmp_path)
    np.testing.assert_array_equal(bundles.load(tmp_path).estimator.predict_proba(X), before)


def test_neighbours_with_fewer_labels_than_points_are_refused(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    fitted = KNeighborsClassifier(3, algorithm="brute").fit(*data)
    fitted._y = fitted._y[:5]
    bundles.save(make(fitted), tmp_path)
    with pytest.raises(BundleError, match="the numbers of labels and points differ"):
        bundles.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "found"),
    [
        (
            "_n_support",
            lambda old: np.array([1, 1, 1], np.int32),
            "the classes have another number of support vectors in total",
        ),
        ("_dual_coef_", lambda old: old[:1].copy(), "coefficients do not fit the support vectors"),
        ("_intercept_", lambda old: old[:1].copy(), "intercepts do not fit the classes"),
    ],
)
def test_a_crafted_support_vector_machine_is_refused(
    name: str, change: Any, found: str, data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    fitted = SVC().fit(*data)
    setattr(fitted, name, change(getattr(fitted, name)))
    bundles.save(make(fitted), tmp_path)
    with pytest.raises(BundleError, match=found):
        bundles.load(tmp_path)


def test_a_head_that_cannot_label_is_refused_when_it_is_loaded(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    fitted = configure(HEADS["ridge"], {"alpha": 1.0}, 0).fit(*data)
    fitted[-1].coef_ = fitted[-1].coef_[:, :2]
    bundles.save(make(fitted), tmp_path)
    with pytest.raises(BundleError, match=r"head.skops: cannot label a vector \(ValueError: "):
        bundles.load(tmp_path)


def test_a_small_file_that_inflates_beyond_reason_is_refused(
    data: tuple[NDArray[np.float32], NDArray[np.int64]], tmp_path: Path
) -> None:
    document = ridge_bundle(tmp_path, data)
    with zipfile.ZipFile(tmp_path / "head.skops", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", bytes(100 << 20))
    rewrite(tmp_path / "bundle.json", document | {"digests": {"head.skops": file_digest(tmp_path / "head.skops")}})
    with pytest.raises(
        BundleError, match=r"head.skops: cannot be read \(ValueError: .* bytes that would inflate to 104"
    ):
        bundles.load(tmp_path)
