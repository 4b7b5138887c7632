"""Everything the page shows, gathered from the saved artifacts: nothing is tuned again, no network is needed.

A part whose files are missing is None, with the reason in `missing`; the page says so instead of failing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data import DatasetIndex
from pipeline.embed.records import read_records, require_index
from pipeline.errors import PipelineError
from pipeline.evaluation import (
    HeadPredictions,
    LearningCurve,
    audit,
    class_columns,
    curve_from_scores,
    curve_scores,
    curve_sizes,
)
from pipeline.evaluation.leaderboard.judge import Trials, judge, read_predictions, read_trials
from pipeline.evaluation.leaderboard.table import Leaderboard, read_leaderboard
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.experiment import Artifacts
from pipeline.heads import RIDGE, configure
from pipeline.store import FeatureStore

log = logging.getLogger(__name__)

MOST_DOTS = 900
"""Images on the map: each carries its thumbnail, and the page should stay well below 3 MB."""
MOST_CURVE_ROWS = 6_000
TRAINING = ("train", "validation")
CURVE_HEAD = RIDGE
"""The learning curve is measured with a cheap head: one factorisation per fit. Its penalty is the number of features: with
little of it, ridge gets worse where images are about as many as features (double descent), and no law fits that."""
CURVE_DRAWS = 5


@dataclass(frozen=True)
class Map:
    """The embedding space in two dimensions: `rows` of the index, shape (n,), and where each lies, shape (n, 2)."""

    method: str
    rows: NDArray[np.intp]
    points: NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    """What the page is made of; `predictions` and `trials` are by row key."""

    output: Path
    leaderboard: Leaderboard
    predictions: Mapping[str, HeadPredictions]
    trials: Mapping[str, Trials]
    index: DatasetIndex | None
    embedding: str | None
    """The embedding the map, the learning curve and the data audit look at: the best row's, or the best with features."""
    map: Map | None
    curve: LearningCurve | None
    findings: audit.Findings
    missing: tuple[str, ...]

    @property
    def best(self) -> HeadPredictions | None:
        """The best row's predictions."""
        return self.predictions.get(self.leaderboard.best.key)


def gather(output: Path) -> Material:
    """Read an experiment's artifacts and work out what the page shows of them.

    Raises
    ------
    PipelineError
        When there is no leaderboard.
    """
    files = Artifacts(output)
    leaderboard = read_leaderboard(output)
    if not leaderboard.rows:
        raise PipelineError(f"{files.leaderboard}: has no rows; run `manyheads heads` again")
    missing: list[str] = []
    leaderboard = leaderboard if leaderboard.verdict else judge(leaderboard, output)
    predictions, trials = read_predictions(leaderboard, output), read_trials(leaderboard, output)
    if leaderboard.best.key not in predictions:
        missing.append("The best row left no predictions, so its mistakes cannot be shown.")
    index = _index(files, missing)
    seed = int(leaderboard.provenance.get("seed", 0))
    findings = audit.Findings(_label_issues(leaderboard, predictions))
    view = None if index is None else _view(files, leaderboard, index, seed, missing)
    embedding, space, curve = None, None, None
    if view is not None:
        embedding, space, curve = view.embedding, _map(view, seed), _curve(view, seed)
        part = view.images
        hashes = audit.read_hashes(files.dataset, part.digests)
        found = audit.examine(view.features, part.paths.tolist(), part.labels.tolist(), part.splits.tolist(), hashes)
        findings = replace(found, label_issues=findings.label_issues)
    return Material(output, leaderboard, predictions, trials, index, embedding, space, curve, findings, tuple(missing))


def _index(files: Artifacts, missing: list[str]) -> DatasetIndex | None:
    try:
        return DatasetIndex.read(files.dataset)
    except (PipelineError, OSError) as error:
        missing.append(f"No images are shown, because the index cannot be read: {error}")
        return None


@dataclass(frozen=True)
class _View:
    """One embedding of images that are in use: `rows` of the index, shape (n,), `features` of shape (n, dim)."""

    embedding: str
    rows: NDArray[np.intp]
    images: DatasetIndex
    features: NDArray[np.float32]
    labelled: int
    """Training images there are, also where `images` are a part."""


