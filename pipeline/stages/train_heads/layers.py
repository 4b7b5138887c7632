"""Layer profiles of all networks with several embedded layers or poolings, from the stored features, without tuning.

`manyheads layers CONFIG` prints them; `heads` writes them to `layers.json`, which the report plots.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import numpy as np

from pipeline.config import Config
from pipeline.embed.records import EmbeddingRecord
from pipeline.errors import PipelineError
from pipeline.evaluation import METRICS, Predictions, metrics_for
from pipeline.evaluation.learning_curve import stratified_order
from pipeline.experiment import LAYERS, write_document
from pipeline.heads.layer_profile import LayerProfile, profile, read_profiles, table
from pipeline.heads.tuning import limited, memory_needed
from pipeline.io.digests import fingerprint
from pipeline.stages.train_heads.task import Asked, unseen_task

log = logging.getLogger(__name__)

VERSION = 1
"""Increased when the meaning of a profile changes, so that stored ones are recomputed."""
MOST_IMAGES = 1500
"""Maximum number of training images in a profile, which bounds its time to a few minutes."""


def run(config: Config) -> list[str]:
    """Return the layer profiles of a config's networks as tables.

    PipelineError if stage one has not been run for this config, or no network has several layers.
    """
    from pipeline.stages.train_heads import ask

    found = profiles(ask(config))
    if not found:
        raise PipelineError(
            "no network of this config has several layers or poolings to compare; name some, such as layers: [stage2, stage3, "
            "penultimate], as `manyheads layers MODEL` lists them, and run `manyheads features`"
        )
    return [line for one in found for line in ["", *table(one)]][1:]


def profiles(asked: Asked) -> tuple[LayerProfile, ...]:
    """Return the profile of every network with several embeddings; read them from `layers.json` if current, else compute and write them."""
    groups: dict[str, list[EmbeddingRecord]] = {}
    for record in asked.records:
        if record.section is not None:
            groups.setdefault(record.section.model_dump_json(), []).append(record)
    several = [group for group in groups.values() if len(group) > 1]
    if not several or asked.task.target.kind != "classification":
        return ()
    prints, scoring = [[record.fingerprint for record in group] for group in several], asked.config.tuning.scoring
    key = fingerprint({"version": VERSION, "task": asked.task.key, "prints": prints, "scoring": scoring})
    known = read_profiles(asked.files.layers, key)
    if known is None:
        judged = [_profile(asked, group) for group in several]
        known = tuple(one for one in judged if one is not None)
        write_document(asked.files.layers, LAYERS, {"key": key, "profiles": known})
    return known


def _profile(asked: Asked, group: Sequence[EmbeddingRecord]) -> LayerProfile | None:
    """Compare the layers of one network on a stratified sample of its training images, in the folds of all heads.

    The widest layers are left out until the rest fit into `tuning.memory` together; None if fewer than two remain.
    """
    config, task = asked.config, unseen_task(asked.task, group[0], asked.config)
    kept = np.sort(stratified_order(task.y_train, config.seed)[:MOST_IMAGES])
    place = np.full(len(task.train), -1)
    place[kept] = np.arange(len(kept))
    folds = [(place[train][place[train] >= 0], place[out][place[out] >= 0]) for train, out in task.folds]
    y, units = task.y_train[kept], None if task.groups is None else task.groups[kept]
    named = dict(sorted(((record.layer, record) for record in group), key=lambda item: _depth(item[0])))
    limit = limited(config.tuning).memory_bytes
    while limit is not None and memory_needed((len(kept), sum(each.spec.dim for each in named.values()))) > limit:
        longest = max(named, key=lambda layer: named[layer].spec.dim)
        log.warning("%s is left out of the layer profile: tuning.memory is too small for it", named.pop(longest).name)
    if len(named) < 2:
        return None
    metric = METRICS[config.tuning.scoring]
    log.info("%s: comparing its %d layers by ridge on %d training images", group[0].network, len(named), len(kept))
    return profile(
        {layer: asked.stores[record.name].read(task.train.digests[kept]) for layer, record in named.items()},
        {layer: record.name for layer, record in named.items()},
        list(named)[-1],
        Predictions(y, y, units=units, target=task.target),
        tuple((train, out) for train, out in folds if len(out)),
        config.seed,
        {"network": group[0].network, "task": task.key, "labelled": len(task.train)},
        metric if metric.needs == "labels" else metrics_for(task.target)[0],
    )


def _depth(layer: str) -> tuple[int, int]:
    """Return the sort key of a layer: the stem and stages by number, then other names, then penultimate layers."""
    stage = re.match(r"stage(\d+)", layer)
    if layer.startswith("penultimate"):
        return (2, -len(layer))  # the default layer, which names no pooling, comes last
    return (0, int(stage[1])) if stage else (0, 0) if layer.startswith("stem") else (1, 0)
