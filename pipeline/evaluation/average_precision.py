"""Average precision of several labels: the mean over the labels that some image has, for any weights of the images at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def label_precision(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> Callable[[NDArray[np.number]], Numbers]:
    """Return what gives one label's average precision under weights: of shape (r, n) in, (r,) out, NaN where no image has it.

    The mean of the precision at each image that has the label, images of equal score taken together, as scikit-learn's
    `average_precision_score` does. y, scores : shape (n,)
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.searchsorted(-scores[order], -scores[order], side="right") - 1
    own = np.flatnonzero(y[order])
    # The last image that has the label among all down to the end of each one's equals.
    last = np.searchsorted(own, ends[own], side="right") - 1

    def under(weights: NDArray[np.number]) -> Numbers:
        ordered = np.asarray(weights, dtype=np.float64)[:, order]
        above, hits = np.cumsum(ordered, axis=1)[:, ends[own]], ordered[:, own]
        right = np.cumsum(hits, axis=1)[:, last]
        precision = np.divide(right, above, out=np.zeros_like(right), where=above > 0)
        total = hits.sum(axis=1)
        nothing = np.full(len(total), np.nan)
        return np.asarray(np.divide((hits * precision).sum(axis=1), total, out=nothing, where=total > 0))

    return under


def label_precisions(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> Numbers:
    """Return the average precision of each label, shape (k,), NaN for one that no image has; y, scores : shape (n, k)."""
    ones = np.ones((1, len(y)))
    return np.array([label_precision(*column)(ones)[0] for column in zip(y.T, scores.T, strict=True)])


def mean_precision(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """Return the mean average precision (mAP) over the labels that some image has, 0 where none is; both of shape (n, k)."""
    return float(_mean(label_precisions(y, scores)[:, None])[0])


def weighted_mean_precision(
    y: NDArray[np.bool_], scores: NDArray[np.floating]
) -> Callable[[NDArray[np.number]], Numbers]:
    """Return what gives the mean average precision under weights of the images, shape (r, n) in and (r,) out."""
    parts = [label_precision(*column) for column in zip(y.T, scores.T, strict=True) if column[0].any()]
    return lambda weights: _mean(np.array([part(weights) for part in parts]).reshape(len(parts), len(weights)))


def _mean(found: Numbers) -> Numbers:
    known = np.isfinite(found)
    return np.asarray(np.where(known, found, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1))


def influence(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> Numbers:
    """Return by how much the mean average precision changes with the weight of each image: its derivatives.

    A column for the part of each label that some image has, shape (n, labels), which sum up to the whole.
    """
    some = y.any(axis=0)
    found = [_derivatives(*column) / some.sum() for column in zip(y.T[some], scores.T[some], strict=True)]
    return np.stack(found, axis=1) if found else np.zeros((len(y), 1))


def _derivatives(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> Numbers:
    """Return the derivatives of one label's average precision by the weights of n images at 1.

    An image's own precision counts where it has the label, and it is among those above every one that is no higher.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, flags = -scores[order], y[order]
    ends = np.searchsorted(ordered, ordered, side="right") - 1
    starts = np.searchsorted(ordered, ordered, side="left")
    above, right, count = (ends + 1).astype(np.float64), np.cumsum(flags)[ends], flags.sum()
    precision = right / above

    def below(values: Numbers) -> Numbers:
        """Sum up over the images that have the label and are no higher."""
        return np.cumsum((flags * values)[::-1])[::-1][starts]

    change = flags * (precision + below(1 / above) - np.sum(flags * precision) / count) - below(right / above**2)
    made = np.empty(len(y))
    made[order] = change / count
    return made


def excess(y: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """Return by how much the mean average precision is too high, as each image that has a label is among those above itself.

    What it would be less if the precision at an image left the image out.
    """
    found = []
    for flags, values in zip(y.T, scores.T, strict=True):
        if flags.any():
            order = np.argsort(-values, kind="stable")
            ends = np.searchsorted(-values[order], -values[order], side="right")[flags[order]]
            right = np.cumsum(flags[order])[ends - 1]
            found.append(np.mean((ends - right) / (ends * np.maximum(ends - 1.0, 1.0))))
    return float(np.mean(found)) if found else 0.0
