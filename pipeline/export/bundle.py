"""ModelBundle: a fitted head with everything needed to predict, as a folder.

    bundle.json      format, head, parameters, classes, the embedding it was trained on, versions, digests of the files
    head.skops       the fitted scikit-learn pipeline in skops' format, which cannot run code when it is loaded
    head.joblib      instead, for a head with types outside `TRUSTED_TYPES`: a pickle, which can run code
    members/0, ...   instead, for a soft vote: the bundles of its members
    predictions.npz  its predictions for all images, if stage two made it
    known.npz        data on the training images for detecting unknown classes, if that was tested

A head takes *vectors*, so a bundle needs no torch; `predict` combines it with a backbone.
"""

from __future__ import annotations

import io
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray
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

from pipeline.config import names_code
from pipeline.data.classes import scores_as_columns
from pipeline.data.targets import Target, record_of, target_of
from pipeline.errors import BundleError, first_line
from pipeline.evaluation.calibration import Calibrator
from pipeline.experiment import (
    BUNDLE,
    DIGEST,
    MADE_BY,
    bundle_file,
    from_plain,
    read_document,
    require_modest,
    write_document,
)
from pipeline.io.digests import bytes_digest
from pipeline.io.files import write_atomic
from pipeline.io.process import instead, look_in, version

with instead({"sklearn.externals.array_api_compat.torch": None}):
    # skops imports all packages of scikit-learn to list its types; this one would import torch, which heads do not need.
    from skops import io as skops_io

MOST_NUMBERS = 1 << 24
"""The longest vector for testing a loaded head."""

KNOWN = "known.npz"
"""The file with data on the training images for detecting images of unknown classes."""
SKOPS, JOBLIB, MEMBERS = "head.skops", "head.joblib", "members"
"""The location of a head: a file in one of two formats, or the folder of a soft vote's members."""

SMALLEST_PROBABILITY = 1e-6
"""Lower limit before taking logarithms: forests and neighbours return 0, whose logarithm no temperature can scale."""

TRUSTED_TYPES = (
    "pipeline.heads.cosine.CosineVote",  # arrays and numbers, used only by numpy
    "pipeline.heads.in_context.InContext",  # arrays and a digest; weights are read as tensors from a file that the user names
    # scikit-learn's own, reviewed: their state is arrays, numbers and names; loading them calls nothing that a file can choose.
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.calibration._TemperatureScaling",
    "sklearn.metrics._dist_metrics.EuclideanDistance64",
    "sklearn.multiclass._ConstantPredictor",
    "sklearn.neighbors._kd_tree.KDTree",
    "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
    "sklearn.tree._tree.Tree",
)
"""Types beyond skops' own list that a built-in head may hold."""


