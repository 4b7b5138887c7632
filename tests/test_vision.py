"""The door to torchvision works beside any torch."""

from __future__ import annotations

import torch

from pipeline.io.vision import torchvision


def test_torchvision_imports_with_its_models() -> None:
    assert "resnet18" in torchvision.models.list_models(module=torchvision.models)
    assert hasattr(torch.ops.torchvision, "nms")
    assert hasattr(torch.ops.torchvision, "qnms")
