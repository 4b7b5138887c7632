"""Where linear heads are solved: by numpy, or by torch on a GPU.

numpy and torch have the functions that the solvers need under the same names and with the same arguments, so one text
serves both: it asks the arrays it is given for their `namespace`. torch is imported only where a GPU may be used.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import HeadError

log = logging.getLogger(__name__)

CPU = "cpu"
"""numpy. A device of torch is `cuda`, `cuda:1` ..., and in tests `torch:cpu`, which goes the same way without a GPU."""

WORTH_A_GPU = 1 << 25
"""Bytes of features from which `auto` takes a GPU. Here (16,384 x 512, 20 classes) a search of logistic regression takes
13 s of one core, torch's import 1.4 s; from where a GPU is really faster was not measured."""

DRIVERS = ("/dev/nvidiactl", "/dev/dxg")
"""One is there where Linux has an NVIDIA driver, the second within Windows. A look costs nothing, importing torch seconds."""


@functools.cache
def resolve(asked: str, large: bool) -> str:
    """Return the device for `tuning.device`, and log a GPU once; `large` is whether the features are worth one.

    Raises
    ------
    HeadError
        When the device asked for is not there.
    """
    if asked == "auto":
        device, reason = _automatic(large)
    else:
        device, reason = asked, "as tuning.device says"
        if asked.startswith("cuda") and int(asked.partition(":")[2] or 0) >= (found := _gpus()):
            raise HeadError(
                f"tuning.device: {asked!r} is not available here: torch sees {found} CUDA GPUs, counted from 0; "
                "set it to 'auto' or 'cpu'"
            )
    # The processor is what users expect, and news only to who looks for the reason.
    log.log(logging.DEBUG if device == CPU else logging.INFO, "linear heads are solved on %s: %s", device, reason)
    return device


def _automatic(large: bool) -> tuple[str, str]:
    if sys.platform == "linux" and not any(os.path.exists(path) for path in DRIVERS):
        return CPU, "there is no NVIDIA GPU"
    if not large:
        return CPU, "the features are too few to be worth a GPU"
    return ("cuda", "torch sees a CUDA GPU") if _gpus() else (CPU, "torch sees no CUDA GPU")


def _gpus() -> int:
    try:
        import torch
    except ImportError:
        return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_bytes(device: str) -> int | None:
    """Return the free memory of a GPU; None where the device's memory is the machine's."""
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def namespace(array: Any) -> Any:
    """Return the module an array belongs to, numpy or torch."""
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def put(array: NDArray[Any], device: str) -> Any:
    """Return the array on the device."""
    if device == CPU:
        return array
    import torch

    return torch.asarray(array, device=device.removeprefix("torch:"))


def take(array: Any) -> NDArray[Any]:
    """Return an array of any device as one of numpy."""
    made: NDArray[Any] = array if isinstance(array, np.ndarray) else array.cpu().numpy()
    return made


def copied(array: Any) -> Any:
    """Return a copy to calculate in, numpy's with its rows one after the other."""
    return array.copy() if isinstance(array, np.ndarray) else array.clone()


def single(array: Any) -> NDArray[np.float32]:
    """Return the array in float32, where it is."""
    xp = namespace(array)
    made: NDArray[np.float32] = xp.asarray(array, dtype=xp.float32, device=array.device)
    return made


def double(array: Any) -> NDArray[np.float64]:
    """Return the array in float64, where it is."""
    xp = namespace(array)
    made: NDArray[np.float64] = xp.asarray(array, dtype=xp.float64, device=array.device)
    return made
