"""Hand-over: a fitted scikit-learn head becomes the last layer of the network that made its features, exactly.

Fine-tuning then starts where stage two ended, not from a random layer whose first gradients would distort the
pretrained weights (Kumar et al. 2022, "Fine-tuning can distort pretrained features": LP-FT).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from torch import nn

from pipeline.config import Config
from pipeline.data.classes import expand_scores
from pipeline.embed.engines import resolve_device, resolve_precision
from pipeline.embed.records import open_record
from pipeline.embed.weights import Network, family_of, load_network
from pipeline.errors import TrainingError
from pipeline.evaluation import fit_calibrator
from pipeline.finetuning.batches import Data, LabelledImages
from pipeline.finetuning.material import Choice, Parts, read_pixels
from pipeline.finetuning.plan import check_plan, last_linear, stages_of
from pipeline.finetuning.trainer import TrainingTask, predict_logits, steps_of
from pipeline.heads import HEADS, Head, Layer, as_layer
from pipeline.heads.tuning import FeatureMatrix, blocks, limited, make_folds, memory_needed, part, refit
from pipeline.store import FeatureStore, StoredRows

PROBES = 32
"""Number of stored vectors computed again to check that they are the inputs of the last layer."""
TOLERANCE = 0.05
"""Their largest relative distance; bf16 against fp32 stays below 0.016, another layer or pooling is far above."""
TEMPERATURE_FOLDS = 3
UNSEEN_MARGIN = 10.0
"""The bias of a class that the head never saw is lower than the lowest other bias by this margin."""


def open_network(config: Config, choice: Choice, store: FeatureStore, parts: Parts) -> Network:
    """Load the network behind an embedding, and check that the stored vectors are the inputs of its last layer.

    TrainingError if they are not, BackboneError if the weights or a library have changed since.
    """
    record = choice.record
    trusted = record.section in config.sections
    preprocessing = open_record(record, config.extraction.device, trust_code=trusted)[0].preprocessing
    assert record.section is not None  # `choose` takes backbones only
    network = replace(load_network(record.section, record.seed), preprocessing=preprocessing)
    module = family_of(network.architecture).with_classifier(network.module, parts.target.width)
    network = replace(network, module=module)
    rows = parts.train.rows(np.arange(min(PROBES, len(parts.train))))
    device, entering = resolve_device(config.extraction.device), list[NDArray[np.float32]]()
    layer = module.to(device).get_submodule(last_linear(module))
    hook = layer.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0].float().cpu().numpy()))
    pixels = read_pixels(config, rows, preprocessing)
    predict_logits(module, pixels, preprocessing.mean, preprocessing.std, device)
    hook.remove()
    found, stored, off = np.concatenate(entering), store.read(rows.digests), np.full(len(rows), np.inf)
    if found.shape == stored.shape:
        off = np.linalg.norm(found - stored, axis=1) / np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
    if off.max() > TOLERANCE:
        raise TrainingError(
            f"{record.name}: {int((off > TOLERANCE).sum())} of {len(rows)} stored vectors are not the inputs of the network's last layer; "
            "only heads on that layer can be handed over: set finetune.start to an embedding of the penultimate layer, or, if "
            "this is one, run `manyheads features` again"
        )
    return network


def put_head(network: nn.Module, layer: Layer) -> None:
    """Replace the network's last linear layer, given weights (width, dim) and biases (width,), float64; the layer is float32."""
    name, (weights, bias) = last_linear(network), layer
    device = next(network.parameters()).device
    new = nn.Linear(weights.shape[1], len(weights), device=device)
    with torch.no_grad():
        new.weight.copy_(torch.from_numpy(weights))
        new.bias.copy_(torch.from_numpy(bias))
    network.set_submodule(name, new)


# ---- the initial last layer


