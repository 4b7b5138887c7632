"""The table of families, and what a config section asks for: a network in eval mode in fp32 on the CPU, with the digest and the transform of its weights."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.config import OWN, WEIGHTS_FILES, BackboneConfig, PreprocessingConfig, guess, names_code, names_vectors
from pipeline.embed import baselines, efficientnet_lite, own_modules, timm_models, torchvision_models
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
from pipeline.embed.own_modules import with_prefix
from pipeline.embed.published import BUNDLED, NO_WEIGHTS, UNKNOWN, Arguments, Family, Fetch, Published, tensors_digest
from pipeline.embed.spec import embedding_name
from pipeline.embed.torchvision_models import AUXILIARY
from pipeline.errors import BackboneError, first, first_line
from pipeline.experiment import MADE_BY
from pipeline.images import Preprocessing
from pipeline.io.digests import fingerprint
from pipeline.io.process import is_out_of_memory

FAMILIES: tuple[Family, ...] = (
    efficientnet_lite.FAMILY,
    torchvision_models.FAMILY,
    timm_models.FAMILY,
    own_modules.FAMILY,
)


def family_of(architecture: str) -> Family:
    """Return the family of a network's name or architecture.

    Raises
    ------
    BackboneError
        When none has it.
    """
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
    """Return all names that a config can have for a network."""
    return [name for family in FAMILIES for name in family.names()]


def published(config: BackboneConfig) -> Published:
    """Return the weights that a section names, of those that its network's family publishes.

    Raises
    ------
    BackboneError
        When there are no such weights, or no such network.
    """
    found = family_of(config.name).weights(config.name)
    if config.weights not in found:
        raise BackboneError(
            f"{config.name} has no weights {config.weights!r}{guess(config.weights, list(found))}; "
            f"there are {', '.join([*found, 'random', 'bundled'])}, or a .safetensors or .pth file"
        )
    return found[config.weights]


def usual_preprocessing(architecture: str) -> Preprocessing:
    """Return the transform for weights that come without one: that of the first published ones, else ImageNet's usual."""
    weights = family_of(architecture).weights(architecture)
    return next((each.preprocessing for each in weights.values()), Preprocessing(resize=256, crop=224))


def build(architecture: str, arguments: Arguments) -> nn.Module:
    """Construct a network in eval mode with whatever weights its constructor makes.

    Raises
    ------
    BackboneError
        When there is no such architecture, or it does not take the arguments.
    """
    return _in_eval_mode(partial(family_of(architecture).build, architecture), architecture, arguments)


def load(config: BackboneConfig) -> nn.Module:
    """Construct a section's network in eval mode with the published weights that it names, fetched if need be.

    Raises
    ------
    BackboneError
        When there are no such weights, they are not to be had, or the network does not take the arguments.
    """
    return _in_eval_mode(published(config).load, config.name, config.arguments)


def load_file(config: BackboneConfig, path: Path) -> nn.Module | None:
    """Construct a section's network in eval mode with the weights of a file, where its family reads such files itself."""
    make = family_of(config.name).load_file
    return make and _in_eval_mode(lambda arguments: make(config.name, arguments, path), config.name, config.arguments)


def _in_eval_mode(make: Callable[[Arguments], nn.Module], name: str, arguments: Arguments) -> nn.Module:
    try:
        return make(arguments).eval()
    except (TypeError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise BackboneError(f"{name} cannot be built with arguments {dict(arguments)}: {first_line(error)}") from None


class _Uninitialised(TorchFunctionMode):
    """Leaves out the initialisation of weights that have no memory, for which torch would load its compiler first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_RANDOM_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_})


def build_empty(architecture: str, arguments: Arguments) -> nn.Module:
    """Construct a network without memory for its weights, in milliseconds; one that needs numbers to be built gets them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Uninitialised():
                return build(architecture, arguments)
        except BackboneError:  # a regnet computes its widths with tensors; a wrong argument fails again here
            return build(architecture, arguments)


logger = logging.getLogger(__name__)

METADATA_KEY = "manyheads"
"""Under it a weights file made by this project carries its description in the safetensors header."""
DIGEST_KEY = "manyheads_digest"
"""Under it such a file carries the digest of its tensors and its description."""

WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
"""What DataParallel, torch.compile, Lightning and self-supervised training put before the names of a network's tensors, in any
order; what lies beside them is of the training, such as a projection head."""


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a weights file: its tensors, and the description a file of this project carries.

    Each tensor has the shape and dtype that it has in the file.

    Raises
    ------
    BackboneError
        When the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise BackboneError(
            f"weights file {path} does not exist; a path in a config is relative to the config's folder, one given with --set to "
            "the folder the command is run in"
        )
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _tensors(torch.load(path, map_location="cpu", weights_only=True), path), {}
    except BackboneError:
        raise
    except Exception as error:  # the readers raise almost anything on damaged files
        reason = first_line(error)
        raise BackboneError(
            f"weights file {path} cannot be read as tensors only ({reason}); save it with torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    description = json.loads(metadata.get(METADATA_KEY, "{}"))
    ours = DIGEST_KEY in metadata or MADE_BY in description
    if ours and metadata.get(DIGEST_KEY) != weights_digest(state, metadata):
        raise BackboneError(
            f"weights file {path} is damaged: its content is not the one that its digest names; make it anew, or fetch it again"
        )
    return _tensors(state, path), description


def weights_digest(state: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> str:
    """Return the one digest of a weights file of this project: of its tensors and the texts in its header.

    The tensors may be of any shape and dtype, both of which the digest covers.
    """
    return fingerprint([tensors_digest(state), {key: text for key, text in header.items() if key != DIGEST_KEY}])


def _tensors(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The state dict in what a file holds: itself, or under the keys training scripts use."""
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise BackboneError(
            f"weights file {path} holds no state dict; expected names with tensors, at the top or under 'state_dict' or 'model'"
        )
    state, others = dict(content), list[str]()
    while prefix := next((found for found in WRAPPERS if any(name.startswith(found) for name in state)), None):
        others += [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if others:
        logger.info(
            "%s: tensors that are no part of the network are left out: %d, such as %s", path, len(others), others[0]
        )
    densenet = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # its old names are written the new way
    return {densenet.sub(r"\1\2", name): value for name, value in state.items()}


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
