"""The rule of `manyheads advise`: what fine-tuning should bring, learned from measured cells, and which way to recommend.

A cell is a data set at a size with a network, of which the signs that can be had cheaply and the truth that took hours were both
measured (`make advisor-cells`); the cells are data of the package. Of an experiment whose signs lie outside of theirs nothing is
said. Gains are shares of the error that the frozen features leave, so that a cell of many errors does not outweigh the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
MOST_SIGNS = 3
"""Of so few cells more would be learned by heart."""
BEYOND = 0.25
"""How far outside of the cells a sign may lie, as a share of their range."""

Record = Mapping[str, Any]
"""What was measured of a cell or an experiment: `signs`, `pilot`, and of a cell `truth`, as `advisor_cells.json` has them."""


def _per_class(record: Record) -> float:
    found = record["signs"]
    return math.log10(max(int(found["images"] - found["copies"]), 1) / int(found["classes"]))


def _gap(record: Record) -> float:
    return float(record["signs"]["train"] - record["signs"]["linear"])


def _slope(record: Record) -> float:
    return float(record["signs"]["linear"] - record["signs"]["half"])


def _curved(record: Record) -> float:
    return float(max(record["signs"]["rbf"], record["signs"]["neighbours"]) - record["signs"]["linear"])


def _error(record: Record) -> float:
    return math.log10(max(1 - float(record["signs"]["cv"]), 0.005))


def _shift(record: Record) -> float:
    return float(record["pilot"]["shift"] or 0.0)


def _start(record: Record) -> float:
    return max(float(record["pilot"]["start"]), 1e-6)


def _drop(record: Record) -> float:
    return 1 - float(record["pilot"]["losses"][1]) / _start(record)


def _growth(record: Record) -> float:
    return float(record["pilot"]["losses"][0] - record["pilot"]["losses"][1]) / _start(record)


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _power(value: float) -> str:
    return f"{10**value:.3g}"


def _plain(value: float) -> str:
    return f"{value:.2f}"


SIGNS: Mapping[str, tuple[str, Callable[[Record], float], Callable[[float], str]]] = {
    "per_class": ("images per class without near-duplicates", _per_class, _power),
    "error": ("error of the linear head out of fold, as a share", _error, _power),
    "gap": ("accuracy of the linear head on its training images minus that out of fold", _gap, _points),
    "slope": ("what the second half of the images brought", _slope, _points),
    "curved": ("kNN or RBF minus linear", _curved, _points),
    "shift": ("distance of the images from the statistics of the network, in its standard deviations", _shift, _plain),
    "drop": ("share of the loss that the pilot took away", _drop, _plain),
    "growth": ("share of the loss that more images took away in the pilot", _growth, _plain),
}
"""What is looked at: a name, what it is in words, how it comes of a record (counts and errors as powers of ten), and its text."""


def _said(name: str, value: float) -> str:
    words, _, text = SIGNS[name]
    return f"{words}: {text(value)}"


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
            f"{_said(name, value)}, measured from {SIGNS[name][2](low)} to {SIGNS[name][2](high)}"
            for name, value, low, high, more in zip(self.names, x, self.low, self.high, room, strict=True)
            if not low - more <= value <= high + more
        )

    def expect(self, record: Record) -> dict[str, Expected]:
        """Return what each arm should bring."""
        x = np.concatenate([[1.0], (_row(record, self.names) - self.centre) / self.spread])
        error = 1 - record["signs"]["cv"]
        found = {}
        for arm in ARMS:
            share = float(x @ self.weights[arm])
            half = _quantile(np.abs(self.errors[arm]))
            found[arm] = Expected(error * share, (error * (share - half), error * (share + half)))
        return found


def _row(record: Record, names: Iterable[str]) -> NDArray[np.float64]:
    return np.array([SIGNS[name][1](record) for name in names])


def _quantile(off: NDArray[np.float64]) -> float:
    """Return the distance within which a new cell lies with probability `COVERAGE`, from those of n cells, float64 (n,)."""
    place = math.ceil((len(off) + 1) * COVERAGE) - 1
    return float(np.sort(off)[min(place, len(off) - 1)])


def cells() -> dict[str, Record]:
    """Return the measured cells by name."""
    found: dict[str, Record] = json.loads(
        files("pipeline.evaluation").joinpath("advisor_cells.json").read_text("utf-8")
    )
    return found


def share_gained(record: Record, arm: str) -> float:
    """Return what an arm took away of the error that the frozen features left in cross-validation."""
    return float(record["truth"][arm]["test"] - record["truth"]["frozen"]) / max(1 - float(record["signs"]["cv"]), 1e-6)


def _solver(X: NDArray[np.float64], penalty: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what makes the weights of a ridge regression with a free constant out of y, float64 (1 + k, n), and its design, float64 (n, 1 + k).

    X : float64 of shape (n, k), standardised
    """
    A = np.column_stack([np.ones(len(X)), X])
    return np.linalg.solve(A.T @ A + np.diag([0.0] + [penalty] * X.shape[1]), A.T), A


