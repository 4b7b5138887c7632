"""Import torchvision even where its compiled operators are missing.

PyPI's torchvision is built for CUDA. With a CPU-only torch its operators do not load, and `import torchvision` fails with "operator
torchvision::nms does not exist". Declaring the two that it registers shapes for is enough for models, transforms and feature extraction.
Your own code can use `from pipeline.io.vision import torchvision`, even after an `import torchvision` that failed.
"""

from __future__ import annotations

import warnings

import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # lives as long as the process

with warnings.catch_warnings():
    # torchvision warns that its image decoders are missing; images are decoded by Pillow here.
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")
    try:
        import torchvision
    except RuntimeError:
        for _schema in (
            "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        ):
            _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
        import torchvision

__all__ = ["torchvision"]
