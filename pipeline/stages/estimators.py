"""Saved heads for Python code: `Classifier.load(folder).predict_proba(images)`, and an experiment's best head as a pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sklearn.pipeline import FeatureUnion, Pipeline

from pipeline.config import names_code, names_vectors
from pipeline.embed.baselines import no_network
from pipeline.embed.engines import engine_at_hand
from pipeline.embed.records import EmbeddingRecord
from pipeline.embed.spec import embedding_name
from pipeline.embed.transformer import Embedder
from pipeline.errors import BackboneError, BundleError
from pipeline.experiment import Artifacts
from pipeline.export import bundle as bundles
from pipeline.export.estimators import estimator_of
from pipeline.stages.predict import find_bundles, records_of

FROM_EXPERIMENT = "experiment"


class Classifier:
    """A saved head for classes or for several labels per image, as a fitted pipeline from images to labels."""

    @staticmethod
    def load(folder: str | Path, *, device: str = "auto", trust: bool = False) -> Pipeline:
        """Load a bundle's folder, or the best head of an output folder; no images are stored.

        It has `predict`, `predict_proba` and `classes_`, and takes a path, a PIL image or an array, or a sequence of these. `trust` allows
        files that can run arbitrary code: a joblib bundle, or a network defined by code. BundleError for a head that predicts numbers.
        """
        return _load(folder, "Regressor", True, device, trust)


class Regressor:
    """A saved head for numbers, as a fitted pipeline from images to them."""

    @staticmethod
    def load(folder: str | Path, *, device: str = "auto", trust: bool = False) -> Pipeline:
        """Load as `Classifier.load` does; BundleError for a head that predicts classes."""
        return _load(folder, "Classifier", False, device, trust)


def _load(folder: str | Path, other: str, classes: bool, device: str, trust: bool) -> Pipeline:
    loaded = best_estimator(folder, store=None, device=device, trust=trust)
    if hasattr(loaded[-1], "classes_") != classes:
        raise BundleError(f"{folder}: says {'numbers' if classes else 'classes'}; use {other}.load")
    return loaded


def best_estimator(
    folder: str | Path, *, store: str | Path | None = FROM_EXPERIMENT, device: str = "auto", trust: bool = False
) -> Pipeline:
    """Return the best head of an output folder, or a bundle, as a fitted pipeline from images: `Embedder`, then the head.

    When refitted, as on each fold of `cross_val_score`, it learns from images and labels with the same hyperparameters. Several
    concatenated embeddings are a `FeatureUnion`. `store` : as in `Embedder`; "experiment" is the experiment's own folder of
    vectors, None for a bundle alone. With several targets one must be chosen. Networks are loaded at the first image.
    """
    folders = find_bundles(Path(folder))
    if len(folders) > 1:
        lines = [f"{name}: {Artifacts(folder).target(name)}" for name in folders]
        raise BundleError(
            f"{folder}: has {len(folders)} targets, each in a folder of its own; load one of these", lines
        )
    (path,) = folders.values()
    bundle = bundles.load(path, trust_code=trust)
    records = records_of({"": bundle}, {"": path})[""]
    embedders = []
    for number, block in enumerate(block for record in records for block in record.parts or (record,)):
        place = store
        if store == FROM_EXPERIMENT:
            place = next((found.parent for found in Artifacts(folder).find_stores(block.store)), None)
        embedders.append((f"embedder{number}", embedder_of(block, place, device, trust)))
    first = embedders[0][1] if len(embedders) == 1 else FeatureUnion(embedders)
    return Pipeline([("embedder", first), ("head", estimator_of(bundle))])


def embedder_of(record: EmbeddingRecord, store: str | Path | None, device: str, trust: bool) -> Embedder:
    """Return the transformer that reproduces the vectors of a record; it refuses to make different ones.

    BackboneError for vectors computed elsewhere, and for an untrusted network defined by code.
    """
    spec, section = record.spec, record.section
    if section is not None and names_vectors(section.name):
        raise no_network(section.name)
    shared: dict[str, Any] = {
        "decode": spec.preprocessing["decode"]["mode"],
        "max_pixels": record.max_pixels,
        "store": store,
    }
    if section is None:
        return Embedder(spec.architecture, fingerprint=record.fingerprint, **shared)
    if names_code(section.name) and not trust:
        raise BackboneError(
            f"{record.name}: its network is code, {section.name}, which can do anything when it is run; only if you know who wrote "
            "it, say trust=True"
        )
    engine = spec.engine if spec.engine == "torch" else engine_at_hand(spec.engine, device)
    pooled = spec.pooling.partition("[")[0]
    return Embedder(
        section.name,
        weights=section.weights,
        layer=max((each for each in section.layers if record.layer.startswith(embedding_name(each))), key=len),
        pooling=pooled if pooled in section.pooling else section.pooling[0],
        arguments=section.arguments or None,
        preprocessing=section.preprocessing and section.preprocessing.model_dump(exclude_defaults=True),  # type: ignore[arg-type]
        view=section.view,
        precision=spec.precision,
        engine=engine,
        device=device,
        seed=record.seed,
        fingerprint=replace(spec, engine=engine).fingerprint(),
        **shared,
    )
