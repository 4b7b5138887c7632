"""JPEGs decoded and prepared by an NVIDIA GPU: what `decode: gpu` adds to `standard`.

nvJPEG decodes, torch turns, resizes and crops, and what comes back are bytes as any other way of decoding makes them. A
processor spends 1 ms on a small photo and 40 ms on one of 12 megapixels; that is what this is for.

A GPU is given only what both decoders agree on: whole JPEGs in grey or in YCbCr. Everything else, and whatever nvJPEG refuses,
is left to the processor, image by image, so that what becomes of an image never depends on its neighbours.
**No GPU has run this file yet.** What guards a run is `gpu_decoder`, which compares both on images of its own first.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import BackboneError, first_line
from pipeline.images.decoding import JpegHeader, decode, jpeg_header
from pipeline.images.preparing import Preprocessing, prepare_tensor
from pipeline.memory import is_out_of_memory

if TYPE_CHECKING:
    import torch

Decode = Callable[[Sequence[bytes]], Sequence["torch.Tensor"]]
"""JPEGs to RGB on the GPU, uint8 of shape (3, height, width) each; RuntimeError where one of them is not for it."""

RUN_PIXELS: Final = 100_000_000
"""Pixels that are decoded at a time, unless a single image has more: 300 MB of bytes, and while one is resized its floats."""

MOST_DIFFERENCE: Final = 2.0
"""Grey levels, on average over an image, between the two decoders. Of the things in which decoders are free, libjpeg-turbo's
fast DCT moves a photo's values by 1.0, and colour that is not smoothed as it is enlarged by 0.4 (by 2.2 at most)."""

TURNED: Final = frozenset({5, 6, 7, 8})
FLIPPED: Final[Mapping[int, tuple[int, ...]]] = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}
"""EXIF orientations that are made upright by exchanging height and width, and then by flipping these axes."""


@dataclass(frozen=True)
class GpuDecoder:
    """A GPU's decoder; `aside` gives the stream on which its work goes on beside the network's."""

    decode: Decode
    aside: Callable[[], AbstractContextManager[object]]
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Of the threads that read, one at a time decodes, so that only one's images are in the GPU's memory."""

    def prepare(
        self, contents: Mapping[int, bytes], wanted: Mapping[int, Sequence[Preprocessing]], max_pixels: int
    ) -> dict[tuple[int, Preprocessing], NDArray[np.uint8]]:
        """Decode what is for the GPU of some files' bytes, and prepare it; what is missing is for the processor.

        Raises
        ------
        BackboneError
            When the GPU's memory does not suffice.
        """
        import torch

        headers = {row: header for row, data in contents.items() if (header := jpeg_header(data, max_pixels))}
        made: dict[tuple[int, Preprocessing], NDArray[np.uint8]] = {}
        with self.turn, self.aside():
            for rows in _runs(headers):
                prepared: dict[Preprocessing, dict[int, torch.Tensor]] = {}
                for row, image in self._decoded({row: contents[row] for row in rows}).items():
                    header = headers[row]
                    if tuple(image.shape) != (3, header.height, header.width):
                        continue
                    upright = _upright(image, header.orientation)
                    for way in wanted[row]:
                        prepared.setdefault(way, {})[row] = prepare_tensor(upright, way)
                for way, images in prepared.items():  # each comes back in one piece, for which the GPU is waited for
                    back = torch.stack(list(images.values())).cpu().numpy()
                    made.update({(row, way): pixels for row, pixels in zip(images, back, strict=True)})
        return made

    def _decoded(self, contents: Mapping[int, bytes]) -> Mapping[int, torch.Tensor]:
        """Decode as many as nvJPEG takes; as it refuses all for the sake of one, each is then tried alone."""
        try:
            return dict(zip(contents, self.decode(list(contents.values())), strict=True))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise BackboneError(
                    "the GPU's memory does not suffice to decode images beside the network; set extraction.decode: standard"
                ) from None
        if len(contents) == 1:
            return {}
        return {row: image for row, data in contents.items() for image in self._decoded({row: data}).values()}


def _upright(image: torch.Tensor, orientation: int) -> torch.Tensor:
    turned = image.transpose(1, 2) if orientation in TURNED else image
    return turned.flip(FLIPPED.get(orientation, ()))


def _runs(headers: Mapping[int, JpegHeader]) -> Iterator[list[int]]:
    rows: list[int] = []
    pixels = 0
    for row, header in headers.items():
        size = header.width * header.height
        if rows and pixels + size > RUN_PIXELS:
            yield rows
            rows, pixels = [], 0
        rows.append(row)
        pixels += size
    if rows:
        yield rows


def gpu_decoder(device: str) -> GpuDecoder:
    """Return a GPU's decoder once it has been seen to agree with the processor's.

    Raises
    ------
    BackboneError
        When the device is no NVIDIA GPU, this torchvision has no nvJPEG, or its pixels differ by more than `MOST_DIFFERENCE`.
    """
    import torch

    if torch.device(device).type != "cuda":
        raise BackboneError(
            f"extraction.decode is gpu, which needs an NVIDIA GPU, and the device is {device}; set extraction.decode: standard"
        )

    def aside() -> AbstractContextManager[object]:
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    return checked(GpuDecoder(nvjpeg(device), aside))


def nvjpeg(device: str) -> Decode:
    """Return torchvision's door to nvJPEG."""
    import torch

    from pipeline.vision import torchvision

    def jpegs(contents: Sequence[bytes]) -> Sequence[torch.Tensor]:
        encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in contents]
        images: list[torch.Tensor] = torchvision.io.decode_jpeg(encoded, torchvision.io.ImageReadMode.RGB, device)
        return images

    return jpegs


def checked(made: GpuDecoder) -> GpuDecoder:
    """Return a decoder if its images are those of the processor's; see `gpu_decoder`."""
    for name, data in _probes():
        expected = decode(data, max_pixels=RUN_PIXELS).astype(int)
        try:
            found = made.decode([data])[0].permute(1, 2, 0).cpu().numpy()
        except RuntimeError as error:
            reason = first_line(error)
            raise _refusal(f"nvJPEG is not to be had ({reason})") from None
        if found.shape != expected.shape:
            raise _refusal(f"a built-in {name} has the shape {found.shape} there, {expected.shape} here")
        difference = float(np.abs(found - expected).mean())
        if not difference <= MOST_DIFFERENCE:
            raise _refusal(
                f"a built-in {name} differs by {difference:.1f} grey levels on average, at most {MOST_DIFFERENCE:g} is allowed"
            )
    return made


def _refusal(found: str) -> BackboneError:
    return BackboneError(f"extraction.decode is gpu, but {found}; set extraction.decode: standard")


def _probes() -> Iterator[tuple[str, bytes]]:
    """JPEGs of soft colours, as photos have them, whose sides are no multiples of a block's."""
    y, x = np.mgrid[0:171, 0:251]
    waves = [128 + 100 * np.sin(x / 15 + y / 32), 128 + 100 * np.cos(x / 21 - y / 19), 255 * y / 171]
    image = Image.fromarray(np.stack(waves, axis=2).astype(np.uint8))
    for name, kept, options in (
        ("JPEG", image, {"subsampling": "4:2:0"}),
        ("JPEG of full colour", image, {"subsampling": "4:4:4"}),
        ("progressive JPEG", image, {"progressive": True}),
        ("grey JPEG", image.convert("L"), {}),
    ):
        sink = io.BytesIO()
        kept.save(sink, "JPEG", quality=90, **options)
        yield name, sink.getvalue()
