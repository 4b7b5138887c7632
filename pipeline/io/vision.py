"""The one door to torchvision, open also where its compiled operators are missing.

PyPI's torchvision is built for CUDA. Beside a CPU-only torch its operators do not load, and `import torchvision` fails with "operator
torchvision::nms does not exist". Declaring the two that it registers shapes for is enough for models, transforms and feature extraction.
Your own code opens it with `from pipeline.io.vision import torchvision`, also after an `import torchvision` that failed.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import warnings

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _load_compiled_operators() -> None:
    """Load torchvision's own library as its import would, so that its operators are declared where they can be."""
    package = importlib.util.find_spec("torchvision")
    if package is None or not package.submodule_search_locations:
        return
    finder = importlib.machinery.FileFinder(
        package.submodule_search_locations[0],
        (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES),
    )
    library = finder.find_spec("_C")
    if library is not None and library.origin is not None:
        with contextlib.suppress(OSError):  # built for a CUDA that is not here: the schemas below stand in
            torch.ops.load_library(library.origin)  # type: ignore[no-untyped-call]


def _declare_missing_operators() -> torch.library.Library | None:
    missing = [schema for schema in _SCHEMAS if not hasattr(torch.ops.torchvision, schema.partition("(")[0])]
    if not missing:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in missing:
        library.define(schema)  # type: ignore[no-untyped-call]
    return library


_load_compiled_operators()
_LIBRARY = _declare_missing_operators()  # lives as long as the process: dropping it would undo the declarations

with warnings.catch_warnings():
    # torchvision warns that its image decoders are missing; images are decoded by Pillow here.
    warnings.filterwarnings("ignore", message="Failed to load image Python extension")
    import torchvision

__all__ = ["torchvision"]
