"""Keys or values of one layer that a growing cache holds in whole numbers: how a graph makes, stores and reads them.

Codes are int8 (those of the format less 128), or of 4 bits, two to a uint8, the even channel in the low half. Scales
come with each vector (or with each run of its channels), as float16 that the cache holds beside the codes; or they were
fixed by data (compress/kv/static.py), and stand in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, float32, from_numpy

from compress.errors import UnsupportedError
from compress.export.onnx.graph import GraphBuilder
from compress.formats.base import Format
from compress.formats.int_grid import IntGrid
from compress.kv.spec import KvSpec, row_format
from compress.kv.static import static_format

FLOAT, HALF, INT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64
BITS = (8, 4)
NAME = "cache."
"""How the names of fixed scales begin in a graph; the layer and `key_scale` or `value_scale` follow."""
Part = Literal["key", "value"]
PARTS: tuple[Part, ...] = ("key", "value")
END = 2**63 - 1
TINY = float(np.finfo(np.float16).tiny)
"""The smallest scale, as the formats have it (compress/maths/grid.py)."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """Of vectors of `size` numbers. bits: 8 or 4; runs: scales of a vector; fixed: (kv heads or 1, size or 1) float32
    where data gave them, then no vector has its own; name: of these in a graph."""

    bits: int
    size: int
    runs: int
    fixed: Floats | None = None
    name: str = ""

    @property
    def dtype(self) -> ir.DataType:
        """Of the tensor that is held."""
        return ir.DataType.INT8 if self.bits == 8 else ir.DataType.UINT8

    @property
    def width(self) -> int:
        """Its last axis."""
        return self.size * self.bits // 8

    @cached_property
    def channels(self) -> list[int]:
        """The channels as they are read: of 4 bits, those in low halves come first."""
        return list(range(self.size)) if self.bits == 8 else [*range(0, self.size, 2), *range(1, self.size, 2)]

    @property
    def scales(self) -> Floats:
        """Fixed scales as they multiply (batch, kv heads, n, size): (1, kv heads or 1, 1, size or 1)."""
        assert self.fixed is not None
        return self.fixed[None, :, None]

    def scale(self, graph: GraphBuilder) -> ir.Value:
        """Fixed scales in a graph."""
        return graph.initializer(self.name, lambda: from_numpy(self.scales), float32, self.scales.shape)

    def encode(self, graph: GraphBuilder, states: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """(batch, kv heads, n, size) float32 → codes (batch, kv heads, n, width), scales (batch, kv heads, n, runs)
        float16 or None."""
        number, middle = _numbers(graph), float(2 ** (self.bits - 1))
        if self.fixed is not None:
            steps = graph.node("Div", [states, self.scale(graph)])
            whole = graph.node("Clip", [graph.node("Round", [steps]), number(-middle), number(middle - 1)])
            return self._packed(graph, whole), None
        split = graph.node("Reshape", [states, graph.constant([0, 0, 0, self.runs, self.size // self.runs])])
        codes, scale = rounded(graph, split, 4, self.bits)
        codes = graph.node("Reshape", [codes, graph.constant([0, 0, 0, self.size])])
        whole = graph.node("Sub", [codes, number(middle)])
        return self._packed(graph, whole), graph.node("Squeeze", [scale, graph.constant([4])], dtype=HALF)

    def _packed(self, graph: GraphBuilder, whole: ir.Value) -> ir.Value:
        """Whole numbers around 0 as they are held."""
        if self.bits == 4:
            number = _numbers(graph)
            low, high = (_every_second(graph, whole, first) for first in (0, 1))
            both = graph.node("Add", [low, graph.node("Mul", [high, number(16.0)])])
            whole = graph.node("Add", [both, number(8.0 * 17)])
        return graph.node("Cast", [whole], {"to": self.dtype.value}, dtype=self.dtype)

    def products(self, graph: GraphBuilder, queries: ir.Value, held: ir.Value, scale: ir.Value | None) -> ir.Value:
        """Queries (batch, kv heads, rows, size) times the keys that are held: (batch, kv heads, rows, past). Scales go
        to what is smaller than the keys."""
        if self.fixed is not None:
            queries = graph.node("Mul", [queries, self.scale(graph)])
        if self.bits == 4:
            queries = graph.node("Gather", [queries, graph.constant(self.channels)], {"axis": 3})
        keys = graph.node("Transpose", [self._floats(graph, held, scale)], {"perm": [0, 1, 3, 2]})
        found = graph.node("MatMul", [queries, keys])
        return graph.node("Mul", [found, _row(graph, scale)]) if self.runs == 1 and scale is not None else found

    def sums(self, graph: GraphBuilder, weights: ir.Value, held: ir.Value, scale: ir.Value | None) -> ir.Value:
        """Weights (batch, kv heads, rows, past) times the values that are held: (batch, kv heads, rows, size)."""
        if self.runs == 1 and scale is not None:
            weights = graph.node("Mul", [weights, _row(graph, scale)])
        found = graph.node("MatMul", [weights, self._floats(graph, held, scale)])
        if self.bits == 4:
            back = np.argsort(self.channels).tolist()
            found = graph.node("Gather", [found, graph.constant(back)], {"axis": 3})
        return found if self.fixed is None else graph.node("Mul", [found, self.scale(graph)])

    def _floats(self, graph: GraphBuilder, held: ir.Value, scale: ir.Value | None) -> ir.Value:
        """What is held as numbers, its channels in the order of `channels`; with their scales where a vector has
        several."""
        if self.bits == 8:
            found = graph.node("Cast", [held], {"to": FLOAT.value})
        else:
            kind = ir.DataType.UINT8
            low = graph.node("BitwiseAnd", [held, graph.constant(15, np.uint8)], dtype=kind)
            high = graph.node("BitShift", [held, graph.constant(4, np.uint8)], {"direction": "RIGHT"}, dtype=kind)
            both = graph.node("Concat", [low, high], {"axis": 3}, dtype=kind)
            found = graph.node("Sub", [graph.node("Cast", [both], {"to": FLOAT.value}), _numbers(graph)(8.0)])
        if self.runs == 1 or scale is None:
            return found
        halves = 8 // self.bits
        shape = [0, 0, 0, halves, self.runs, self.size // self.runs // halves]
        wide = graph.node("Cast", [scale], {"to": FLOAT.value})
        wide = graph.node("Unsqueeze", [wide, graph.constant([3, 5])])
        found = graph.node("Mul", [graph.node("Reshape", [found, graph.constant(shape)]), wide])
        return graph.node("Reshape", [found, graph.constant([0, 0, 0, self.size])])

    def decoded(self, held: NDArray[np.integer], scale: NDArray[np.float16] | None) -> Floats:
        """What a tensor of codes stands for: (batch, kv heads, n, size) float32. A twin of what the graph reads."""
        return np.asarray(self.steps(held) * self.spread(scale), np.float32)

    def steps(self, held: NDArray[np.integer]) -> Floats:
        """The whole numbers of codes (batch, kv heads, n, width): (batch, kv heads, n, size)."""
        if self.bits == 8:
            return held.astype(np.float32)
        return np.stack([held & 15, held >> 4], -1).reshape(*held.shape[:-1], self.size).astype(np.float32) - 8

    def spread(self, scale: NDArray[np.float16] | None) -> Floats:
        """The scale of each number; scale: (batch, kv heads, n, runs), where each vector has its own."""
        if self.fixed is not None:
            return self.scales
        assert scale is not None
        return np.repeat(scale.astype(np.float32), self.size // self.runs, -1)


def of_layer(spec: KvSpec, tensors: Mapping[str, Tensor], size: int, layer: int) -> dict[str, Codes]:
    """By `key` and `value`, what a layer's cache holds in codes. size: of a head. Raises: UnsupportedError."""
    fixed = {part: (tensors[name], f"{NAME}{layer}.{name}") for part in PARTS if (name := f"{part}_scale") in tensors}
    return {part: _codes(spec, part, size, fixed.get(part)) for part in PARTS if text_of(spec, part)}


