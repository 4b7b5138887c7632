"""How strange an image is to a head: distance to the training images, lack of sureness; and sets of labels that hold the true one.

All are conformal: a new image is ranked among the training images as they were when held out, so that of images like these not more
than a stated share is called strange, and not less than a stated share of sets holds the true label (Vovk et al. 2005). Distance to the
nearest neighbours: Sun et al. 2022; sets: Sadinle et al. 2019.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pipeline.experiment import parse_arrays

Floats = NDArray[np.floating]

NEIGHBOURS = 5
"""Which nearest training image is looked at: one alone may be an odd one."""
BLOCK_NUMBERS = 1 << 22
"""Cosines that are held at once."""
PROBABILITY = "probability"
"""The strangeness that is told by the head's own probabilities; all others are distances."""


STORED = {"mean": np.float32, "references": np.float16, "distances": np.float64, "lengths": np.float32}


@dataclass(frozen=True)
class Reference:
    """What is kept of the training images: their `mean`, (dim,), m unit rows, (m, dim), and the `distances` of n of them, each held out.

    `lengths`, (m,), are those of the rows before they were units.
    """

    mean: Floats
    references: Floats
    distances: Floats
    lengths: Floats

    def vectors(self) -> NDArray[np.float32]:
        """Return the references as they were, float32 of shape (m, dim), to half precision."""
        return np.asarray(self.mean + self.references * self.lengths[:, None], np.float32)

    def distance(self, X: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return how far vectors, float32 of shape (n, dim), lie from the training images: float64 of shape (n,)."""
        return distance(directions(X, self.mean), self.references)

    def to_bytes(self) -> bytes:
        """Return the content of a file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: getattr(self, name).astype(kind) for name, kind in STORED.items()})
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Reference:
        """Return what `to_bytes` was given, references to half precision; ValueError for what is none."""
        arrays = parse_arrays(data)
        shapes = {name: array.shape for name, array in arrays.items()}
        if (
            set(shapes) != set(STORED)
            or [len(shapes[name]) for name in STORED] != [1, 2, 1, 1]
            or shapes["references"] != shapes["lengths"] + shapes["mean"]
            or 0 in shapes["references"] + shapes["distances"]
        ):
            raise ValueError(f"arrays of shapes {shapes}")
        return Reference(
            arrays["mean"], arrays["references"].astype(np.float32), arrays["distances"], arrays["lengths"]
        )


def directions(X: NDArray[np.float32], mean: Floats | float) -> NDArray[np.float32]:
    """Centre vectors, float32 of shape (n, dim), and bring them to length 1; one of zeros stays."""
    centred = X - mean
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32)


def distance(units: NDArray[np.float32], references: Floats, nth: int = NEIGHBOURS) -> NDArray[np.float64]:
    """Return 1 - cosine to the nth nearest reference: float64 of shape (n,).

    units : unit rows, float32 of shape (n, dim); references : unit rows, of any float dtype, shape (m, dim)
    """
    nth = max(1, min(nth, len(references)))
    block = max(1, BLOCK_NUMBERS // len(references))
    parts = [
        1 - np.partition(units[start : start + block] @ references.T, -nth, axis=1)[:, -nth]
        for start in range(0, len(units), block)
    ]
    return np.concatenate([np.empty(0), *parts])


def unsureness(probabilities: Floats) -> NDArray[np.float64]:
    """Return 1 - the highest probability: float64 of shape (n,), for any float dtype of shape (n, n_classes)."""
    return np.asarray(1 - np.asarray(probabilities, dtype=np.float64).max(axis=1))


def alike(scores: Floats, known: Floats) -> NDArray[np.float64]:
    """Return for each score the share of known images that are at least as strange, itself among them.

    Of images like the known ones it is at most a in a share a of cases: a conformal p-value.

    scores, known : of any float dtype, shapes (n,) and (m,), or (n, k) for `scores`; returns float64 of the shape of
        `scores`
    """
    above = len(known) - np.searchsorted(np.sort(known), scores, side="left")
    return np.asarray((1.0 + above) / (1 + len(known)), dtype=np.float64)


def auroc(known: Floats, unknown: Floats) -> float:
    """Return how often an unknown image is stranger than a known one, a tie counting half: the area under the ROC curve."""
    ranks = rankdata(np.concatenate([known, unknown]))
    return float((ranks[len(known) :].sum() / len(unknown) - (len(unknown) + 1) / 2) / len(known))


def label_sets(probabilities: Floats, of_truth: Floats, coverage: float) -> NDArray[np.bool_]:
    """Return the labels that cannot be ruled out: of images like the known ones a share `coverage` has the true one.

    The likeliest label is always there.

    probabilities : of any float dtype, shape (n, n_classes); returns bool of the same shape
    of_truth : those of the true labels of m known images when they were held out, of any float dtype, shape (m,)
    """
    p = np.asarray(probabilities, dtype=np.float64)
    kept = alike(1 - p, 1 - np.asarray(of_truth, dtype=np.float64)) > 1 - coverage
    kept[np.arange(len(p)), p.argmax(axis=1)] = True
    return np.asarray(kept)
