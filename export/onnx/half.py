"""Half precision for GPUs: a lowered float32 graph whose products, attention and cache become float16.

What may overflow float16 or lose positions in it stays float32: the residual stream, norms, softmax and its masks,
the angles of rotary embeddings, the routing of experts. Ids, images, hidden states and logits go in and out as before;
the cache goes in and out in float16, as onnxruntime-genai's CUDA graphs have it.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from compress.errors import UnsupportedError
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.runtime import WIDE
from compress.hwprofiles import Runtime
from compress.records import Bounds
from compress.target import Refusal

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
TYPES = ("float32", "float16")
"""What this target computes in, as profiles name it."""
# float16's own rounding, which later blocks amplify, as in export/tensorrt/rules.py.
BOUNDS = Bounds(shipped=0.05, exact=0.05)

STANDARD = frozenset({"MatMul", "Gemm", "Conv"})
CONTRIBUTED = frozenset({"GroupQueryAttention", "RotaryEmbedding"})
"""Beside those that lowerings write (`Lowering.half`)."""
TABLE = "table"
"""Among the `meta` of a Gather whose rows are looked up in a layer's weight, which stays float16 in memory too."""
FOLLOWING = frozenset(
    {
        *("Reshape", "Transpose", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Expand", "Identity", "Flatten"),
        *("Add", "Mul", "Neg", "Sigmoid", "Tanh", "Relu", "Gelu", "LeakyRelu", "Clip", "HardSigmoid", "HardSwish"),
        *("MaxPool", "AveragePool", "Pad"),
    }
)
"""Taken along where all that they compute with is float16 already: what acts on one product before the next."""
INDIFFERENT = frozenset({"Shape", "Size", "Cast"})
"""They read any type and put out what does not depend on it."""
CACHE = "past_key_values."


def wanted(runtime: Runtime) -> bool:
    """Whether a profile's runtime computes in float16."""
    return runtime.float_dtype == "float16"


def problem(runtime: Runtime) -> Refusal | None:
    """What is wrong with the type that a profile's runtime computes in, if anything."""
    if runtime.float_dtype in TYPES:
        return None
    return Refusal(
        f"the profile computes in {runtime.float_dtype}; the onnx target computes in {' or '.join(TYPES)}: "
        "ONNX Runtime has few kernels for others on the CPU, where graphs are checked"
    )


def obstacle(document: ir.Model) -> str:
    """Why a lowered graph cannot be turned; empty where it can. Those that were given as ONNX may be of any form."""
    for node in document.graph:
        kinds = {attribute.type for attribute in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            return f"{node.op_type} {node.name} holds a graph of its own"
        if any(output.dtype is None for output in node.outputs if output.name):
            return f"the type of what {node.op_type} {node.name} puts out is not known"
    return ""


def halve(document: ir.Model, contributed: Collection[str]) -> None:
    """In place, or why not among the document's properties (`WIDE`), which a session tells.

    contributed: operators of com.microsoft that lowerings wrote and that compute in float16.
    Raises: UnsupportedError, when it is written, for a weight beyond float16's range.
    """
    reason = obstacle(document)
    if reason:
        document.metadata_props[WIDE] = reason
        return
    _Halving(document.graph, contributed).run()
    RemoveUnusedNodesPass()(document)


class _Halving:
    """One walk over the nodes in their order; each value has one true type, and casts that are made once."""

    def __init__(self, graph: ir.Graph, contributed: Collection[str]) -> None:
        self.graph, self.contributed = graph, CONTRIBUTED | set(contributed)
        self.fixed: set[ir.Value] = set(graph.initializers.values())
        self.known: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for value in self.graph.inputs:
            if str(value.name).startswith(CACHE):
                value.type = ir.TensorType(HALF)
        for node in list(self.graph):
            inputs = [value for value in node.inputs if value is not None]
            if all(value in self.fixed for value in inputs):
                self.fixed.update(node.outputs)
            elif self._is_product(node) or self._follows(node, inputs):
                self._turn(node)
            elif node.op_type not in INDIFFERENT or node.domain:
                self._read(node, HALF, FLOAT)
        self._close()

    def _is_product(self, node: ir.Node) -> bool:
        """Whether a node computes in float16 whatever is in front of it."""
        if node.domain == MICROSOFT:
            return node.op_type in self.contributed
        if node.domain:
            return False
        if any(value is not None and str(value.name).startswith(CACHE) for value in node.inputs):
            return True
        if node.op_type == "Gather":
            return TABLE in node.meta and _source(node.inputs[0]) is not None
        return node.op_type in STANDARD and any(value is not None and _is_float(value) for value in node.inputs)

    def _follows(self, node: ir.Node, inputs: list[ir.Value]) -> bool:
        """Whether all floats that change from call to call are float16. The sum of two such, a residual, is none."""
        moving = [value for value in inputs if value not in self.fixed and _is_float(value)]
        if node.domain or node.op_type not in FOLLOWING or (node.op_type == "Add" and len(moving) > 1):
            return False
        return bool(moving) and all(value.dtype is HALF for value in moving)

    def _turn(self, node: ir.Node) -> None:
        self._read(node, FLOAT, HALF)
        for value in node.outputs:
            if value.dtype is FLOAT:
                value.type = ir.TensorType(HALF)

    def _read(self, node: ir.Node, have: ir.DataType, want: ir.DataType) -> None:
        """Let a node read the inputs of one type as the other."""
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype is have:
                node.replace_input_with(place, self._as(value, want, node))

    def _as(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        key = (value, kind)
        if key not in self.known:
            stored = _source(value) if kind is HALF else None
            if stored is not None:
                self.known[key] = stored if stored.dtype is HALF else self._stored(stored)
            elif kind is HALF and value in self.fixed and _turns(value.producer()):
                self.known[key] = self._turned(value)
            else:
                self.known[key] = self._cast(value, kind, reader)
        return self.known[key]

    def _stored(self, value: ir.Value) -> ir.Value:
        """A stored tensor in float16."""
        tensor, name = value.const_value, f"{value.name}/float16"
        assert tensor is not None
        made = GraphBuilder(self.graph).lazy(name, lambda: _narrowed(tensor, name), HALF, tensor.shape)
        self.fixed.add(made)
        return made

    def _turned(self, value: ir.Value) -> ir.Value:
        """What turns a stored tensor, again, for its float16 form: a head that reads the rows of an embedding."""
        old = value.producer()
        assert old is not None and old.inputs[0] is not None
        first = self._as(old.inputs[0], HALF, old)
        node = ir.node(old.op_type, [first, *old.inputs[1:]], dict(old.attributes), name=f"{old.name}/half")
        made = node.outputs[0]
        made.name, made.type, made.shape = f"{value.name}/half", ir.TensorType(HALF), value.shape
        self.graph.insert_after(old, node)
        self.fixed.add(made)
        return made

    def _cast(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        """A cast right behind a value's producer; of an input, in front of its first reader."""
        name = f"{value.name}/{kind.name.lower()}"
        node, producer = ir.node("Cast", [value], {"to": kind.value}, name=f"{name}/Cast"), value.producer()
        made = node.outputs[0]
        made.name, made.type, made.shape = name, ir.TensorType(kind), value.shape
        if producer is None:
            self.graph.insert_before(reader, node)
        else:
            self.graph.insert_after(producer, node)
        if value in self.fixed:
            self.fixed.add(made)
        return made

    def _close(self) -> None:
        """The graph's outputs: the cache in float16, all else in float32, under the names that they had."""
        last = self.graph[-1]
        for place, value in enumerate(self.graph.outputs):
            kind = HALF if str(value.name).startswith("present.") else FLOAT
            if not _is_float(value) or value.dtype is kind:
                continue
            name = value.name
            other = self._cast(value, kind, last)
            value.name = f"{name}/{'float' if kind is HALF else 'half'}"
            other.name = name
            self.graph.outputs[place] = other


def _turns(node: ir.Node | None) -> bool:
    """Whether a node only moves numbers about."""
    return node is not None and not node.domain and node.op_type in ("Transpose", "Reshape")


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (FLOAT, HALF)


def _source(value: ir.Value | None) -> ir.Value | None:
    """The stored tensor that a value is, or is cast from."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Cast" and not producer.domain:
        value = producer.inputs[0]
    return value if value is not None and value.const_value is not None and value.is_initializer() else None


def _narrowed(tensor: ir.TensorProtocol, name: str) -> ir.Tensor:
    """Raises: UnsupportedError for numbers beyond float16's range, which infinity would stand for."""
    values = np.asarray(tensor.numpy()).astype(np.float32)
    most = float(np.abs(values).max(initial=0.0))
    if most > float(np.finfo(np.float16).max):
        raise UnsupportedError(
            f"{name.removesuffix('/float16')} holds {most:g}, beyond float16's 65504. Export with a profile of your "
            "own whose runtime says float_dtype: float32."
        )
    return ir.Tensor(values.astype(np.float16), dtype=HALF, name=name)
