"""The user's own networks: `name: module:function` in a config, where the function returns a `torch.nn.Module`.

The output of its forward pass is embedded. A last layer is added, so that it is like any other network: `penultimate` is the
input of that layer, inner layers can be named if the module can be traced, and `finetune` has a head to train.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.config import OWN, guess, names_code
from pipeline.embed import graph
from pipeline.embed.published import UNKNOWN, Arguments, Family, Published, read_preprocessing, tensors_digest
from pipeline.embed.spec import probe_images
from pipeline.embed.torchvision_models import preprocessing_of
from pipeline.errors import BackboneError, first_line
from pipeline.images import Preprocessing
from pipeline.io.digests import file_digest, fingerprint
from pipeline.io.process import users_module

logger = logging.getLogger(__name__)

USUAL = Preprocessing(resize=256, crop=224)
"""The default transform, if neither the function nor the config has one: ImageNet's."""

STABLE_LIBRARIES = ("torch", "torchvision", "timm")
"""Libraries whose source is not part of the identity: their releases do not change what a network computes."""


class OwnNetwork(nn.Module):
    """A user's module with an added last layer of zeros; `code` has digests of its printed form and of its source files."""

    def __init__(self, name: str, network: nn.Module, preprocessing: Preprocessing, num_classes: int) -> None:
        super().__init__()
        self.name, self.preprocessing = name, preprocessing
        self.network = network.eval()
        self.code: Mapping[str, str] = {}
        images = torch.from_numpy(probe_images(preprocessing.size)[:2]).permute(0, 3, 1, 2) / 255
        vectors = self._run(images)
        traced, _ = graph.trace(network, images)
        self.leaf_modules = (type(network),) if isinstance(traced, graph.Taps) else ()
        self.classifier = nn.Linear(vectors.shape[-1], num_classes)
        for parameter in self.classifier.parameters():
            parameter.data.zero_()  # the digest of the weights must not vary

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return class scores (n, num_classes) for images (n, 3, height, width), for `finetune`; both of the network's float dtype."""
        vectors = self.network(images)
        if isinstance(vectors, torch.Tensor) and vectors.ndim != 2:
            raise BackboneError(f"{self.name}: gives {tuple(vectors.shape[1:])} for an image; pool it in its forward")
        scores: torch.Tensor = self.classifier(vectors)
        return scores

    def _run(self, images: torch.Tensor) -> torch.Tensor:
        """Return the module's output for two images; BackboneError if it fails or the output is not a tensor per image."""
        height, width = images.shape[2:]
        try:
            with torch.inference_mode():
                output = self.network(images)
        except Exception as error:  # a user's module may fail in any way
            raise BackboneError(
                f"{self.name}: fails on images of {height} x {width} pixels ({type(error).__name__}: {first_line(error)}); set its "
                "image size under preprocessing, or in a transform that the function returns with it"
            ) from None
        if not isinstance(output, torch.Tensor) or output.ndim < 2 or len(output) != len(images):
            what = tuple(output.shape) if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
            raise BackboneError(
                f"{self.name}: gives {what} for {len(images)} images, expected vectors, such as (2, 512)"
            )
        return output


# ---- the user's function


def _function(name: str) -> Callable[..., Any]:
    """Import `module:function`; BackboneError if it cannot be imported or is not callable."""
    module_name, _, attribute = name.partition(":")
    module = users_module(module_name, f"backbone {name!r}", BackboneError)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise BackboneError(f"{name}: {module_name!r} has no function {attribute!r}{guess(attribute, [*vars(module)])}")
    return found  # type: ignore[no-any-return]


def _call(name: str, arguments: Arguments) -> tuple[nn.Module, Preprocessing]:
    """Call the user's function, on the CPU whatever torch's default device is; return its module and transform."""
    function, takes = _function(name), list[str]()
    with contextlib.suppress(TypeError, ValueError):  # functions not written in Python may have no signature
        takes += inspect.signature(function).parameters
    ours = {"num_classes", "image_size"} - {*takes}
    given = {key: value for key, value in arguments.items() if key not in ours}
    try:
        with torch.device("cpu"):
            made = function(**given)
    except Exception as error:  # a user's function may fail in any way
        raise BackboneError(f"{name}: fails with {given}: {type(error).__name__}: {first_line(error)}") from None
    network, transform = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(network, nn.Module):
        raise BackboneError(
            f"{name}: returns {type(network).__name__}, expected a torch.nn.Module, or it and a transform"
        )
    try:
        if transform is None:
            return network, USUAL
        return network, read_preprocessing(transform) if isinstance(transform, Mapping) else preprocessing_of(transform)
    except (ValueError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{name}: its transform is not understood ({first_line(error)}); expected the keys of preprocessing (resize, crop, "
            "interpolation, mean, std), or the result of torchvision's weights.transforms()"
        ) from None


def _build(name: str, arguments: Arguments) -> OwnNetwork:
    network, preprocessing = _call(name, arguments)
    if (side := arguments.get("image_size")) is not None:
        preprocessing = replace(preprocessing, resize=side, crop=side)
    with torch.device("cpu"):
        whole = OwnNetwork(name, network, preprocessing, arguments.get("num_classes", 1))
    written_in = [_function(name), *map(type, network.modules())]
    whole.code = {"text": fingerprint(str(network)), "source": _digest_of_source(written_in)}
    return whole


def _load(name: str, arguments: Arguments) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the user's function may set a seed
        network, (again, _) = _build(name, arguments), _call(name, arguments)
    if tensors_digest(network.network.state_dict()) != tensors_digest(again.state_dict()):
        raise BackboneError(f"{name}: has different weights each time; load trained ones in it, or set weights: random")
    return network


def _digest_of_source(things: Iterable[Any]) -> str:
    """Return the digest of the source files of functions and classes; '' if there are none, as in a notebook."""
    files = set()
    for thing in things:
        if str(getattr(thing, "__module__", "")).partition(".")[0] not in STABLE_LIBRARIES:
            try:
                files.add(str(inspect.getsourcefile(thing)))
            except TypeError:
                continue
    digests = {file_digest(Path(file)) for file in files if Path(file).is_file()}
    return fingerprint(sorted(digests)) if digests else ""


def _weights(name: str) -> dict[str, Published]:
    license = getattr(_function(name), "license", UNKNOWN)
    return {OWN: Published(lambda arguments: _load(name, arguments), USUAL, license=license)}


FAMILY = Family(
    title="module:function of your own",
    library=OWN,
    names=lambda: (),
    has=names_code,
    build=_build,
    weights=_weights,
    sized=True,
    auto_precision="fp32",  # the module may depend on it, for example by constants created in its forward pass
)
