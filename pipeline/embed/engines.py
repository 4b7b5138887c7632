"""Engines: what carries out a network's arithmetic, on which device and in which number format. No torch before it is used.

torch does it anywhere, OpenVINO is faster on x86 processors. Both get the same graph with the same weights, but add up in
another order, so the engine is part of the identity of the vectors, as the format is: chosen by what the machine and the
network are, never by timing them, so that the same machine gives the same answer every time.
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
"""The same for arrays."""

NATIVE_BF16 = frozenset({"amx_bf16", "avx512_bf16"})

BATCH_SIZES = {"cpu": 32, "mps": 64, "cuda": 256}
"""`batch_size: auto`: on a processor the activations of 16 to 32 images still fit its cache, a GPU wants many at once."""

MOST_DEVIATION = 0.25
"""Largest allowed L2 distance to torch's vector in fp32, as a fraction of its norm. bf16 moves a ResNet's by less than 0.01,
EfficientNet-Lite's by up to 0.13; those of another network are more than 1 away."""

BATCH = 32
"""Images of a compiled network's batch, which is fixed; a shorter batch is filled up."""

PAYS_FROM = 1_000
"""Images from which `auto` takes OpenVINO: its start costs 0.5 to 1 s, and ResNet-18, the smallest of the usual networks,
saves 1 ms an image."""

_FORMATS = {"fp32": "f32", "bf16": "bf16"}


# ---- the machine


@cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's features and its vendor as Linux names them; nothing on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    first = dict(re.findall(r"^(vendor_id|flags|Features)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    return frozenset(" ".join(first.values()).split())


def native_bf16(flags: frozenset[str]) -> frozenset[str]:
    """Return those of a processor's flags by which bf16 is quicker than fp32: matrix units (AMX), or AVX512-BF16 but on Intel's."""
    return frozenset() if "GenuineIntel" in flags and "amx_bf16" not in flags else flags & NATIVE_BF16


def choice_inputs() -> dict[str, Any]:
    """Return what device, precision and engine depend on, learnt without importing torch: the key under which a choice is kept."""
    return {
        "versions": {name: version(name) for name in ("torch", "torchvision", "openvino")},
        "machine": platform.machine(),
        "system": platform.system(),
        "bf16": sorted(native_bf16(cpu_flags())),
        "cuda": [os.path.exists("/dev/nvidiactl"), os.environ.get("CUDA_VISIBLE_DEVICES")],
    }


# ---- device, number format and engine


def resolve_device(asked: str) -> torch.device:
    """Return the device to compute on, BackboneError when it is not there; `auto` takes cuda before mps before cpu."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        return torch.device(next(kind for kind, available in there.items() if available))
    device = torch.device(asked)
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        found = ", ".join(kind for kind, available in there.items() if available)
        raise BackboneError(
            f"device {asked!r} is not available; there are {found} and {torch.cuda.device_count()} GPUs"
        )
    return device


def choose_batch_size(asked: int | str, device: str) -> int:
    """Return how many images a device, such as `cuda:0`, is given at a time."""
    return BATCH_SIZES[device.partition(":")[0]] if asked == "auto" else int(asked)


def choose_precision(asked: str, device: str, flags: frozenset[str], cuda_bf16: bool = False) -> tuple[str, str]:
    """Return the number format of the network's arithmetic, and the reason for it.

    `device` is `cpu`, `cuda` or `mps`; `flags` are the processor's as `cpu_flags` gives them. On a processor bf16 is 3 to 8 times as
    fast as fp32 with AMX, 1.7 to 1.8 times with AVX512-BF16 alone on AMD's, and slower on Intel's or emulated.
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


def resolve_precision(asked: str, device: torch.device) -> tuple[torch.dtype, str, str]:
    """Return the torch dtype, its name and the reason."""
    import torch

    cuda_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    name, reason = choose_precision(asked, device.type, cpu_flags(), cuda_bf16)
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name], name, reason


