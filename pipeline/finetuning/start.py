"""How stage three starts: the network that made the features, with stage two's head as its last layer."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline

from pipeline import images
from pipeline.config import Config
from pipeline.data import DatasetIndex
from pipeline.embed.families import family_of
from pipeline.embed.precision import resolve_device, resolve_precision
from pipeline.embed.records import open_record
from pipeline.embed.weights import Network, load_network
from pipeline.errors import TrainingError
from pipeline.evaluation import fit_calibrator
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.finetuning import (
    Data,
    Labelled,
    Task,
    check_plan,
    describe_plan,
    fold,
    predict_logits,
    put_head,
    random_layer,
    stages_of,
    steps_for,
)
from pipeline.finetuning.handover import Layer
from pipeline.finetuning.material import Choice, Parts, read_pixels
from pipeline.finetuning.plan import last_linear
from pipeline.heads import HEADS, Head
from pipeline.heads.tuning import Features, blocks, expand_scores, limited, make_folds, memory_needed, part, refit
from pipeline.store import FeatureStore, StoredRows

log = logging.getLogger(__name__)

PROBES = 32
"""Stored vectors that are computed again, to see that they are what enters the last layer."""

TOLERANCE = 0.05
"""Their largest distance relative to their length; bf16 against fp32 stays below 0.016, another layer or pooling is far above."""

TEMPERATURE_FOLDS = 3
UNSEEN_MARGIN = 10.0


def open_network(config: Config, choice: Choice, store: FeatureStore, parts: Parts) -> Network:
    """Load the network behind an embedding, having seen that the stored vectors are what enters its last layer.

    Raises
    ------
    TrainingError
        When they are not.
    BackboneError
        When the weights or a library have changed since.
    """
    record = choice.record
    preprocessing = open_record(record, config.extraction.device)[0].preprocessing
    assert record.section is not None  # `choose` takes backbones only
    network = replace(load_network(record.section, record.seed), preprocessing=preprocessing)
    module = family_of(network.architecture).with_classifier(network.module, len(parts.classes))
    network = replace(network, module=module)
    rows = parts.train.rows(np.arange(min(PROBES, len(parts.train))))
    stored = store.read(rows.digests)
    found = _entering_last_layer(network, read_pixels(config, rows, preprocessing), config)
    off = np.full(len(rows), np.inf)
    if found.shape == stored.shape:
        off = np.linalg.norm(found - stored, axis=1) / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
    if off.max() > TOLERANCE:
        raise TrainingError(
            f"{record.name}: {int((off > TOLERANCE).sum())} of {len(rows)} stored vectors are not what enters the network's last layer; "
            "heads on that layer alone can be handed over: set finetune.start to an embedding of the penultimate layer, or, if "
            "this is one, run `manyheads features` again"
        )
    return network


def _entering_last_layer(network: Network, pixels: NDArray[np.uint8], config: Config) -> NDArray[np.float32]:
    """Return what a network's last linear layer is given for images, uint8 (n, height, width, 3): float32 (n, dim)."""
    device, prepared = resolve_device(config.extraction.device), network.preprocessing
    given: list[NDArray[np.float32]] = []
    layer = network.module.to(device).get_submodule(last_linear(network.module))
    hook = layer.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0].float().cpu().numpy()))
    try:
        predict_logits(network.module, pixels, prepared.mean, prepared.std, device)
    finally:
        hook.remove()
    return np.concatenate(given)


def starting_layer(
    config: Config, files: Artifacts, choice: Choice, store: FeatureStore, parts: Parts
) -> tuple[Layer, str]:
    """Return the last layer to start from, weights (n_classes, dim) and biases (n_classes,), float64, and what it is in words.

    The head is fitted anew, with stage two's parameters, on the images that stage three learns from: stage two's own has
    seen the validation images, on which it would look better than it is.

    Raises
    ------
    TrainingError
        When the head tells other classes apart than the data have.
    """
    classes = len(parts.classes)
    if choice.linear is None:
        return random_layer(classes, choice.record.spec.dim, config.seed), "a random last layer"
    bundle = bundles.load(files.root / str(choice.linear.bundle))
    if bundle.classes != parts.classes:
        raise TrainingError(
            f"{choice.linear.bundle}: tells {len(bundle.classes)} classes apart, the data have {classes} others; run `manyheads heads` again"
        )
    limit, needed = limited(config.tuning).memory_bytes, memory_needed((len(parts.train), store.dim))
    stays = limit is not None and needed > limit
    X: Features = StoredRows.of(store, parts.train.digests) if stays else store.read(parts.train.digests)
    y = parts.codes(parts.train)
    pipeline = _fitted(bundle.estimator, choice.linear.head, X, y, config.seed)
    layer = fold(pipeline)
    if not hasattr(pipeline, "predict_proba"):
        layer = _tempered(layer, bundle.estimator, choice.linear.head, X, y, config.seed)
    return _for_all_classes(layer, pipeline.classes_, classes), _in_words(choice)


