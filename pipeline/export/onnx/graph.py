"""Graph: builder of an ONNX model; and resize and crop as ONNX nodes, bit-identical to `images.prepare`.

ONNX's own Resize rounds differently: even in two passes it is one grey level off in up to 1 % of the pixels, which on photos of
clothes changed probabilities by up to 0.04. So images are resized here as by Pillow and torch: with integer weights that sum to a
power of two, width before height, with rounding in between. All sums are exact in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

from pipeline.errors import BundleError
from pipeline.images import Preprocessing

OPSET = 18
"""A version that torch's tracing exporter and skl2onnx both write, and older onnxruntimes read."""
OPSETS = {"": OPSET, "ai.onnx.ml": 3}
FLOAT, DOUBLE, INT64, UINT8, STRING = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT64,
    TensorProto.UINT8,
    TensorProto.STRING,
)


@dataclass
class Graph:
    """Builder of an ONNX model: a call with an operator, its inputs and attributes adds a node and returns its output's name."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def __call__(self, operator: str, *inputs: Any, outputs: int = 1, named: str = "", **attributes: Any) -> Any:
        """Add a node; return the name of its output, or a list of names. An input is a name, '' if omitted, or a constant's value."""
        names = [named or f"{operator}.{len(self.nodes)}" + f".{place}" * (place > 0) for place in range(outputs)]
        given = [each if isinstance(each, str) else self.constant(np.asarray(each)) for each in inputs]
        self.nodes.append(helper.make_node(operator, given, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant; float64 is stored as float32 if that is exact, as for vectors of training images, which halves the file.

        value : an array of any shape; float64, float32, int64, bool or str
        """
        name = f"constant.{len(self.constants)}"
        short = value.astype(np.float32) if value.dtype == np.float64 and value.size > 1 else value
        exact = short is not value and bool((short == value).all())
        kept = short if exact else value.astype(object) if value.dtype.kind == "U" else value
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(kept).reshape(kept.shape), name))
        return self.double(name) if exact else name

    def double(self, name: str) -> str:
        """Add a cast to float64."""
        return str(self("Cast", name, to=DOUBLE))

    def add(self, model: onnx.ModelProto, given: str) -> list[str]:
        """Add a model with its only input connected to `given`; return the names of its outputs."""
        prefixed = compose.add_prefix(model, f"part{len(self.nodes)}.").graph
        self.nodes.append(helper.make_node("Identity", [given], [prefixed.input[0].name]))
        self.nodes += prefixed.node
        self.constants += prefixed.initializer
        return [output.name for output in prefixed.output]

    def model(self, given: Mapping[str, Any], made: Mapping[str, Any]) -> onnx.ModelProto:
        """Return the model with inputs `given` and outputs `made`, name -> (element type, shape), and only the nodes it needs."""
        needed, nodes = {*made}, list[onnx.NodeProto]()
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.output):
                nodes.insert(0, node)
                inner = [name for attribute in node.attribute for each in attribute.g.node for name in each.input]
                needed |= {*node.input, *inner} - {*given}
        inputs, outputs = (
            [helper.make_tensor_value_info(name, *about) for name, about in ends.items()] for ends in (given, made)
        )
        constants = [constant for constant in self.constants if constant.name in needed]
        graph = helper.make_graph(nodes, "manyheads", inputs, outputs, constants)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="manyheads")


BLOCK = 32
"""Number of output pixels of a row that are computed together, from the input pixels that any of them needs."""
PILLOWS_BITS, TORCHS_BITS = 22, 15
"""Bits of a weight: Pillow's unit is 2 to the -22; torch's is the smallest power of two for which its largest weight has 15 bits."""
ENDS = 4
"""Number of pixels at a row's start that are considered for the largest weight, besides those that the crop keeps."""


def _bilinear(g: Graph, at: str) -> str:
    return str(g("Max", g("Sub", 1.0, at), 0.0))


def _bicubic(g: Graph, at: str) -> str:
    """The bicubic filter of Pillow and torch, with a = -0.5."""
    near = g("Add", g("Mul", g("Mul", g("Sub", g("Mul", 1.5, at), 2.5), at), at), 1.0)
    far = g("Mul", g("Sub", g("Mul", g("Add", g("Mul", g("Sub", at, 5.0), at), 8.0), at), 4.0), -0.5)
    return str(g("Where", g("Less", at, 1.0), near, g("Where", g("Less", at, 2.0), far, 0.0)))


_FILTERS: Mapping[str, tuple[float, Callable[[Graph, str], str]]] = {
    "bilinear": (1.0, _bilinear),
    "bicubic": (2.0, _bicubic),
}
"""Name -> the filter's radius, and its weight at a distance."""


def add_prepared(g: Graph, images: str, preprocessing: Preprocessing) -> str:
    """Add `prepare` for images, uint8 (n, height, width, 3); its output is 0 to 255, float32 (n, 3, *size). BundleError if unsupported."""
    if preprocessing.interpolation not in _FILTERS or preprocessing.fit == "border":
        way = f"{preprocessing.interpolation} with fit {preprocessing.fit}"
        raise BundleError(f"export to ONNX supports resizing by {' and '.join(_FILTERS)} without border, not by {way}")
    sides = g("Slice", g("Shape", images), [1], [3])
    resized = _resized(g, sides, preprocessing)
    crop = np.array(preprocessing.size)
    half = g("Div", g.double(g("Sub", resized, crop)), 2.0)
    start = g("Max", g("Cast", g("Round", half), to=INT64), np.array(0))
    kept = g("Min", resized, crop)
    pixels = g("Transpose", images, perm=[0, 3, 1, 2])
    for side in (1, 0):
        had, made, first, count = (g("Gather", each, np.array(side)) for each in (sides, resized, start, kept))
        pixels = _pass(g, pixels, preprocessing, had, made, g("Range", first, g("Add", first, count), np.array(1)))
        pixels = g("Transpose", pixels, perm=[0, 1, 3, 2])
    # Sides that are shorter than the crop are padded with black.
    missing = g("Sub", crop, kept)
    before = g("Div", missing, np.array(2))
    none = np.array([0, 0])  # pads for all axes, as onnxruntime confuses a subset of axes when it moves a Transpose
    pads = g("Concat", none, before, none, g("Sub", missing, before), axis=0)
    return str(g("Pad", g("Cast", pixels, to=FLOAT), pads, np.float32(0)))


def _resized(g: Graph, sides: str, preprocessing: Preprocessing) -> str:
    """Return height and width after the resize, int64 of shape (2,), as in `images.preparing`."""
    resize = preprocessing.resize
    if not isinstance(resize, int) or preprocessing.fit == "squash":
        return g.constant(np.array([resize, resize] if isinstance(resize, int) else resize))
    return str(g("Div", g("Mul", sides, np.array(resize)), g("ReduceMin", sides, keepdims=0)))


def _pass(g: Graph, pixels: str, preprocessing: Preprocessing, had: str, made: str, places: str) -> str:
    """Resize rows from `had` to `made` pixels and keep those at `places`: (n, 3, rows, had) to (n, 3, rows, places)."""
    weights, one, first, last = _weights(g, preprocessing, had, made, places)
    end = g("Sub", g("Shape", places), np.array(1))
    parts = []
    for place in range(0, max(preprocessing.size), BLOCK):
        low = g("Gather", first, g("Min", np.array([place]), end))
        high = g("Gather", last, g("Min", np.array([place + BLOCK - 1]), end))
        own = g("Slice", g("Slice", weights, [place], [place + BLOCK], [0]), low, high, [1])
        parts.append(g("MatMul", g.double(g("Slice", pixels, low, high, [3])), g("Transpose", own, perm=[1, 0])))
    sums = g("Concat", *parts, axis=3)
    return str(g("Clip", g("Floor", g("Div", g("Add", sums, g("Div", one, 2.0)), one)), 0.0, 255.0))


def _weights(g: Graph, preprocessing: Preprocessing, had: str, made: str, places: str) -> tuple[str, str, str, str]:
    """Return the integer weights of input pixels for each output pixel, shape (places, had), and their sum; and the first and last
    input pixel of each, shape (places,)."""
    reach, weigh = _FILTERS[preprocessing.interpolation]
    scale = g("Div", g.double(had), g.double(made))
    wide = g("Max", scale, 1.0)
    seen = g("Concat", g("Range", np.array(0), g("Min", made, np.array(ENDS)), np.array(1)), places, axis=0)
    centres = g("Mul", g("Add", g.double(seen), 0.5), scale)
    away = g("Sub", g.double(g("Range", np.array(0), had, np.array(1))), g("Unsqueeze", centres, [1]))
    weights = weigh(g, g("Abs", g("Mul", g("Add", away, 0.5), g("Div", 1.0, wide))))
    weights = g("Div", weights, g("ReduceSum", weights, [1]))
    one = g.constant(np.array(2.0**PILLOWS_BITS))
    if preprocessing.decode != "exact":
        most = g("Div", 2.0**TORCHS_BITS - 0.5, g("ReduceMax", weights, keepdims=0))
        one = g("Pow", 2.0, g("Min", g("Floor", g("Div", g("Log", most), log(2))), float(PILLOWS_BITS)))
    whole = g("Mul", g("Sign", weights), g("Floor", g("Add", g("Mul", g("Abs", weights), one), 0.5)))
    asked = g("Sub", g("Shape", seen), g("Shape", places))
    whole, centres = (g("Slice", each, asked, [2**31 - 1], [0]) for each in (whole, centres))
    far = g("Mul", reach, wide)
    first = g("Max", g("Cast", g("Floor", g("Sub", centres, far)), to=INT64), np.array(0))
    return whole, one, first, g("Cast", g("Ceil", g("Add", centres, far)), to=INT64)