def openvino_is_there() -> bool:
    """Whether OpenVINO is installed, learnt without importing it."""
    return importlib.util.find_spec("openvino") is not None


def choose_engine(
    asked: str, device: str, precision: str, *, images: int, layer_norms: bool, there: bool
) -> tuple[str, str]:
    """Return the engine and the reason for it; BackboneError when OpenVINO is asked for where it cannot be.

    `layer_norms` tells transformers and their kin. Measured in bf16 with AMX, OpenVINO is 1.4 to 2.5 times as fast as torch for ResNets
    and MobileNets, 0.7 times for ConvNeXt and ViT; torch.compile gains 1.2 to 1.5 after 20 to 120 s, and is not used.
    """
    if asked == "torch":
        return asked, "asked for"
    obstacles = [
        *([] if there else ["it is not installed; pip install 'manyheads[openvino]'"]),
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
    """See that the device, the precision and the engine that a config asks for are to be had; BackboneError where not."""
    device = resolve_device(extraction.device)
    _, precision, _ = resolve_precision(extraction.precision, device)
    choose_engine(extraction.engine, device.type, precision, images=0, layer_norms=False, there=openvino_is_there())


def engine_at_hand(engine: str, device: str) -> str:
    """Return the engine where it can compute on the device, else `torch`, which always can."""
    return engine if openvino_is_there() and resolve_device(device).type == "cpu" else "torch"


# ---- OpenVINO


def require_close(found: LayerFeatures, expected: LayerFeatures) -> None:
    """See that two engines' vectors, float32 (n, dim) per layer, differ by the rounding of bf16 at most; RuntimeError where not."""
    for mine, torchs in zip(found, expected, strict=True):
        distance = np.linalg.norm(mine - torchs, axis=1)
        if not (distance <= MOST_DEVIATION * np.linalg.norm(torchs, axis=1) + 1e-6).all():
            raise RuntimeError("the vectors of the probe images are not torch's")


def compile_openvino(vectors: TorchForward, size: tuple[int, int], precision: str, threads: int) -> Forward:
    """Compile the way from pixels to vectors for images of `size` (height, width); RuntimeError where OpenVINO cannot."""
    import torch

    began = time.perf_counter()
    try:
        openvino, core = import_openvino(), _core()
    except Exception as error:  # half an installation, or another package of that name, fails in any way
        raise RuntimeError(f"it is installed and cannot be imported: {first_line(error)}") from None
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that shapes become constants, which they are
        example = torch.zeros(1, *size, 3, dtype=torch.uint8)
        traced = torch.jit.trace(vectors, (example,), check_trace=False)  # type: ignore[no-untyped-call]
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": _FORMATS[precision],
        # Left to itself it ties its threads to the first processors, in each of several processes to the same ones.
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
            if count < BATCH:  # what fills it up is cut off again, and no image is changed by its neighbours
                part = np.concatenate([part, np.zeros((BATCH - count, *part.shape[1:]), np.uint8)])
            found = request.infer({0: np.ascontiguousarray(part)}, share_inputs=True)
            parts.append([np.array(found[output][:count]) for output in range(len(found))])
        return tuple(map(np.concatenate, zip(*parts, strict=True)))

    return run


def import_openvino() -> ModuleType:
    """Import OpenVINO, which in this process can report its use to its maker no more; nothing else may import it.

    Its import and every conversion are reported by the package `openvino_telemetry`, under an id kept in the home folder,
    from a forked process that a firewall makes hang. OpenVINO has a stand-in for machines that lack that package, which is
    what None says; where the user imported OpenVINO first, its messages are dropped.
    """
    telemetry = sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    if telemetry is not None:
        sender = importlib.import_module("openvino_telemetry.main").TelemetrySender
        sender.send = lambda *_: None
    return importlib.import_module("openvino")


@cache
def _core() -> Any:
    """Make the one of this process, which lasts as long.

    Each has a stack of its own for signals; when two go in the order in which they came, Ctrl-C is handled on one that is gone.
    """
    return import_openvino().Core()
