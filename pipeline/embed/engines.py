"""The choice of device, number format and engine (torch or OpenVINO) for a network. torch is imported only when used.

torch runs anywhere, OpenVINO is faster on x86 processors. Both run the same graph with the same weights, but sum in a
different order, so engine and number format are part of the identity of the vectors. They are chosen by properties of the
machine and the network, never by timings, so that a machine always makes the same choice.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import ExtractionConfig
from pipeline.errors import BackboneError, first_line
from pipeline.io.process import version

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LayerFeatures = tuple[NDArray[np.float32], ...]
"""One array of shape (n, dim), float32, per layer."""

TorchForward = Callable[["torch.Tensor"], "tuple[torch.Tensor, ...]"]
"""Pixels, uint8 of shape (n, height, width, 3), to one float32 tensor of shape (n, dim) per layer."""

Forward = Callable[[NDArray[np.uint8]], LayerFeatures]
"""The same with arrays."""

NATIVE_BF16 = frozenset({"amx_bf16", "avx512_bf16"})

BATCH_SIZES = {"cpu": 32, "mps": 64, "cuda": 256}
"""`batch_size: auto`: the activations of 16 to 32 images still fit a processor's cache; a GPU needs many images at once."""

MOST_DEVIATION = 0.25
"""Largest allowed L2 distance to torch's vector in fp32, as a fraction of its norm. bf16 changes a ResNet's by less than 0.01,
EfficientNet-Lite's by up to 0.13; vectors of different networks differ by more than 1."""

BATCH = 32
"""The fixed batch size of a compiled network; shorter batches are padded."""

PAYS_FROM = 1_000
"""Number of images from which `auto` uses OpenVINO: its start costs 0.5 to 1 s, and ResNet-18, the smallest usual network,
saves 1 ms per image."""

_FORMATS = {"fp32": "f32", "bf16": "bf16"}


# ---- the machine


@cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features and vendor by their Linux names; empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    first = dict(re.findall(r"^(vendor_id|flags|Features)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    return frozenset(" ".join(first.values()).split())


def native_bf16(flags: frozenset[str]) -> frozenset[str]:
    """Return the processor flags that make bf16 faster than fp32: matrix units (AMX), or AVX512-BF16 except on Intel's."""
    return frozenset() if "GenuineIntel" in flags and "amx_bf16" not in flags else flags & NATIVE_BF16


def choice_inputs() -> dict[str, Any]:
    """Return the inputs of the choice of device, precision and engine, as a cache key; does not import torch."""
    return {
        "versions": {name: version(name) for name in ("torch", "torchvision", "openvino")},
        "machine": platform.machine(),
        "system": platform.system(),
        "bf16": sorted(native_bf16(cpu_flags())),
        "cuda": [os.path.exists("/dev/nvidiactl"), os.environ.get("CUDA_VISIBLE_DEVICES")],
    }


# ---- device, number format and engine


def resolve_device(asked: str) -> torch.device:
    """Return the device to compute on, BackboneError if it is not available; `auto` prefers cuda to mps to cpu."""
    import torch

    devices = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(kind for kind, available in devices.items() if available))
    device = torch.device(asked)
    if not devices[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, available in devices.items() if available)
        raise BackboneError(
            f"device {asked!r} is not available; there are {found} and {torch.cuda.device_count()} GPUs"
        )
    return device


def choose_batch_size(asked: int | str, device: str) -> int:
    """Return the batch size for a device such as `cuda:0`."""
    return BATCH_SIZES[device.partition(":")[0]] if asked == "auto" else int(asked)


def choose_precision(asked: str, device: str, flags: frozenset[str], cuda_bf16: bool = False) -> tuple[str, str]:
    """Return the number format of the network's arithmetic, and the reason for it.

    `device` is `cpu`, `cuda` or `mps`; `flags` are those of `cpu_flags`. On a CPU, bf16 is 3 to 8 times as fast as fp32 with AMX,
    1.7 to 1.8 times with AVX512-BF16 alone on AMD's, and slower on Intel's or emulated.
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
    return "fp32", "the processor has no faster bf16"


def resolve_precision(asked: str, device: torch.device) -> tuple[torch.dtype, str, str]:
    """Return the torch dtype, its name in configs, and the reason for it."""
    import torch

    cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    name, reason = choose_precision(asked, device.type, cpu_flags(), cuda_bf16)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], name, reason


def openvino_is_installed() -> bool:
    """Whether OpenVINO is installed; does not import it."""
    return importlib.util.find_spec("openvino") is not None


def choose_engine(
    asked: str, device: str, precision: str, *, images: int, layer_norms: bool, installed: bool
) -> tuple[str, str]:
    """Return the engine and the reason for it; BackboneError if OpenVINO is requested but cannot be used.

    `layer_norms` identifies transformers and similar networks. In bf16 with AMX, OpenVINO is 1.4 to 2.5 times as fast as torch for
    ResNets and MobileNets, 0.7 times for ConvNeXt and ViT; torch.compile gains 1.2 to 1.5 after 20 to 120 s, and is not used.
    """
    if asked == "torch":
        return asked, "asked for"
    obstacles = [
        *([] if installed else ["it is not installed; pip install 'manyheads[openvino]'"]),
        *([] if device == "cpu" else [f"it computes on the processor and the device is {device}"]),
        *([] if precision in _FORMATS else [f"it has no {precision}; set extraction.precision to fp32 or bf16"]),
    ]
    if asked == "openvino":
        if obstacles:
            raise BackboneError("extraction.engine is openvino, but it cannot be used", obstacles)
        return asked, "asked for"
    if obstacles:
        return "torch", f"OpenVINO: {obstacles[0]}"
    if platform.machine().lower() not in {"x86_64", "amd64"}:
        return "torch", "OpenVINO was not measured on this kind of processor"
    if images < PAYS_FROM:
        return "torch", f"fewer than {PAYS_FROM:,} images do not pay for the start of OpenVINO"
    if layer_norms:
        return "torch", "faster than OpenVINO for networks with layer norms"
    return "openvino", "faster than torch for convolutional networks"


def require_arithmetic(extraction: ExtractionConfig) -> None:
    """Check that a config's device, precision and engine are available; BackboneError if not."""
    device = resolve_device(extraction.device)
    _, precision, _ = resolve_precision(extraction.precision, device)
    installed = openvino_is_installed()
    choose_engine(extraction.engine, device.type, precision, images=0, layer_norms=False, installed=installed)


def engine_at_hand(engine: str, device: str) -> str:
    """Return the engine if it can run on the device, else `torch`."""
    return engine if openvino_is_installed() and resolve_device(device).type == "cpu" else "torch"


# ---- OpenVINO


def require_close(found: LayerFeatures, expected: LayerFeatures) -> None:
    """Check that two engines' vectors, float32 (n, dim) per layer, differ at most by bf16 rounding; RuntimeError if not."""
    for vectors, by_torch in zip(found, expected, strict=True):
        distance = np.linalg.norm(vectors - by_torch, axis=1)
        if not (distance <= MOST_DEVIATION * np.linalg.norm(by_torch, axis=1) + 1e-6).all():
            raise RuntimeError("the vectors of the probe images differ from torch's")


def compile_openvino(vectors: TorchForward, size: tuple[int, int], precision: str, threads: int) -> Forward:
    """Compile the computation from pixels to vectors for images of `size` (height, width); RuntimeError if OpenVINO cannot."""
    import torch

    began = time.perf_counter()
    try:
        openvino, core = import_openvino(), _core()
    except Exception as error:  # a broken installation, or another package of that name, may raise anything
        raise RuntimeError(f"it is installed and cannot be imported: {first_line(error)}") from None
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # shapes become constants, as intended
        example = torch.zeros(1, *size, 3, dtype=torch.uint8)
        traced = torch.jit.trace(vectors, (example,), check_trace=False)  # type: ignore[no-untyped-call]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": _FORMATS[precision],
        # By default OpenVINO pins its threads to the first cores, and several processes would share these.
        **({"ENABLE_CPU_PINNING": False} if threads < (os.cpu_count() or 1) else {}),
    }
    compiled = core.compile_model(openvino.convert_model(traced, input=[BATCH, *size, 3]), "CPU", settings)
    request = compiled.create_infer_request()
    logger.info("OpenVINO compiled the network in %.1f s", time.perf_counter() - began)

    def run(pixels: NDArray[np.uint8]) -> LayerFeatures:
        parts = []
        for start in range(0, len(pixels), BATCH):
            part = pixels[start : start + BATCH]
            count = len(part)
            if count < BATCH:  # padding is cut off below, and does not affect the other images
                part = np.concatenate([part, np.zeros((BATCH - count, *part.shape[1:]), np.uint8)])
            found = request.infer({0: np.ascontiguousarray(part)}, share_inputs=True)
            parts.append([np.array(found[output][:count]) for output in range(len(found))])
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    return run


def import_openvino() -> ModuleType:
    """Import OpenVINO with its telemetry disabled in this process; nothing else may import it.

    The package `openvino_telemetry` reports its import and every conversion, under an id kept in the home folder, from a forked
    process that hangs behind a firewall. With None in its place, OpenVINO acts as if the package were not installed; if the
    user imported OpenVINO first, its messages are dropped.
    """
    telemetry = sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    if telemetry is not None:
        sender = importlib.import_module("openvino_telemetry.main").TelemetrySender
        sender.send = lambda *_: None
    return importlib.import_module("openvino")


@cache
def _core() -> Any:
    """Return the only Core of this process, which is never freed.

    Each Core has its own signal stack; if two are freed in the order of their creation, Ctrl-C is handled on a freed stack.
    """
    return import_openvino().Core()
