"""Weight-only integer grids: com.microsoft MatMulNBits, and GatherBlockQuantized on the very same tensors.

Layout (onnxruntime contrib operators): B uint8 (out, blocks, block · bits / 8), lowest bits first; scales
(out, blocks); zero points packed per row, 2^(bits−1) where absent.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from compress import grid
from compress.export.onnx.float_matmul import add_bias
from compress.export.onnx.graph import MICROSOFT, GraphBuilder
from compress.export.onnx.lowering import Choice, Source
from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import Runtime, Support
from compress.layer import LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

# The kernel rounds activations to int8 per block at accuracy level 4: 0.01 of the largest logit on real models, up to
# 0.15 on small random ones (benchmarks/agreement.py). With that off it computes exactly.
INT8_ACTIVATIONS = Bounds(shipped=0.25)
CHANNEL_BLOCK = 128


def choose(spec: LayerSpec, runtime: Runtime) -> Choice | Refusal | None:
    """Takes integer grids in blocks that the kernel has."""
    form = spec.format
    if not isinstance(form, IntGrid) or spec.act is not None:
        return None
    support = runtime.support("weight_only", form.bits)
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
    return total + spec.bias_bytes


def _needs_zero(form: IntGrid, bits: int) -> bool:
    """A symmetric grid in a wider container keeps its own middle as an explicit zero point."""
    return form.scheme == "asymmetric" or form.bits != bits


def _tensors(source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """B, scales and packed zero points in the kernel's layout."""
    weight = source.read().weight
    assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
    block, bits, (rows, columns) = source.choice.block, source.choice.stored_bits, source.spec.shape
    codes, scale, zero = weight.format.unpack(weight.tensors, weight.shape)
    blocks = -(-columns // block)
    codes = torch.nn.functional.pad(codes, (0, blocks * block - columns))
    packed = grid.pack_bits(codes, bits).reshape(rows, blocks, block * bits // 8)
    if scale.shape[1] != blocks:  # one scale per row, repeated
        scale, zero = scale[:, :1].expand(rows, blocks), zero[:, :1].expand(rows, blocks)
    return packed, scale.contiguous(), grid.pack_bits(zero, bits)


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
    return add_bias(graph, source, graph.node("MatMulNBits", inputs, attributes, domain=MICROSOFT))


def gather(graph: GraphBuilder, source: Source, ids: ir.Value) -> ir.Value:
    """ids (…) → (…, features), from the tensors that a tied head also reads."""
    packed, scale, zero = _inputs(graph, source)
    rows, bits = source.spec.shape[0], source.choice.stored_bits
    width = source.spec.shape[1] * bits // 8
    flat = graph.node("Reshape", [packed, graph.constant([rows, width])], dtype=ir.DataType.UINT8)
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": source.choice.block, "bits": bits}
    inputs = [flat, ids, scale] + ([zero] if zero is not None else [])
    return graph.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)
