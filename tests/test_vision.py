"""The door to torchvision works beside any torch, and opens only once."""

from __future__ import annotations

import pytest
import torch

from pipeline.io import vision


def test_torchvision_imports_with_its_models() -> None:
    models = vision.torchvision.models
    assert "resnet18" in models.list_models(module=models)


def test_the_missing_operators_are_declared_once() -> None:
    assert hasattr(torch.ops.torchvision, "nms")
    assert hasattr(torch.ops.torchvision, "qnms")
    assert vision._declare_missing_operators() is None


def test_only_what_is_missing_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "_SCHEMAS", ("nms(Tensor other) -> Tensor", "missing_here(Tensor dets) -> Tensor"))
    library = vision._declare_missing_operators()
    assert library is not None
    # A second declaration of nms would have been an error; its own schema is the one that stands.
    assert len(torch.ops.torchvision.nms.default._schema.arguments) == 3
    assert hasattr(torch.ops.torchvision, "missing_here")
