"""The page's data, read from saved artifacts without tuning or running a network.

A part whose files are missing is None, with the reason in `missing`, which the page shows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DatasetIndex
from pipeline.data.classes import class_columns
from pipeline.data.targets import TARGETS
from pipeline.embed.records import concatenated, open_features, read_records, require_index
from pipeline.errors import PipelineError
from pipeline.evaluation import HeadPredictions, audit
from pipeline.evaluation.leaderboard import (
    Leaderboard,
    Trials,
    read_leaderboard,
    read_predictions,
    read_trials,
    recommend,
)
from pipeline.evaluation.learning_curve import (
    LearningCurve,
    curve_from_scores,
    curve_scores,
    curve_sizes,
    stratified_order,
)
from pipeline.experiment import FEWSHOT, MISTAKES, Artifacts, read_document, read_record
from pipeline.heads import RIDGE, configure
from pipeline.io.process import instead

if TYPE_CHECKING:
    from pipeline.evaluation.advice import Advice
    from pipeline.evaluation.fewshot import FewShot

MOST_IMAGES = 20_000
"""Most images whose features are read."""
MOST_DOTS = 900
"""Most images on the map: each has a thumbnail, and the page should stay well below 3 MB."""
LEAST_UMAP = 20
"""Fewest images for UMAP, which uses fifteen neighbours of each."""
MOST_CURVE_ROWS = 6_000
TRAINING = ("train", "validation")
CURVE_HEAD = RIDGE
"""The cheap head of the learning curve: one factorisation per fit. Its penalty is the number of features, because with a small
penalty ridge gets worse where n is near the number of features (double descent), which no power law fits."""
CURVE_DRAWS = 5

T = TypeVar("T")


@dataclass(frozen=True)
class EmbeddingView:
    """One embedding of the images in use: `rows` of the index, shape (n,), `features` of shape (n, dim)."""

    embedding: str
    rows: NDArray[np.intp]
    images: DatasetIndex
    features: NDArray[np.float32]
    labelled: int
    """Number of all training images, even if `images` are a subset."""
    seed: int


@dataclass(frozen=True)
class Map:
    """The embedding space in two dimensions: `rows` of the index, shape (n,), and their `points`, shape (n, 2)."""

    rows: NDArray[np.intp]
    points: NDArray[np.float32]
    method: str = "PCA"


@dataclass(frozen=True)
class Material:
    """The page's data; `predictions` and `trials` are by row key, and expensive parts are computed on first access."""

    output: Path
    leaderboard: Leaderboard
    predictions: Mapping[str, HeadPredictions]
    trials: Mapping[str, Trials]
    index: DatasetIndex | None = None
    view: EmbeddingView | None = None
    """The embedding of the best row with features."""
    findings: audit.Findings = field(default_factory=audit.Findings)
    missing: tuple[str, ...] = ()
    few_shot: FewShot | None = None
    """Results of `manyheads fewshot`, if it was run."""
    advice: Advice | None = None
    """Result of `manyheads advise`, if it was run."""
    why: Mapping[str, Any] = field(default_factory=dict)
    """Explanations of the best row's mistakes by path, as `explained.keep` stores them, if `manyheads report --explain` was run."""

    @property
    def target(self) -> str:
        """The kind of the experiment's target, which decides on the sections."""
        return self.leaderboard.target.kind

    @property
    def best(self) -> HeadPredictions | None:
        """The best row's predictions."""
        return self.predictions.get(self.leaderboard.best.key)

    @cached_property
    def map(self) -> Map | None:
        """The embedding space; None without features."""
        return None if self.view is None or len(self.view.rows) < 3 else _map(self.view, self.codes)

    @cached_property
    def kinds(self) -> DatasetIndex | None:
        """The images labelled by countable names: classes, each of several labels, or ranges of a number."""
        return None if self.index is None else TARGETS[self.target].as_classes(self.index)

    @cached_property
    def codes(self) -> Mapping[str, list[int]]:
        """Indices of each path's names among the classes of `kinds`."""
        found, kinds = dict[str, list[int]](), self.kinds
        if kinds is not None:
            columns = class_columns(kinds.labels.astype(str), kinds.classes).tolist()
            for path, code in zip(kinds.paths.tolist(), columns, strict=True):
                found.setdefault(path, []).append(code)
        return found

    @cached_property
    def curve(self) -> LearningCurve | None:
        """Accuracy by number of labelled images; None without features or classes, or with too few images."""
        return _curve(self.view) if self.view is not None and self.leaderboard.target.exclusive else None

    @cached_property
    def label_issues(self) -> audit.LabelIssues:
        """Labels that the best row with out-of-fold probabilities doubts."""
        for row in self.leaderboard.rows:
            part = self.predictions[row.key].out_of_fold if row.key in self.predictions else None
            if part is not None and part.probabilities is not None and part.target.exclusive:
                paths = np.asarray(part.paths).tolist()
                return audit.label_issues(part.probabilities, part.y_true, part.classes, paths)
        return audit.LabelIssues()


