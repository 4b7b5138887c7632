"""The proof of the advice on fine-tuning: each measured cell advised by a rule that has not seen it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.advice import ARMS, STOP, TRAIN, WORTH, Record, Way, fit, recommend


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
