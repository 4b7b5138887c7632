"""Layer profile: comparison of a network's layers, single and concatenated.

Each candidate is scored by ridge on the folds of all heads, with the penalty chosen within the training rows. The network's default
layer is chosen unless another candidate is shown to be better. The choice itself is scored by nested cross-validation: it is repeated
within every fold, on images that do not score it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.errors import PipelineError
from pipeline.evaluation import (
    ACCURACY,
    METRICS,
    Interval,
    Metric,
    Paired,
    Predictions,
    compare,
    paired_answers,
    scores,
)
from pipeline.evaluation.comparison import LEVEL, least_half_width, paired_interval, paired_p, shared_training
from pipeline.evaluation.intervals import freedom
from pipeline.experiment import LAYERS, from_plain, read_document
from pipeline.heads.tuning.folds import Folds

PENALTIES = np.logspace(0, 6, 7)
"""Ridge penalties for standardised columns; each fit chooses one by leave-one-out validation, which ridge computes in closed form."""


@dataclass(frozen=True)
class LayerRow:
    """The ridge result of one layer, or of several concatenated ones."""

    name: str
    embeddings: tuple[str, ...]
    dim: int
    score: float
    interval: Interval
    tied: bool
    """Whether there is no evidence that it is worse than the best row."""
    gain: Paired | None
    """The gain over the default layer, with an interval that holds for all rows simultaneously; None for the default layer."""


@dataclass(frozen=True)
class LayerProfile:
    """The out-of-fold results of the layers of one network."""

    network: str
    task: str
    """The task's key, as in leaderboard rows."""
    metric: str
    images: int
    labelled: int
    """Number of all training images, of which `images` were used."""
    folds: int
    usual: str
    """The default layer, used if the config names none."""
    chosen: str
    rows: tuple[LayerRow, ...]
    """Single layers from input to output, then concatenated ones."""
    nested: float | None
    """The score when the choice is repeated within every fold; None for two folds, which leave too few images to choose by."""
    nested_gain: Paired | None
    """The gain of this nested choice over the default layer."""

    def row(self, name: str) -> LayerRow:
        """Return a row by name; KeyError if there is none."""
        return {row.name: row for row in self.rows}[name]


def read_profiles(path: Path, key: str | None = None) -> tuple[LayerProfile, ...] | None:
    """Read the profiles of `layers.json`; None if it is missing or damaged, or has another `key`."""
    try:
        document = read_document(path, LAYERS)
        found = tuple(from_plain(LayerProfile, one) for one in document["profiles"])
        for one in found:
            _ = METRICS[one.metric], one.row(one.usual), one.row(one.chosen)
        return found if key in (None, document["key"]) else None
    except (PipelineError, KeyError, TypeError, ValueError, AttributeError):
        return None


