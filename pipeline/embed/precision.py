"""Which device and number format a run uses: one rule, decided by what the machine is and never by timing it.

The choice is part of the identity of the vectors, so the same machine must give the same answer every time.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import BackboneError

if TYPE_CHECKING:
    import torch

NATIVE_BF16 = frozenset({"amx_bf16", "avx512_bf16"})
INTEL = "GenuineIntel"


def choose_precision(asked: str, device: str, flags: frozenset[str], cuda_bf16: bool = False) -> tuple[str, str]:
    """Return the number format of the network's arithmetic, and the reason for it.

    `device` is `cpu`, `cuda` or `mps`; `flags` are the processor's as `cpu_flags` gives them.

    On a processor, bf16 pays only with instructions of its own: x3 to x8 over fp32 with matrix units (AMX), x1.7 to x1.8 with
    AVX512-BF16 alone on AMD's (ResNet-18 and ResNet-50 on an EPYC 9004, fp32 folded and channels-last), but x0.6 to x0.75 on
    Intel's, which have one unit for it; emulated it is slower too.
    """
    if asked != "auto":
        return asked, "asked for"
    if device == "cuda":
        return ("bf16", "the GPU computes in bf16") if cuda_bf16 else ("fp32", "the GPU has no bf16")
    if device != "cpu":
        return "fp32", f"the only one measured on {device}"
    native = sorted(native_bf16(flags))
    if native:
        return "bf16", f"the processor computes in it ({', '.join(native)}); precision: fp32 is exact and slower"
    return "fp32", "the processor has no bf16 that is quicker"


def native_bf16(flags: frozenset[str]) -> frozenset[str]:
    """Return those of a processor's flags by which bf16 is quicker than fp32."""
    return frozenset() if INTEL in flags and "amx_bf16" not in flags else flags & NATIVE_BF16


@cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features and its vendor as Linux names them; nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    first = dict(re.findall(r"^(vendor_id|flags|Features)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    return frozenset(" ".join(first.values()).split())


def choice_inputs() -> dict[str, Any]:
    """Return what device, precision and engine depend on, learnt without importing torch: the key under which a choice is kept."""
    return {
        "versions": {name: version(name) for name in ("torch", "torchvision", "openvino")},
        "machine": platform.machine(),
        "system": platform.system(),
        "bf16": sorted(native_bf16(cpu_flags())),
        "cuda": [os.path.exists("/dev/nvidiactl"), os.environ.get("CUDA_VISIBLE_DEVICES")],
    }


@cache
def version(name: str) -> str | None:
    """Return the version of an installed package; None where it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve_device(asked: str) -> torch.device:
    """Return the device to compute on; `auto` takes cuda before mps before cpu.

    Raises
    ------
    BackboneError
        When the device asked for is not there.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    device = torch.device(asked)
    if not there[device.type]:
        found = ", ".join(kind for kind, available in there.items() if available)
        raise BackboneError(
            f"device {asked!r} is not available here, found {found}; set extraction.device (predict: --device) to one of these or to 'auto'"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackboneError(
            f"device {asked!r} is not available here: there are {torch.cuda.device_count()} GPUs, counted from 0"
        )
    return device


def resolve_precision(asked: str, device: torch.device) -> tuple[torch.dtype, str, str]:
    """Return the torch dtype, its name and the reason."""
    import torch

    cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    name, reason = choose_precision(asked, device.type, cpu_flags(), cuda_bf16)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], name, reason
