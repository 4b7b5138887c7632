"""Weights and where they come from: published by the network's family, a local file, the package's own, or a seed.

Whatever the source, what comes out is a `Network`: a module in eval mode in fp32 on the CPU, with the digest of its tensors
and the preprocessing that belongs to them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import OWN, WEIGHTS_FILES, BackboneConfig, PreprocessingConfig, names_code
from pipeline.embed.families import (
    FAMILIES,
    build,
    build_empty,
    family_of,
    load,
    load_file,
    network_names,
    published,
    usual_preprocessing,
)
from pipeline.embed.family import Arguments, Fetch
from pipeline.embed.graph import (
    PENULTIMATE,
    classifier_name,
    cut,
    effective,
    rows,
    stage_ends,
    tokens_of,
    trace,
)
from pipeline.embed.installed import BUNDLED
from pipeline.embed.licenses import NO_WEIGHTS, UNKNOWN
from pipeline.embed.own_modules import with_prefix
from pipeline.embed.spec import embedding_name
from pipeline.embed.torchvision_models import AUXILIARY
from pipeline.embed.weights_files import read_weights, tensors_digest
from pipeline.errors import BackboneError, first
from pipeline.images import Preprocessing

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Network:
    """A network with its weights, and all that an `EmbeddingSpec` says of them."""

    module: nn.Module
    name: str
    architecture: str
    arguments: Mapping[str, Any]
    weights: str
    weights_digest: str
    preprocessing: Preprocessing
    untrained: bool = False
    trained_on: str | None = None
    license: str = UNKNOWN
    code: Mapping[str, str] = field(default_factory=dict)
    has_classifier: bool = True
    """Whether the weights have the last layer, which those of self-supervised training lack."""


def load_network(config: BackboneConfig, seed: int) -> Network:
    """Build the network a config section asks for; `seed` makes the weights of an untrained control (`weights: random`).

    Raises
    ------
    BackboneError
        When the model, the weights, or the arguments are not to be had; all misfits of a file at once.
    """
    config = _sized(config)
    if config.weights == "bundled":
        description = bundled()
        return _from_state(config, read_weights(BUNDLED)[0], description, BUNDLED, "bundled")
    if config.weights.endswith(WEIGHTS_FILES):
        path = Path(config.weights)
        state, description = read_weights(path)
        module = None if description else load_file(config, path)
        return (
            _network(config, module, path.stem) if module else _from_state(config, state, description, path, path.stem)
        )
    if config.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build(config.name, config.arguments)
        return _network(config, module, "random", untrained=True, license=NO_WEIGHTS)
    found = published(config)
    return _network(
        config,
        load(config),
        config.weights,
        found.preprocessing,
        license=found.license,
        has_classifier=config.weights != OWN,
    )


def _sized(config: BackboneConfig) -> BackboneConfig:
    """A network that is built for one image size is built for the one that the config asks for."""
    sized = any(family.sized and family.has(config.name) for family in FAMILIES)
    if config.preprocessing is None or "image_size" in config.arguments or not sized:
        return config
    return config.model_copy(update={"arguments": {"image_size": config.preprocessing.crop, **config.arguments}})


def check(config: BackboneConfig) -> list[str]:
    """Return what the section's embeddings will be called; fetches nothing.

    Raises
    ------
    BackboneError
        When the model, arguments, weights, image size, layers or pooling are not to be had.
    """
    config = _sized(config)
    weights = Path(config.weights).stem if config.weights.endswith(WEIGHTS_FILES) else config.weights
    if config.weights == "bundled" or config.weights.endswith(WEIGHTS_FILES):
        network = load_network(config, seed=0)
        module, preprocessing, has_classifier = network.module, network.preprocessing, network.has_classifier
    else:
        random = config.weights == "random"
        if not random and (lacking := published(config).to_install()):
            raise BackboneError(lacking)
        usual = None if random else published(config).preprocessing
        module = build_empty(config.name, config.arguments)
        preprocessing = fitting_preprocessing(config, module, usual)
        has_classifier = True
    height, width = preprocessing.size
    graph, tokens = trace(module), tokens_of(module)
    ends = partial(stage_ends, module, graph, (height, width))
    asked = rows(graph, config.layers, config.pooling, tokens, has_classifier, ends)
    if (config.layers, config.preprocessing) == ((PENULTIMATE,), None) and config.pooling in {("own",), ("avg",)}:
        found = asked  # fits every network; running one without weights for the first time costs two seconds
    else:
        device = next(module.parameters()).device
        kept = cut(graph, [row.node for row in asked])
        about = f"{config.name} cannot take images of {height} x {width} pixels"
        found = effective(lambda: kept(torch.zeros(2, 3, height, width, device=device)), asked, tokens, about)
    return [embedding_name(config.name, weights, *row.words) for row in found]


def to_fetch(config: BackboneConfig) -> Fetch | None:
    """Return what a section's weights have to be fetched from; None where they are here."""
    if config.weights in ("bundled", "random") or config.weights.endswith(WEIGHTS_FILES):
        return None
    return published(config).to_fetch()


def license_of(config: BackboneConfig) -> str:
    """Return the licence of a section's weights; loads and fetches nothing.

    Raises
    ------
    BackboneError
        When the model or the weights are not to be had.
    """
    if config.weights == "random":
        return NO_WEIGHTS
    if config.weights == "bundled":
        return str(bundled().get("license", UNKNOWN))
    if config.weights.endswith(WEIGHTS_FILES):
        described = read_weights(Path(config.weights))[1] if config.weights.endswith(".safetensors") else {}
        return str(described.get("license", UNKNOWN))
    return published(config).license