def gather(output: Path) -> Material:
    """Read an experiment's artifacts; PipelineError where there is no leaderboard."""
    files, board = Artifacts(output), read_leaderboard(output)
    if not board.rows:
        raise PipelineError(f"{files.leaderboard}: has no rows; run `manyheads heads` again")
    board = board if board.recommendation else recommend(board, output)
    predictions, missing = read_predictions(board, output), list[str]()

    def found(what: str, read: Callable[..., T], *of: Any) -> T | None:
        try:
            return read(*of)
        except (PipelineError, OSError) as error:
            missing.append(f"{what}: {error}")
        return None

    if board.best.key not in predictions:
        missing.append("The best row left no predictions, so its mistakes cannot be shown.")
    index = found("No images are shown, because the index cannot be read", DatasetIndex.read, files.dataset)
    view = None if index is None else _view(files, board, index, missing)
    findings = found("No near-duplicates and outliers are shown", audit.read_findings, files.audit)
    few_shot = advice = None  # what was not asked for is not imported
    if files.few_shot.exists():
        from pipeline.evaluation.fewshot import FewShot

        few_shot = found("Few-shot scores are not shown", read_record, files.few_shot, FEWSHOT, FewShot)
    if files.advice.exists():
        from pipeline.evaluation.advice import read_advice

        advice = read_advice(files.advice)
    return Material(
        output,
        board,
        predictions,
        read_trials(board, output),
        index,
        view,
        findings or audit.Findings(),
        tuple(missing),
        few_shot,
        advice,
        _why(files, board.best.key),
    )


def _view(files: Artifacts, board: Leaderboard, index: DatasetIndex, missing: list[str]) -> EmbeddingView | None:
    """Read the features of the best embedding that has some, or a stratified sample of them."""
    seed = int(board.provenance.get("seed", 0))
    try:
        require_index(files.features, index.fingerprint())
        records = read_records(files.features)
        concat = board.provenance.get("config", {}).get("concat", ())
        by_name = {record.name: record for record in (*records, *concatenated(concat, records))}
        record = next((by_name[row.embedding] for row in board.rows if row.embedding in by_name), None)
        if record is None:
            missing.append("No embedding of the leaderboard has stored features, so there is no map.")
            return None
        store, splits = open_features(record, files), index.splits.astype(str)
        rows = known = np.flatnonzero(~store.missing(index.digests) & (splits != "excluded"))
        if len(known) > MOST_IMAGES:
            rows = np.sort(known[stratified_order(index.labels[known].astype(str), seed)[:MOST_IMAGES]])
            missing.append(f"The map and the learning curve use {len(rows):,} of {len(known):,} images.")
        labelled = int(np.isin(splits[known], TRAINING).sum())
        return EmbeddingView(record.name, rows, index.rows(rows), store.read(index.digests[rows]), labelled, seed)
    except (OSError, PipelineError) as error:
        missing.append(f"There is no map and no learning curve: the features cannot be read ({error}).")
    return None


def _why(files: Artifacts, row: str) -> Mapping[str, Any]:
    try:
        document = read_document(files.mistakes, MISTAKES)
    except (PipelineError, OSError):
        return {}
    return document["images"] if document["row"] == row else {}


def umap_is_installed() -> bool:
    """Whether the extra `manyheads[umap]` is installed."""
    return find_spec("umap") is not None


def _map(view: EmbeddingView, codes: Mapping[str, list[int]]) -> Map:
    first = np.array([codes[path][0] for path in view.images.paths.tolist()])
    shown = np.sort(stratified_order(first, view.seed)[:MOST_DOTS])
    points = audit.project(view.features[shown], 50)
    if len(shown) < LEAST_UMAP or not umap_is_installed():
        points = points[:, :2]
        return Map(view.rows[shown], np.pad(points, ((0, 0), (0, 2 - points.shape[1]))))
    with instead({"tensorflow": None}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # UMAP warns of missing TensorFlow, which is not needed
        from umap import UMAP
    drawn = UMAP(random_state=view.seed, n_jobs=1).fit_transform(points)
    return Map(view.rows[shown], drawn.astype(np.float32), "UMAP")


def _curve(view: EmbeddingView) -> LearningCurve | None:
    """Measure the curve on the training images, holding out another fifth in each draw; test images are not used."""
    labels = view.images.labels.astype(str)
    rows = np.flatnonzero(np.isin(view.images.splits.astype(str), TRAINING))
    if len(rows) < 50:
        return None
    rows = rows[stratified_order(labels[rows], view.seed)][:MOST_CURVE_ROWS]
    X, y = view.features[rows], class_columns(labels[rows], view.images.classes)
    draws = range(view.seed, view.seed + CURVE_DRAWS)
    parts = [_held_apart(view.images.rows(rows), draw) for draw in draws]
    smallest = min(len(rest) for rest, _ in parts)
    if smallest < 40:  # one group has nearly all images
        return None
    sizes = np.array(curve_sizes(smallest, len(view.images.classes)))
    build = partial(configure, CURVE_HEAD, {"alpha": float(X.shape[1])})
    found = [
        curve_scores(build, (X[rest], y[rest]), (X[held], y[held]), sizes.tolist(), draw)
        for (rest, held), draw in zip(parts, draws, strict=True)
    ]
    scores = np.stack(found, axis=1)
    shared = np.isfinite(scores).all(axis=1)
    return curve_from_scores(sizes[shared].tolist(), list(scores[shared]), view.seed, view.labelled)


def _held_apart(images: DatasetIndex, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Split images, with groups and copies kept together, into a training part and a held-out fifth.

    Returns the rows of both in `images`, intp of shape (k,) and (m,).
    """
    groups, order = images.fold_groups(), stratified_order(images.labels.astype(str), seed)
    part = len(order) // 5
    if groups is None:
        return order[part:], order[:part]
    held = np.random.default_rng(seed).permutation(groups.max() + 1)
    counts = np.cumsum(np.bincount(groups)[held])
    inside = np.isin(groups, held[: max(1, int(np.searchsorted(counts, part)))])
    return order[~inside[order]], order[inside[order]]
