"""Backbone: a loaded network on its device, from uint8 pixels to float32 vectors."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.config import WEIGHTS_FILES, BackboneConfig, ExtractionConfig
from pipeline.embed import graph as graphs
from pipeline.embed.engines import (
    Forward,
    LayerFeatures,
    TorchForward,
    choose_engine,
    compile_openvino,
    openvino_is_installed,
    require_close,
    resolve_device,
    resolve_precision,
)
from pipeline.embed.spec import VIEW, EmbeddingSpec, embedding_name, probe_images
from pipeline.embed.weights import Network, bundled, family_of, load_network, network_names
from pipeline.errors import BackboneError, first_line
from pipeline.io.digests import canonical_json
from pipeline.io.process import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arithmetic:
    """The device, number format and engine of a network."""

    device: torch.device
    dtype: torch.dtype
    precision: str
    """The dtype's name in configs and identities."""
    engine: str
    """`torch` or `openvino`."""


class Backbone:
    """A frozen network in eval mode: one forward pass turns pixels into the vectors of all its layers and poolings."""

    def __init__(self, network: Network, config: BackboneConfig, arithmetic: Arithmetic) -> None:
        self.device, self.preprocessing = arithmetic.device, network.preprocessing
        size = self.preprocessing.size
        probes = probe_images(size)
        graph = graphs.trace(network.module, torch.from_numpy(probes[-1:]).permute(0, 3, 1, 2) / 255)
        self._rows = graphs.rows(graph, network.module, config, size, network.has_classifier)
        # OpenVINO gets the exact weights and does its own rounding.
        self._dtype = arithmetic.dtype if arithmetic.engine == "torch" else torch.float32
        module = graphs.cut(graph, [row.node for row in self._rows]).to(device=self.device, dtype=self._dtype)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._module = module.eval().requires_grad_(False)
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        two = self._scaled(torch.zeros(2, *size, 3, dtype=torch.uint8, device=self.device))
        tokens = graphs.tokens_of(network.module)
        self._rows = graphs.effective(partial(self._module, two), self._rows, tokens, network.name, size)
        self._engine: Forward = self._by_torch
        self.probe: LayerFeatures = self.embed(probes)
        if arithmetic.engine == "openvino":
            self._engine = compile_openvino(self._vectors, size, arithmetic.precision, torch.get_num_threads())
            by_torch, self.probe = self.probe, self.embed(probes)
            require_close(self.probe, by_torch)
        self.specs: tuple[EmbeddingSpec, ...] = tuple(
            _spec(network, row, vectors.shape[1], arithmetic)
            for row, vectors in zip(self._rows, self.probe, strict=True)
        )

    def embed(self, pixels: NDArray[np.uint8]) -> LayerFeatures:
        """Return float32 (n, dim) for each of `specs`, for n images prepared by `images.prepare`, uint8 (n, height, width, 3)."""
        return self._engine(pixels)

    def _by_torch(self, pixels: NDArray[np.uint8]) -> LayerFeatures:
        with torch.inference_mode():
            sent = torch.from_numpy(pixels)
            if self.device.type == "cuda":
                sent = sent.pin_memory()  # asynchronous copies need pinned memory
            vectors = self._vectors(sent.to(self.device, non_blocking=True))
            return tuple(vector.contiguous().cpu().numpy() for vector in vectors)

    def _vectors(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._module(self._scaled(pixels))
        return tuple(graphs.pool(outputs[row.output].to(torch.float32), row.pooling) for row in self._rows)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        # Only bytes are copied to the device, and scaled there; a permuted view of NHWC pixels is already channels-last.
        scaled = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        return scaled.to(self._dtype)

    def contributions(
        self, pixels: NDArray[np.uint8], output: int, weights: NDArray[np.float64]
    ) -> NDArray[np.float32] | None:
        """Return the contribution of each map position to a linear score of one of `specs`; their mean is the score.

        None if the vector is not pooled from a map, such as a class token.

        pixels : uint8 of shape (n, height, width, 3), as for `embed`; weights : float64 of shape (n, dim), the score's weights for
            each image; returns float32 of shape (n, rows, columns), the size of the map
        """
        row = self._rows[output]
        with torch.no_grad():
            scaled = self._scaled(torch.from_numpy(pixels).to(self.device))
            own: torch.Tensor = self._module(scaled)[row.output]
            vectors = graphs.pool(own.float(), row.pooling)
            maps = own if own.ndim == 4 else graphs.map_before(self._module, row.output, scaled)
            if maps is None:
                return None
            maps, pooling = maps.float(), row.pooling if own.ndim == 4 else "avg"
            pooled = graphs.pool(maps, pooling)
            tolerance = 1e-4 if self._dtype == torch.float32 else 1e-2  # the two averages use different operations
            if pooled.shape != vectors.shape or (pooled - vectors).norm() > tolerance * vectors.norm():
                return None
            return graphs.contributions(maps, pooling, torch.from_numpy(weights).to(maps)).cpu().numpy()

    def weight(self) -> tuple[int, float]:
        """Return the number of parameters up to the last embedded layer, and their size in megabytes."""
        parameters = list(self._module.parameters())
        return sum(part.numel() for part in parameters), sum(part.nbytes for part in parameters) / 1e6

    def in_float64(self) -> Backbone:
        """Return the same network computing in float64 with torch, to resolve differences due to float32 rounding."""
        twin = copy(self)
        twin._module, twin._dtype, twin._engine = deepcopy(self._module).double(), torch.float64, twin._by_torch
        return twin

    def to_onnx(self, opset: int) -> bytes:
        """Return an ONNX model from pixels, float32 of shape (n, 3, *size) from 0 to 255, to the vectors of each of `specs`.

        Uses torch's tracing exporter: the newer one needs onnxscript, is slower and writes source paths into its nodes. Callers
        must verify that the model computes the same vectors. BackboneError if the export fails.
        """
        file, two = io.BytesIO(), torch.zeros(2, 3, *self.preprocessing.size)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # its fused attention operation cannot be exported
        try:
            # The exporter warns of all that becomes constant, and prints its graph when it fails.
            with torch.inference_mode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    _Written(self._module, self._vectors).eval(),  # or the exporter leaves the network in training mode
                    (two,),
                    file,  # type: ignore[arg-type]  # a file object is accepted
                    dynamo=False,
                    input_names=["pixels"],
                    dynamic_axes={"pixels": {0: "n"}},
                    opset_version=opset,
                )
        except (RuntimeError, ValueError, TypeError) as error:  # the exporter's own errors are RuntimeErrors
            raise BackboneError(f"torch cannot write the network as ONNX ({first_line(error)})") from None
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return file.getvalue()