def _view(
    files: Artifacts, leaderboard: Leaderboard, index: DatasetIndex, seed: int, missing: list[str]
) -> _View | None:
    """Read the features of the best embedding that has some; of very many images a stratified part."""
    try:
        require_index(files.features, index.fingerprint())
        by_name = {record.name: record for record in read_records(files.features)}
        for row in leaderboard.rows:
            record = by_name.get(row.embedding)
            if record is None:
                continue
            store = FeatureStore.open(files.root / record.store, record.fingerprint)
            # Copies that were excluded for a leak are known; they would be found again as duplicates.
            known = np.flatnonzero(~store.missing(index.digests) & (index.splits.astype(str) != "excluded"))
            labelled = int(np.isin(index.splits[known].astype(str), TRAINING).sum())
            rows = known
            if len(known) > audit.MOST_IMAGES:
                rows = np.sort(known[stratified_order(index.labels[known].astype(str), seed)[: audit.MOST_IMAGES]])
                missing.append(
                    f"The map and the search for near-duplicates look at {len(rows):,} of {len(known):,} images."
                )
            return _View(row.embedding, rows, index.rows(rows), store.read(index.digests[rows]), labelled)
        missing.append("No embedding of the leaderboard has stored features, so there is no map.")
    except (OSError, PipelineError) as error:
        missing.append(
            f"There is no map, no learning curve and no search for near-duplicates: the features cannot be read ({error})."
        )
    return None


def _label_issues(leaderboard: Leaderboard, predictions: Mapping[str, HeadPredictions]) -> audit.LabelIssues:
    """Ask the best row that has out-of-fold probabilities which labels it does not believe."""
    for row in leaderboard.rows:
        found = predictions.get(row.key)
        if found is not None and found.out_of_fold is not None and found.out_of_fold.probabilities is not None:
            part = found.out_of_fold
            assert part.paths is not None
            return audit.label_issues(found.out_of_fold.probabilities, part.y_true, part.classes, part.paths.tolist())
    return audit.LabelIssues()


def _map(view: _View, seed: int) -> Map | None:
    if len(view.rows) < 3:
        return None
    shown = np.sort(stratified_order(view.images.labels.astype(str), seed)[:MOST_DOTS])
    rows = view.rows[shown]
    components = audit.project(view.features[shown], 50)
    try:
        from umap import UMAP  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        points = (
            components[:, :2] if components.shape[1] > 1 else np.pad(components, ((0, 0), (0, 2 - components.shape[1])))
        )
        return Map("PCA", rows, points)
    # A seed makes UMAP single-threaded and repeatable.
    return Map("UMAP", rows, np.asarray(UMAP(random_state=seed, n_jobs=1).fit_transform(components), dtype=np.float32))


def _curve(view: _View, seed: int) -> LearningCurve | None:
    """Measure the curve within the training images, each draw with another fifth held out; test images stay untouched."""
    index, features = view.images, view.features
    labels = index.labels.astype(str)
    rows = np.flatnonzero(np.isin(index.splits.astype(str), TRAINING))
    if len(rows) < 50:
        return None
    rows = rows[stratified_order(labels[rows], seed)][:MOST_CURVE_ROWS]
    y = class_columns(labels, index.classes)
    draws = [_held_apart(index.rows(rows), draw) for draw in range(seed, seed + CURVE_DRAWS)]
    smallest = min(len(rest) for rest, _ in draws)
    if smallest < 40:  # one group holds nearly all images
        return None
    sizes = curve_sizes(smallest, len(index.classes))

    def build(seed: int) -> Any:
        return configure(CURVE_HEAD, {"alpha": float(features.shape[1])}, seed)

    def measured(draw: int, places: Sequence[NDArray[np.intp]]) -> NDArray[np.float64]:
        train, test = ((features[rows[part]], y[rows[part]]) for part in places)
        return curve_scores(build, train, test, sizes, draw)

    scores = np.stack([measured(draw, places) for draw, places in enumerate(draws, seed)], axis=1)
    shared = np.flatnonzero(np.isfinite(scores).all(axis=1)).tolist()
    return curve_from_scores([sizes[size] for size in shared], [scores[size] for size in shared], seed, view.labelled)


def _held_apart(images: DatasetIndex, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Divide images, whole groups and all copies of a content together, into those to learn from and a fifth to judge by."""
    labels, groups = images.labels.astype(str), images.fold_groups()
    order = stratified_order(labels, seed)
    part = len(order) // 5
    if groups is None:
        return order[part:], order[:part]
    held = np.random.default_rng(seed).permutation(groups.max() + 1)
    counts = np.cumsum(np.bincount(groups)[held])
    inside = np.isin(groups, held[: max(1, int(np.searchsorted(counts, part)))])
    return order[~inside[order]], order[inside[order]]
