"""The graph of a decoder whose cache drops tokens: so many slots per head, scored and overwritten inside the graph.

One graph reads prompts and decodes: (input_ids, position_ids, state) → (logits, state). position_ids (batch, n) int64
are true positions, −1 for padding. The state of layer i, each tensor one buffer that is bound as input and as output:

    slots.i.key, slots.i.value              (batch, kv heads, C + 1, size)  float32 (in TensorRT the type of its
                                                                            products), or int8 codes
    slots.i.key_scale, slots.i.value_scale  (batch, kv heads, C + 1)        float16, of codes only
    slots.i.position                        (batch, kv heads, C + 1)        int32, −1: nothing is there
    slots.i.score                           (batch, kv heads, C + 1)        float32, where the scorer keeps one

C is the budget. What is not kept goes to the last slot, which always counts as empty: nothing is written
conditionally. All keys, values and scores are read before anything is written (see `slot_update.Choice`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from compress.errors import UnsupportedError
from compress.export.onnx import half, slot_heads
from compress.export.onnx.attention import CACHED, dim, float_of, int_of
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.interfaces import DOMAIN
from compress.export.onnx.providers import CPU
from compress.export.onnx.slot_attention import attend
from compress.export.onnx.slot_session import AFTER, FACTS, STATE
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import Runtime
from compress.kv.spec import KvSpec, LayerTensors, row_format
from compress.target import Refusal

POSITIONS = "position_ids"
MASK, PAST = "attention_mask", "past_key_values."
SCORERS = ("position", "key_norm", "h2o", "tova", "locret", "kvzap")
_SETTINGS = {"keys", "values", "scorer", "budget", "sinks", "recent", "decay", "by_age", "chunk", "head_width"}
_COUNTED = SCORERS[1:]  # scores that do not follow from the position


def refusal(specs: Sequence[KvSpec], runtime: Runtime) -> Refusal | None:
    """Why caches cannot be slots of a graph; None where they can."""
    if runtime.provider != CPU or half.wanted(runtime):
        return Refusal(f"the slot graph is for ONNX Runtime's CPU provider, not for {runtime.provider}", usage=False)
    found = dict.fromkeys(told for spec in specs if (told := reason(spec)))
    return Refusal("; ".join(found)) if found else None


def reason(spec: KvSpec) -> str:
    """Why a layer's cache cannot be slots, of whatever runtime; empty where it can."""
    if spec.selects:
        return (
            "a cache that keeps all tokens and attends to some (kv_select) grows and is searched by the host; take the "
            "target native, or kv_evict in its place"
        )
    if not spec.evicts:
        return "a cache that keeps all tokens grows, and the slot graph has a fixed number of slots; add kv_evict"
    if spec.scorer not in SCORERS:
        return f"the scorer {spec.scorer} is not in the slot graph, which has {', '.join(('streaming', *_COUNTED))}"
    if spec.static or spec.rotated:
        what = "scales fitted to data (static)" if spec.static else "rotated vectors"
        return f"{what} are not in the slot graph, which has float and int8(token)"
    if spec.heads != "even":
        return "the slot graph has as many slots for each head, so heads share none (heads=adaptive); take heads=even"
    for text in filter(None, (spec.keys, spec.values)):
        form = row_format(text)
        if form != IntGrid(8, "channel"):
            return f"{text} is not stored by the slot graph, which has float and int8(token)"
    if unknown := sorted(set(spec.as_data()) - _SETTINGS):
        return f"the slot graph does not know {', '.join(unknown)} of a cache"
    return ""


