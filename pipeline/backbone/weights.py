"""Weights and where they come from: an enum member, a local file, the package's own, or a seed.

Whatever the source, what comes out is a `Network`: a module in eval mode in fp32 on the CPU, with the digest of its tensors
and the preprocessing that belongs to them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from pipeline.backbone import BUNDLED
from pipeline.backbone.graph import PENULTIMATE, classifier, cut, effective_poolings, resolve, trace
from pipeline.config import BackboneConfig, PreprocessingConfig, guess
from pipeline.digests import canonical_json
from pipeline.errors import BackboneError, first
from pipeline.images import Preprocessing
from pipeline.vision import torchvision

logger = logging.getLogger(__name__)

METADATA_KEY = "manyheads"
"""Under it a weights file made by this project carries its description in the safetensors header."""

SUFFIXES = (".safetensors", ".pth", ".pt")
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
    classes: tuple[str, ...] = ()


def load_network(config: BackboneConfig, seed: int) -> Network:
    """Build the network a config section asks for.

    Raises
    ------
    BackboneError
        When the model, the weights, or the arguments are not to be had; all misfits of a file at once.
    """
    if config.weights == "bundled":
        return _from_bundle(config)
    if config.weights.endswith(SUFFIXES):
        return _from_file(config, Path(config.weights))
    if config.weights == "random":
        return _from_seed(config, seed)
    return _from_enum(config)


def check(config: BackboneConfig) -> None:
    """Refuse a section whose model, arguments, weights, image size, layers or pooling are not to be had; fetches nothing.

    Raises
    ------
    BackboneError
    """
    if config.weights == "bundled" or config.weights.endswith(SUFFIXES):
        network = load_network(config, seed=0)
        module, preprocessing = network.module, network.preprocessing
    else:
        if config.weights != "random":
            _member(config)
        module = build_empty(config.name, config.arguments)
        preprocessing = _fitting_preprocessing(config, module, _default_preprocessing(config.name))
    graph = trace(module)
    nodes = resolve(graph, config.layers)
    if (config.layers, config.pooling, config.preprocessing) == ((PENULTIMATE,), "avg", None):
        return  # fits every network; running one without weights for the first time costs two seconds
    height, width = preprocessing.size
    device = next(module.parameters()).device
    kept = cut(graph, nodes)
    effective_poolings(
        lambda: kept(torch.zeros(2, 3, height, width, device=device)),
        nodes,
        config.pooling,
        hasattr(module, "class_token"),
        f"{config.name} cannot take images of {height} x {width} pixels",
    )


def to_fetch(config: BackboneConfig) -> tuple[str, Path, float] | None:
    """Return what a section's weights have to be fetched from, the folder, and their size in MB; None where they are here."""
    if config.weights in ("bundled", "random") or config.weights.endswith(SUFFIXES):
        return None
    member = _member(config)
    path = _checkpoint(member)
    return None if path.exists() else (member.url, path.parent, float(member.meta.get("_file_size", 0)))


# ---- architectures


def _regnet(block_params: Mapping[str, Any], **arguments: Any) -> nn.Module:
    """A RegNet of any shape; `block_params` are BlockParams' own, or those of its `from_init_params`."""
    from torchvision.models.regnet import BlockParams, RegNet

    make = BlockParams.from_init_params if "depth" in block_params else BlockParams
    module: nn.Module = RegNet(make(**block_params), **arguments)
    return module


def _resnet(block: str, layers: list[int], **arguments: Any) -> nn.Module:
    """A ResNet of any depth; `block` is BasicBlock or Bottleneck."""
    from torchvision.models import resnet

    module: nn.Module = resnet.ResNet(
        {"BasicBlock": resnet.BasicBlock, "Bottleneck": resnet.Bottleneck}[block], layers, **arguments
    )
    return module


CONSTRUCTORS: Mapping[str, Callable[..., nn.Module]] = {
    "torchvision.models.regnet.RegNet": _regnet,
    "torchvision.models.resnet.ResNet": _resnet,
}
"""Architectures with nested arguments, which only a weights file's own description can name."""

# The auxiliary classifiers of these two serve training only; without `init_weights` they warn.
_ALWAYS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def classification_models() -> list[str]:
    """Return the names of torchvision's classification models."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a network in eval mode with whatever weights its constructor makes."""
    check_architecture(architecture)
    make = CONSTRUCTORS.get(architecture)
    try:
        if make is not None:
            return make(**arguments).eval()
        module: nn.Module = torchvision.models.get_model(architecture, **{**_ALWAYS.get(architecture, {}), **arguments})
        return module.eval()
    except (TypeError, ValueError, KeyError, NotImplementedError) as error:
        raise BackboneError(f"{architecture} cannot be built with arguments {dict(arguments)}: {error}") from None


