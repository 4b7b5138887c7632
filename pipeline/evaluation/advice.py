"""The rule of `manyheads advise`: what fine-tuning should bring, learned from measured cells, and which way to recommend.

A cell is a data set at a size with a network, of which the signs that can be had cheaply and the truth that took hours were both
measured (`make advisor-cells`); the cells are data of the package. Of an experiment whose signs lie outside of theirs nothing is
said. Gains are shares of the error that the frozen features leave, so that a cell of many errors does not outweigh the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError
from pipeline.evaluation.intervals import Interval
from pipeline.experiment import ADVICE, from_plain, read_document

ARMS = ("last_stage", "all")
"""What can be trained, as `finetune.unfreeze` calls it."""
COVERAGE = 0.8
"""Of the intervals of expected gains."""
WORTH = 0.005
"""The least expected gain in accuracy for which anything is recommended."""
PENALTIES = (1.0, 3.0, 10.0, 30.0)
"""Of the ridge regression over cells, on standardised signs."""
MOST_SIGNS = 2
"""One for each eight cells or so: more would be learned by heart."""
BEYOND = 0.25
"""How far outside of the cells a sign may lie, as a share of their range."""

Record = Mapping[str, Any]
"""What was measured of a cell or an experiment: `signs`, `pilot`, and of a cell `truth`, as `advisor_cells.json` has them."""


SIGNS: Mapping[str, tuple[str, str]] = {
    "per_class": ("images per class without near-duplicates", "{power:.3g}"),
    "error": ("error of the linear head out of fold, as a share", "{power:.3g}"),
    "gap": ("accuracy of the linear head on its training images minus that out of fold", "{points:+.1f} points"),
    "slope": ("what the second half of the images brought", "{points:+.1f} points"),
    "curved": ("kNN or RBF minus linear", "{points:+.1f} points"),
    "shift": ("distance of the images from the statistics of the network, in its standard deviations", "{value:.2f}"),
    "drop": ("share of the loss that the pilot took away", "{value:.2f}"),
    "growth": ("share of the loss that more images took away in the pilot", "{value:.2f}"),
}
"""What is looked at: by name what it is in words, and how it is written."""


def signs_of(record: Record) -> dict[str, float]:
    """Return what is looked at of a record, by the names of `SIGNS`; images per class and errors are decimal logarithms."""
    found, pilot = record["signs"], record["pilot"]
    start, (fewer, all_of_them) = max(float(pilot["start"]), 1e-6), pilot["losses"]
    return {
        "per_class": math.log10(max(int(found["images"] - found["copies"]), 1) / int(found["classes"])),
        "error": math.log10(max(1 - float(found["cv"]), 0.005)),
        "gap": float(found["train"] - found["linear"]),
        "slope": float(found["linear"] - found["half"]),
        "curved": float(max(found["rbf"], found["neighbours"]) - found["linear"]),
        "shift": float(pilot["shift"] or 0.0),
        "drop": 1 - float(all_of_them) / start,
        "growth": float(fewer - all_of_them) / start,
    }


def _written(name: str, value: float) -> str:
    return SIGNS[name][1].format(value=value, points=100 * value, power=10 ** min(value, 300.0))


def _said(name: str, value: float) -> str:
    return f"{SIGNS[name][0]}: {_written(name, value)}"


@dataclass(frozen=True)
class Expected:
    """What an arm should bring in accuracy, and the interval that holds it in `COVERAGE` of the cells."""

    gain: float
    interval: Interval


@dataclass(frozen=True)
class Rule:
    """A ridge regression of each arm's gain on some signs, and how far it was off for cells that it had not seen."""

    names: tuple[str, ...]
    """Of the signs that it goes by; the others are shown, and kept with the cells."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]
    weights: Mapping[str, NDArray[np.float64]]
    """By arm, float64 of shape (1 + n_signs,), the constant first."""
    errors: Mapping[str, NDArray[np.float64]]
    """By arm the residuals of cells left out, as shares, float64 of shape (n_cells,)."""

    def outside(self, record: Record) -> tuple[str, ...]:
        """Say which signs lie outside of the cells; nothing where the rule may speak."""
        x, room = _row(record, self.names), BEYOND * (self.high - self.low)
        return tuple(
            f"{_said(name, value)}, measured from {_written(name, low)} to {_written(name, high)}"
            for name, value, low, high, more in zip(self.names, x, self.low, self.high, room, strict=True)
            if not low - more <= value <= high + more
        )

    def expect(self, record: Record) -> dict[str, Expected]:
        """Return what each arm should bring."""
        x = np.concatenate([[1.0], (_row(record, self.names) - self.centre) / self.spread])
        error, found = 1 - record["signs"]["cv"], {}
        for arm in ARMS:
            share, off = float(x @ self.weights[arm]), np.sort(np.abs(self.errors[arm]))
            # Within it a new cell lies with probability `COVERAGE`.
            half = float(off[min(math.ceil((len(off) + 1) * COVERAGE), len(off)) - 1])
            found[arm] = Expected(error * share, (error * (share - half), error * (share + half)))
        return found


def _row(record: Record, names: Iterable[str]) -> NDArray[np.float64]:
    signs = signs_of(record)
    return np.array([signs[name] for name in names])


def cells() -> dict[str, Record]:
    """Return the measured cells by name."""
    found: dict[str, Record] = json.loads(
        files("pipeline.evaluation").joinpath("advisor_cells.json").read_text("utf-8")
    )
    return found


def _ridge(
    X: NDArray[np.float64], Y: NDArray[np.float64], penalty: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fit a ridge regression with a free constant on standardised X, float64 (n, k), and Y, float64 (n, n_arms).

    Returns weights, float64 (1 + k, n_arms), and how far it is off for each cell when it is fitted on the others, float64 (n, n_arms):
    the residual over one minus the cell's own weight in its prediction.
    """
    A = np.column_stack([np.ones(len(X)), X])
    solver = np.linalg.solve(A.T @ A + np.diag([0.0] + [penalty] * X.shape[1]), A.T)
    hat = A @ solver
    return solver @ Y, (hat @ Y - Y) / (1 - np.diag(hat))[:, None]