def _in_words(choice: Choice) -> str:
    linear, winner = choice.linear, choice.winner
    assert linear is not None
    gap = winner.cv_mean - linear.cv_mean
    behind = "" if gap <= 0 else f"; {winner.key}, which is no layer, is {gap:.2%} better in cross-validation"
    return f"{linear.head} of stage two ({linear.cv_mean:.2%} in cross-validation{behind})"


def _fitted(estimator: Any, name: str, X: Features, y: NDArray[np.int64], seed: int) -> Pipeline:
    """Fit stage two's head anew as stage two would: on fewer rows there may be fewer components, and X may be on disk."""
    pca = dict(estimator.steps).get("pca")
    if not isinstance(pca, PCA):
        head = Head(name, lambda seed: clone(estimator), {}, {}, evaluator=HEADS[name].evaluator)
        return refit(head, {}, X, y, seed)
    head = Head(name, lambda seed: clone(estimator[2:]), {}, {})  # behind the scaler and the PCA
    return refit(head, {}, X, y, seed, pca.n_components, pca.whiten)


def _tempered(layer: Layer, estimator: Any, name: str, X: Features, y: NDArray[np.int64], seed: int) -> Layer:
    """Scale margins to logits by one temperature fitted on out-of-fold scores; no predicted label changes.

    Cross-entropy on raw margins of a ridge (which lie around +-1) would start far too unsure.
    """
    classes, codes = np.unique(y, return_inverse=True)
    columns = np.empty((len(y), len(classes)), dtype=np.float32)
    for learned, held_out in make_folds(y, TEMPERATURE_FOLDS, seed):
        pipeline = _fitted(estimator, name, part(X, learned), codes[learned], seed)
        for place, block in blocks(X, held_out):
            scores = expand_scores(pipeline.decision_function(block), pipeline.classes_, len(classes), "decision")
            columns[held_out[place]] = scores / 2 if len(classes) == 2 else scores
    slope = fit_calibrator(columns, codes).slopes[0]
    return layer[0] * slope, layer[1] * slope


def _for_all_classes(layer: Layer, seen: NDArray[np.int64], classes: int) -> Layer:
    """Give a class that the head never saw a row too, far below the others."""
    weights = np.zeros((classes, layer[0].shape[1]))
    bias = np.full(classes, layer[1].min() - UNSEEN_MARGIN)
    weights[seen], bias[seen] = layer
    return weights, bias


def make_task(config: Config, network: Network, layer: Layer, parts: Parts, folder: Path) -> tuple[Task, Data]:
    """Bring network, plan and pixels together, and say what will be trained, while a mistake still costs nothing.

    Raises
    ------
    TrainingError
        When the plan cannot be followed or an image cannot be read.
    """
    device = resolve_device(config.extraction.device)
    _, precision, reason = resolve_precision(config.extraction.precision, device)
    settings = config.finetune
    steps = steps_for(len(parts.train)) if settings.steps == "auto" else settings.steps
    put_head(network.module, layer)
    stages = stages_of(network.module, network.preprocessing.size[0])
    plan = check_plan(settings.unfreeze, stages)
    log.info("training on %s in %s: %s", device, precision, reason)
    for stage in stages:
        log.info("  %-7s %s", stage.name, ", ".join(stage.modules))
    for line in describe_plan(plan, stages, network.module, steps):
        log.info("%s", line)
    data = Data(
        _labelled(config, network.preprocessing, parts, parts.train, folder / "train.npy"),
        _labelled(config, network.preprocessing, parts, parts.validation, folder / "validation.npy"),
        len(parts.classes),
        network.preprocessing.mean,
        network.preprocessing.std,
    )
    return Task(network.module, stages, plan, settings, steps, precision, config.seed, device), data


def _labelled(
    config: Config, preprocessing: images.Preprocessing, parts: Parts, part: DatasetIndex, scratch: Path
) -> Labelled:
    return Labelled(read_pixels(config, part, preprocessing, scratch), parts.codes(part))