@dataclass(frozen=True, repr=False)
class ModelBundle:
    """A fitted head and its embedding; a soft vote has `members` instead, whose probabilities are averaged."""

    head: str
    params: Mapping[str, Any]
    target: Target
    embedding: Mapping[str, Any]
    """Stage one's record of the embedding, with the config section to load its backbone."""
    estimator: Any
    """The estimator, fitted on labels encoded by the target's `learned`, for instance as indices of its classes."""
    provenance: Mapping[str, Any]
    calibrator: Calibrator | None = None
    """Maps the estimator's scores, in the order of its `classes_`, to probabilities; never changes the most likely class."""
    members: tuple[ModelBundle, ...] = ()

    @property
    def parts(self) -> tuple[ModelBundle, ...]:
        """The bundles that take vectors: its members, or itself."""
        return self.members or (self,)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.target.classes

    def predict(self, *X: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
        """Predict the labels of n images from their vectors, one array for each of `parts`, as users write labels.

        Returns names of classes, object (str) of shape (n,), or for other targets the result of `decode`; and probabilities of
        shape (n, len(classes)), None for a head without them.
        """
        y_pred, probabilities = self.said(*X)
        labels = self.target.decode(y_pred)
        return labels.astype(object) if labels.dtype.kind == "U" else labels, probabilities

    def said(self, *X: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
        """Predict encoded labels as in `Predictions`, such as indices of classes; BundleError for vectors of another length.

        X : float32 of shape (n, dim), for a soft vote one for each member; labels are int64 of shape (n,), or numbers,
            float64 of shape (n,) or (n, k); probabilities are float64 of shape (n, width), None for a head without them
        """
        if self.members:
            of_members = [member.said(vectors)[1] for member, vectors in zip(self.members, X, strict=True)]
            return self.voted([probabilities for probabilities in of_members if probabilities is not None])
        (vectors,) = X
        dim = getattr(self.estimator, "n_features_in_", vectors.shape[1])
        if vectors.shape[1] != dim:
            raise BundleError(f"head {self.head!r} takes vectors of {dim} numbers, got {vectors.shape[1]}")
        return self.target.predict(self.estimator, vectors, self.calibrated)

    def voted(self, of_members: Sequence[NDArray[np.floating]]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return a soft vote's labels, intp (n,), and probabilities, float64 (n, k), from its members', any float dtype, (n, k)."""
        mean = np.asarray(np.mean(of_members, axis=0, dtype=np.float64))
        probabilities = self.calibrated(mean, "probability")
        return mean.argmax(axis=1), mean if probabilities is None else probabilities

    def calibrated(self, raw: NDArray[np.floating], kind: str | None) -> NDArray[np.float64] | None:
        """Return probabilities for scores of any float dtype, shape (n, columns), as float64; None without a calibrator."""
        return None if self.calibrator is None else self.calibrator.probabilities(logits(raw, kind))


def logits(raw: NDArray[np.floating], kind: str | None) -> NDArray[np.float64]:
    """Return a calibrator's input: decision values with one column per class, or the logarithms of probabilities.

    raw : of any float dtype, shape (n,) for decision values of two classes, or (n, n_classes); returns float64 of shape (n, n_classes)
    """
    if kind == "probability":
        clipped: NDArray[np.float64] = np.clip(raw, SMALLEST_PROBABILITY, 1.0).astype(np.float64)
        return np.log(clipped)
    return scores_as_columns(raw)


def versions() -> dict[str, str]:
    """Return the versions of packages that a fitted head depends on."""
    names = ("manyheads", "scikit-learn", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: str(version(name)) for name in names}}


def save(bundle: ModelBundle, folder: Path, beside: Mapping[str, bytes] | None = None) -> None:
    """Write a bundle with additional files `beside` it, by name; a killed save leaves the previous bundle or none, never a partial one.

    The format is skops', or joblib's if the head holds a type outside `TRUSTED_TYPES`, as recorded in `bundle.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places = [folder / MEMBERS / str(number) for number in range(len(bundle.members))]
    for member, place in zip(bundle.members, places, strict=True):
        save(member, place)
    members = [describe(place) for place in places]
    name, head = (MEMBERS, dict[str, bytes]()) if members else _head_file(bundle.estimator)
    written = {**head, **(beside or {})}
    for each, content in written.items():
        write_atomic(folder / each, content)
    document = {
        "head": bundle.head,
        "params": dict(bundle.params),
        **record_of(bundle.target),
        "embedding": dict(bundle.embedding),
        "calibrator": asdict(bundle.calibrator) if bundle.calibrator else None,
        "file": name,
        **({"members": [member[DIGEST] for member in members]} if members else {}),
        "digests": {each: bytes_digest(content) for each, content in written.items()},
        "runs_code_when_loaded": name == JOBLIB
        or names_code(str((bundle.embedding.get("section") or {}).get("name")))
        or any(member["runs_code_when_loaded"] for member in members),
        "versions": versions(),
        "provenance": dict(bundle.provenance),
    }
    # The document is written last, with the files' digests: only with it is the folder a bundle.
    write_document(folder / "bundle.json", BUNDLE, document)
    for other in {SKOPS, JOBLIB} - {name}:
        (folder / other).unlink(missing_ok=True)


def _head_file(estimator: Any) -> tuple[str, dict[str, bytes]]:
    """Return the name of an estimator's file, and its content under that name."""
    data = skops_io.dumps(estimator)
    if set(skops_io.get_untrusted_types(data=data)) <= set(TRUSTED_TYPES):
        return SKOPS, {SKOPS: data}
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    return JOBLIB, {JOBLIB: buffer.getvalue()}


def add(folder: Path, files: Mapping[str, bytes], more: Mapping[str, Any]) -> None:
    """Add files, by name, and entries of its document to a bundle."""
    document = describe(folder)
    for name, content in files.items():
        write_atomic(folder / name, content)
    digests = {**document["digests"], **{name: bytes_digest(content) for name, content in files.items()}}
    kept = {key: value for key, value in document.items() if key not in ("format", "version", MADE_BY, DIGEST)}
    write_document(folder / "bundle.json", BUNDLE, {**kept, **more, "digests": digests})


def describe(folder: Path) -> dict[str, Any]:
    """Read and check a bundle's document without loading its head; BundleError if it is missing or damaged."""
    return read_document(folder / "bundle.json", BUNDLE)


def load(folder: Path, *, trust_code: bool = False) -> ModelBundle:
    """Load a bundle; BundleError if it is damaged, of another scikit-learn, or can run code and is not trusted."""
    document = describe(folder)
    try:
        file, found = document["file"], str(document["versions"]["scikit-learn"])
        stored = document.get("calibrator")
        calibrator = None if stored is None else from_plain(Calibrator, stored)
        target, about = target_of(document), {key: document[key] for key in ("head", "params", "embedding")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{folder}/bundle.json: incomplete (missing: {error.args[0]}); {BUNDLE.again}") from None
    if file not in (SKOPS, JOBLIB, MEMBERS):
        raise BundleError(f"{folder}/bundle.json: incomplete (missing: a known head file); {BUNDLE.again}")
    # scikit-learn only guarantees that a fitted object loads in the release (major.minor) that wrote it.
    own = str(version("scikit-learn"))
    if found.split(".")[:2] != own.split(".")[:2]:
        raise BundleError(f"{folder}: saved with scikit-learn {found}, this is {own}; install that, or {BUNDLE.again}")
    members = tuple(load(place, trust_code=trust_code) for place in places_of(folder, document))
    bundle = ModelBundle(
        **about,
        target=target,
        estimator=None if members else _load_head(folder / file, trust_code),
        provenance=document.get("provenance", {}),
        calibrator=calibrator,
        members=members,
    )
    _require_predicts(bundle, folder / file)
    return bundle


def places_of(folder: Path, document: Mapping[str, Any]) -> list[Path]:
    """Return the folders of a soft vote's members, none for other bundles; BundleError if members were changed."""
    if document["file"] != MEMBERS:
        return []
    digests = list(document.get("members") or ())
    places = [folder / MEMBERS / str(number) for number in range(len(digests))]
    if not places or [describe(place).get(DIGEST) for place in places] != digests:
        raise BUNDLE.damaged(folder / MEMBERS, "its members are not those that bundle.json names")
    return places


def _load_head(path: Path, trust_code: bool) -> Any:
    """Load and check an estimator's file; a pickle only if `trust_code`."""
    data = bundle_file(path.parent, path.name)
    if path.name == JOBLIB and not trust_code:
        raise BundleError(f"{path}: can run any code when it is loaded; add --trust only if you know who made it")
    if path.name == JOBLIB:
        look_in(Path())
        try:
            return joblib.load(io.BytesIO(data))
        except (ImportError, AttributeError) as error:
            raise BundleError(f"{path}: cannot be loaded ({first_line(error)}); run it where your module is") from None
    try:
        require_modest(data)
        unknown = sorted(set(skops_io.get_untrusted_types(data=data)) - set(TRUSTED_TYPES))
        if unknown:
            raise ValueError(f"it holds types that are not trusted: {', '.join(unknown)}")
        estimator = skops_io.loads(data, trusted=list(TRUSTED_TYPES))
        check_fitted(estimator)
        return estimator
    except Exception as error:  # a crafted file can make the reader fail in any way
        raise BundleError(f"{path}: cannot be read ({type(error).__name__}: {first_line(error)})") from None


def _require_predicts(bundle: ModelBundle, path: Path) -> None:
    """Check that a head can label a vector with one of the bundle's classes; BundleError with the reason if not."""
    dims: list[Any] = [getattr(part.estimator, "n_features_in_", None) for part in bundle.parts]
    if not all(isinstance(dim, int) for dim in dims):  # a user's own head need not have `n_features_in_`
        return
    try:
        if not all(0 < dim <= MOST_NUMBERS for dim in dims):
            raise ValueError(f"it takes vectors of {', '.join(f'{dim:,}' for dim in dims)} numbers")
        labels, probabilities = bundle.predict(*(np.zeros((1, dim), np.float32) for dim in dims))
        if len(labels) != 1 or (probabilities is not None and not np.isfinite(probabilities).all()):
            raise ValueError("it gives no label, or no probability")
    except Exception as error:  # a crafted head can fail in any way
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise BundleError(f"{path}: cannot label a vector ({reason}); {BUNDLE.again}") from None


# ---- validation of loaded estimators: indices that compiled code uses unchecked are checked, or rebuilt
#
# A safe format calls nothing that a file can choose, but scikit-learn's compiled loops trust its numbers: the children of a
# node, the rows of a support vector or a neighbour. An invalid index causes a crash, an endless loop, or reads of foreign
# memory.

MOST_OBJECTS = 10_000_000


def check_fitted(estimator: Any) -> None:
    """Check all that compiled code relies on in a loaded estimator, and rebuild its search trees; ValueError with the problem."""
    for part in _parts(estimator):
        if issparse(part) and hasattr(part, "check_format"):
            part.check_format(full_check=True)
        for kind, check in CHECKS:
            if isinstance(part, kind):
                check(part)


def _parts(root: Any) -> Iterator[Any]:
    """Yield an object and all objects that it contains, each once."""
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
            # The search tree of a neighbours estimator is not checked, as it is rebuilt.
            rebuilt = {"_tree"} if isinstance(part, NeighborsBase) else set()
            waiting += [each for name, each in vars(part).items() if name not in rebuilt]


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _check_tree(tree: Tree) -> None:
    """Check that children come after their node, so that every traversal ends, and that nodes use existing features."""
    _require(0 < tree.node_count <= tree.capacity, "a tree has a wrong count of nodes")
    nodes = tree.__getstate__()["nodes"]
    leaf = nodes["left_child"] == -1
    _require(bool((nodes["right_child"][leaf] == -1).all()), "a leaf of a tree has a child")
    node, inner = np.arange(len(nodes))[~leaf], nodes[~leaf]
    for children in (inner["left_child"], inner["right_child"]):
        _require(bool(((children > node) & (children < len(nodes))).all()), "a node of a tree has an invalid child")
    inside = (inner["feature"] >= 0) & (inner["feature"] < tree.n_features)
    _require(bool(inside.all()), "a node of a tree uses a feature that does not exist")


def _check_decision_tree(owner: BaseDecisionTree) -> None:
    tree = getattr(owner, "tree_", None)
    _require(
        tree is None or (isinstance(tree, Tree) and tree.n_features == owner.n_features_in_),
        "a tree has other features than its owner",
    )


def _refuse(part: Any) -> None:
    """Refuse search trees outside of neighbours estimators, which rebuild theirs, and histogram trees, which skops does not trust."""
    raise ValueError(f"it holds a {type(part).__name__} that compiled code would use unchecked")


def _check_neighbours(owner: NeighborsBase) -> None:
    points, labels = getattr(owner, "_fit_X", None), getattr(owner, "_y", None)
    if points is None:
        return
    tree = getattr(owner, "_tree", None)
    if tree is not None:
        # Rebuilding from its points gives the same tree, unless its inner arrays were crafted.
        state = tree.__getstate__()
        data, leaf_size = np.asarray(state[0]), int(state[4])
        _require(bool(np.isfinite(data).all()) and leaf_size >= 1, "a search tree has no usable points")
        same = not issparse(points) and points.shape == data.shape
        _require(same, "a search tree has other points than its owner")
        owner._tree = type(tree)(data, leaf_size=leaf_size, metric=state[11])
    if labels is not None and hasattr(owner, "classes_"):
        _require(len(labels) == points.shape[0], "the numbers of labels and points differ")
        classes = owner.classes_ if isinstance(owner.classes_, list) else [owner.classes_]
        columns = np.asarray(labels).reshape(len(labels), -1)
        _require(columns.shape[1] == len(classes), "the numbers of labels and classes differ")
        for column, known in zip(columns.T, classes, strict=True):
            _require(bool(((column >= 0) & (column < len(known))).all()), "a label has no class")


def _check_libsvm(owner: BaseLibSVM) -> None:
    counts = getattr(owner, "_n_support", None)
    if counts is None:
        return
    vectors, total = owner.support_vectors_, len(owner.support_)
    pairs = len(counts) * (len(counts) - 1) // 2 if len(counts) > 1 else 1
    rows = max(len(counts) - 1, 1)
    _require(bool((counts >= 0).all()), "a class has a negative number of support vectors")
    outlier = owner._impl == "one_class" or "svr" in owner._impl
    _require(outlier or int(counts.sum()) == total, "the classes have another number of support vectors in total")
    _require(vectors.shape[0] in (0, total), "the numbers of support vectors and their rows differ")
    _require(owner._dual_coef_.shape == (1 if outlier else rows, total), "coefficients do not fit the support vectors")
    _require(len(owner._intercept_) == (1 if outlier else pairs), "intercepts do not fit the classes")
    for name in ("_probA", "_probB"):
        _require(len(getattr(owner, name, ())) in (0, pairs), "probabilities do not fit the classes")


def _check_ensemble(owner: Any) -> None:
    """Check the feature counts of an ensemble's trees, as only the ensemble checks its input vectors."""
    features = getattr(owner, "estimators_features_", None)
    trees = [part for part in _parts(getattr(owner, "estimators_", ())) if isinstance(part, BaseDecisionTree)]
    taken = {owner.n_features_in_} if features is None else {*map(len, features)}
    _require({tree.n_features_in_ for tree in trees} <= taken, "a tree has other features than its ensemble")


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
"""Type -> check of its objects."""
