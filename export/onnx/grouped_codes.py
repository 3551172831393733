"""com.microsoft GroupQueryAttention with a cache in codes: which caches it has, and how it is told.

By trial of onnxruntime 1.31.1 on the CPU: int8 and packed int4 codes are those of this project, half to even, −128
and −8 too. The operator rounds first: a call's own tokens are attended to as they are stored, where the torch cache and
`growing` attend to them as they were computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from torch import Tensor, float32, from_numpy

from compress.export.onnx import cache_codes, grouped_query, growing
from compress.export.onnx.attention import dim
from compress.export.onnx.cache_codes import Codes
from compress.export.onnx.graph import GraphBuilder
from compress.kv.spec import KvSpec
from compress.kv.static import static_format
from compress.models.model import Model

Attend = Callable[[GraphBuilder, ir.Node, ir.Value, ir.Value], list[ir.Value]]
SCALES = 12
"""The operator's input of the keys' scales; that of the values' follows."""


def refusal(specs: Sequence[KvSpec]) -> str:
    """Why the operator has no such caches; empty where it does."""
    return "; ".join(dict.fromkeys(reason for spec in specs if (reason := _reason(spec))))


def _reason(spec: KvSpec) -> str:
    if spec.is_plain:
        return ""
    if not (spec.keys and spec.values):
        return "keys and values are not both in codes; GroupQueryAttention has one type for both"
    if not all(map(spec.static_part, cache_codes.PARTS)):
        return "scales come with each token; GroupQueryAttention takes scales that data fixed (static)"
    bits = {static_format(text).bits for text in (spec.keys, spec.values)}
    return "keys and values of other bits; GroupQueryAttention has one type for both" if len(bits) > 1 else ""


def one_type(specs: Sequence[KvSpec]) -> bool:
    """Whether all layers' caches are of one type, as onnxruntime-genai has them: it goes by the first."""
    return len({(spec.keys, spec.values) for spec in specs}) == 1


def attend(model: Model) -> Attend:
    """The lowering of a model's attentions, with caches in codes where its caches are so."""
    plain = partial(grouped_query.attention, positions=model.longest)

    def rounded(graph: GraphBuilder, node: ir.Node, ids: ir.Value, mask: ir.Value) -> list[ir.Value]:
        layer, heads, size = growing.layer_of(node), dim(node.inputs[1], 1), dim(node.inputs[1], 3)
        codes = cache_codes.of_layer(model.kv[layer], model.kv_tensors[layer], size, layer)
        if not codes:
            return plain(graph, node, ids, mask)
        growing.retype(graph.graph, node, codes)
        found = plain(graph, node, ids, mask)
        _tell(graph, codes, heads)
        return found

    return rounded if model.kv else plain


def _tell(graph: GraphBuilder, codes: Mapping[str, Codes], heads: int) -> None:
    """Give the operator that was made last the scales and the type of its cache."""
    made = next(node for node in reversed(graph.nodes) if node.op_type == "GroupQueryAttention")
    made.resize_inputs(SCALES + 2)
    kind = "PER_TENSOR" if all(each.scales.size == 1 for each in codes.values()) else "PER_CHANNEL"  # of both alike
    for place, (part, letter) in enumerate((("key", "k"), ("value", "v")), SCALES):
        each = codes[part]
        shape = (1,) if kind == "PER_TENSOR" else (1, heads, 1, each.size)
        wide = from_numpy(np.broadcast_to(each.scales.reshape(1) if len(shape) == 1 else each.scales, shape).copy())
        scale = graph.initializer(each.name, partial(_same, wide), float32, shape)
        made.replace_input_with(place, scale)
        made.attributes[f"{letter}_quant_type"] = ir.AttrString(f"{letter}_quant_type", kind)
    bits = codes["key"].bits
    made.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)


def _same(tensor: Tensor) -> Tensor:
    return tensor
