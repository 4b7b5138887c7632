"""Out-of-distribution scores of images (distance to the training images, uncertainty), and sets of labels that hold the true one.

Both are conformal (Vovk et al. 2005): a new image is ranked among the held-out training images, so that among images like these at
most a given share is flagged as strange, and at least a given share of the sets holds the true label. Distance to the nearest
neighbours: Sun et al. 2022; sets: Sadinle et al. 2019.
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
"""Which nearest training image gives the distance: the very nearest may be atypical."""
BLOCK_NUMBERS = 1 << 22
"""Most cosines in memory at once."""
PROBABILITY = "probability"
"""Name of the out-of-distribution score from the head's own probabilities; all others are distances."""


STORED = {"mean": np.float32, "references": np.float16, "distances": np.float64, "lengths": np.float32}


@dataclass(frozen=True)
class Reference:
    """Stored data of the training images: `mean`, (dim,), m unit rows `references`, (m, dim), and held-out `distances`, (n,).

    `lengths`, (m,), are the lengths of the rows before normalisation.
    """

    mean: Floats
    references: Floats
    distances: Floats
    lengths: Floats

    def vectors(self) -> NDArray[np.float32]:
        """Return the references' original vectors, float32 of shape (m, dim), to half precision."""
        return np.asarray(self.mean + self.references * self.lengths[:, None], np.float32)

    def distance(self, X: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the distances of vectors, float32 of shape (n, dim), to the training images: float64 of shape (n,)."""
        return distance(directions(X, self.mean), self.references)

    def to_bytes(self) -> bytes:
        """Return the content of a file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{name: getattr(self, name).astype(kind) for name, kind in STORED.items()})
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> Reference:
        """Read the bytes of `to_bytes`, references to half precision; ValueError where they are no reference."""
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
    """Centre vectors, float32 of shape (n, dim), and scale them to length 1; a zero vector stays zero."""
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
    """Return the conformal p-value of each score: the share of known images, itself included, that are at least as strange.

    For images like the known ones, P(p <= a) is at most a.

    scores, known : of any float dtype, shapes (n,) and (m,), or (n, k) for `scores`; returns float64 of the shape of
        `scores`
    """
    above = len(known) - np.searchsorted(np.sort(known), scores, side="left")
    return np.asarray((1.0 + above) / (1 + len(known)), dtype=np.float64)


def auroc(known: Floats, unknown: Floats) -> float:
    """Return the area under the ROC curve: how often an unknown image is stranger than a known one, a tie counting half."""
    ranks = rankdata(np.concatenate([known, unknown]))
    return float((ranks[len(known) :].sum() / len(unknown) - (len(unknown) + 1) / 2) / len(known))


def label_sets(probabilities: Floats, of_truth: Floats, coverage: float) -> NDArray[np.bool_]:
    """Return conformal sets of labels, which hold the true one for a share `coverage` of images like the known ones.

    The most probable label is always included.

    probabilities : of any float dtype, shape (n, n_classes); returns bool of the same shape
    of_truth : probabilities of the true labels of m held-out known images, of any float dtype, shape (m,)
    """
    p = np.asarray(probabilities, dtype=np.float64)
    kept = alike(1 - p, 1 - np.asarray(of_truth, dtype=np.float64)) > 1 - coverage
    kept[np.arange(len(p)), p.argmax(axis=1)] = True
    return np.asarray(kept)