class _Written(nn.Module):
    """The computation from pixels to vectors as a module, as the exporter requires."""

    def __init__(self, network: nn.Module, vectors: TorchForward) -> None:
        super().__init__()
        self.network = network  # registered, so that its weights get names
        self._vectors = vectors

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the vectors, float32 of shape (n, dim) each, of pixels, float32 of shape (n, 3, height, width)."""
        return self._vectors(pixels.permute(0, 2, 3, 1))


def _spec(network: Network, row: graphs.EmbeddingRow, dim: int, arithmetic: Arithmetic) -> EmbeddingSpec:
    view = network.preprocessing.view.split()[:1]
    same = ("architecture", "arguments", "weights", "weights_digest", "untrained", "trained_on", "code", "license")
    return EmbeddingSpec(
        name=embedding_name(network.name, network.weights, *row.words, *view),
        kind=VIEW if view else "backbone",
        library=family_of(network.architecture).library,
        layer=row.node,
        pooling=row.pooling,
        dim=dim,
        preprocessing=json.loads(canonical_json(network.preprocessing.identity())),
        precision=arithmetic.precision,
        engine=arithmetic.engine,
        **{name: getattr(network, name) for name in same},
    )


def load(config: BackboneConfig, extraction: ExtractionConfig, seed: int, images: int = 0) -> Backbone:
    """Build the backbone of a config; `seed` is for untrained weights, and `engine: auto` depends on the number of `images`."""
    device = resolve_device(extraction.device)
    network = load_network(config, seed)
    view = "" if config.view is None else config.view if config.view == "flip" else f"{config.view} {seed}"
    network = replace(network, preprocessing=replace(network.preprocessing, decode=extraction.decode, view=view))
    own = family_of(network.architecture).auto_precision if extraction.precision == "auto" else ""
    dtype, precision, reason = resolve_precision(own or extraction.precision, device)
    reason = f"the one for {network.name}, whose vectors bf16 may change" if own else reason
    if device.type == "cuda" and precision == "fp32":
        # cuDNN would round to 10 bits (TF32), and fp32 must mean the same on every device.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    engine, why = choose_engine(
        extraction.engine,
        device.type,
        precision,
        images=images,
        layer_norms=any(isinstance(part, nn.LayerNorm) for part in network.module.modules()),
        installed=openvino_is_installed(),
    )
    arithmetic = Arithmetic(device, dtype, precision, engine)
    try:
        backbone = Backbone(network, config, arithmetic)
    except RuntimeError as error:
        if engine != "openvino" or is_out_of_memory(error):
            raise
        why = f"OpenVINO cannot run {network.name} ({first_line(error)})"
        if extraction.engine == "openvino":
            raise BackboneError(f"{why}; set extraction.engine: torch") from None
        engine = "torch"
        backbone = Backbone(network, config, replace(arithmetic, engine=engine))
    name = backbone.specs[0].name
    logger.info("%s on %s in %s: %s; by %s: %s", name, device, precision, reason, engine, why)
    return backbone


def layers(name: str) -> list[tuple[str, tuple[int, ...], str]]:
    """List the nodes of a network, the bundled one, or a described weights file: name, shape for one image, model-independent name."""
    config = BackboneConfig(name=name, weights="random")  # avoids a download
    if name.endswith(WEIGHTS_FILES):
        config = BackboneConfig(name=Path(name).stem, weights=name)
    elif name not in network_names() and name == bundled()["name"]:
        config = BackboneConfig(name=name, weights="bundled")
    network = load_network(config, seed=0)
    graph, size = graphs.trace(network.module), network.preprocessing.size
    called = {node: stage for stage, node in graphs.stage_ends(network.module, graph, size).items()}
    called |= {graphs.resolve(graph, [graphs.PENULTIMATE])[0]: graphs.PENULTIMATE}
    return [(node, shape, called.get(node, "")) for node, shape in graphs.shapes(graph, size)]