def starting_layer(config: Config, choice: Choice, store: FeatureStore, parts: Parts) -> tuple[Layer, str]:
    """Return the initial last layer, weights (width, dim) and biases (width,), float64, and its description in words.

    The head is refitted, with stage two's parameters, on the training images of stage three: stage two's own head has
    also seen the validation images, on which it would look better than it is.
    TrainingError if the head was fitted for a different target than the data's.
    """
    linear, bundle, width = choice.linear, choice.head, parts.target.width
    if linear is None or bundle is None:
        bound, rng = store.dim**-0.5, np.random.default_rng(config.seed)  # torch's initialisation
        random = rng.uniform(-bound, bound, (width, store.dim)), rng.uniform(-bound, bound, width)
        return random, "a random last layer"
    if bundle.target != parts.target:
        raise TrainingError(
            f"{linear.bundle}: was fitted on {bundle.target.width} classes, but the data have {width} different ones; run `manyheads heads` again"
        )
    limit, needed = limited(config.tuning).memory_bytes, memory_needed((len(parts.train), store.dim))
    stays = limit is not None and needed > limit
    X: FeatureMatrix = StoredRows.of(store, parts.train.digests) if stays else store.read(parts.train.digests)
    y = parts.target.encode(parts.train)
    pipeline = _fitted(bundle.estimator, linear.head, X, y, config.seed)
    layer = as_layer(pipeline)
    if not hasattr(pipeline, "predict_proba"):
        layer = _tempered(layer, bundle.estimator, linear.head, X, y, config.seed)
    # A class that the head never saw gets a row too, with a far lower bias.
    weights, bias = np.zeros((width, store.dim)), np.full(width, layer[1].min() - UNSEEN_MARGIN)
    weights[pipeline.classes_], bias[pipeline.classes_] = layer
    return (weights, bias), f"{linear.head} of stage two ({linear.cv_mean:.2%} in cross-validation)"


def _fitted(estimator: Any, name: str, X: FeatureMatrix, y: NDArray[np.int64], seed: int) -> Pipeline:
    """Refit stage two's head as stage two would: with fewer components if there are fewer rows, on features that may stay on disk."""
    pca = dict(estimator.steps).get("pca")
    if not isinstance(pca, PCA):
        head = Head(name, lambda seed: clone(estimator), {}, {}, evaluator=HEADS[name].evaluator)
        return refit(head, {}, X, y, seed)
    head = Head(name, lambda seed: clone(estimator[2:]), {}, {})  # the steps after the scaler and the PCA
    return refit(head, {}, X, y, seed, pca.n_components)


def _tempered(layer: Layer, estimator: Any, name: str, X: FeatureMatrix, y: NDArray[np.int64], seed: int) -> Layer:
    """Scale margins to logits by a single temperature fitted on out-of-fold scores; no predicted label changes.

    With the raw margins of a ridge (around +-1), cross-entropy would start with far too low confidence.
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


# ---- the training task


def make_task(
    config: Config, choice: Choice, network: Network, layer: Layer, parts: Parts, folder: Path | None = None
) -> tuple[TrainingTask, Data]:
    """Combine network, head, plan and pixels into a task; with a folder, pixels that do not fit in memory are stored there.

    TrainingError if the plan is invalid or an image cannot be read.
    """
    settings, prepared, device = config.finetune, network.preprocessing, resolve_device(config.extraction.device)
    put_head(network.module, layer)
    stages = stages_of(network.module, prepared.size)
    assert settings.unfreeze != "auto"  # replaced by the advice before
    plan = check_plan(settings.unfreeze, stages)
    train, validation = (
        LabelledImages(read_pixels(config, own, prepared, folder and folder / f"{name}.npy"), parts.target.encode(own))
        for name, own in (("train", parts.train), ("validation", parts.validation))
    )
    data = Data(train, validation, parts.target.width, prepared.mean, prepared.std, balanced=choice.balanced)
    steps, precision = steps_of(settings, len(parts.train)), resolve_precision(config.extraction.precision, device)[1]
    return TrainingTask(network.module, stages, plan, settings, steps, precision, config.seed, device), data
