"""What the slot graph knows of the tokens at hand, by their positions (batch, n): the same for every layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from compress.export.onnx.attention import MASKED
from compress.export.onnx.graph import GraphBuilder

BOOL, INT, FLOAT = ir.DataType.BOOL, ir.DataType.INT64, ir.DataType.FLOAT


class Tokens:
    """Values that are made where they are first asked for.

    Args: positions (batch, n) int64, −1 for padding; groups: query heads of a key-value head, whose queries are
    (groups · n) rows.
    """

    def __init__(self, graph: GraphBuilder, positions: ir.Value, groups: int) -> None:
        self._graph, self._given, self._groups = graph, positions, groups

    @property
    def length(self) -> ir.Value:
        """n, (1,) int64."""
        return self.once("length", lambda g: g.node("Shape", [self._given], {"start": 1, "end": 2}, dtype=INT))

    @property
    def positions(self) -> ir.Value:
        """(batch, 1, n) int64."""
        return self.once("positions", lambda g: g.node("Unsqueeze", [self._given, g.constant([1])], dtype=INT))

    @property
    def exact(self) -> ir.Value:
        """Positions (batch, 1, n) float32, which has all whole numbers up to 2^24."""
        return self.once("exact", lambda g: g.node("Cast", [self.positions], {"to": FLOAT.value}))

    @property
    def newest(self) -> ir.Value:
        """The newest position, (batch, 1, 1) float32; −1 where all is padding."""
        return self.once("newest", lambda g: g.node("ReduceMax", [self.exact, g.constant([2])]))

    @property
    def bias(self) -> ir.Value:
        """What each query sees of them, (batch, 1, groups · n, n): those up to itself, no padding."""
        return self.once("bias", self._bias)

    def _bias(self, graph: GraphBuilder) -> ir.Value:
        queries = graph.node("Unsqueeze", [self._given, graph.constant([1, 3])], dtype=INT)
        keys = graph.node("Unsqueeze", [self._given, graph.constant([1, 2])], dtype=INT)
        seen = graph.node("LessOrEqual", [keys, queries], dtype=BOOL)
        seen = graph.node("And", [seen, is_there(graph, keys, np.int64)], dtype=BOOL)
        return self._grouped(bias(graph, seen), 2)

    @property
    def real(self) -> ir.Value:
        """1 for a token and 0 for padding, (batch, 1, n)."""
        return self.once("real", lambda g: g.node("Cast", [is_there(g, self.positions, np.int64)], {"to": FLOAT.value}))

    @property
    def ends(self) -> ir.Value:
        """Whether the last of them is a token, (batch, 1, 1) bool."""

        def make(graph: GraphBuilder) -> ir.Value:
            one = graph.constant([-1]), graph.constant([2**63 - 1]), graph.constant([2])
            return is_there(graph, graph.node("Slice", [self.positions, *one], dtype=INT), np.int64)

        return self.once("ends", make)

    def weights(self, decay: float) -> ir.Value:
        """How much each query counts, (batch, 1, 1, groups · n): `decay` to the number of tokens after it, padding left
        out; padding counts nothing."""

        def make(graph: GraphBuilder) -> ir.Value:
            counts = self.real
            if decay < 1:
                later = graph.node("Sub", [self._total, graph.node("CumSum", [counts, graph.constant(2)])])
                factors = graph.node("Pow", [graph.constant(decay, np.float32), later])
                counts = graph.node("Mul", [counts, factors])
            return self._grouped(graph.node("Unsqueeze", [counts, graph.constant([1])]), 3)

        return self.once(("weights", decay), make)

    def fade(self, decay: float) -> ir.Value:
        """What older sums are multiplied by, (batch, 1, 1)."""
        made = ("fade", decay)
        return self.once(made, lambda g: g.node("Pow", [g.constant(decay, np.float32), self._total]))

    @property
    def _total(self) -> ir.Value:
        return self.once("total", lambda g: g.node("ReduceSum", [self.real, g.constant([2])]))

    def _grouped(self, value: ir.Value, axis: int) -> ir.Value:
        return self._graph.node("Concat", [value] * self._groups, {"axis": axis}) if self._groups > 1 else value

    def once(self, name: object, make: Callable[[GraphBuilder], ir.Value]) -> ir.Value:
        """What a name stands for, made by the first layer that asks."""
        key = ("slots", name, self._groups)
        if key not in self._graph.shared:
            self._graph.shared[key] = make(self._graph)
        return self._graph.shared[key]


def is_there(graph: GraphBuilder, positions: ir.Value, dtype: type[np.integer]) -> ir.Value:
    """Which positions are of tokens, bool."""
    return graph.node("GreaterOrEqual", [positions, graph.constant(0, dtype)], dtype=BOOL)


def bias(graph: GraphBuilder, seen: ir.Value) -> ir.Value:
    """0 where bool is true, far below any score elsewhere."""
    return graph.node("Where", [seen, graph.constant(0.0, np.float32), graph.constant(MASKED, np.float32)])
