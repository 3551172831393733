"""A thin builder over onnx_ir: nodes, shared initializers written tensor by tensor, constants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

MICROSOFT = "com.microsoft"

_IR_TYPES = {
    torch.float64: ir.DataType.DOUBLE,
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8,
    torch.int8: ir.DataType.INT8,
    torch.int64: ir.DataType.INT64,
}
_NARROW_TYPES = {torch.int8: ir.DataType.INT4, torch.uint8: ir.DataType.UINT4}


def to_ir(tensor: Tensor, name: str, narrow: bool = False) -> ir.Tensor:
    """A torch tensor as an onnx_ir tensor; bfloat16 travels as its 16 bits; narrow: bytes as 4 bits each."""
    tensor = tensor.detach().contiguous()
    if narrow:
        array = tensor.numpy().astype(_NARROW_TYPES[tensor.dtype].numpy())
    elif tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.uint16).numpy().view(ir.DataType.BFLOAT16.numpy())
    else:
        array = tensor.numpy()
    return ir.Tensor(array, name=name)


class GraphBuilder:
    """Adds nodes at a place in a graph; equal constants and initializers of one name are made once."""

    def __init__(self, graph: ir.Graph, prefix: str = "") -> None:
        self.graph = graph
        self.nodes: list[ir.Node] = []
        self.prefix = prefix
        self._count = 0
        self.shared: dict[Any, ir.Value] = {}

    def at(self, prefix: str) -> GraphBuilder:
        """A builder for another place that shares constants."""
        other = GraphBuilder(self.graph, prefix)
        other.shared = self.shared
        return other

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
    ) -> ir.Value:
        """Add a node and give its (first) output."""
        self._count += 1
        name = f"{self.prefix}/{op}_{self._count}"
        node = ir.node(op, inputs, attributes or {}, domain=domain, num_outputs=outputs, name=name)
        for place, value in enumerate(node.outputs):
            value.name = f"{name}:{place}"
            if dtype is not None:
                value.type = ir.TensorType(dtype)
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A small constant as an initializer, shared among equal ones."""
        array = np.asarray(value, dtype=dtype)
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self.shared:
            number = len(self.shared)
            while f"constant_{number}" in self.graph.initializers:  # of a builder that was here before
                number += 1
            name = f"constant_{number}"
            self.shared[key] = self._register(name, ir.Tensor(array, name=name))
        return self.shared[key]

    def initializer(
        self, name: str, make: Callable[[], Tensor], dtype: torch.dtype, shape: Sequence[int], narrow: bool = False
    ) -> ir.Value:
        """See `lazy`. narrow: int8 or uint8 in 4 bits each."""
        kind = (_NARROW_TYPES if narrow else _IR_TYPES)[dtype]
        return self.lazy(name, lambda: to_ir(make(), name, narrow), kind, shape)

    def typed(self, name: str, make: Callable[[], Tensor], dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """A stored tensor of a type that torch may not have (INT4, FLOAT8E4M3FN, FLOAT4E2M1): `make` gives its values,
        each of which the type holds."""

        def write() -> ir.Tensor:
            return ir.Tensor(make().detach().contiguous().numpy().astype(dtype.numpy()), dtype=dtype, name=name)

        return self.lazy(name, write, dtype, shape)

    def lazy(self, name: str, make: Callable[[], ir.Tensor], dtype: ir.DataType, shape: Iterable[Any]) -> ir.Value:
        """A stored tensor that is made when it is written, one at a time; the first of its name."""
        key = ("initializer", name)
        if key not in self.shared:
            tensor = ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(list(shape)), name=name, cache=False)
            self.shared[key] = self._register(name, tensor)
        return self.shared[key]

    def float_initializer(
        self, name: str, make: Callable[[], Tensor], dtype: torch.dtype, shape: Sequence[int]
    ) -> ir.Value:
        """The same, computed with as float32: half-precision storage is cast when the runtime loads the graph."""
        stored = self.initializer(name, make, dtype, shape)
        if dtype == torch.float32:
            return stored
        key = ("cast", name)
        if key not in self.shared:
            # at the head of the graph, so that every user comes after it
            cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value}, name=f"{name}/Cast")
            cast.outputs[0].name = f"{name}/float"
            cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            cast.outputs[0].shape = ir.Shape(list(shape))
            first = next(iter(self.graph), None)
            if first is None:
                self.graph.append(cast)
            else:
                self.graph.insert_before(first, cast)
            self.shared[key] = cast.outputs[0]
        return self.shared[key]

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value
