"""The table of families, and loading of a config section: a network with its weights, their digest and their transform.

For any source of weights (published by the family, a file, bundled with the package, or a seed) the result is a `Network`: a
module in eval mode in fp32 on the CPU.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config import OWN, WEIGHTS_FILES, BackboneConfig, guess, names_code, names_vectors
from pipeline.embed import baselines, efficientnet_lite, own_modules, timm_models, torchvision_models
from pipeline.embed.graph import PENULTIMATE, classifier_name, cut, effective, rows, tokens_of, trace
from pipeline.embed.published import (
    BUNDLED,
    NO_WEIGHTS,
    UNKNOWN,
    Arguments,
    Family,
    Fetch,
    Published,
    read_preprocessing,
    tensors_digest,
)
from pipeline.embed.spec import embedding_name
from pipeline.errors import BackboneError, first_line
from pipeline.experiment import MADE_BY
from pipeline.images import Preprocessing
from pipeline.io.digests import fingerprint
from pipeline.io.process import is_out_of_memory

logger = logging.getLogger(__name__)

MOST_LETTERS = 300
"""Length limit, in characters, of a list of missing or unexpected tensors in a message."""

# ---- families

FAMILIES: tuple[Family, ...] = (
    efficientnet_lite.FAMILY,
    torchvision_models.FAMILY,
    timm_models.FAMILY,
    own_modules.FAMILY,
)


def family_of(architecture: str) -> Family:
    """Return the family of a network's name or architecture; BackboneError if there is none."""
    if names_vectors(architecture):
        raise baselines.no_network(architecture)
    for family in FAMILIES:
        if family.has(architecture):
            return family
    raise BackboneError(
        f"no network {architecture!r}{guess(architecture, network_names())}; there are "
        + "; ".join(family.title for family in FAMILIES)
    )


def network_names() -> list[str]:
    """Return the names of all library networks that a config can name."""
    return [name for family in FAMILIES for name in family.names()]


def published(config: BackboneConfig) -> Published:
    """Return a section's weights from those that its network's family publishes; BackboneError if they are not among them."""
    found = family_of(config.name).weights(config.name)
    if config.weights not in found:
        raise BackboneError(
            f"{config.name} has no weights {config.weights!r}{guess(config.weights, list(found))}; "
            f"there are {', '.join([*found, 'random', 'bundled'])}, or a .safetensors or .pth file"
        )
    return found[config.weights]


def build(architecture: str, arguments: Arguments) -> nn.Module:
    """Construct a network in eval mode with its constructor's initial weights; BackboneError if that fails."""
    return _in_eval_mode(partial(family_of(architecture).build, architecture), architecture, arguments)


def _in_eval_mode(make: Callable[[Arguments], nn.Module], name: str, arguments: Arguments) -> nn.Module:
    try:
        return make(arguments).eval()
    except (TypeError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BackboneError(f"{name} cannot be built with arguments {dict(arguments)}: {first_line(error)}") from None


_RANDOM_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_})


class _Uninitialised(TorchFunctionMode):
    """Skips the initialisation of weights on the meta device, for which torch would import its compiler."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_empty(architecture: str, arguments: Arguments) -> nn.Module:
    """Construct a network on the meta device, in milliseconds; on the CPU if its constructor needs values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Uninitialised():
                return build(architecture, arguments)
        except BackboneError:  # a regnet computes its widths with tensors; a wrong argument fails again here
            return build(architecture, arguments)


@cache
def penultimate_dim(name: str) -> int:
    """Return the length of the vector before a network's last layer, without loading its weights."""
    module = build_empty(name, {})
    if hasattr(module, "head_hidden_size"):  # timm's attribute
        return int(module.head_hidden_size)  # type: ignore[arg-type]
    *_, last = (part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))
    return last.in_features if isinstance(last, nn.Linear) else last.in_channels


# ---- weights files, from which only tensors are loaded

METADATA_KEY = "manyheads"
"""Key in the safetensors header of the description, in weights files of this project."""
DIGEST_KEY = "manyheads_digest"
"""Key of the digest of tensors and description in such a file."""

WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
"""Prefixes that DataParallel, torch.compile, Lightning and self-supervised training put before the names of a network's tensors,
in any order; tensors without them belong to the training, such as a projection head."""


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a file's tensors, with their shapes and dtypes, and its description; BackboneError if it has other content or is damaged."""
    if not path.is_file():
        raise BackboneError(f"weights file {path} does not exist; a path in a config is relative to its folder")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _tensors(torch.load(path, map_location="cpu", weights_only=True), path), {}
    except BackboneError:
        raise
    except Exception as error:  # the readers may raise anything on damaged files
        reason = first_line(error)
        raise BackboneError(f"weights file {path} cannot be read as a state dict ({reason})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    description = json.loads(metadata.get(METADATA_KEY, "{}"))
    ours = DIGEST_KEY in metadata or MADE_BY in description
    if ours and metadata.get(DIGEST_KEY) != weights_digest(state, metadata):
        raise BackboneError(f"weights file {path} is damaged: its content is not the one that its digest names")
    return _tensors(state, path), bundled() if path == BUNDLED else description


def weights_digest(state: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """Return the digest of a weights file of this project: of its tensors, of any shape and dtype, and the texts in its header."""
    return fingerprint([tensors_digest(state), {key: text for key, text in header.items() if key != DIGEST_KEY}])


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a file's content, at the top or under the usual keys of training scripts, without wrappers' prefixes."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    usable = isinstance(content, Mapping) and all(isinstance(value, torch.Tensor) for value in content.values())
    if not usable or not content:
        raise BackboneError(
            f"weights file {path} holds no tensors by name, at the top or under 'state_dict' or 'model'"
        )
    state, others = dict(content), list[str]()
    while prefix := next((found for found in WRAPPERS if any(name.startswith(found) for name in state)), None):
        others += [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if others:
        message = "%s: tensors that are not part of the network are left out: %d, such as %s"
        logger.info(message, path, len(others), others[0])
    return state


def bundled() -> dict[str, Any]:
    """Return the description of the bundled weights from the JSON file next to them."""
    return dict(json.loads(BUNDLED.with_suffix(".json").read_text(encoding="utf-8")))


def _file_of(config: BackboneConfig) -> Path | None:
    """Return a section's weights file, None for published or random weights."""
    named = Path(config.weights) if config.weights.endswith(WEIGHTS_FILES) else None
    return BUNDLED if config.weights == "bundled" else named


# ---- networks


@dataclass(frozen=True)
class Network:
    """A network with its weights, and what an `EmbeddingSpec` records about them."""

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
    """Whether the weights include the last layer; those of self-supervised training do not."""


def load_network(config: BackboneConfig, seed: int) -> Network:
    """Build the network of a config section; `seed` is for random weights. BackboneError if it cannot be built."""
    config = _sized(config)
    if config.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = build(config.name, config.arguments)
        return _network(config, module, "random", untrained=True, license=NO_WEIGHTS)
    path = _file_of(config)
    if path is None:
        found = published(config)
        module = _in_eval_mode(found.load, config.name, config.arguments)
        own = config.weights == OWN
        return _network(
            config, module, config.weights, found.preprocessing, license=found.license, has_classifier=not own
        )
    state, described = read_weights(path)
    make = None if described else family_of(config.name).load_file
    if make is None:
        return _from_state(config, state, described, path)
    whole = _in_eval_mode(lambda arguments: make(config.name, arguments, path), config.name, config.arguments)
    return _network(config, whole, path.stem)


def _sized(config: BackboneConfig) -> BackboneConfig:
    """Set `image_size` from the config's preprocessing, for networks that are built for one image size."""
    sized = any(family.sized and family.has(config.name) for family in FAMILIES)
    if config.preprocessing is None or "image_size" in config.arguments or not sized:
        return config
    return config.model_copy(update={"arguments": {"image_size": config.preprocessing.crop, **config.arguments}})


def _network(
    config: BackboneConfig,
    module: nn.Module,
    weights: str,
    preprocessing: Preprocessing | None = None,
    resolved: tuple[str, Arguments] | None = None,
    **rest: Any,
) -> Network:
    architecture, arguments = resolved or family_of(config.name).resolve(config.name, config.arguments)
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


def _from_state(
    config: BackboneConfig, state: dict[str, torch.Tensor], description: Mapping[str, Any], origin: Path
) -> Network:
    architecture = description.get("architecture", config.name)
    if description and config.name != architecture and config.name in network_names():
        raise BackboneError(f"{origin} holds a {architecture}; write name: {description.get('name', architecture)}")
    if names_code(architecture) and architecture != config.name:
        raise BackboneError(
            f"{origin} holds a network of code; write name: {architecture} only if you know whose it is"
        )
    if names_code(architecture) and not any(name.startswith("network.") for name in state):
        state = {f"network.{name}": tensor for name, tensor in state.items()}  # saved from the user's module alone
    arguments = {**description.get("arguments", {}), **config.arguments}
    module, has_classifier = _fill(architecture, arguments, state, origin)
    if not has_classifier:
        logger.info("%s has no classifier: only layers before it can be embedded", origin)
    if "preprocessing" in description:
        module.preprocessing = read_preprocessing(description["preprocessing"])  # type: ignore[assignment]
    elif not hasattr(module, "preprocessing"):
        module.preprocessing = _usual_preprocessing(architecture)  # type: ignore[assignment]
    return _network(
        config,
        module,
        origin.stem,
        resolved=(architecture, arguments),
        trained_on=description.get("trained_on"),
        license=description.get("license", UNKNOWN),
        has_classifier=has_classifier,
    )


def _usual_preprocessing(architecture: str) -> Preprocessing:
    """Return the transform for weights without one: that of the first published weights, else ImageNet's usual one."""
    weights = family_of(architecture).weights(architecture)
    return next((each.preprocessing for each in weights.values()), Preprocessing(resize=256, crop=224))


def fitting_preprocessing(config: BackboneConfig, module: nn.Module, default: Preprocessing | None) -> Preprocessing:
    """Return the config's transform, else the network's or the weights' own, at the image size of a network that fixes it."""
    size = getattr(module, "image_size", None)  # vision transformers
    asked = config.preprocessing
    if asked is not None:
        if size not in (None, asked.crop):
            raise BackboneError(f"{config.name} takes images of {size} pixels only; set preprocessing.crop: {size}")
        return Preprocessing(**asked.model_dump())
    default = getattr(module, "preprocessing", None) or default or _usual_preprocessing(config.name)
    if size is not None and default.size != (size, size):
        return replace(default, resize=size, crop=size)
    return default


def _fill(
    architecture: str, arguments: Mapping[str, Any], state: Mapping[str, torch.Tensor], origin: object
) -> tuple[nn.Module, bool]:
    """Build a network from a state dict, and return whether that has the last layer, else set to zero; BackboneError if it does not fit."""
    state = {name: value for name, value in state.items() if not name.startswith(torchvision_models.AUXILIARY)}
    empty = build_empty(architecture, arguments)
    head = f"{classifier_name(empty, trace(empty))}."
    has_classifier = f"{head}weight" in state
    if "num_classes" not in arguments and has_classifier:
        arguments = {**arguments, "num_classes": state[f"{head}weight"].shape[0]}
    module = build_empty(architecture, arguments)
    expected = module.state_dict()
    if not has_classifier:  # a projection head may have its name
        state = {name: value for name, value in state.items() if not name.startswith(head)}
        state |= {name: torch.zeros(value.shape) for name, value in expected.items() if name.startswith(head)}
    state = {name: value.to(expected[name].dtype) if name in expected else value for name, value in state.items()}
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        problems = [line.strip()[:MOST_LETTERS] for line in str(error).splitlines()]
        raise BackboneError(f"weights file {origin} does not fit {architecture}", problems) from None
    return module.eval(), has_classifier


# ---- information on a section without loading its weights


def check(config: BackboneConfig) -> list[str]:
    """Return the names of the section's embeddings, without downloads; BackboneError if one of its settings is not possible."""
    config = _sized(config)
    weights, has_classifier = config.weights, True
    if _file_of(config) is not None:
        network = load_network(config, seed=0)
        module, size, has_classifier = network.module, network.preprocessing.size, network.has_classifier
        weights = network.weights
    else:
        found = None if config.weights == "random" else published(config)
        if found and (lacking := found.to_install()):
            raise BackboneError(lacking)
        module = build_empty(config.name, config.arguments)
        usual = None if found is None else found.preprocessing
        size = fitting_preprocessing(config, module, usual).size
    graph = trace(module)
    asked = rows(graph, module, config, size, has_classifier)
    if (config.layers, config.preprocessing) == ((PENULTIMATE,), None) and config.pooling in {("own",), ("avg",)}:
        kept = asked  # possible for every network; a first run on the meta device takes two seconds
    else:
        images = torch.zeros(2, 3, *size, device=next(module.parameters()).device)
        run = partial(cut(graph, [row.node for row in asked]), images)
        kept = effective(run, asked, tokens_of(module), config.name, size)
    return [embedding_name(config.name, weights, *row.words) for row in kept]


def to_fetch(config: BackboneConfig) -> Fetch | None:
    """Return the download that a section's weights need; None if they are on disk."""
    return None if config.weights == "random" or _file_of(config) else published(config).to_fetch()


def license_of(config: BackboneConfig) -> str:
    """Return the licence of a section's weights, without downloads; BackboneError if they are not available."""
    if config.weights == "random":
        return NO_WEIGHTS
    path = _file_of(config)
    return published(config).license if path is None else str(read_weights(path)[1].get("license", UNKNOWN))