def bundled() -> dict[str, Any]:
    """Return the description of the bundled weights, which lies beside them.

    Raises
    ------
    BackboneError
        When this installation comes without them.
    """
    described = BUNDLED.with_suffix(".json")
    if not BUNDLED.exists() or not described.exists():
        raise BackboneError(
            f"weights: bundled: this installation comes without {BUNDLED.name}; use weights: random or a torchvision weights name"
        )
    return dict(json.loads(described.read_text(encoding="utf-8")))


def _from_state(
    config: BackboneConfig, state: dict[str, torch.Tensor], description: Mapping[str, Any], origin: Path, readable: str
) -> Network:
    architecture = description.get("architecture", config.name)
    if description and config.name != architecture and config.name in network_names():
        raise BackboneError(
            f"{origin} holds a {architecture}, the config says {config.name}; write name: {description.get('name', architecture)}"
        )
    if names_code(architecture) and architecture != config.name:
        raise BackboneError(
            f"{origin} holds a network of code, {architecture}, which can do anything when it is built; write name: {architecture} "
            "only if you know who wrote that"
        )
    state = with_prefix(state) if names_code(architecture) else state
    arguments = {**description.get("arguments", {}), **config.arguments}
    module, has_classifier = fill(architecture, arguments, state, origin)
    if not has_classifier:
        logger.info("%s has no classifier: all that comes before one can be embedded", origin)
    described = _described(description["preprocessing"]) if "preprocessing" in description else None
    module.preprocessing = described or getattr(module, "preprocessing", usual_preprocessing(architecture))  # type: ignore[assignment]
    network = _network(
        config, module, readable, trained_on=description.get("trained_on"), license=description.get("license", UNKNOWN)
    )
    return replace(network, architecture=architecture, arguments=arguments, has_classifier=has_classifier)


def _network(
    config: BackboneConfig, module: nn.Module, weights: str, preprocessing: Preprocessing | None = None, **rest: Any
) -> Network:
    architecture: str = config.name
    arguments: Arguments = config.arguments
    if any(family.has(config.name) for family in FAMILIES):  # a file that describes itself may be called anything
        architecture, arguments = family_of(config.name).resolve(config.name, config.arguments)
    return Network(
        module=module,
        name=config.name,
        architecture=architecture,
        arguments=dict(arguments),
        weights=weights,
        weights_digest=tensors_digest(module.state_dict()),
        preprocessing=fitting_preprocessing(config, module, preprocessing),
        code=getattr(module, "code", {}),
        **rest,
    )


def _described(values: Mapping[str, Any]) -> Preprocessing:
    """The transform that a weights file of this project describes."""
    given = {key: values[key] for key in PreprocessingConfig.model_fields if key in values}
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Preprocessing(**plain)


def fitting_preprocessing(config: BackboneConfig, module: nn.Module, default: Preprocessing | None) -> Preprocessing:
    """The config's transform before the network's or the weights' own; a network of one fixed image size gets that size."""
    size = getattr(module, "image_size", None)  # vision transformers
    asked = config.preprocessing
    if asked is not None:
        if size not in (None, asked.crop):
            raise BackboneError(
                f"{config.name} takes images of {size} x {size} pixels only, the config says preprocessing.crop: {asked.crop}"
            )
        return Preprocessing(**asked.model_dump())
    default = getattr(module, "preprocessing", None) or default or usual_preprocessing(config.name)
    if size is not None and default.size != (size, size):
        return replace(default, resize=size, crop=size)
    return default


def fill(
    architecture: str, arguments: Mapping[str, Any], state: Mapping[str, torch.Tensor], origin: object
) -> tuple[nn.Module, bool]:
    """Build a network from a state dict; the number of classes is the file's.

    Returned with whether the file has the network's last layer, which is zero otherwise.

    state : tensors of the network's shapes and of any dtype; each is turned into the dtype the network has it in

    Raises
    ------
    BackboneError
        With one line for every tensor that is missing, left over or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.startswith(AUXILIARY)}
    empty = build_empty(architecture, arguments)
    head = f"{classifier_name(empty, trace(empty))}."
    has_classifier = f"{head}weight" in state
    if "num_classes" not in arguments and has_classifier:
        arguments = {**arguments, "num_classes": state[f"{head}weight"].shape[0]}
    module = build_empty(architecture, arguments)
    expected = module.state_dict()
    if not has_classifier:  # what may be in its place is a projection head
        state = {name: value for name, value in state.items() if not name.startswith(head)}
        state |= {name: torch.zeros(value.shape) for name, value in expected.items() if name.startswith(head)}
    problems = _misfits(expected, state)
    if problems:
        raise BackboneError(
            f"weights file {origin} does not fit {architecture}: {len(problems)} of {len(expected)} tensors",
            first(problems, MAX_PROBLEMS),
        )
    kept = {name: value.to(expected[name].dtype) for name, value in state.items()}
    kept |= {name: torch.zeros((), dtype=torch.long) for name in expected if name not in kept}
    module.load_state_dict(kept, strict=True, assign=True)
    return module.eval(), has_classifier


def _misfits(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    counters = {
        name for name in expected if name.endswith(".num_batches_tracked")
    }  # old files have none, nothing reads them
    return [
        *(
            f"missing: {name} {tuple(expected[name].shape)}"
            for name in expected
            if name not in state and name not in counters
        ),
        *(f"unexpected: {name} {tuple(state[name].shape)}" for name in state if name not in expected),
        *(
            f"other shape: {name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in expected
            if name in state and state[name].shape != expected[name].shape
        ),
    ]