def _left_out(X: NDArray[np.float64], Y: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    """Return how far a regression is off for each cell when it is fitted on the others: float64 of the shape of Y, (n, n_arms).

    Of ridge that is the residual over one minus the cell's own weight in its prediction.
    """
    solver, A = _solver(X, penalty)
    hat = A @ solver
    return np.asarray((hat @ Y - Y) / (1 - np.diag(hat))[:, None])


def fit(records: Sequence[Record]) -> Rule:
    """Fit the rule on cells: signs and penalty are those that are least off, in accuracy, for cells left out."""
    all_signs = np.stack([_row(record, SIGNS) for record in records])
    centre, spread = all_signs.mean(axis=0), np.maximum(all_signs.std(axis=0), 1e-9)
    Z = (all_signs - centre) / spread
    Y = np.array([[share_gained(record, arm) for arm in ARMS] for record in records])
    error = np.array([[1 - record["signs"]["cv"]] for record in records])
    choices = [
        (list(places), penalty)
        for count in range(1, MOST_SIGNS + 1)
        for places in combinations(range(len(SIGNS)), count)
        for penalty in PENALTIES
    ]
    off = [float(((_left_out(Z[:, places], Y, penalty) * error) ** 2).sum()) for places, penalty in choices]
    places, penalty = choices[int(np.argmin(off))]
    weights = dict(zip(ARMS, (_solver(Z[:, places], penalty)[0] @ Y).T, strict=True))
    errors = dict(zip(ARMS, _left_out(Z[:, places], Y, penalty).T, strict=True))
    names, kept = tuple(np.array(list(SIGNS))[places].tolist()), all_signs[:, places]
    return Rule(names, kept.min(axis=0), kept.max(axis=0), centre[places], spread[places], weights, errors)


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


# ---- the proof: each cell advised by a rule that has not seen it


@dataclass(frozen=True)
class Judged:
    """How the advice does on cells, each left out in turn, and beside always and never fine-tuning."""

    names: tuple[str, ...]
    advised: tuple[str, ...]
    gains: tuple[float, ...]
    """What was advised brought, in accuracy."""
    regrets: tuple[float, ...]
    """What the best of stopping and both arms brought more, in accuracy."""
    covered: float
    """Share of the intervals that hold the true gain."""
    spared: float
    """Of the cells where no arm brings `WORTH`, the share in which it says stop."""
    worth: Mapping[str, float]
    """Mean gain minus `WORTH` for each whole run's minutes, of the advice, of always training everything, and of never."""


def judged(records: Mapping[str, Record]) -> Judged:
    """Advise each cell by the rule of the others."""
    names, advised, gains, regrets, inside, spared, prices = tuple(records), [], [], [], [], [], []
    for name in names:
        record, truth = records[name], records[name]["truth"]
        rule = fit([records[other] for other in names if other != name])
        expected = rule.expect(record)
        true = {arm: truth[arm]["test"] - truth["frozen"] for arm in ARMS} | {STOP: 0.0}
        ways = [Way(STOP, 0.0)] + [
            Way(way, expected[arm].gain, expected[arm].interval, truth[arm]["minutes"]) for way, arm in TRAIN.items()
        ]
        taken = recommend(ways).name
        arm = TRAIN.get(taken, STOP)
        advised.append(taken)
        gains.append(true[arm])
        regrets.append(max(true.values()) - true[arm])
        inside += [expected[each].interval[0] <= true[each] <= expected[each].interval[1] for each in ARMS]
        prices.append(0.0 if arm == STOP else truth[arm]["minutes"] / max(truth["all"]["minutes"], 1e-9))
        if max(true[each] for each in ARMS) < WORTH:
            spared.append(arm == STOP)
    always = [records[name]["truth"]["all"]["test"] - records[name]["truth"]["frozen"] for name in names]
    worth = {
        "advice": float(np.mean(gains) - WORTH * np.mean(prices)),
        "always": float(np.mean(always) - WORTH),
        "never": 0.0,
    }
    return Judged(
        names,
        tuple(advised),
        tuple(gains),
        tuple(regrets),
        float(np.mean(inside)),
        float(np.mean(spared)) if spared else 1.0,
        worth,
    )
