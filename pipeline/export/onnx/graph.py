"""Graph: the nodes and constants of an ONNX model that is being written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, compose, helper, numpy_helper

OPSET = 18
"""That torch's exporter of traces and skl2onnx both write, and older onnxruntimes read."""
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
    """Called with an operator, its inputs and attributes it adds a node, and returns the name of its output."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    parts: int = 0

    def __call__(self, operator: str, *inputs: Any, outputs: int = 1, named: str = "", **attributes: Any) -> Any:
        """Add a node; an input is the name of another's output, '' for one left out, or the value of a constant.

        Returns the name of the output, `named` where that is given; of several outputs a list.
        """
        names = [named or f"{operator}.{len(self.nodes)}" + f".{place}" * (place > 0) for place in range(outputs)]
        given = [each if isinstance(each, str) else self.constant(np.asarray(each)) for each in inputs]
        self.nodes.append(helper.make_node(operator, given, names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: NDArray[Any]) -> str:
        """Add a constant; of float64 in float32 where that is exact, as training images are, which halves a file.

        value : an array of any shape; float64, float32, int64, bool or str
        """
        name = f"constant.{len(self.constants)}"
        short = value.astype(np.float32) if value.dtype == np.float64 and value.size > 1 else value
        exact = short is not value and bool((short == value).all())
        kept = short if exact else value.astype(object) if value.dtype.kind == "U" else value
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(kept).reshape(kept.shape), name))
        return str(self("Cast", name, to=DOUBLE)) if exact else name

    def add(self, model: onnx.ModelProto, given: str) -> list[str]:
        """Add a model whose one input is to be `given`; return the names of its outputs."""
        self.parts += 1
        prefixed = compose.add_prefix(model, f"part{self.parts}.").graph
        self.nodes.append(helper.make_node("Identity", [given], [prefixed.input[0].name]))
        self.nodes += prefixed.node
        self.constants += prefixed.initializer
        return [output.name for output in prefixed.output]

    def model(self, given: Mapping[str, Any], made: Mapping[str, Any]) -> onnx.ModelProto:
        """Return the model from some names to others, each with (type of elements, shape): only the nodes on that way."""
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
