"""Every family of timm against timm itself, with random weights: `make timm` (two minutes).

Beside it stands what "the input of the last linear layer" would have been, the rule that is right for torchvision's networks:
with timm's headless networks (`num_classes=0`), and with their heads. The table is that of docs/backbones.md.
"""

from __future__ import annotations

import math

import pytest
import torch
from timm_families import FAMILIES, compared, pictures, timms_own
from torch import nn

from pipeline.io.vision import torchvision

pytest.importorskip("timm")

BOUND = 1e-5
"""By which folding norms may change a feature, of its largest value."""


@pytest.mark.parametrize("tag", FAMILIES)
def test_a_family_gives_timms_own_feature(tag: str, capsys: pytest.CaptureFixture[str]) -> None:
    size = FAMILIES[tag]
    off, way, shape = compared(tag, size)
    cells = [
        tag,
        way,
        _shown(shape),
        f"{off:.0e}" if off else "0",
        *(_old_rule(tag, size, **head) for head in ({"num_classes": 0}, {})),
    ]
    with capsys.disabled():
        print("\n| " + " | ".join(cells) + " |", end="")
    assert off <= BOUND


def _old_rule(tag: str, size: int, **head: int) -> str:
    """The shape of what enters the last Linear of the traced network, or without any the last convolution, for one image."""
    from torchvision.models.feature_extraction import NodePathTracer

    model = timms_own(tag, {"image_size": size}, **head)
    try:
        nodes = NodePathTracer(autowrap_modules=(math, torchvision.ops)).trace(model).nodes
    except Exception:
        return "does not trace"
    calls = [model.get_submodule(str(node.target)) for node in nodes if node.op == "call_module"]
    kinds = (nn.Linear, nn.Conv2d)
    last = next((part for kind in kinds for part in reversed(calls) if isinstance(part, kind)), None)
    if last is None:
        return "nothing"
    shapes: list[tuple[int, ...]] = []
    last.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[1:])))
    with torch.inference_mode():
        model(pictures(size))
    return _shown(shapes[-1])


def _shown(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{side:,}" for side in shape)