def fit(records: Sequence[Record]) -> Rule:
    """Fit the rule on cells: signs and penalty are those that are least off, in accuracy, for cells left out."""
    signs = np.stack([_row(record, SIGNS) for record in records])
    centre, spread = signs.mean(axis=0), np.maximum(signs.std(axis=0), 1e-9)
    Z, error = (signs - centre) / spread, np.array([[1 - record["signs"]["cv"]] for record in records])
    truths = [record["truth"] for record in records]
    gained = np.array([[truth[arm]["test"] - truth["frozen"] for arm in ARMS] for truth in truths])
    choices = [
        (list(places), penalty)
        for count in range(1, MOST_SIGNS + 1)
        for places in combinations(range(len(SIGNS)), count)
        for penalty in PENALTIES
    ]
    fitted = [_ridge(Z[:, places], gained / np.maximum(error, 1e-6), penalty) for places, penalty in choices]
    best = int(np.argmin([((off * error) ** 2).sum() for _, off in fitted]))
    places, (weights, errors) = choices[best][0], fitted[best]
    names, kept = tuple(np.array(list(SIGNS))[places].tolist()), signs[:, places]
    return Rule(
        names,
        kept.min(axis=0),
        kept.max(axis=0),
        centre[places],
        spread[places],
        dict(zip(ARMS, weights.T, strict=True)),
        dict(zip(ARMS, errors.T, strict=True)),
    )


# ---- what to recommend


