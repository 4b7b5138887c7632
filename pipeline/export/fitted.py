"""Fitted estimators that come out of a file: what compiled code would follow blindly is checked, or made again.

A safe format calls nothing that a file can choose, but scikit-learn's compiled loops trust the numbers they are given: the
children of a node, the rows that a support vector or a neighbour has. One that points elsewhere crashes, never ends, or
reads foreign memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.ensemble._bagging import BaseBagging
from sklearn.ensemble._forest import BaseForest
from sklearn.ensemble._gb import BaseGradientBoosting
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.neighbors import BallTree, KDTree
from sklearn.neighbors._base import NeighborsBase
from sklearn.svm._base import BaseLibSVM
from sklearn.tree import BaseDecisionTree
from sklearn.tree._tree import Tree

MOST_OBJECTS = 10_000_000

_REBUILT = ("_tree", True)


def check_fitted(estimator: Any) -> None:
    """Check every part of a loaded estimator that compiled code relies on; neighbours' search trees are built again.

    Raises
    ------
    ValueError
        With what is wrong, in one line.
    """
    for part in _parts(estimator):
        if issparse(part) and hasattr(part, "check_format"):
            part.check_format(full_check=True)
        for kind, check in CHECKS:
            if isinstance(part, kind):
                check(part)


def _parts(root: Any) -> Iterator[Any]:
    """Yield an object and everything it holds, each once."""
    seen: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (str, bytes, int, float, type(None))) or id(part) in seen:
            continue
        seen[id(part)] = part
        if len(seen) > MOST_OBJECTS:
            raise ValueError(f"it holds more than {MOST_OBJECTS:,} objects")
        yield part
        if isinstance(part, np.ndarray):
            waiting += part.ravel().tolist() if part.dtype == object else []
        elif isinstance(part, dict):
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, (list, tuple, set, frozenset)):
            waiting += part
        elif hasattr(part, "__dict__"):
            # The tree of a search for neighbours is not looked at but built again.
            waiting += [
                each for name, each in vars(part).items() if (name, isinstance(part, NeighborsBase)) != _REBUILT
            ]


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _check_tree(tree: Tree) -> None:
    """See that children come after their node, so that every walk ends, and that nodes ask for features that exist."""
    _require(0 < tree.node_count <= tree.capacity, "a tree says it has other nodes than it has")
    nodes = tree.__getstate__()["nodes"]
    leaf = nodes["left_child"] == -1
    _require(bool((nodes["right_child"][leaf] == -1).all()), "a leaf of a tree has a child")
    node = np.arange(len(nodes))[~leaf]
    for side in ("left_child", "right_child"):
        children = nodes[side][~leaf].astype(np.int64)
        _require(bool(((children > node) & (children < len(nodes))).all()), "a node of a tree has a child that is none")
    asked = nodes["feature"][~leaf].astype(np.int64)
    inside = bool(((asked >= 0) & (asked < tree.n_features)).all())
    _require(inside, "a node of a tree asks for a feature that does not exist")


def _check_decision_tree(owner: BaseDecisionTree) -> None:
    tree = getattr(owner, "tree_", None)
    if tree is not None:
        _require(isinstance(tree, Tree), "a decision tree holds no tree")
        _require(tree.n_features == owner.n_features_in_, "a tree is for other features than its owner")


def _rebuilt(tree: KDTree | BallTree) -> KDTree | BallTree:
    """Build a search tree again from its points: the same, unless its inner arrays were crafted."""
    state = tree.__getstate__()
    data, leaf_size, metric = np.asarray(state[0]), int(state[4]), state[11]
    _require(data.ndim == 2 and data.size > 0 and bool(np.isfinite(data).all()), "a search tree has no usable points")
    _require(leaf_size >= 1, "a search tree has no leaf size")
    return type(tree)(data, leaf_size=leaf_size, metric=metric)


def _refuse(part: Any) -> None:
    """Search trees outside of neighbours, which alone build theirs again, and trees of histograms, which skops does not trust."""
    raise ValueError(f"it holds a {type(part).__name__} that compiled code would follow blindly")


def _check_neighbours(owner: NeighborsBase) -> None:
    points, labels = getattr(owner, "_fit_X", None), getattr(owner, "_y", None)
    if points is None:
        return
    tree = getattr(owner, "_tree", None)
    if tree is not None:
        owner._tree = _rebuilt(tree)
        same = not issparse(points) and points.shape == tree.data.shape
        _require(same, "a search tree has other points than its owner")
    if labels is not None and hasattr(owner, "classes_"):
        _require(len(labels) == points.shape[0], "there are other labels than points")
        classes = owner.classes_ if isinstance(owner.classes_, list) else [owner.classes_]
        columns = np.asarray(labels).reshape(len(labels), -1)
        _require(columns.shape[1] == len(classes), "there are other labels than classes")
        for column, known in zip(columns.T, classes, strict=True):
            _require(bool(((column >= 0) & (column < len(known))).all()), "a label is of no class")


def _check_libsvm(owner: BaseLibSVM) -> None:
    counts = getattr(owner, "_n_support", None)
    if counts is None:
        return
    vectors, total = owner.support_vectors_, len(owner.support_)
    pairs = len(counts) * (len(counts) - 1) // 2 if len(counts) > 1 else 1
    rows = max(len(counts) - 1, 1)
    _require(bool((counts >= 0).all()), "a class has fewer than no support vectors")
    outlier = owner._impl == "one_class" or "svr" in owner._impl
    _require(outlier or int(counts.sum()) == total, "the classes have other support vectors than there are")
    _require(vectors.shape[0] in (0, total), "there are other support vectors than rows of them")
    _require(owner._dual_coef_.shape == (1 if outlier else rows, total), "coefficients do not fit the support vectors")
    _require(len(owner._intercept_) == (1 if outlier else pairs), "intercepts do not fit the classes")
    for name in ("_probA", "_probB"):
        _require(len(getattr(owner, name, ())) in (0, pairs), "probabilities do not fit the classes")


def _check_ensemble(owner: Any) -> None:
    """An ensemble checks vectors once, and its trees take them as they come."""
    features = getattr(owner, "estimators_features_", None)
    trees = [part for part in _parts(getattr(owner, "estimators_", ())) if isinstance(part, BaseDecisionTree)]
    taken = {owner.n_features_in_} if features is None else {*map(len, features)}
    _require({tree.n_features_in_ for tree in trees} <= taken, "a tree is for other features than its ensemble")


CHECKS: tuple[tuple[Any, Callable[[Any], None]], ...] = (
    (Tree, _check_tree),
    (BaseDecisionTree, _check_decision_tree),
    (BaseForest, _check_ensemble),
    (BaseGradientBoosting, _check_ensemble),
    (BaseBagging, _check_ensemble),
    (KDTree, _refuse),
    (BallTree, _refuse),
    (TreePredictor, _refuse),
    (NeighborsBase, _check_neighbours),
    (BaseLibSVM, _check_libsvm),
)
"""Type -> what is checked of each object of it."""
