"""Advice: stop, label more, use another layer or backbone, or fine-tune; each option with its expected gain and price.

Reads the results of stages one and two and runs a pilot, which together cost at most a twentieth of a whole fine-tuning. Test
images are not used. The expected gain of fine-tuning is derived from measured cells (`evaluation/advice.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from pipeline.config import Config
from pipeline.data import lineage
from pipeline.errors import PipelineError
from pipeline.evaluation import advice
from pipeline.evaluation.advice import LABEL, OTHER, STOP, TRAIN, Advice, Way, read_advice, recommend
from pipeline.evaluation.audit import read_findings
from pipeline.evaluation.leaderboard import Leaderboard
from pipeline.evaluation.learning_curve import LearningCurve, stratified_order
from pipeline.experiment import ADVICE, Artifacts, write_document
from pipeline.finetuning.handover import open_network, starting_layer
from pipeline.finetuning.material import Choice, Parts, choose, divide
from pipeline.finetuning.pilot import Pilot, full_passes, pilot
from pipeline.finetuning.result import transfer
from pipeline.heads.layer_profile import PENALTIES, read_profiles
from pipeline.heads.tuning import make_folds
from pipeline.io.digests import fingerprint
from pipeline.report import material
from pipeline.store import FeatureStore

log = logging.getLogger(__name__)

MOST_IMAGES = 1500
"""Largest number of training images for the simple heads."""
FOLDS = 5
EIGHTY = 1.2816 / 1.96
"""Ratio of the half width of an 80 % normal interval to that of a 95 % interval."""


def run(config: Config) -> Advice:
    """Advise what to do next, or return earlier advice for the same features and rows.

    PipelineError if stages one and two have not been run, or the target or embedding cannot be fine-tuned.
    """
    files = Artifacts(config.output, config.store)
    choice = choose(config, files)
    cells = advice.cells()
    key = fingerprint(
        {
            "version": ADVICE.version,
            "cells": cells,
            "embedding": choice.record.fingerprint,
            "row": None if choice.linear is None else choice.linear.key,
            "task": choice.winner.task,
            "finetune": config.finetune.model_dump(mode="json", exclude={"unfreeze", "watch"}),
            "seed": config.seed,
        }
    )
    known = read_advice(files.advice, key)
    if known is not None:
        return known
    log.info("advice: a pilot of fine-tuning %s, and simple heads on its features", choice.record.name)
    record, tried, parts = signs(config, choice)
    rule = advice.fit(list(cells.values()))
    outside = rule.outside(record)
    shown = material.gather(files.root)
    ways = [Way(STOP, 0.0, (0.0, 0.0)), _label(shown.curve), _other(shown.leaderboard, files, choice)]
    expected = {} if outside else rule.expect(record)
    for (name, arm), price in zip(TRAIN.items(), tried.minutes(config, parts), strict=True):
        if outside:
            ways.append(Way(name, minutes=price, basis="outside of what was measured"))
        else:
            ways.append(Way(name, expected[arm].gain, expected[arm].interval, price))
    made = Advice(
        choice.record.name,
        recommend(ways).name,
        tuple(ways),
        outside,
        len(cells),
        tried.share(config, parts),
        advice.signs_of(record),
        transfer(files, choice, config.seed, held_out=True),
    )
    write_document(files.advice, ADVICE, {"key": key, "signs": record, "advice": made})
    return made


# ---- the signs, which are the inputs of the rule


def signs(config: Config, choice: Choice) -> tuple[dict[str, Any], Pilot, Parts]:
    """Return the inputs of the rule, `signs` and `pilot`, with the pilot and the division of the images."""
    files = Artifacts(config.output, config.store)
    store = FeatureStore.open(files.find_store(choice.record.store), choice.record.fingerprint)
    parts = divide(config, files, store, lineage.of(choice.record.section, choice.record.spec.trained_on))
    y = parts.target.encode(parts.train)
    kept = np.sort(stratified_order(y, config.seed)[:MOST_IMAGES])
    units = parts.train.fold_groups()
    found: dict[str, Any] = dict(
        probes(store.read(parts.train.digests[kept]), y[kept], None if units is None else units[kept], config.seed)
    )
    network = open_network(config, choice, store, parts)
    layer, _ = starting_layer(config, choice, store, parts)
    tried = pilot(config, choice, network, layer, parts)
    try:
        copies = len({pair.other for pair in read_findings(files.audit).near_duplicates})
    except PipelineError:
        copies = 0
    found |= {
        "images": len(parts.train) + len(parts.validation),
        "classes": parts.target.width,
        "copies": copies,
        "cv": choice.winner.cv_mean if choice.linear is None else choice.linear.cv_mean,
        "dim": choice.record.spec.dim,
        "passes": full_passes(config, parts),
    }
    return {"signs": found, "pilot": asdict(tried)}, tried, parts


def probes(
    X: NDArray[np.float32], y: NDArray[np.int64], groups: NDArray[np.int64] | None, seed: int
) -> dict[str, float]:
    """Return the out-of-fold accuracies of simple heads on the same folds; for the linear one also its training accuracy.

    `half` is the linear head fitted on half of each fold's training rows.

    X : float32 of shape (n, dim); y : int64 of shape (n,); groups : int64 of shape (n,), whose members share a fold
    """
    heads: Mapping[str, Callable[[], Any]] = {
        "linear": lambda: make_pipeline(StandardScaler(), RidgeClassifierCV(PENALTIES)),
        "neighbours": lambda: make_pipeline(StandardScaler(), KNeighborsClassifier(5, metric="cosine")),
        "rbf": lambda: make_pipeline(StandardScaler(), SVC(C=10.0)),
    }
    right = {name: np.zeros(len(y), dtype=bool) for name in (*heads, "half")}
    train = list[float]()
    with threadpool_limits(limits=1, user_api="blas"):
        for learned, held_out in make_folds(y, FOLDS, seed, groups):
            for name, build in heads.items():
                fitted = build().fit(X[learned], y[learned])
                right[name][held_out] = fitted.predict(X[held_out]) == y[held_out]
                if name == "linear":
                    train.append(float(fitted.score(X[learned], y[learned])))
            half = learned[stratified_order(y[learned], seed)[: len(learned) // 2]]
            if len(np.unique(y[half])) > 1:
                fitted = heads["linear"]().fit(X[half], y[half])
                right["half"][held_out] = fitted.predict(X[held_out]) == y[held_out]
    return {**{name: float(hits.mean()) for name, hits in right.items()}, "train": float(np.mean(train))}


# ---- the options


def _label(curve: LearningCurve | None) -> Way:
    if curve is None or curve.law is None or not curve.forecast:
        return Way(LABEL, basis="there is no learning curve: too few images")
    twice, labelled = curve.forecast[0], curve.forecast[0].size // 2
    now = float(curve.law.accuracy([float(labelled)])[0])
    low, high = (EIGHTY * (end - twice.predicted) + twice.predicted - now for end in twice.interval)
    return Way(
        LABEL, twice.predicted - now, (low, high), images=labelled, basis="the learning curve, at twice the images"
    )


def _other(board: Leaderboard, files: Artifacts, choice: Choice) -> Way:
    """Return the option of using another row or layer; both are measured already, so they cost nothing."""
    best, ours = board.best, choice.linear or choice.winner
    layered = [
        one for one in read_profiles(files.layers) or () if one.nested_gain is not None and one.chosen != one.usual
    ]
    if best.embedding != choice.record.name and best.cv_mean > ours.cv_mean:
        return Way(OTHER, best.cv_mean - ours.cv_mean, None, basis=f"take {best.key}, which is best out of fold")
    if layered and layered[0].nested_gain is not None:
        gain = layered[0].nested_gain
        low, high = (EIGHTY * (end - gain.difference) + gain.difference for end in gain.interval)
        return Way(OTHER, gain.difference, (low, high), basis=f"layers {layered[0].chosen}, by the profile of layers")
    several = len({row.embedding for row in board.rows if not row.baseline}) > 1
    none = "no other that was embedded is better" if several else "no other was embedded; see `manyheads shortlist`"
    return Way(OTHER, 0.0 if several else None, (0.0, 0.0) if several else None, basis=none)
