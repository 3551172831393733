"""Weight-only integer grids: com.microsoft MatMulNBits, and GatherBlockQuantized on the very same tensors.

Layout (onnxruntime contrib operators): B uint8 (out, blocks, block · bits / 8), lowest bits first; scales
(out, blocks); zero points packed per row, 2^(bits−1) where absent. Float zero points, which the kernel knows, make it
13 to 32 times slower than float32 at batch 1 (1.31.1, 4096x4096, 2 and 4 bits; none for 8). Here they are a product of
block sums beside the fast kernel, a tenth of its time: Σ x(q − z)s = Σ x(q − c)s + Σ over blocks of (Σ x)(c − z)s.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from compress.export.onnx.float_matmul import add_bias
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.lowering import TRANSFORMED, Choice, Lowering, Source
from compress.formats import name_of
from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.honours import Honours
from compress.hwprofiles import Runtime, Support
from compress.layer import LayerKind, LayerSpec
from compress.maths import grid
from compress.records import Bounds
from compress.target import Refusal

# The kernel rounds activations to int8 per block at accuracy level 4: 0.01 of the largest logit on real models, up to
# 0.15 on small random ones (benchmarks/agreement.py). With that off it computes exactly.
INT8_ACTIVATIONS = Bounds(shipped=0.25)
CHANNEL_BLOCK = 128


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes integer grids in blocks that the kernel has."""
    form = spec.format
    if not isinstance(form, IntGrid) or spec.act is not None or spec.kind is LayerKind.CONV:
        return None
    support = runtime.support("weight_only", form.bits, format=name_of(form))
    if support.state == "no":
        return Refusal(f"{form}: {support.note}", usage=False)
    shared = spec.kind is LayerKind.EMBEDDING
    block = _block(form, spec.shape[1], support)
    if block is None:
        sizes = ", ".join(str(size) for size in support.blocks)
        return Refusal(f"{form}: MatMulNBits stores groups of {sizes} or channel, not group={form.group}")
    if shared and (spec.shape[1] % block or (support.stored_bits or form.bits) not in (2, 4, 8)):
        sizes = ", ".join(str(size) for size in support.blocks if spec.shape[1] % size == 0)
        return Refusal(f"{form}: GatherBlockQuantized needs a group that divides {spec.shape[1]} columns: {sizes}")
    if form.scheme == "float_zero" and (shared or spec.shape[1] % block):
        what = "an embedding" if shared else f"{spec.shape[1]} columns, which a block of {block} does not divide"
        return Refusal(f"{form}: float zero points are not stored for {what}; use asymmetric there")
    bits = support.stored_bits or form.bits
    operator = "GatherBlockQuantized" if shared else "MatMulNBits"
    if shared and len(spec.users) > 1:
        operator = "GatherBlockQuantized+MatMulNBits"
    note = support.note if support.state != "fast" else ""
    return Choice(
        operator,
        support.state,
        __name__,
        _stored_bytes(spec, block, bits),
        note,
        block,
        support.accuracy_level or 0,
        bits,
        INT8_ACTIVATIONS if support.accuracy_level == 4 else Bounds(),
        rounds_inputs=support.accuracy_level == 4,
        speed=support.speed(block),
    )


def _block(form: IntGrid, columns: int, support: Support) -> int | None:
    """The kernel's block for a format: its group, or for whole-row scales a block that repeats the scale."""
    if isinstance(form.group, int):
        if form.group in support.blocks:
            return form.group
        return None
    dividing = [size for size in support.blocks if columns % size == 0]
    return CHANNEL_BLOCK if CHANNEL_BLOCK in dividing or not dividing else max(dividing)