Candidates = Mapping[str, tuple[str, ...]]
"""The candidates: name -> the layers that are concatenated."""
Fit = Callable[[tuple[str, ...], NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""(layers, training rows, other rows) -> the predicted classes of the other rows."""


def answers(
    groups: Candidates, fit: Fit, held_out: Sequence[NDArray[np.int64]], n: int
) -> tuple[dict[str, NDArray[np.int64]], dict[str, list[NDArray[np.int64]]]]:
    """Return each candidate's out-of-fold predictions of n images, and for each fold its inner predictions, to choose by.

    The inner predictions of fold k label an image of fold j by a fit on the folds other than j and k, and images of k itself -1. One
    fit without j and k serves both folds.

    held_out : row numbers of each fold, int64 of shape (k,); returns classes, int64 of shape (n,)
    """
    outer = {name: np.full(n, -1, dtype=np.int64) for name in groups}
    inner = {name: [np.full(n, -1, dtype=np.int64) for _ in held_out] for name in groups}
    everything = np.arange(n)
    for name, layers in groups.items():
        for rows in held_out:
            outer[name][rows] = fit(layers, np.setdiff1d(everything, rows), rows)
        for j, k in combinations(range(len(held_out) if len(held_out) > 2 else 0), 2):
            both = np.concatenate([held_out[j], held_out[k]])
            found = fit(layers, np.setdiff1d(everything, both), both)
            inner[name][k][held_out[j]] = found[: len(held_out[j])]
            inner[name][j][held_out[k]] = found[len(held_out[j]) :]
    return outer, inner


def gains(
    predictions: Mapping[str, Predictions], usual: str, folds: int, seed: int, metric: Metric
) -> dict[str, Paired]:
    """Return each candidate's gain over the default layer, with simultaneous intervals and p-values.

    Bonferroni-corrected, and widened for the training rows that folds share, see `comparison.shared_training`.
    """
    others = [name for name in predictions if name != usual]
    units = predictions[usual].units
    spare = len(predictions[usual]) - 1 if units is None else freedom(units)
    z = stats.t.ppf(1 - LEVEL / 2 / len(others), spare) * np.sqrt(shared_training(folds, metric))
    found = {}
    for name in others:
        a, b = predictions[name], predictions[usual]
        difference = metric.score(a) - metric.score(b)
        if metric is ACCURACY:
            interval = paired_interval(a, b, z)
        else:
            added = metric.contributions(a) - metric.contributions(b)
            half = max(z * added.std(ddof=1) / np.sqrt(len(added)), least_half_width(metric, a, b, z))
            interval = (difference - half, difference + half)
        p_value = min(1.0, len(others) * paired_p(metric, a, b, seed))
        found[name] = Paired(difference, metric.clipped_difference(interval), p_value)
    return found


def choose(
    predictions: Mapping[str, Predictions],
    over: Mapping[str, Paired],
    groups: Candidates,
    usual: str,
    seed: int,
    metric: Metric,
) -> str:
    """Return the default layer, unless candidates are shown to be better.

    Of these, return the one with the fewest layers among those not shown to be worse than the best.
    """
    better = [name for name, gain in over.items() if gain.shown == 1]
    if not better:
        return usual
    best = max(better, key=lambda name: over[name].difference)
    near = [name for name in better if paired_answers(metric, predictions[best], predictions[name], seed).shown != 1]
    return min(near, key=lambda name: (len(groups[name]), -over[name].difference))


def profile(
    blocks: Mapping[str, NDArray[np.float32]],
    embeddings: Mapping[str, str],
    usual: str,
    truth: Predictions,
    folds: Folds,
    seed: int,
    about: Mapping[str, Any],
    metric: Metric = ACCURACY,
) -> LayerProfile:
    """Compare the layers of one network.

    blocks : layer -> ndarray of shape (n, dim), float32, ordered from input to output
    embeddings : layer -> name of its embedding
    truth : the true classes of the n images, and their units if not independent; its predictions are not used
    about : `network`, `task` and `labelled` of the profile
    """

    def fit(layers: tuple[str, ...], train: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        if (truth.y_true[train] == truth.y_true[train[0]]).all():  # all others are held out
            return np.full(len(rows), truth.y_true[train[0]])
        X = np.concatenate([blocks[layer] for layer in layers], axis=1)
        ridge = make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES))
        found: NDArray[np.int64] = ridge.fit(X[train], truth.y_true[train]).predict(X[rows])
        return found

    def predictions_of(labels: NDArray[np.int64], rows: NDArray[np.int64]) -> Predictions:
        units = None if truth.units is None else truth.units[rows]
        return Predictions(truth.y_true[rows], labels[rows], units=units, target=truth.target)

    n, held_out = len(truth), [rows for _, rows in folds]
    # Every single layer, each with the default one, and all together.
    sets = [*((layer,) for layer in blocks), *((usual, layer) for layer in blocks if layer != usual)]
    sets += [tuple(blocks)] if len(blocks) > 2 else []
    groups, every = {"+".join(layers): layers for layers in sets}, np.arange(n)
    outer, inner = answers(groups, fit, held_out, n)
    found = {name: predictions_of(labels, every) for name, labels in outer.items()}
    best = max(found, key=lambda name: metric.score(found[name]))
    tied = {gap.key for gap in compare(found, best, seed=seed, metric=metric) if gap.no_evidence}
    over = gains(found, usual, len(held_out), seed, metric)
    taken = choose(found, over, groups, usual, seed, metric)
    tied -= {usual} if taken != usual else set()
    rows = []
    for name, layers in groups.items():
        score, interval = scores(found[name], seed, metric).of(metric)
        assert score is not None
        assert interval is not None
        names = tuple(embeddings[layer] for layer in layers)
        dim = sum(blocks[layer].shape[1] for layer in layers)
        rows.append(LayerRow(name, names, dim, score, interval, name in tied, over.get(name)))
    nested, gain = None, None
    if len(held_out) > 2:
        mixed = outer[usual].copy()
        for k, out in enumerate(held_out):
            rest = np.setdiff1d(every, out)
            within = {name: predictions_of(parts[k], rest) for name, parts in inner.items()}
            over_it = gains(within, usual, len(held_out) - 1, seed, metric)
            mixed[out] = outer[choose(within, over_it, groups, usual, seed, metric)][out]
        selection = predictions_of(mixed, every)
        nested, gain = metric.score(selection), paired_answers(metric, selection, found[usual], seed)
    return LayerProfile(
        **about,
        metric=metric.name,
        images=n,
        folds=len(held_out),
        usual=usual,
        chosen=taken,
        rows=tuple(rows),
        nested=nested,
        nested_gain=gain,
    )


def table(found: LayerProfile) -> list[str]:
    """Return a profile as lines of text: every layer with its score, then the recommendation."""
    metric, width = METRICS[found.metric], max(len(row.name) for row in found.rows)
    of = f" of {found.labelled:,}" if found.images < found.labelled else ""
    lines = [
        f"{found.network}: ridge on each layer, {found.images:,}{of} training images, {found.folds} folds, {metric.title} out of fold",
        f"   {'layer':<{width}}   numbers   {'score [95 %]':>18}   over {found.usual}",
    ]
    for row in found.rows:
        gain = "" if row.gain is None else gap(metric, row.gain)
        score = f"{metric.text(row.score)} {metric.interval_text(row.interval)}"
        lines.append(f" {'~' if row.tied else ' '} {row.name:<{width}}   {row.dim:>7,}   {score:>18}   {gain}".rstrip())
    return [*lines, " ~ no evidence of a difference from the best", *what_to_take(found)]


def gap(metric: Metric, gain: Paired) -> str:
    """Format a difference with its interval."""
    low, high = map(metric.gap_text, gain.interval)
    return f"{metric.gap_text(gain.difference)} [{low}, {high}]"


def what_to_take(found: LayerProfile) -> list[str]:
    """Return the recommended layers, and the nested score of choosing them in this way, as lines of text."""
    row, lines = found.row(found.chosen), [f"take {found.usual}: nothing else is shown to be better"]
    if found.chosen != found.usual:
        lines = [f"take {found.chosen}, which is shown to be better than {found.usual}"]
        lines[0] += (
            f": concat: {json.dumps([row.embeddings])}" if len(row.embeddings) > 1 else f": layers: [{found.chosen}]"
        )
    if found.nested is not None and found.nested_gain is not None:
        metric = METRICS[found.metric]
        lines.append(
            "this choice repeated within every fold, on images other than those that score it: "
            f"{metric.text(found.nested)}, {gap(metric, found.nested_gain)} over {found.usual}"
        )
    return lines
