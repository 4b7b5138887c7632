"""The rule of `manyheads advise`: the expected gain of fine-tuning, learned from measured cells, and the recommendation.

A cell is a data set of a given size with a network. Both its cheap signs and its true gain, which took hours, were measured
(`make advisor-cells`); the cells ship with the package. The rule makes no prediction for an experiment whose signs lie outside those
of the cells. Gains are shares of the error with frozen features, so that a cell with many errors does not outweigh the others.
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
"""Parts of a network that can be trained, named as in `finetune.unfreeze`."""
COVERAGE = 0.8
"""Coverage of the intervals of expected gains."""
WORTH = 0.005
"""Smallest expected gain in accuracy that is worth recommending."""
PENALTIES = (1.0, 3.0, 10.0, 30.0)
"""Candidate penalties of the ridge regression over cells, on standardised signs."""
MOST_SIGNS = 2
"""Most signs in the regression, about one for each eight cells: more would overfit."""
BEYOND = 0.25
"""How far outside the cells' range a sign may lie, as a share of that range."""

Record = Mapping[str, Any]
"""Measurements of a cell or an experiment as in `advisor_cells.json`: `signs`, `pilot`, and `truth` for a cell."""


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
"""The cheap signs: name -> (description, format)."""


def signs_of(record: Record) -> dict[str, float]:
    """Return the signs of a record by the names of `SIGNS`; images per class and errors are decimal logarithms."""
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
    """The expected gain of an arm in accuracy, and its interval with coverage `COVERAGE`."""

    gain: float
    interval: Interval


@dataclass(frozen=True)
class Rule:
    """A ridge regression of each arm's gain on some signs, with its leave-one-out errors."""

    names: tuple[str, ...]
    """Names of the signs it uses; the others are only shown and stored with the cells."""
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]
    weights: Mapping[str, NDArray[np.float64]]
    """Coefficients by arm, float64 of shape (1 + n_signs,), the intercept first."""
    errors: Mapping[str, NDArray[np.float64]]
    """Leave-one-out residuals by arm, as shares of the error, float64 of shape (n_cells,)."""

    def outside(self, record: Record) -> tuple[str, ...]:
        """Describe the signs that lie outside the cells' range; empty where the rule applies."""
        x, room = _row(record, self.names), BEYOND * (self.high - self.low)
        return tuple(
            f"{_said(name, value)}, measured from {_written(name, low)} to {_written(name, high)}"
            for name, value, low, high, more in zip(self.names, x, self.low, self.high, room, strict=True)
            if not low - more <= value <= high + more
        )

    def expect(self, record: Record) -> dict[str, Expected]:
        """Return the expected gain of each arm."""
        x = np.concatenate([[1.0], (_row(record, self.names) - self.centre) / self.spread])
        error, found = 1 - record["signs"]["cv"], {}
        for arm in ARMS:
            share, off = float(x @ self.weights[arm]), np.sort(np.abs(self.errors[arm]))
            # A new cell's error is at most this with probability `COVERAGE` (split conformal).
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
    """Fit a ridge regression with an unpenalised intercept on standardised X, float64 (n, k), and Y, float64 (n, n_arms).

    Returns coefficients, float64 (1 + k, n_arms), and leave-one-out residuals, float64 (n, n_arms): residual / (1 - leverage).
    """
    A = np.column_stack([np.ones(len(X)), X])
    solver = np.linalg.solve(A.T @ A + np.diag([0.0] + [penalty] * X.shape[1]), A.T)
    hat = A @ solver
    return solver @ Y, (hat @ Y - Y) / (1 - np.diag(hat))[:, None]


def fit(records: Sequence[Record]) -> Rule:
    """Fit the rule on cells, with the signs and penalty of the smallest leave-one-out error in accuracy."""
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
    """One possible next step: its expected gain in accuracy with an 80 % interval, where known, and its price."""

    name: str
    gain: float | None = None
    interval: Interval | None = None
    minutes: float = 0.0
    images: int = 0
    """Images to be labelled."""
    basis: str = ""
    """Evidence for the gain, or the reason why none is known."""

    @property
    def gain_text(self) -> str:
        """The gain in points, with its interval."""
        if self.gain is None:
            return "not known"
        interval = "" if self.interval is None else f" [{100 * self.interval[0]:+.1f}, {100 * self.interval[1]:+.1f}]"
        return f"{100 * self.gain:+.1f}{interval}"

    @property
    def price(self) -> str:
        """The price in images to label or minutes."""
        if self.images:
            return f"{self.images:,} images"
        return f"{self.minutes:.1f} minutes" if self.minutes else "nothing"


STOP = "stop here"
LABEL = "label more"
OTHER = "another layer or backbone"
TRAIN: Mapping[str, str] = {"fine-tune the last stage": "last_stage", "fine-tune everything": "all"}
"""The ways that train a network, and the arm of each."""


def recommend(ways: Sequence[Way]) -> Way:
    """Return the step to recommend: the largest worthwhile gain that costs no labels, else more labels, else stop.

    Labels cost more than computing time, so they are recommended only where nothing else is expected to gain `WORTH`. Where expected
    gains differ by less than `WORTH` the cheapest step is taken.
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
    """The recommended next step and its evidence."""

    embedding: str
    recommended: str
    ways: tuple[Way, ...]
    outside: tuple[str, ...]
    """Signs outside the measured range; if there are any, no gain of fine-tuning is predicted."""
    cells: int
    share: float
    """Cost of the pilot, as a share of the passes of a whole fine-tuning."""
    signs: Mapping[str, float]
    """Values of the signs by their names in `SIGNS`."""
    transfer: str = ""
    """Whether the network's pretraining helps, out of fold; '' without a baseline to compare with."""

    @property
    def scope(self) -> str | None:
        """The recommended part to train, as `finetune.unfreeze` names it; None where nothing should be trained."""
        return TRAIN.get(self.recommended)

    def summary_lines(self) -> list[str]:
        """The advice, every option with its gain and price, and the evidence."""
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
    """Read the latest advice; None where it is missing, damaged, or has another `key`."""
    try:
        document = read_document(path, ADVICE)
        made: Advice = from_plain(Advice, document["advice"])
        return made if key in (None, document["key"]) else None
    except (PipelineError, KeyError, TypeError, ValueError, AttributeError):
        return None
