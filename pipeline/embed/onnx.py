"""A network as ONNX, by torch's exporter of traces: the one that runs it, writes what it met, and needs no package but onnx.

The newer exporter (`dynamo=True`) needs onnxscript, takes longer and writes the paths of source files into its nodes. Whichever
wrote a network, whether it computes the same is for who uses it to prove.
"""

from __future__ import annotations

import contextlib
import io
import warnings

import torch
from torch import nn

from pipeline.embed.engines import Vectors
from pipeline.errors import BackboneError, first_line


class _Written(nn.Module):
    """The way from pixels to vectors as a module, which is what the exporter takes."""

    def __init__(self, network: nn.Module, vectors: Vectors) -> None:
        super().__init__()
        self.network = network  # named, so that its weights are
        self._vectors = vectors

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the vectors, float32 of shape (n, dim) each, of pixels, float32 of shape (n, 3, height, width)."""
        return self._vectors(pixels.permute(0, 2, 3, 1))


def to_onnx(network: nn.Module, vectors: Vectors, size: tuple[int, int], opset: int) -> bytes:
    """Return an ONNX model from prepared pixels, float32 of shape (n, 3, *size) from 0 to 255, to vectors, (n, dim) each.

    network : what `vectors` runs, in float32 on the processor

    Raises
    ------
    BackboneError
        When it has an operation that the exporter cannot write.
    """
    file, two = io.BytesIO(), torch.zeros(2, 3, *size)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operation for all of an attention cannot be written
    try:
        # It warns of all that becomes constant, and prints its graph where it fails.
        with torch.inference_mode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Written(network, vectors),
                (two,),
                file,  # type: ignore[arg-type]  # it takes one
                dynamo=False,
                input_names=["pixels"],
                dynamic_axes={"pixels": {0: "n"}},
                opset_version=opset,
            )
    except (RuntimeError, ValueError, TypeError) as error:  # errors of the exporter are RuntimeErrors
        raise BackboneError(f"torch cannot write the network as ONNX ({first_line(error)})") from None
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return file.getvalue()
