"""Detection of images of unknown classes with a saved head: marks, label sets, and the drift of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import BundleError, ConfigError, number_of
from pipeline.evaluation import HeadPredictions, wilson
from pipeline.evaluation.predictions import FILE_NAME
from pipeline.evaluation.strangeness import PROBABILITY, Reference, alike, label_sets, unsureness
from pipeline.export import bundle as bundles
from pipeline.export.bundle import ModelBundle

FAR = 0.05
"""Share of training images, each held out, that count as far away; a batch without drift has the same share."""


@dataclass
class Strangers:
    """Settings and counts of the detection for one head; `unknown` and `sets` are None if not requested."""

    bundle: ModelBundle
    known: Reference | None
    score: str
    own: NDArray[np.floating]
    """Strangeness of the held-out training images, shape (n,), measured by `score`."""
    of_truth: NDArray[np.floating]
    """Probabilities of their true labels, shape (m,)."""
    unknown: float | None
    sets: float | None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("images", "far", "unknown"), 0))

    @property
    def columns(self) -> list[str]:
        """The column names for an image's cells."""
        return ["strangeness", "unknown"] * (self.unknown is not None) + ["label_set"] * (self.sets is not None)

    def cells(self, X: NDArray[np.float32], probabilities: NDArray[np.floating] | None) -> list[list[str]]:
        """Return the cells of n images from vectors of the head's first part and its probabilities, and update the counts.

        X : float32 of shape (n, dim); probabilities : of any float dtype, shape (n, n_classes); None for a head without them
        """
        self.counts["images"] += len(X)
        distances = None
        if self.known is not None:
            distances = self.known.distance(X)
            self.counts["far"] += int((alike(distances, self.known.distances) <= FAR).sum())
        found: list[list[str]] = [[] for _ in X]
        if self.unknown is not None:
            by_probability = self.score == PROBABILITY and probabilities is not None
            strangeness = unsureness(probabilities) if by_probability else distances  # type: ignore[arg-type]
            assert strangeness is not None, "checked by `open_strangers`"
            share = alike(strangeness, self.own)
            self.counts["unknown"] += int((share <= self.unknown).sum())
            for cells, alike_to in zip(found, share.tolist(), strict=True):
                cells += [f"{1 - alike_to:.4f}", "unknown" if alike_to <= self.unknown else ""]
        if self.sets is not None and probabilities is not None:
            for cells, kept in zip(found, label_sets(probabilities, self.of_truth, self.sets), strict=True):
                cells.append("|".join(np.asarray(self.bundle.classes)[kept].tolist()))
        return found

    def lines(self) -> list[str]:
        """Return lines on the number of unknown images, and on the drift of the batch from the training images."""
        n, far, lines = self.counts["images"], self.counts["far"], list[str]()
        if self.unknown is not None and n:
            lines.append(
                f"unknown: {self.counts['unknown']:,} of {number_of(n, 'image')} ({100 * self.counts['unknown'] / n:.1f} %), by "
                f"{self.score}; of images like those of training it would be {100 * self.unknown:g} %"
            )
        if self.known is not None and n:
            low, high = wilson(far, n)
            drifted = "this batch has drifted" if low > FAR else "no drift is shown"
            lines.append(
                f"drift: {100 * far / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] lie farther from the training images than "
                f"{100 * (1 - FAR):.0f} % of these from one another, where {100 * FAR:.0f} % would: {drifted}"
            )
        return lines


def open_strangers(folder: Path, bundle: ModelBundle, unknown: float | None, sets: float | None) -> Strangers:
    """Open the detection data of a bundle's folder; ConfigError if a request is not possible, BundleError for damage."""
    known, asked = _known(folder), unknown is not None or sets is not None
    nothing = np.empty(0)
    if not asked:
        return Strangers(bundle, known, PROBABILITY, nothing, nothing, None, None)
    if not bundle.target.exclusive:
        raise ConfigError(f"{folder}: says {bundle.target.kind}; --unknown and --sets are for one class per image")
    predictions = HeadPredictions.read(folder / FILE_NAME).out_of_fold
    p = None if predictions is None else predictions.probabilities
    score = str(bundles.describe(folder)["unknown"]["score"]) if known else PROBABILITY
    if predictions is None or (p is None and (score == PROBABILITY or sets is not None)):
        raise ConfigError(f"{folder}: has no probabilities of held-out images, which --unknown and --sets need")
    own = known.distances if known is not None and score != PROBABILITY else unsureness(p)  # type: ignore[arg-type]
    of_truth = nothing if p is None else p[np.arange(len(predictions)), predictions.y_true]
    least = 1 / (len(own) + 1)
    if unknown is not None and not least <= unknown < 1:
        raise ConfigError(f"--unknown: {unknown:g} must be from {least:.2g}, the least for {len(own):,} images, to 1")
    if sets is not None and not 0 < sets < 1:
        raise ConfigError(f"--sets: {sets:g} must be between 0 and 1, such as 0.9")
    return Strangers(bundle, known, score, own, of_truth, unknown, sets)


def _known(folder: Path) -> Reference | None:
    if "unknown" not in bundles.describe(folder):
        return None
    try:
        return Reference.from_bytes(bundles.bundle_file(folder, bundles.KNOWN))
    except ValueError as error:
        raise BundleError(f"{folder / bundles.KNOWN}: cannot be read ({error}); run `manyheads heads` again") from None


def names(of: dict[str, Strangers]) -> Sequence[str]:
    """Return the column names for several heads by target, '' for a single one."""
    return [f"{target}_{column}" if target else column for target, each in of.items() for column in each.columns]
