"""CUDA graphs: when one is used, that its memory mixes up no batches, and, where there is a GPU, that it gives torch's vectors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import backbone
from pipeline.backbone import cuda, network
from pipeline.backbone.engines import Features, Start, at_once
from pipeline.backbone.weights import load_network
from pipeline.config import BackboneConfig, ExtractionConfig, PreprocessingConfig

BATCH = 4
SECTION = BackboneConfig(name="squeezenet1_1", preprocessing=PreprocessingConfig(resize=40, crop=32))


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5 * BATCH + 3, 32, 32, 3), dtype=np.uint8)


# ---- whether there is one


def sums(pixels: np.ndarray) -> Features:
    return (pixels.reshape(len(pixels), -1).sum(1, keepdims=True).astype(np.float32),)


def test_a_graph_that_cannot_be_captured_or_computes_something_else_is_not_used(pixels: np.ndarray) -> None:
    def refuse() -> Start:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\n  details")

    right, wrong = at_once(sums), at_once(lambda found: (sums(found)[0][::-1],))
    assert cuda.capture_checked(lambda: right, pixels, sums(pixels)) == (right, "as a CUDA graph")
    assert cuda.capture_checked(refuse, pixels, sums(pixels)) == (
        None,
        "without a CUDA graph (CUDA error: operation not permitted when stream is capturing)",
    )
    pixels[0] = 0
    assert cuda.capture_checked(lambda: wrong, pixels, sums(pixels)) == (
        None,
        "without a CUDA graph (the vectors of the probe images are not torch's)",
    )


@pytest.mark.parametrize("works", [True, False])
def test_a_backbone_goes_on_without_its_graph(works: bool, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is called as the capture would be, and computes without a GPU what was captured."""
    seen: list[int] = []

    def stand_in(vectors: Callable[..., Any], size: tuple[int, int], batch: int, device: torch.device) -> Start:
        assert (size, batch, device.type) == ((32, 32), BATCH, "cpu")
        if not works:
            raise RuntimeError("no")

        def engine(found: np.ndarray) -> Features:
            seen.append(len(found))
            with torch.inference_mode():
                return tuple(output.numpy() for output in vectors(torch.from_numpy(found)))

        return at_once(engine)

    monkeypatch.setattr(cuda, "capture", stand_in)
    arithmetic = network.Arithmetic(torch.device("cpu"), torch.float32, "fp32", "torch", BATCH)
    loaded = load_network(SECTION, 0)
    loaded = replace(loaded, preprocessing=replace(loaded.preprocessing, decode="standard"))
    made = network.Backbone(loaded, SECTION, arithmetic)
    plain = backbone.load(SECTION, ExtractionConfig(device="cpu", precision="fp32", engine="torch"), 0)
    np.testing.assert_array_equal(made.embed(pixels)[0], plain.embed(pixels)[0])
    np.testing.assert_array_equal(made.canary[0], plain.canary[0])
    assert made.specs == plain.specs, "a graph is no part of the identity"
    assert made.remark == ("as a CUDA graph" if works else "without a CUDA graph (no)")
    assert seen == ([len(made.canary[0]), len(pixels)] if works else [])


# ---- its memory


class Replay:
    """A graph of one operation, carried out at once by the processor."""

    def __init__(self, pixels: torch.Tensor, output: torch.Tensor) -> None:
        self.pixels, self.output = pixels, output

    def replay(self) -> None:
        self.output.copy_(self.pixels.flatten(1).to(torch.float32).sum(1, keepdim=True))


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> cuda.Captured:
    """Batches through the memory of a graph where streams and events have nothing to wait for."""
    here = SimpleNamespace(
        device=lambda _: nullcontext(),
        stream=lambda _: nullcontext(),
        Stream=lambda _: None,
        current_stream=lambda: SimpleNamespace(wait_event=lambda _: None),
    )
    monkeypatch.setattr(torch, "cuda", here)
    event: Any = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    pixels, output = torch.zeros(BATCH, 32, 32, 3, dtype=torch.uint8), torch.zeros(BATCH, 1)
    slots = [
        cuda._Slot(
            torch.zeros_like(pixels), torch.zeros_like(pixels), (torch.zeros_like(output),), event, event, lambda: None
        )
        for _ in range(cuda.SLOTS)
    ]
    graph: Any = Replay(pixels, output)
    return cuda.Captured(torch.device("cpu"), graph, pixels, (output,), slots)


def test_any_number_of_images_goes_through_batches_of_one_size(captured: cuda.Captured, pixels: np.ndarray) -> None:
    for count in (1, BATCH, BATCH + 1, len(pixels), 2):
        np.testing.assert_array_equal(captured.start(pixels[:count])()[0], sums(pixels[:count])[0])


def test_batches_may_be_collected_late_and_in_any_order(captured: cuda.Captured, pixels: np.ndarray) -> None:
    parts = [pixels[first : first + 3] for first in range(0, len(pixels), 3)]
    assert len(parts) > 3 * cuda.SLOTS
    waiting = [captured.start(part.copy()) for part in parts]
    for place in (5, 0, 1, 4, 3, 2, 7, 6, 0):
        np.testing.assert_array_equal(waiting[place]()[0], sums(parts[place])[0])


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_graph_gives_the_vectors_that_torch_gives_without_one(name: str, precision: str) -> None:
    crop = PreprocessingConfig(resize=224, crop=224)
    section = BackboneConfig(name=name, preprocessing=crop)
    extraction = ExtractionConfig.model_validate({"device": "cuda", "precision": precision, "batch_size": BATCH})
    graphed = backbone.load(section, extraction, 0, images=10**6)
    eager = backbone.load(section, extraction, 0, images=1)
    assert (graphed.remark, eager.remark) == ("as a CUDA graph", "")
    assert graphed.specs == eager.specs
    pixels = np.random.default_rng(0).integers(0, 256, (2 * BATCH + 1, 224, 224, 3), dtype=np.uint8)
    (expected,) = eager.embed(pixels)
    tolerance = {"fp32": 1e-4, "bf16": 5e-2}[precision] * np.abs(expected).max()
    waiting = [graphed.start(pixels[first : first + 3]) for first in range(0, len(pixels), 3)]
    for found in (graphed.embed(pixels)[0], np.concatenate([collect()[0] for collect in waiting])):
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
