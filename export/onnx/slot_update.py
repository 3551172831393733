"""The state of a layer's slots after a call: scores, which new tokens go where, and what is written.

The best new token takes the place of the worst slot if it is no worse, the second best that of the second worst, and so
on: what is left are the best C of all, as sorting them together would give, and nothing else moves. Of equal scores the
older token goes. All is float32, which TensorRT has too (its parser makes float32 of float64 without a word): so ranks
are two keys, the score and then, among those that are as good as the last one chosen, the position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.export.onnx.attention import dim
from compress.export.onnx.cache_codes import END, HALF, rounded
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.slot_tokens import BOOL, FLOAT, INT, Tokens
from compress.kv.spec import KvSpec

INT8 = ir.DataType.INT8
FAR = 2.0**127
"""Rank of what always stays, and less than 0 of what is not there: any score is lost when it is added to it."""


class Choice(NamedTuple):
    """Which new tokens are kept and where, (batch, kv heads, m) each, m the smaller of new tokens and slots.

    token: among the new ones; wins: whether it is kept; place: its slot, the last one where it is not.
    """

    token: ir.Value
    wins: ir.Value
    place: ir.Value


class Update:
    """Of one layer. Args: judged (batch, kv heads, n): scores of the new tokens by a learned head."""

    def __init__(
        self,
        graph: GraphBuilder,
        spec: KvSpec,
        state: Mapping[str, ir.Value],
        tokens: Tokens,
        judged: ir.Value | None = None,
    ) -> None:
        self._graph, self._spec, self._state, self._tokens, self._judged = graph, spec, state, tokens, judged
        self._known: dict[tuple[ir.Value, int], ir.Value] = {}

    def after(self, key: ir.Value, value: ir.Value, weights: ir.Value, out: ir.Value) -> dict[str, ir.Value]:
        """The state after. key, value (batch, kv heads, n, size); weights (batch, kv heads, groups · n, slots + n);
        out (batch, kv heads, groups · n, size), what the attention puts out."""
        state, scores, fresh = self._state, *self._scores(key, weights)
        choice = self._choose(scores, fresh, dim(key, 1), out)
        after = {}
        for name, states in (("key", key), ("value", value)):
            picked, width = self._take(states, choice, dim(states, 3)), dim(states, 3)
            if f"{name}_scale" in state:
                picked, scales = self._encode(picked)
                after[f"{name}_scale"] = self._put(state[f"{name}_scale"], choice, scales)
            elif state[name].dtype is not FLOAT:
                picked = self._graph.node("Cast", [picked], {"to": state[name].dtype.value}, dtype=state[name].dtype)
            after[name] = self._put(state[name], choice, picked, width)
        after["position"] = self._put(state["position"], choice, self._positions(choice, dim(key, 1)))
        if scores is not None and fresh is not None:
            after["score"] = self._put(scores, choice, self._take(fresh, choice))
        return after

    def _scores(self, key: ir.Value, weights: ir.Value) -> tuple[ir.Value | None, ir.Value | None]:
        """Of slots (batch, kv heads, slots) and of new tokens (batch, kv heads, n), as compress/kv/scorers.py has them;
        None where they are the positions."""
        graph, spec = self._graph, self._spec
        if spec.scorer == "position":
            return None, None
        if self._judged is not None:
            return self._state["score"], self._judged
        if spec.scorer == "key_norm":
            norms = graph.node("ReduceL2", [key, graph.constant([3])], {"keepdims": 0})
            return self._state["score"], graph.node("Neg", [norms])
        if spec.scorer == "tova":
            return cut(graph, self._last_read(key, weights), spec.budget + 1, axis=2)
        sums = graph.node("MatMul", [self._tokens.weights(spec.decay), weights])
        held, fresh = cut(graph, graph.node("Squeeze", [sums, graph.constant([2])]), spec.budget + 1, axis=2)
        before = self._state["score"]
        if spec.decay < 1:
            before = graph.node("Mul", [before, self._tokens.fade(spec.decay)])
        return graph.node("Add", [before, held]), fresh

    def _last_read(self, key: ir.Value, weights: ir.Value) -> ir.Value:
        """What the last query gave slots and new tokens, over all heads, (batch, kv heads, slots + n); where it is
        padding, the scores before."""
        graph, state, heads = self._graph, self._state["score"], dim(key, 1)
        length, total = self._tokens.length, graph.node("Shape", [weights], {"start": 3, "end": 4}, dtype=INT)
        apart = graph.node("Concat", [graph.constant([0, heads, -1]), length, total], {"axis": 0}, dtype=INT)
        apart = graph.node("Reshape", [weights, apart])  # (batch, kv heads, groups, n, slots + n)
        one = graph.constant([-1]), graph.constant([END]), graph.constant([3])
        last = graph.node("ReduceMean", [graph.node("Slice", [apart, *one]), graph.constant([1, 2])], {"keepdims": 0})
        nothing = graph.node("Sub", [self._tokens.exact, self._tokens.exact])
        before = graph.node("Concat", [state, self._spread(nothing, heads)], {"axis": 2})
        return graph.node("Where", [self._tokens.ends, last, before])

    def _choose(self, scores: ir.Value | None, fresh: ir.Value | None, heads: int, out: ir.Value) -> Choice:
        """Heads whose output is no number keep nothing: so whatever is written waits for the attention, which reads the
        same buffers."""
        graph, slots = self._graph, self._spec.budget
        position = cut(graph, graph.node("Cast", [self._state["position"]], {"to": FLOAT.value}), slots, axis=2)[0]
        old = self._rank(None if scores is None else cut(graph, scores, slots, axis=2)[0], position)
        of_all = self._tokens.once(("place", self._by_position), lambda _: self._place(self._tokens.exact))
        new = self._spread(self._rank(fresh, self._tokens.exact, of_all), heads)
        count = graph.node("Min", [self._tokens.length, graph.constant([slots])], dtype=INT)
        worst, slot = self._top(old, count, largest=0)
        best, token = self._top(new, count, largest=1)
        one = graph.constant([0, 0]), graph.constant([1, 1]), graph.constant([2, 3])
        first = graph.node("Squeeze", [graph.node("Slice", [out, *one]), graph.constant([3])])
        is_number = graph.node("Not", [graph.node("IsNaN", [first], dtype=BOOL)], dtype=BOOL)
        wins = graph.node("GreaterOrEqual", [best, worst], dtype=BOOL)
        wins = graph.node("And", [wins, is_number], dtype=BOOL)
        if scores is not None:  # positions are never equal
            last = self._last(wins)
            going = self._settled(old, graph.node("GatherElements", [worst, last], {"axis": 2}), position, least=True)
            coming = self._settled(new, graph.node("GatherElements", [best, last], {"axis": 2}), self._tokens.exact)
            slot, token = self._top(going, count, largest=0)[1], self._top(coming, count, largest=1)[1]
        return Choice(token, wins, graph.node("Where", [wins, slot, graph.constant(slots)], dtype=INT))

    def _last(self, wins: ir.Value) -> ir.Value:
        """The place of the last true, (batch, kv heads, 1): all before it are; 0 where none is."""
        graph = self._graph
        count = graph.node("ReduceSum", [graph.node("Cast", [wins], {"to": INT.value}, dtype=INT), graph.constant([2])])
        count.type = ir.TensorType(INT)
        before = graph.node("Sub", [count, graph.constant([1])], dtype=INT)
        return graph.node("Max", [before, graph.constant([0])], dtype=INT)

    def _settled(self, ranks: ir.Value, edge: ir.Value, position: ir.Value, least: bool = False) -> ir.Value:
        """What puts those beyond the edge first and, of those on it, the older first to go and the newer to come."""
        graph, far = self._graph, self._number(-FAR if least else FAR)
        beyond = graph.node("Less" if least else "Greater", [ranks, edge], dtype=BOOL)
        on = graph.node("Equal", [ranks, edge], dtype=BOOL)
        rest = graph.node("Where", [on, position, self._number(FAR if least else -FAR)])
        return graph.node("Where", [beyond, far, rest])

    def _rank(self, score: ir.Value | None, position: ir.Value, place: ir.Value | None = None) -> ir.Value:
        """Higher ones stay: −FAR where nothing is, FAR for what always stays (`scorers.ranked`). place: of the
        positions, where it is known."""
        graph, place = self._graph, place or self._place(position)
        if score is None:
            return place
        if self._spec.by_age:
            age = graph.node("Sub", [self._tokens.newest, graph.node("Sub", [position, self._number(1.0)])])
            age = graph.node("Max", [age, self._number(1.0)])
            if self._spec.learned:  # a logarithm
                score = graph.node("Sub", [score, graph.node("Log", [age])])
            else:
                score = graph.node("Div", [score, age])
        return graph.node("Add", [score, place])

    @property
    def _by_position(self) -> tuple[object, ...]:
        """What a rank that follows from the position depends on."""
        return self._spec.scorer == "position", self._spec.sinks, self._spec.recent

    def _place(self, position: ir.Value) -> ir.Value:
        """What of a rank follows from the position."""
        graph, spec = self._graph, self._spec
        rank = position if spec.scorer == "position" else self._number(0.0)
        first = graph.node("Less", [position, self._number(float(spec.sinks))], dtype=BOOL)
        recent = self._number(float(spec.recent))
        edge = self._tokens.once(("edge", spec.recent), lambda g: g.node("Sub", [self._tokens.newest, recent]))
        newest = graph.node("Greater", [position, edge], dtype=BOOL)
        stays = graph.node("Or", [first, newest], dtype=BOOL)
        rank = graph.node("Where", [stays, self._number(FAR), rank])
        is_empty = graph.node("Less", [position, self._number(0.0)], dtype=BOOL)
        return graph.node("Where", [is_empty, self._number(-FAR), rank])

    def _top(self, ranks: ir.Value, count: ir.Value, largest: int) -> tuple[ir.Value, ir.Value]:
        """The highest or lowest so many, in order, and where they are."""
        found = self._graph.node("TopK", [ranks, count], {"axis": -1, "largest": largest}, outputs=2)
        where = self._graph.nodes[-1].outputs[1]
        where.type = ir.TensorType(INT)
        return found, where

    def _spread(self, values: ir.Value, heads: int, dtype: ir.DataType = FLOAT) -> ir.Value:
        """(batch, 1 or kv heads, n) → (batch, kv heads, n)."""
        return self._graph.node("Expand", [values, self._graph.constant([1, heads, 1])], dtype=dtype)

    def _positions(self, choice: Choice, heads: int) -> ir.Value:
        """Of what is written: −1 where it is not kept."""
        graph = self._graph
        taken = self._take(self._spread(self._tokens.positions, heads, INT), choice, dtype=INT)
        taken = graph.node("Where", [choice.wins, taken, graph.constant(-1)], dtype=INT)
        return graph.node("Cast", [taken], {"to": ir.DataType.INT32.value}, dtype=ir.DataType.INT32)

    def _take(self, values: ir.Value, choice: Choice, width: int = 0, dtype: ir.DataType = FLOAT) -> ir.Value:
        """Of new tokens (batch, kv heads, n[, width]) those of the choice."""
        return self._graph.node("GatherElements", [values, self._wide(choice.token, width)], {"axis": 2}, dtype=dtype)

    def _put(self, held: ir.Value, choice: Choice, values: ir.Value, width: int = 0) -> ir.Value:
        """What is held, with the chosen values in their slots."""
        inputs = [held, self._wide(choice.place, width), values]
        return self._graph.node("ScatterElements", inputs, {"axis": 2}, dtype=held.dtype)

    def _wide(self, index: ir.Value, width: int) -> ir.Value:
        """(batch, kv heads, m) → (batch, kv heads, m[, width])."""
        if width and (index, width) not in self._known:
            apart = self._graph.node("Unsqueeze", [index, self._graph.constant([3])], dtype=INT)
            shape = self._graph.constant([1, 1, 1, width])
            self._known[index, width] = self._graph.node("Expand", [apart, shape], dtype=INT)
        return self._known[index, width] if width else index

    def _encode(self, states: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(batch, kv heads, m, size) → int8 codes, those of int8(token) less 128, and scales (batch, kv heads, m)
        float16."""
        graph = self._graph
        codes, scale = rounded(graph, states, 3, 8)
        codes = graph.node("Cast", [graph.node("Sub", [codes, self._number(128.0)])], {"to": INT8.value}, dtype=INT8)
        return codes, graph.node("Squeeze", [scale, graph.constant([3])], dtype=HALF)

    def _number(self, value: float) -> ir.Value:
        return self._graph.constant(value, np.float32)


def cut(
    graph: GraphBuilder, values: ir.Value, count: int, axis: int = 3, dtype: ir.DataType = FLOAT
) -> tuple[ir.Value, ir.Value]:
    """The first so many along an axis, and the rest."""
    ends = [graph.constant([each]) for each in (0, count, END)]
    along = graph.constant([axis])
    first = graph.node("Slice", [values, ends[0], ends[1], along], dtype=dtype)
    return first, graph.node("Slice", [values, ends[1], ends[2], along], dtype=dtype)
