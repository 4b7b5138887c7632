"""The door to torchvision works beside any torch."""

from __future__ import annotations

import subprocess
import sys

import torch

from pipeline.io.vision import torchvision


def test_torchvision_imports_with_its_models() -> None:
    assert "resnet18" in torchvision.models.list_models(module=torchvision.models)
    assert hasattr(torch.ops.torchvision, "nms")


def test_the_door_opens_after_an_import_that_failed() -> None:
    script = """
import contextlib
with contextlib.suppress(RuntimeError):
    import torchvision
from pipeline.io.vision import torchvision
print(len(torchvision.models.list_models()) > 100)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