def _stored_bytes(spec: LayerSpec, block: int, bits: int) -> int:
    rows, columns = spec.shape
    blocks = -(-columns // block)
    total = rows * blocks * (block * bits // 8) + rows * blocks * 2
    if isinstance(spec.format, IntGrid) and _needs_zero(spec.format, bits):
        total += grid.packed_bytes(rows, blocks, bits)
    if isinstance(spec.format, IntGrid) and spec.format.scheme == "float_zero":
        total += rows * blocks * 2
    return total + spec.bias_bytes


def _needs_zero(form: IntGrid, bits: int) -> bool:
    """A symmetric grid in a wider container keeps its own middle as an explicit zero point."""
    return form.scheme == "asymmetric" or form.bits != bits


def _tensors(source: Source) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """B, scales and packed zero points in the kernel's layout; the format's own zero points (out, blocks)."""
    weight = source.read().weight
    assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
    block, bits, (rows, columns) = source.choice.block, source.choice.stored_bits, source.spec.shape
    codes, scale, zero = weight.format.unpack(weight.tensors, weight.shape)
    blocks = -(-columns // block)
    codes = torch.nn.functional.pad(codes, (0, blocks * block - columns))
    packed = grid.pack_bits(codes, bits).reshape(rows, blocks, block * bits // 8)
    if scale.shape[1] != blocks:  # one scale per row, repeated
        scale, zero = scale[:, :1].expand(rows, blocks), zero[:, :1].expand(rows, blocks)
    middle = torch.full_like(zero, 2 ** (weight.format.bits - 1))
    whole = middle if weight.format.scheme == "float_zero" else zero
    return packed, scale.contiguous(), grid.pack_bits(whole, bits), zero.contiguous()


def _inputs(graph: GraphBuilder, source: Source) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    spec, choice = source.spec, source.choice
    rows, columns = spec.shape
    blocks = -(-columns // choice.block)
    name = f"{spec.name}.weight"
    shape = (rows, blocks, choice.block * choice.stored_bits // 8)
    packed = graph.initializer(f"{name}.codes", lambda: _tensors(source)[0], torch.uint8, shape)
    scale = graph.float_initializer(f"{name}.scale", lambda: _tensors(source)[1], torch.float16, (rows, blocks))
    assert isinstance(spec.format, IntGrid)
    if not _needs_zero(spec.format, choice.stored_bits):
        return packed, scale, None
    width = grid.packed_bytes(1, blocks, choice.stored_bits)
    return packed, scale, graph.initializer(f"{name}.zero", lambda: _tensors(source)[2], torch.uint8, (rows, width))


def linear(graph: GraphBuilder, source: Source, values: ir.Value) -> ir.Value:
    """values (…, in) → (…, out)."""
    packed, scale, zero = _inputs(graph, source)
    attributes = {
        "K": source.spec.shape[1],
        "N": source.spec.shape[0],
        "bits": source.choice.stored_bits,
        "block_size": source.choice.block,
        "accuracy_level": source.choice.accuracy_level,
    }
    inputs = [values, packed, scale] + ([zero] if zero is not None else [])
    result = graph.node("MatMulNBits", inputs, attributes, domain=MICROSOFT)
    assert isinstance(source.spec.format, IntGrid)
    if source.spec.format.scheme == "float_zero":
        result = graph.node("Add", [result, _shift(graph, source, values, scale, result)])
    return add_bias(graph, source, result)


def _shift(graph: GraphBuilder, source: Source, values: ir.Value, scale: ir.Value, like: ir.Value) -> ir.Value:
    """What float zero points add to a product that took the middle c for them: Σ over blocks of Σx · (c − z)s.

    (c − z)s is computed once, when the graph is loaded.
    """
    form, (rows, columns), block = source.spec.format, source.spec.shape, source.choice.block
    assert isinstance(form, IntGrid)
    shape = (rows, columns // block)
    name = f"{source.spec.name}.weight.zero_point"
    zero = graph.float_initializer(name, lambda: _tensors(source)[3], torch.float16, shape)
    middle = graph.constant(2.0 ** (form.bits - 1), np.float32)
    each = graph.node("Mul", [graph.node("Sub", [middle, zero]), scale])
    blocks = graph.node("Reshape", [values, graph.constant([-1, columns // block, block])])
    sums = graph.node("ReduceSum", [blocks, graph.constant([2])], {"keepdims": 0})
    flat = graph.node("MatMul", [sums, graph.node("Transpose", [each], {"perm": [1, 0]})])
    return graph.node("Reshape", [flat, graph.node("Shape", [like], dtype=ir.DataType.INT64)])


def gather(graph: GraphBuilder, source: Source, ids: ir.Value) -> ir.Value:
    """ids (…) → (…, features), from the tensors that a tied head also reads."""
    packed, scale, zero = _inputs(graph, source)
    rows, bits = source.spec.shape[0], source.choice.stored_bits
    width = source.spec.shape[1] * bits // 8
    flat = graph.node("Reshape", [packed, graph.constant([rows, width])], dtype=ir.DataType.UINT8)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": source.choice.block, "bits": bits}
    inputs = [flat, ids, scale] + ([zero] if zero is not None else [])
    return graph.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)


KINDS = frozenset({LayerKind.LINEAR, LayerKind.EXPERT, LayerKind.EMBEDDING})
LOWERS = Lowering(
    Honours(KINDS, pre=TRANSFORMED, bias=KINDS),
    linear=linear,
    gather=gather,
    half=frozenset({"MatMulNBits", "GatherBlockQuantized"}),
)
