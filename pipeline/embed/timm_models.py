"""The networks of timm: any of its tags, the few that matter by short names, a folder, or a file that timm itself can read.

A network gives what timm calls `pre_logits`: its own feature, without the last layer. timm is imported only where one is used.
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
"""What timm calls the source of weights in a folder."""


class TimmWeights(NamedTuple):
    """What a name stands for."""

    tag: str
    """Network and weights, as timm writes them, such as `resnet50.a1_in1k`; without a dot where no weights are named."""
    cfg: Mapping[str, Any]
    """timm's description of the weights."""
    arguments: Mapping[str, Any]
    """The constructor's."""

    @property
    def network(self) -> str:
        """timm's name of the constructor."""
        return self.tag.partition(".")[0]


def library() -> ModuleType:
    """Import timm; BackboneError when it is not installed."""
    if version("timm") is None:
        raise BackboneError("networks of timm need the package timm; run `pip install 'manyheads[timm]'`")
    from pipeline.io.vision import torchvision  # noqa: F401 - without its operators, which this declares, timm's import fails

    return importlib.import_module("timm")


def find(name: str, arguments: Arguments) -> TimmWeights:
    """Return what a config's name, or a record's architecture, stands for; BackboneError with the nearest that timm has."""
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
        with contextlib.suppress(RuntimeError):  # of a tag that the network does not have
            cfg = models.get_pretrained_cfg(tag)
    if cfg is None:
        known = models.list_pretrained() if weights else models.list_models()
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.4) or known[:3]
        raise BackboneError(f"timm has no {tag!r}; the nearest are {', '.join(TIMM_PREFIX + each for each in near)}")
    return TimmWeights(tag, cfg.to_dict(), {**_token(network), **arguments})


def _token(network: str) -> dict[str, Any]:
    """DINOv3's transformers were trained for their class token, timm averages by default."""
    return {"global_pool": "token"} if network.startswith("vit_") and "_dinov3" in network else {}


def create(found: TimmWeights, weights: Mapping[str, Any] | None = None) -> nn.Module:
    """Construct a network that gives its own feature, at layer `pooled`: of random weights, or those that `weights` tells timm to take."""
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
    """The forward pass of a network that gives its own feature."""
    return self.pooled(self.forward_head(self.unpooled(self.forward_features(images)), pre_logits=True))


def preprocessing(found: TimmWeights) -> Preprocessing:
    """Return the transform that timm resolves for the weights, at the image size that is asked for."""
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
    """Return the network as timm made it, with a last layer for so many classes."""
    module.__class__ = type(module).__mro__[1]
    del module.unpooled, module.pooled
    module.reset_classifier(classes)  # type: ignore[operator]
    return module


# ---- weights


def _load(found: TimmWeights, name: str, weights: Mapping[str, Any]) -> nn.Module:
    """Construct a network with weights that timm loads, twice with other seeds: a tensor that differs is in no file, and is refused."""
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
    path = _here(found) or _fetch(found, name)
    # A file of the Hub is in timm's own format; others may be the authors'.
    foreign = bool(found.cfg.get("custom_load")) and not found.cfg.get("hf_hub_id")
    return _load(found, name, {"file": str(path), "custom_load": foreign})


def _load_file(name: str, arguments: Arguments, path: Path) -> nn.Module:
    """Construct a network with the weights of a file, renamed as timm does it for files of the network's authors."""
    # Without a number of classes timm leaves the last layer out.
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


# ---- where weights are


def _to_fetch(found: TimmWeights) -> Fetch | None:
    if _here(found):
        return None
    numbers = 0
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        numbers = sum(value.numel() for value in create(found).state_dict().values())
    return Fetch(_origin(found), _cache(found), numbers * 4 / 1e6)


def _origin(found: TimmWeights) -> str:
    repository = found.cfg.get("hf_hub_id")
    return f"{repository} of the Hugging Face Hub" if repository else str(found.cfg["url"])


def _cache(found: TimmWeights) -> Path:
    """Return the folder in which weights are kept: of the Hugging Face Hub's library, or torch's."""
    if found.cfg.get("hf_hub_id"):
        return Path(importlib.import_module("huggingface_hub").constants.HF_HUB_CACHE)
    return Path(torch.hub.get_dir()) / "checkpoints"


def _here(found: TimmWeights) -> Path | None:
    """Return the file of weights that was fetched before, or their folder, found without asking anybody."""
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
    """Fetch weights as timm does; return their file, BackboneError where they cannot be had."""
    logger.info("fetching %s to %s", _origin(found), _cache(found))
    # Each retry is a warning; what fails is told once, in our words.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    hub = library().models._hub
    try:
        if found.cfg.get("hf_hub_id"):
            hub.load_state_dict_from_hf(found.cfg["hf_hub_id"])
        else:
            hub.download_cached_file(found.cfg["url"], cache_dir=_cache(found))
    except Exception as error:  # of the network, of three libraries
        gated = type(error).__name__ == "GatedRepoError"
        reason = "accept its terms on its page and run `hf auth login`" if gated else first_line(error)
        how = f"write name: {LOCAL_DIR}FOLDER" if found.cfg.get("hf_hub_id") else f"put it in {_cache(found)}"
        raise BackboneError(
            f"{name}: {_origin(found)} cannot be fetched ({reason}); fetch it elsewhere and {how}; {NO_DOWNLOAD}"
        ) from None
    path = _here(found)
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
