"""The family of timm's networks: by tag, by short names for a few, from a folder, or from a weights file that timm can read.

A network's output is what timm calls `pre_logits`: its own feature, without the last layer. timm is imported only when used.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.config import LOCAL_DIR, TIMM_NAMES, TIMM_PREFIX, names_timm
from pipeline.embed.graph import POOLED, UNPOOLED
from pipeline.embed.published import NO_DOWNLOAD, UNKNOWN, Arguments, Family, Fetch, Published, tensors_digest
from pipeline.errors import BackboneError, first_line
from pipeline.images import Preprocessing
from pipeline.io.process import version

logger = logging.getLogger(__name__)

LOCAL = "local-dir"
"""timm's name for weights from a folder, as the `source` in their description."""


class TimmWeights(NamedTuple):
    """A network of timm and its weights."""

    tag: str
    """Network and weights in timm's notation, such as `resnet50.a1_in1k`; without a dot if no weights are named."""
    cfg: Mapping[str, Any]
    """timm's description of the weights."""
    arguments: Mapping[str, Any]
    """The constructor's arguments."""

    @property
    def network(self) -> str:
        """timm's name of the constructor."""
        return self.tag.partition(".")[0]


def library() -> ModuleType:
    """Import timm; BackboneError if it is not installed."""
    if version("timm") is None:
        raise BackboneError("networks of timm need the package timm; run `pip install 'manyheads[timm]'`")
    from pipeline.io.vision import torchvision  # noqa: F401 - declares torchvision's operators, which timm's import needs

    return importlib.import_module("timm")


def find(name: str, arguments: Arguments) -> TimmWeights:
    """Return the network and weights for a config's name or a record's architecture; BackboneError with similar names of timm."""
    models = library().models
    if name.startswith(LOCAL_DIR):
        folder = Path(name.removeprefix(LOCAL_DIR))
        try:
            cfg, network, given = models._hub.load_model_config_from_path(folder)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = first_line(error)
            raise BackboneError(f"{folder}: expected config.json and weights of a network of timm ({reason})") from None
        tag = f"{network}.{cfg['tag']}" if cfg.get("tag") else network
        return TimmWeights(tag, cfg, {**_token(network), **given, **arguments})
    tag = TIMM_NAMES.get(name, name.removeprefix(TIMM_PREFIX))
    network, _, weights = tag.partition(".")
    cfg = None
    if models.is_model(network):
        with contextlib.suppress(RuntimeError):  # raised for an unknown tag of the network
            cfg = models.get_pretrained_cfg(tag)
    if cfg is None:
        known = models.list_pretrained() if weights else models.list_models()
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.4) or known[:3]
        raise BackboneError(f"timm has no {tag!r}; the nearest are {', '.join(TIMM_PREFIX + each for each in near)}")
    return TimmWeights(tag, cfg.to_dict(), {**_token(network), **arguments})


def _token(network: str) -> dict[str, Any]:
    """Select the class token for DINOv3's transformers, which were trained for it; timm averages by default."""
    return {"global_pool": "token"} if network.startswith("vit_") and "_dinov3" in network else {}


def create(found: TimmWeights, weights: Mapping[str, Any] | None = None) -> nn.Module:
    """Construct a network whose output is its own feature (layer `pooled`), with random weights or those that `weights` describes."""
    arguments = dict(found.arguments)
    size = arguments.pop("image_size", None)
    if size is not None and found.cfg.get("fixed_input_size"):
        arguments["img_size"] = size
    module: nn.Module = library().create_model(
        found.network,
        pretrained=weights is not None,
        pretrained_cfg=dict(found.cfg),
        pretrained_cfg_overlay=dict(weights or {}),
        **arguments,
    )
    for layer in (UNPOOLED, POOLED):
        assert not hasattr(module, layer), f"timm has a part {layer!r} of its own"
        module.add_module(layer, nn.Identity())
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": _pre_logits})
    module.preprocessing = preprocessing(found)  # type: ignore[assignment]
    return module


def _pre_logits(self: Any, images: torch.Tensor) -> Any:
    """The forward pass up to the network's own feature."""
    return self.pooled(self.forward_head(self.unpooled(self.forward_features(images)), pre_logits=True))