class _Uninitialised(TorchFunctionMode):
    """Leaves out the initialisation of weights that have no memory, for which torch would load its compiler first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _RANDOM_FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


_RANDOM_FILLS = frozenset({torch.Tensor.normal_, torch.Tensor.uniform_})


def build_empty(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a network without memory for its weights, in milliseconds; one that needs numbers to be built gets them."""
    free = {"init_weights": False} if "init_weights" in _ALWAYS.get(architecture, {}) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"), _Uninitialised():
                return build(architecture, {**free, **arguments})
        except BackboneError:  # a regnet computes its widths with tensors; a wrong argument fails again here
            return build(architecture, {**free, **arguments})


def check_architecture(name: str) -> None:
    """Refuse a name that torchvision does not have.

    Raises
    ------
    BackboneError
    """
    if name not in CONSTRUCTORS and name not in classification_models():
        raise BackboneError(
            f"no classification model {name!r} in torchvision {torchvision.__version__}{guess(name, classification_models())}"
        )


# ---- sources


def _from_seed(config: BackboneConfig, seed: int) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(config.name, config.arguments)
    return _network(config, module, "random", _default_preprocessing(config.name), untrained=True)


def _member(config: BackboneConfig) -> Any:
    """The member of torchvision's weights enum that a section names."""
    check_architecture(config.name)
    members = torchvision.models.get_model_weights(config.name).__members__
    if config.weights not in members:
        raise BackboneError(
            f"{config.name} has no weights {config.weights!r}{guess(config.weights, list(members))}; "
            f"there are {', '.join(name for name in members if name != 'DEFAULT')}, random, bundled, or a .safetensors or .pth file"
        )
    return members[config.weights]


def _from_enum(config: BackboneConfig) -> Network:
    member = _member(config)
    _require_checkpoint(member)
    with _tensors_only():
        module = build(
            config.name,
            {**config.arguments, "weights": member, **({"init_weights": False} if config.name in _ALWAYS else {})},
        )
    classes = tuple(member.meta.get("categories", ()))
    return _network(config, module, config.weights, _preprocessing_of(member), classes=classes)


def _from_file(config: BackboneConfig, path: Path) -> Network:
    state, description = read_weights(path)
    return _from_state(config, state, description, str(path), path.stem)


def _from_bundle(config: BackboneConfig) -> Network:
    description = json.loads(_require_bundled().read_text(encoding="utf-8"))
    state, _ = read_weights(BUNDLED)
    return _from_state(config, state, description, str(BUNDLED), "bundled")


def _require_bundled() -> Path:
    """The description of the bundled weights, which lies beside them."""
    described = BUNDLED.with_suffix(".json")
    if not BUNDLED.exists() or not described.exists():
        raise BackboneError(
            f"weights: bundled: this installation comes without {BUNDLED.name}; use weights: random or a torchvision weights name"
        )
    return described


def _from_state(
    config: BackboneConfig, state: dict[str, torch.Tensor], description: Mapping[str, Any], origin: str, readable: str
) -> Network:
    architecture = description.get("architecture", config.name)
    if description and config.name in classification_models() and config.name != architecture:
        raise BackboneError(
            f"{origin} holds a {architecture}, the config says {config.name}; write name: {description.get('name', architecture)}"
        )
    arguments = {**description.get("arguments", {}), **config.arguments}
    module = fill(architecture, arguments, state, origin)
    preprocessing = (
        _described_preprocessing(description["preprocessing"])
        if "preprocessing" in description
        else _default_preprocessing(architecture)
    )
    network = _network(
        config,
        module,
        readable,
        preprocessing,
        trained_on=description.get("trained_on"),
        classes=tuple(description.get("classes", ())),
    )
    return replace(network, architecture=architecture, arguments=arguments)


def _network(
    config: BackboneConfig, module: nn.Module, weights: str, preprocessing: Preprocessing, **rest: Any
) -> Network:
    return Network(
        module=module,
        name=config.name,
        architecture=config.name,
        arguments=dict(config.arguments),
        weights=weights,
        weights_digest=tensors_digest(module.state_dict()),
        preprocessing=_fitting_preprocessing(config, module, preprocessing),
        **rest,
    )


