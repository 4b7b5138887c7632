"""Few-shot scores: with intervals over episodes, compared with logistic regression, in words and as a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from tabulate import tabulate

from pipeline.evaluation import Interval
from pipeline.evaluation.fewshot.methods import PLAIN
from pipeline.experiment import FEWSHOT, from_plain, read_document, write_document

MARGIN = 0.01
"""How far logistic regression may lie behind and still be called as good."""


@dataclass(frozen=True)
class Point:
    """One method at one number of shots: its mean accuracy over episodes, with 95 % intervals."""

    method: str
    shots: int
    accuracy: float
    interval: Interval
    ahead: float
    """Of logistic regression on the same episodes."""
    ahead_interval: Interval
    """Simultaneous over the methods that are compared with it."""


@dataclass(frozen=True)
class FewShot:
    """What `manyheads fewshot` found on one embedding."""

    embedding: str
    ways: int
    queries: int
    episodes: int
    seed: int
    images: int
    classes: int
    key: str
    """Digest of all that the numbers come from."""
    points: tuple[Point, ...]
    notes: tuple[str, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """Names, logistic regression first."""
        return tuple(dict.fromkeys(point.method for point in self.points))

    @property
    def shots(self) -> tuple[int, ...]:
        """Images per class that were tried."""
        return tuple(dict.fromkeys(point.shots for point in self.points))

    def at(self, method: str, shots: int) -> Point | None:
        """Return a point; None where the method was not had with so many shots."""
        return next((point for point in self.points if (point.method, point.shots) == (method, shots)), None)

    def verdict(self) -> list[str]:
        """Say where plain logistic regression is as good as all others, where it is not, and where nobody can tell."""
        found: dict[str, list[str]] = {"good": [], "tell": [], "better": []}
        for shots in self.shots:
            others = [point for point in self.points if point.shots == shots and point.method != PLAIN]
            best, reach = max(others, key=lambda point: point.ahead), max(point.ahead_interval[1] for point in others)
            if reach <= MARGIN:
                found["good"].append(f"{shots}")
            elif best.ahead_interval[0] > 0:
                low, high = (100 * end for end in best.ahead_interval)
                found["better"].append(
                    f"K = {shots}: {best.method} by {100 * best.ahead:.1f} points [{low:.1f}, {high:.1f}]"
                )
            else:
                found["tell"].append(f"{shots} (another may be ahead by up to {100 * reach:.1f} points)")
        lines = []
        if found["good"]:
            point = f"{100 * MARGIN:g} point"
            lines.append(
                f"Plain {PLAIN} is as good at K = {', '.join(found['good'])}: none is ahead by more than {point}."
            )
        if found["better"]:
            lines.append(f"Better than plain {PLAIN}: {'; '.join(found['better'])}.")
        if found["tell"]:
            lines.append(f"Not told apart at K = {', '.join(found['tell'])}; --episodes takes more.")
        return lines

    def to_text(self) -> str:
        """Return the table, the verdict and the notes, for a terminal."""
        rows = [[method, *(_cell(self.at(method, shots)) for shots in self.shots)] for method in self.methods]
        headers = ["accuracy, %", *(f"K = {shots}" for shots in self.shots)]
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * len(self.shots)))
        return "\n".join([self.title(), "", table, "", *self.verdict(), *self.notes])

    def title(self) -> str:
        """Say what was measured, in one line."""
        return (
            f"{self.embedding}: {self.ways}-way, K images per class, {self.queries} queries per class, {self.episodes:,} "
            f"episodes of {self.images:,} images in {self.classes:,} classes, ± 95 % over episodes"
        )


def points_of(shots: int, found: Mapping[str, NDArray[np.float64]]) -> list[Point]:
    """Return the points of one number of shots.

    found : each method's accuracy in the same episodes, float64 of shape (n,)
    """
    level = 0.05 / max(1, len(found) - 1)
    plain = found[PLAIN]
    return [
        Point(name, shots, *_mean(right, 0.05), *_mean(right - plain, level if name != PLAIN else 0.05))
        for name, right in found.items()
    ]


def write(path: Path, result: FewShot) -> None:
    """Write the document in one move."""
    write_document(path, FEWSHOT, asdict(result))


def read(path: Path) -> FewShot:
    """Read the document.

    Raises
    ------
    PipelineError
        When it is missing, damaged or of another version.
    """
    document = read_document(path, FEWSHOT)
    try:
        return cast(FewShot, from_plain(FewShot, {name: document[name] for name in FewShot.__dataclass_fields__}))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FEWSHOT.damaged(path, "it does not hold what its version says") from None


def _mean(values: NDArray[np.float64], level: float) -> tuple[float, Interval]:
    """Return the mean with Student's interval: episodes are drawn independently, whatever their answers share."""
    mean, spread = float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))
    half = float(stats.t.ppf(1 - level / 2, len(values) - 1)) * spread
    return mean, (mean - half, mean + half)


def _cell(point: Point | None) -> str:
    if point is None:
        return "-"
    return f"{100 * point.accuracy:.1f} ± {50 * (point.interval[1] - point.interval[0]):.1f}"
