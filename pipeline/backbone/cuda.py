"""A network on an NVIDIA GPU as a CUDA graph: no launches to wait for, and copies that go on beside the arithmetic.

The steps are those that torch's notes on CUDA semantics prescribe, "CUDA Graphs" and "Use pinned memory buffers".
**This file has not been run on a GPU yet.** What guards a run is `capture_checked`: a graph that cannot be captured, or does
not give the vectors that torch gives without one, is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.backbone.engines import Features, Start, Vectors, require_close
from pipeline.errors import first_line

SLOTS = 2
"""Batches under way: one in the network, one on its way to it or back."""

WARM_UPS = 3
"""Passes before the capture, in which libraries choose their algorithms and take their memory."""


def capture_checked(
    capture: Callable[[], Start], probes: NDArray[np.uint8], expected: Features
) -> tuple[Start | None, str]:
    """Return a captured network, or None, and what is to be said of it.

    `expected` is what torch gives for the probes without a graph.
    """
    try:
        start = capture()
        require_close(start(probes)(), expected)
    except RuntimeError as error:  # torch's own errors of CUDA and of memory are such
        reason = first_line(error)
        return None, f"without a CUDA graph ({reason})"
    return start, "as a CUDA graph"


def capture(vectors: Vectors, size: tuple[int, int], batch: int, device: torch.device) -> Start:
    """Capture the way from pixels to vectors for batches of a fixed size; a shorter one is filled up.

    Raises
    ------
    RuntimeError
        When the network does something that a graph cannot hold, or memory runs out.
    """
    with torch.cuda.device(device), torch.inference_mode():
        pixels = torch.zeros(batch, *size, 3, dtype=torch.uint8, device=device)
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                vectors(pixels)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):  # where the libraries have what they need already
            outputs = tuple(output.contiguous() for output in vectors(pixels))
        slots = [_Slot.like(pixels, outputs) for _ in range(SLOTS)]
    return Captured(device, graph, pixels, outputs, slots).start


@dataclass
class _Slot:
    """The memory of one batch under way, and the events that tell how far it is."""

    pinned: torch.Tensor
    staged: torch.Tensor
    """Where the pixels arrive on the GPU while the network still reads those of the batch before."""
    found: tuple[torch.Tensor, ...]
    uploaded: torch.cuda.Event
    done: torch.cuda.Event
    collect: Callable[[], object]
    """Waits for the batch that has this memory."""

    @staticmethod
    def like(pixels: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> _Slot:
        """Take memory for one batch."""
        return _Slot(
            torch.zeros(pixels.shape, dtype=pixels.dtype, pin_memory=True),
            torch.empty_like(pixels),
            tuple(torch.empty(output.shape, dtype=output.dtype, pin_memory=True) for output in outputs),
            torch.cuda.Event(),  # type: ignore[no-untyped-call]
            torch.cuda.Event(blocking=True),  # type: ignore[no-untyped-call]  # to wait leaves the processor to the decoders
            lambda: None,
        )


class Captured:
    """A captured network and the memory it works in."""

    def __init__(
        self,
        device: torch.device,
        graph: torch.cuda.CUDAGraph,
        pixels: torch.Tensor,
        outputs: tuple[torch.Tensor, ...],
        slots: list[_Slot],
    ) -> None:
        self._device = device
        self._graph = graph
        self._pixels, self._outputs = pixels, outputs
        self._slots = slots
        self._uploads = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, pixels: NDArray[np.uint8]) -> Callable[[], Features]:
        """Send pixels on their way; see `engines.Start`."""
        step = len(self._pixels)
        parts = [self._launch(pixels[first : first + step]) for first in range(0, len(pixels), step)]
        return lambda: tuple(np.concatenate(arrays) for arrays in zip(*(part() for part in parts), strict=True))

    def _launch(self, pixels: NDArray[np.uint8]) -> Callable[[], Features]:
        slot = self._slots.pop(0)
        self._slots.append(slot)
        slot.collect()  # from here on the memory is free: all that was sent through it has come back
        count = len(pixels)
        with torch.cuda.device(self._device), torch.inference_mode():
            # Behind a short batch lie rows of an earlier one; no image is changed by its neighbours.
            slot.pinned[:count].copy_(torch.from_numpy(pixels))
            with torch.cuda.stream(self._uploads):
                slot.staged.copy_(slot.pinned, non_blocking=True)
                slot.uploaded.record()
            torch.cuda.current_stream().wait_event(slot.uploaded)
            self._pixels.copy_(slot.staged)
            self._graph.replay()
            for mine, its in zip(slot.found, self._outputs, strict=True):
                mine.copy_(its, non_blocking=True)
            slot.done.record()
        kept: list[Features] = []

        def collect() -> Features:
            if not kept:
                slot.done.synchronize()
                kept.append(tuple(output[:count].numpy().copy() for output in slot.found))
            return kept[0]

        slot.collect = collect
        return collect