def _codes(spec: KvSpec, part: Part, size: int, fixed: tuple[Tensor, str] | None) -> Codes:
    """fixed: scales and their name in a graph."""
    form = require_whole_bytes(spec, part, size)
    if fixed is not None:
        return Codes(form.bits, size, 0, fixed[0].float().numpy(), fixed[1])
    return Codes(form.bits, size, size // (form.group if isinstance(form.group, int) else size))


def require_whole_bytes(spec: KvSpec, part: Part, size: int) -> IntGrid:
    """The format of keys or values. size: of a head. Raises: UnsupportedError where its runs leave bytes half full."""
    form = _form(spec, part)
    assert isinstance(form, IntGrid)
    run = form.group if isinstance(form.group, int) else size
    if size % run or run % (8 // form.bits):
        raise UnsupportedError(
            f"{text_of(spec, part)}: the vectors of this model's cache have {size} channels, which runs of {run} do "
            "not divide into whole bytes. Give a group that divides them, or 8 bits where their number is odd."
        )
    return form


def graph_bytes(spec: KvSpec, size: int) -> int:
    """About what the nodes of a layer's codes take in a graph, fitted on Llamas of 2 and 4 blocks. size: of a head.
    Raises: as `require_whole_bytes`."""
    bits = {part: require_whole_bytes(spec, part, size).bits for part in PARTS if text_of(spec, part)}
    own = sum(not spec.static_part(part) for part in bits)
    return 2_300 * len(bits) + 2_900 * own + 2_300 * list(bits.values()).count(4)


def text_of(spec: KvSpec, part: Part) -> str:
    """The format of keys or of values, empty for float."""
    return spec.keys if part == "key" else spec.values


def _form(spec: KvSpec, part: Part) -> Format:
    text = text_of(spec, part)
    return static_format(text) if spec.static_part(part) else row_format(text)


def reason(spec: KvSpec) -> str:
    """Why keys or values of a layer are not held in codes by a graph; empty where they are, or are floats."""
    if spec.rotated:
        return "a rotated cache is turned as it is read, which a graph does not do"
    for part in filter(partial(text_of, spec), PARTS):
        form = _form(spec, part)
        if not isinstance(form, IntGrid) or form.bits not in BITS or form.scheme != "symmetric":
            return f"{text_of(spec, part)} is not stored by a graph, which has float, int8 and int4 of symmetric codes"
    return ""


def _every_second(graph: GraphBuilder, values: ir.Value, first: int) -> ir.Value:
    bounds = [graph.constant([each]) for each in (first, END, 3, 2)]
    return graph.node("Slice", [values, *bounds])


def _row(graph: GraphBuilder, scale: ir.Value) -> ir.Value:
    """(batch, kv heads, past, 1) float16 → (batch, kv heads, 1, past) float32."""
    turned = graph.node("Transpose", [scale], {"perm": [0, 1, 3, 2]}, dtype=HALF)
    return graph.node("Cast", [turned], {"to": FLOAT.value})


def rounded(graph: GraphBuilder, states: ir.Value, axis: int, bits: int) -> tuple[ir.Value, ir.Value]:
    """As the formats round (compress/maths/grid.py): states float32, which share a scale along their last axis → codes
    from 0 to 2^bits − 1 as float32, and scales float16, of length 1 along the axis."""
    number, middle = _numbers(graph), float(2 ** (bits - 1))
    peak = graph.node("ReduceMax", [graph.node("Abs", [states]), graph.constant([axis])])
    found = graph.node("Div", [graph.node("Mul", [peak, number(2.0)]), number(2 * middle - 1)])
    scale = graph.node("Cast", [graph.node("Max", [found, number(TINY)])], {"to": HALF.value}, dtype=HALF)
    wide = graph.node("Cast", [scale], {"to": FLOAT.value})
    steps = graph.node("Add", [graph.node("Div", [states, wide]), number(middle)])
    return graph.node("Clip", [graph.node("Round", [steps]), number(0.0), number(2 * middle - 1)]), scale


def _numbers(graph: GraphBuilder) -> Callable[[float], ir.Value]:
    return lambda value: graph.constant(value, np.float32)