class Slots:
    """The lowering of a decoder's attentions, as `lower` takes it: `open` a captured graph, lower it, `close` it.

    Args: tensors: by layer, those that the specs want; kind: type of keys and values that are not codes.
    """

    def __init__(
        self, specs: Sequence[KvSpec], tensors: Sequence[LayerTensors] = (), kind: ir.DataType = ir.DataType.FLOAT
    ) -> None:
        self.specs, self.tensors, self.kind = specs, tensors or [{}] * len(specs), kind
        self.positions: ir.Value | None = None

    def open(self, graph: ir.Graph) -> None:
        """Free the attentions of their growing cache, and name the layer of each. Raises: UnsupportedError."""
        ids = next(value for value in graph.inputs if value.name == "input_ids")
        self.positions = _value(POSITIONS, ir.DataType.INT64, ids.shape or ())
        graph.inputs.append(self.positions)
        for node in graph:
            if node.domain != DOMAIN or node.op_type != "Attention":
                continue
            _check(node)
            past = node.inputs[3]
            assert past is not None and past.name is not None
            layer = int(past.name.split(".")[1])
            node.attributes["cache"] = ir.AttrInt64("cache", layer)
            kept = [*node.inputs[:3], *_features(node, self.specs[layer])]
            node.resize_inputs(len(kept))
            for place, value in enumerate(kept):
                node.replace_input_with(place, value)
            for value in node.outputs[1:]:
                graph.outputs.remove(value)
            node.resize_outputs(1)

    def __call__(self, graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value) -> list[ir.Value]:
        """Replace an Attention placeholder; ids and mask are not looked at."""
        assert self.positions is not None
        layer = int_of(node, "cache")
        spec = self.specs[layer]
        sizes = dim(node.inputs[1], 1), dim(node.inputs[1], 3), dim(node.inputs[2], 3)
        held = state(spec, *sizes, self.kind)
        before = {name: _value(f"{STATE}{layer}.{name}", *each) for name, each in held.items()}
        features = [value for value in node.inputs[3:] if value is not None]
        judged = slot_heads.scores(graph, layer, features, self.tensors[layer]) if features else None
        out, after = attend(graph, node, spec, before, self.positions, judged)
        graph.graph.inputs.extend(before.values())
        for name, value in before.items():
            new = after[name]
            new.name, new.type, new.shape = f"{AFTER}{layer}.{name}", value.type, value.shape
            graph.graph.outputs.append(new)
        return [out]

    def close(self, document: ir.Model) -> None:
        """Let positions come from the new input, and say what the graph is. Raises: UnsupportedError for a model that
        looks at its growing cache elsewhere."""
        graph = document.graph
        inputs = {str(value.name): value for value in graph.inputs}
        _mask_of_positions(GraphBuilder(graph, "positions"), inputs[POSITIONS], inputs[MASK])
        for name, value in inputs.items():
            if name != MASK and not name.startswith(PAST):
                continue
            if value.uses():
                raise UnsupportedError(
                    f"The model reads {name} outside its attention, so its cache cannot be slots. Leave kv_evict out, "
                    "or add --target native."
                )
            graph.inputs.remove(value)
        chunk = min(spec.chunk for spec in self.specs)
        facts = {"chunk": chunk, "specs": [spec.as_data() for spec in self.specs]}
        document.metadata_props[FACTS] = json.dumps(facts, sort_keys=True)


def _check(node: ir.Node) -> None:
    """Raises: UnsupportedError for what the torch cache does not attend with either."""
    odd = {"a soft cap": float_of(node, "softcap") > 0, "a window": int_of(node, "before") >= 0}
    found = [name for name, is_there in odd.items() if is_there]
    if found or int_of(node, "after") or len(node.inputs) < CACHED:
        what = " and ".join(found) or "no causal cache"
        raise UnsupportedError(
            f"{node.name} attends with {what}, which the slot graph does not do. Leave kv_evict out."
        )


def _features(node: ir.Node, spec: KvSpec) -> list[ir.Value | None]:
    """What the layer's head looks at. Raises: UnsupportedError where the captured graph does not have it."""
    if not spec.learned:
        return []
    if len(node.inputs) == CACHED:
        raise UnsupportedError(
            f"{node.name} has projections under names that are not known, which {spec.scorer} looks at. Take another "
            "scorer for kv_evict."
        )
    hidden, *projected = node.inputs[CACHED:]
    return [hidden] if spec.scorer == "kvzap" else projected


def forget_features(graph: ir.Graph) -> None:
    """Let attentions of a captured graph read no more than they attend to, but those that `Slots.open` has prepared."""
    for node in graph:
        if node.domain == DOMAIN and node.op_type == "Attention" and "cache" not in node.attributes:
            node.resize_inputs(min(len(node.inputs), CACHED))


class Tensor(NamedTuple):
    """Of the state: its type and shape."""

    dtype: ir.DataType
    shape: tuple[int | str, ...]


def state(
    spec: KvSpec, heads: int, key_size: int, value_size: int, kind: ir.DataType = ir.DataType.FLOAT
) -> dict[str, Tensor]:
    """The tensors of a layer's state. heads: of keys and values; kind: of those that are not codes."""
    flat = ("batch", heads, spec.budget + 1)
    found = {}
    for part, text, size in (("key", spec.keys, key_size), ("value", spec.values, value_size)):
        found[part] = Tensor(ir.DataType.INT8 if text else kind, (*flat, size))
        if text:
            found[f"{part}_scale"] = Tensor(ir.DataType.FLOAT16, flat)
    found["position"] = Tensor(ir.DataType.INT32, flat)
    if spec.scorer in _COUNTED:
        found["score"] = Tensor(ir.DataType.FLOAT, flat)
    return found


def _value(name: str, dtype: ir.DataType, shape: Sequence[object]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(shape)))


def _mask_of_positions(place: GraphBuilder, positions: ir.Value, mask: ir.Value) -> None:
    """The captured graph takes positions from the running sum of its mask, less one: so they are what the mask is made
    of, its first column one more than the first position, the others the steps from one to the next."""
    integer = ir.DataType.INT64
    zero, one, last = place.constant([0]), place.constant([1]), place.constant([2**63 - 1])
    known = place.node("Max", [positions, place.constant(0)], dtype=integer)
    first = place.node("Slice", [known, zero, one, one], dtype=integer)
    rest = place.node("Slice", [known, one, last, one], dtype=integer)
    before = place.node("Slice", [known, zero, place.constant([-1]), one], dtype=integer)
    steps = place.node("Sub", [rest, before], dtype=integer)
    begin = place.node("Add", [first, one], dtype=integer)
    made = place.node("Concat", [begin, steps], {"axis": 1}, dtype=integer)
    made.shape = mask.shape
    place.graph.insert_before(place.graph[0], place.nodes)
    mask.replace_all_uses_with(made)