def tensors_digest(state: Mapping[str, torch.Tensor]) -> str:
    """Return the hex BLAKE2b-256 of tensors: of each, sorted by name, the name, dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- files


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a weights file: its tensors, and the description a file of this project carries.

    Raises
    ------
    BackboneError
        When the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise BackboneError(
            f"weights file {path} does not exist; paths are relative to the folder the command is run in"
        )
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        return _tensors(torch.load(path, map_location="cpu", weights_only=True), path), {}
    except BackboneError:
        raise
    except Exception as error:  # the readers raise almost anything on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"weights file {path} cannot be read as tensors only ({reason}); save it with torch.save(model.state_dict(), ...) or as .safetensors"
        ) from None


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    return _tensors(state, path), json.loads(metadata.get(METADATA_KEY, "{}"))


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
    return {_plain_name(name): value for name, value in content.items()}


def _plain_name(name: str) -> str:
    """Drop what DataParallel and torch.compile put before a name, and write densenet's old names the new way."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def fill(architecture: str, arguments: Mapping[str, Any], state: Mapping[str, torch.Tensor], origin: str) -> nn.Module:
    """Build a network from a state dict; the number of classes is the file's.

    Raises
    ------
    BackboneError
        With one line for every tensor that is missing, left over or of another shape.
    """
    state = {name: value for name, value in state.items() if not name.startswith(_AUXILIARY)}
    if "num_classes" not in arguments:
        head = f"{classifier(trace(build_empty(architecture, arguments))[0]).target}.weight"
        if head in state:
            arguments = {**arguments, "num_classes": state[head].shape[0]}
    module = build_empty(architecture, arguments)
    expected = module.state_dict()
    problems = _misfits(expected, state)
    if problems:
        raise BackboneError(
            f"weights file {origin} does not fit {architecture}: {len(problems)} of {len(expected)} tensors",
            first(problems, MAX_PROBLEMS),
        )
    kept = {name: value.to(expected[name].dtype) for name, value in state.items()}
    kept |= {name: torch.zeros((), dtype=torch.long) for name in expected if name not in kept}
    module.load_state_dict(kept, strict=True, assign=True)
    return module.eval()


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


# ---- torchvision's own files


def _checkpoint(member: Any) -> Path:
    """Where torchvision keeps the file of its weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / str(member.url.rsplit("/", 1)[-1])


def _require_checkpoint(member: Any) -> None:
    """Have torchvision's file in its folder, fetched if need be, with the hash in its name."""
    path = _checkpoint(member)
    folder = path.parent
    found = re.search(r"-([a-f0-9]{8,})\.", path.name)
    prefix = found.group(1) if found else ""
    if not path.exists():
        logger.info("fetching %s to %s", member.url, folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(member.url, str(path), prefix or None, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            raise BackboneError(
                f"weights {member} cannot be fetched ({error}); fetch {member.url} elsewhere and put it in {folder}, "
                "or say weights: bundled, as configs/bundled.yaml does, which needs no download"
            ) from None
    if prefix:
        with path.open("rb") as file:
            digest = _sha256(file)
        if not digest.startswith(prefix):
            raise BackboneError(
                f"{path} is damaged: its SHA-256 starts with {digest[: len(prefix)]}, its name says {prefix}; delete it and run again"
            )


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Make torch refuse pickled code in torchvision's files too; it asks for the opposite by default."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


# ---- preprocessing


def _preprocessing_of(member: Any) -> Preprocessing:
    """The transform that comes with torchvision's weights."""
    preset = member.transforms()
    return Preprocessing(
        resize=_side(preset.resize_size),
        crop=_side(preset.crop_size),
        interpolation=preset.interpolation.value,
        antialias=bool(preset.antialias),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )


def _default_preprocessing(architecture: str) -> Preprocessing:
    """The transform of an architecture's first published weights, for weights that come without one."""
    if architecture in CONSTRUCTORS:
        return Preprocessing(resize=256, crop=224)
    members = list(torchvision.models.get_model_weights(architecture))
    return _preprocessing_of(members[0]) if members else Preprocessing(resize=256, crop=224)


def _described_preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    def plain(key: str) -> Any:
        return tuple(values[key]) if isinstance(values[key], list) else values[key]

    return Preprocessing(
        resize=plain("resize"),
        crop=plain("crop"),
        interpolation=plain("interpolation"),
        mean=plain("mean"),
        std=plain("std"),
    )


def _fitting_preprocessing(config: BackboneConfig, module: nn.Module, default: Preprocessing) -> Preprocessing:
    """The config's transform before the weights' own; a network of one fixed image size gets that size."""
    size = getattr(module, "image_size", None)  # vision transformers
    asked: PreprocessingConfig | None = config.preprocessing
    if asked is not None:
        if size not in (None, asked.crop):
            raise BackboneError(
                f"{config.name} takes images of {size} x {size} pixels only, the config says preprocessing.crop: {asked.crop}"
            )
        return Preprocessing(
            resize=asked.resize, crop=asked.crop, interpolation=asked.interpolation, mean=asked.mean, std=asked.std
        )
    if size is not None and default.size != (size, size):
        return replace(default, resize=size, crop=size)
    return default


def _side(sizes: list[int]) -> int | tuple[int, int]:
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