def preprocessing(found: TimmWeights) -> Preprocessing:
    """Return the transform that timm resolves for the weights, at the requested image size."""
    size = found.arguments.get("image_size")
    data = library().data.resolve_data_config({"img_size": size} if size else {}, pretrained_cfg=found.cfg)
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise BackboneError(f"{found.tag} takes {channels} x {height} x {width} pixels, expected squares in RGB")
    return Preprocessing(
        resize=math.floor(height / data["crop_pct"]),
        crop=height,
        interpolation=data["interpolation"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        fit={"center": "crop"}.get(data["crop_mode"], data["crop_mode"]),
    )


def _with_classifier(module: nn.Module, classes: int) -> nn.Module:
    """Restore timm's original network, with a last layer for `classes` classes."""
    module.__class__ = type(module).__mro__[1]
    del module.unpooled, module.pooled
    module.reset_classifier(classes)  # type: ignore[operator]
    return module


# ---- weights


def _load(found: TimmWeights, name: str, weights: Mapping[str, Any]) -> nn.Module:
    """Construct a network with weights loaded by timm, with two seeds: tensors that differ are missing in the file; BackboneError then."""
    prints: list[dict[str, str]] = []
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                module = create(found, weights)
            except (RuntimeError, KeyError, ValueError, OSError) as error:
                reason = " ".join(str(error).split())[:300]
                raise BackboneError(f"{name}: the weights {weights.get('file', '')} do not fit: {reason}") from None
        prints.append({key: tensors_digest({key: value}) for key, value in module.state_dict().items()})
    random = [key for key, digest in prints[0].items() if prints[1][key] != digest]
    if random:
        raise BackboneError(f"{name}: tensors that are not in the weights: {len(random)}, such as {random[0]}")
    return module


def _load_published(name: str, arguments: Arguments) -> nn.Module:
    found = find(name, arguments)
    path = _cached(found) or _fetch(found, name)
    # Files of the Hub are in timm's own format; others may be in the authors'.
    foreign = bool(found.cfg.get("custom_load")) and not found.cfg.get("hf_hub_id")
    return _load(found, name, {"file": str(path), "custom_load": foreign})


def _load_file(name: str, arguments: Arguments, path: Path) -> nn.Module:
    """Construct a network with the weights of a file, renamed as timm does for files of the network's authors."""
    # Without a number of classes timm omits the last layer.
    classes = {"num_classes": arguments["num_classes"]} if "num_classes" in arguments else {}
    return _load(find(name, arguments), name, {"file": str(path), **classes})


def _weights(name: str) -> dict[str, Published]:
    found = find(name, {})
    if found.cfg.get("source") == LOCAL or "." in found.tag:
        has_weights = any(found.cfg.get(key) for key in ("source", "hf_hub_id", "url"))
        return {"pretrained": _published(name)} if has_weights else {}
    prefix = f"{found.network}."
    tags = library().list_pretrained(f"{prefix}*")
    return {tag.removeprefix(prefix): _published(TIMM_PREFIX + tag) for tag in tags}


def _published(name: str) -> Published:
    found = find(name, {})
    return Published(
        load=partial(_load_published, name),
        preprocessing=preprocessing(found),
        to_fetch=partial(_to_fetch, found),
        license=str(found.cfg.get("license") or UNKNOWN).lower(),
    )


# ---- the location of weights


def _to_fetch(found: TimmWeights) -> Fetch | None:
    if _cached(found):
        return None
    numbers = 0
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        numbers = sum(value.numel() for value in create(found).state_dict().values())
    return Fetch(_origin(found), _cache(found), numbers * 4 / 1e6)


def _origin(found: TimmWeights) -> str:
    repository = found.cfg.get("hf_hub_id")
    return f"{repository} of the Hugging Face Hub" if repository else str(found.cfg["url"])


def _cache(found: TimmWeights) -> Path:
    """Return the cache folder for weights: that of the Hugging Face Hub's library, or torch's."""
    if found.cfg.get("hf_hub_id"):
        return Path(importlib.import_module("huggingface_hub").constants.HF_HUB_CACHE)
    return Path(torch.hub.get_dir()) / "checkpoints"


def _cached(found: TimmWeights) -> Path | None:
    """Return the cached weights file, or the local folder, without using the network; None if there is none."""
    if found.cfg.get("source") == LOCAL:
        return Path(found.cfg["file"])
    repository = found.cfg.get("hf_hub_id")
    if not repository:
        path = _cache(found) / str(found.cfg["url"]).rpartition("/")[2]
        return path if path.exists() else None
    hub = importlib.import_module("huggingface_hub")
    paths = [hub.try_to_load_from_cache(repository, file) for file in ("model.safetensors", "pytorch_model.bin")]
    return next((Path(path) for path in paths if isinstance(path, str)), None)


def _fetch(found: TimmWeights, name: str) -> Path:
    """Download weights as timm does and return their file; BackboneError if that fails."""
    logger.info("fetching %s to %s", _origin(found), _cache(found))
    # Each retry would be a warning; a failure is reported once, below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hub = library().models._hub
    try:
        if found.cfg.get("hf_hub_id"):
            hub.load_state_dict_from_hf(found.cfg["hf_hub_id"])
        else:
            hub.download_cached_file(found.cfg["url"], cache_dir=_cache(found))
    except Exception as error:  # network errors of three libraries
        gated = type(error).__name__ == "GatedRepoError"
        reason = "accept its terms on its page and run `hf auth login`" if gated else first_line(error)
        how = f"write name: {LOCAL_DIR}FOLDER" if found.cfg.get("hf_hub_id") else f"put it in {_cache(found)}"
        raise BackboneError(
            f"{name}: {_origin(found)} cannot be fetched ({reason}); fetch it elsewhere and {how}; {NO_DOWNLOAD}"
        ) from None
    path = _cached(found)
    assert path is not None, "it was fetched"
    return path


def _resolve(name: str, arguments: Arguments) -> tuple[str, Arguments]:
    found = find(name, arguments)
    return TIMM_PREFIX + found.tag, found.arguments


FAMILY = Family(
    title=f"timm's, as {TIMM_PREFIX}TAG or {', '.join(TIMM_NAMES)}",
    library="timm",
    names=lambda: list(TIMM_NAMES),
    has=names_timm,
    sized=True,
    build=lambda name, arguments: create(find(name, arguments)),
    weights=_weights,
    resolve=_resolve,
    load_file=_load_file,
    with_classifier=_with_classifier,
)
