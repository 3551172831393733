"""NF4 and FP4 weights: com.microsoft MatMulBnb4, which reads bitsandbytes' own bytes.

Layout (onnxruntime contrib operators): B uint8 (ceil(out · in / 2),), row by row, the first of two codes in the high
half; absmax float32 (blocks,) of a run of the whole weight. It decodes to float32 and computes exactly.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx.float_matmul import add_bias
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Choice, Lowering, Source
from compress.formats import name_of
from compress.formats.base import QuantTensor
from compress.formats.lookup import FIXED, Lookup, nibbles
from compress.honours import Honours
from compress.hwprofiles import Runtime
from compress.layer import LayerKind, LayerSpec
from compress.target import Refusal

QUANT_TYPE = {"fp4": 0, "nf4": 1}
DOUBLE = "scales that were quantized twice are stored as float32"


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes the fixed tables in blocks that the kernel has, for layers with float inputs."""
    form = spec.format
    if not isinstance(form, Lookup) or spec.kind is LayerKind.CONV:
        return None
    if form.table not in FIXED:
        return Refusal(f"{form}: no operator of ONNX Runtime reads a learned table; nf4 and fp4 are read")
    if spec.act is not None:
        return None  # whoever takes rounded inputs says which weights go with them
    support = runtime.support("lookup", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form}: {support.note}", usage=False)
    if spec.kind is LayerKind.EMBEDDING:
        return Refusal(f"{form}: no operator gathers rows of an embedding from such a table; use int8 or int4 there")
    crosses = not form.flat and spec.shape[1] % form.size
    if form.size not in support.blocks or crosses:
        sizes = ", ".join(str(size) for size in support.blocks)
        layout = "groups that divide the columns" if crosses else f"blocks of {sizes}"
        return Refusal(f"{form}: MatMulBnb4 stores {layout}, found {form.size} for {spec.shape[1]} columns")
    notes = [DOUBLE] if form.double else []
    if support.state != "fast":
        notes.insert(0, support.note)
    rows, columns = spec.shape
    size = -(-rows * columns // 2) + 4 * form.blocks(spec.shape) + spec.bias_bytes
    return Choice(
        "MatMulBnb4",
        support.state,
        __name__,
        size,
        "; ".join(notes),
        form.size,
        stored_bits=form.bits,
        speed=support.speed(form.size),
    )


def _tensors(source: Source) -> tuple[Tensor, Tensor]:
    """B and absmax in the kernel's layout."""
    weight = source.read().weight
    assert isinstance(weight, QuantTensor) and isinstance(weight.format, Lookup)
    codes, scale, table = weight.format.unpack(weight.tensors, weight.shape)
    return nibbles(codes, table), scale.contiguous()


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    form, (rows, columns), name = source.spec.format, source.spec.shape, f"{source.spec.name}.weight"
    assert isinstance(form, Lookup)
    packed = graph.initializer(f"{name}.codes", lambda: _tensors(source)[0], torch.uint8, [-(-rows * columns // 2)])
    scale = graph.initializer(
        f"{name}.scale", lambda: _tensors(source)[1], torch.float32, [form.blocks((rows, columns))]
    )
    attributes = {"K": columns, "N": rows, "block_size": form.size, "quant_type": QUANT_TYPE[form.table]}
    return add_bias(graph, source, graph.node("MatMulBnb4", [values, packed, scale], attributes, domain=MICROSOFT))


KINDS = frozenset({LayerKind.LINEAR, LayerKind.EXPERT})
LOWERS = Lowering(Honours(KINDS, pre=TRANSFORMED, bias=KINDS), linear=linear)