@dataclass(frozen=True)
class Way:
    """One way to go on: what it should bring in accuracy with an 80 % interval, where that is known, and its price."""

    name: str
    gain: float | None = None
    interval: Interval | None = None
    minutes: float = 0.0
    images: int = 0
    """To be labelled."""
    basis: str = ""
    """What the gain rests on, or why there is none."""

    @property
    def gain_text(self) -> str:
        """The gain in points, with its interval."""
        if self.gain is None:
            return "not known"
        interval = "" if self.interval is None else f" [{100 * self.interval[0]:+.1f}, {100 * self.interval[1]:+.1f}]"
        return f"{100 * self.gain:+.1f}{interval}"

    @property
    def price(self) -> str:
        """What it takes, in images or minutes."""
        if self.images:
            return f"{self.images:,} images"
        return f"{self.minutes:.1f} minutes" if self.minutes else "nothing"


STOP = "stop here"
LABEL = "label more"
OTHER = "another layer or backbone"
TRAIN: Mapping[str, str] = {"fine-tune the last stage": "last_stage", "fine-tune everything": "all"}
"""The ways that train a network, and the arm of each."""


def recommend(ways: Sequence[Way]) -> Way:
    """Return the way to take: of those that cost no labels the largest gain worth having, else more labels, else stop.

    Labels are dearer than minutes, so they are asked for only where nothing else should bring `WORTH`. Of two arms that should
    bring the same within `WORTH` the cheaper is taken.
    """
    named = {way.name: way for way in ways}
    able = [way for way in ways if way.name != LABEL and (way.gain or 0.0) >= WORTH]
    if able:
        most = max(way.gain or 0.0 for way in able)
        return min((way for way in able if (way.gain or 0.0) > most - WORTH), key=lambda way: way.minutes)
    label = named.get(LABEL)
    return label if label is not None and (label.gain or 0.0) >= WORTH else named[STOP]


@dataclass(frozen=True)
class Advice:
    """What to do next, and what speaks for it."""

    embedding: str
    recommended: str
    ways: tuple[Way, ...]
    outside: tuple[str, ...]
    """Signs that lie outside of what was measured; where there are any, nothing is said of fine-tuning."""
    cells: int
    share: float
    """What the pilot cost, as a share of the passes of a whole fine-tuning."""
    signs: Mapping[str, float]
    """What was looked at, by its name in `SIGNS`."""
    transfer: str = ""
    """Whether the network's pretraining helps, out of fold; '' where there is nothing to hold it against."""

    @property
    def scope(self) -> str | None:
        """What `finetune.unfreeze` is to be by this advice; None where nothing is to be trained."""
        return TRAIN.get(self.recommended)

    def summary_lines(self) -> list[str]:
        """The advice, every way with its gain and price, and what it rests on."""
        lines = [f"advice     {self.recommended} ({self.embedding})", ""]
        lines += [f"  {way.name:<26} {way.gain_text:<24} {way.price:<16} {way.basis}".rstrip() for way in self.ways]
        lines += [
            "",
            f"Gains are in points of accuracy on new images, with {100 * COVERAGE:.0f} % intervals; {100 * WORTH:g} points are the least worth having.",
        ]
        lines += [f"Transfer: {self.transfer}"] if self.transfer else []
        lines += ["Looked at:", *(f"  {_said(name, value)}" for name, value in self.signs.items())]
        if self.outside:
            lines += ["Nothing is said of fine-tuning, because these images are unlike all that was measured:"]
            lines += [f"  {line}" for line in self.outside]
        else:
            lines += [
                f"Fine-tuning's come from {self.cells} measured cases; the pilot took {self.share:.1%} of what a whole run takes."
            ]
        return lines


def read_advice(path: Path, key: str | None = None) -> Advice | None:
    """Read the advice that was given last; None where there is none, it is damaged, or of another `key`."""
    try:
        document = read_document(path, ADVICE)
        made: Advice = from_plain(Advice, document["advice"])
        return made if key in (None, document["key"]) else None
    except (PipelineError, KeyError, TypeError, ValueError, AttributeError):
        return None
