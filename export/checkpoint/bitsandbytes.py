"""The layouts of bitsandbytes (0.50, read by transformers): 4-bit tables and int8 rows.

4 bit, per module: `weight` uint8 (out · in / 2, 1), row by row, the first of two codes in the high half of a byte;
`weight.absmax` (blocks,) float32; `weight.quant_map` (16,); `weight.quant_state.bitsandbytes__nf4` (or `fp4`), the
bytes of a JSON object. Where scales are quantized again, absmax is uint8 with `weight.nested_absmax` and
`weight.nested_quant_map`. 8 bit: `weight` int8, `SCB` (out,) float32, the largest magnitude of a row; its value is
weight · SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.layout import ROUNDED_INPUTS, Choice, Packed, refuse_common, weight_only
from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.int_grid import IntGrid
from compress.formats.lookup import FIXED, Lookup, nibbles
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths import tables
from compress.records import Bounds
from compress.target import Refusal

NOTE = "bitsandbytes decodes at every call on the CPU; its fast kernels are for GPUs"
NOTE_INT8 = "bitsandbytes rounds the inputs to int8 too (LLM.int8), outliers above 6 aside"
# CPUs with AVX512-BF16 get scales and inputs in bfloat16.
BFLOAT16_KERNEL = Bounds(shipped=0.1)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LEVELS = 127
THRESHOLD = 6.0


class BitsAndBytes:
    """See compress.export.checkpoint.layout.Layout."""

    name = "bitsandbytes"
    transforms = False
    expert_reader = ""
    config_file = ""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes nf4 and fp4 in blocks of the flat weight, and symmetric int8 per row, inside the blocks."""
        form = spec.format
        bare = replace(spec, act=None) if _rounds_like_the_kernel(spec) else spec
        refused = refuse_common(bare, "bitsandbytes") or weight_only(bare, "bitsandbytes") or _expert(spec)
        if refused is not None:
            return refused
        if isinstance(form, Lookup) and form.table in FIXED:
            return _choose_table(spec, form)
        if not isinstance(form, IntGrid) or (form.bits, form.group, form.scheme) != (8, "channel", "symmetric"):
            return Refusal(f"{form}: bitsandbytes stores nf4, fp4 and int8(channel). Give one of them")
        shapes: dict[str, TensorSpec] = {
            "weight": (spec.shape, torch.int8),
            "SCB": ((spec.shape[0],), torch.float32),
            "weight_format": ((), torch.uint8),
        }
        bounds = ROUNDED_INPUTS if spec.act is not None else Bounds(shipped=ROUNDED_INPUTS.shipped)
        return Choice("llm_int8", "works", shapes, NOTE_INT8, bounds, spec.bias_bytes)

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """One format for all."""
        forms = {
            name: f"{spec.format}{f' with inputs in {spec.act}' if spec.act else ''}"
            for name, spec in specs.items()
            if spec.format is not None
        }
        if len(set(forms.values())) <= 1:
            return {}
        reason = f"{' and '.join(sorted(set(forms.values())))} in one model: bitsandbytes has one format for all layers"
        return dict.fromkeys(forms, Refusal(f"{reason}. Give them one"))

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor)
        if isinstance(weight.format, Lookup):
            return _table_tensors(weight, weight.format)
        assert isinstance(weight.format, IntGrid)
        codes, scale, _ = weight.format.unpack(weight.tensors, weight.shape)
        return {
            "weight": (codes.to(torch.int16) - 128).to(torch.int8),
            "SCB": scale[:, 0].float() * LEVELS,
            "weight_format": torch.tensor(0, dtype=torch.uint8),  # row by row
        }

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """See Layout."""
        form = packed[0].spec.format
        tabled = isinstance(form, Lookup)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": tabled,
            "load_in_8bit": not tabled,
            "llm_int8_threshold": _threshold(packed[0].spec),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": list(plain),
            "bnb_4bit_quant_type": form.table if isinstance(form, Lookup) else "fp4",
            "bnb_4bit_use_double_quant": isinstance(form, Lookup) and form.double,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
        }


def _expert(spec: LayerSpec) -> Refusal | None:
    """transformers 5.23 passes over int8 experts and leaves its own random, and stops at nf4's shapes (tried)."""
    if spec.kind is not LayerKind.EXPERT:
        return None
    return Refusal(
        f"{spec.format}: transformers puts bitsandbytes' layers in place of linear modules only, and loads no packed "
        "experts. Export for checkpoint (--target checkpoint), which stores int8, int4 and fp8 experts that it reads"
    )


def _rounds_like_the_kernel(spec: LayerSpec) -> bool:
    """Whether the inputs are rounded as LLM.int8() does it."""
    form = spec.act.format if spec.act is not None and not spec.act.static else None
    return isinstance(form, IntGrid) and (form.bits, form.group, form.scheme) == (8, "token", "symmetric")


def _threshold(spec: LayerSpec) -> float:
    """The magnitude from which input columns stay in float; 0 for none."""
    if spec.act is None:
        return THRESHOLD
    assert isinstance(spec.act.format, IntGrid)
    return float(spec.act.format.outliers or 0.0)


def _choose_table(spec: LayerSpec, form: Lookup) -> Choice | Refusal:
    rows, columns = spec.shape
    if spec.act is not None:
        return Refusal(f"{form} with inputs in {spec.act}: bitsandbytes rounds inputs of int8(channel) only")
    if columns % form.size:
        dividing = sorted((size for size in BLOCKS if columns % size == 0), key=lambda size: abs(size - form.size))
        advice = f"Give block={dividing[0]}" if dividing else "Leave the layer in float"
        return Refusal(
            f"{form}: {columns} columns are no multiple of the block, and bitsandbytes decodes blocks that run on from "
            f"row to row wrongly on CPUs. {advice}"
        )
    if form.size not in BLOCKS:
        return Refusal(f"{form}: bitsandbytes has blocks of {', '.join(map(str, BLOCKS))}")
    blocks = form.blocks(spec.shape)
    shapes: dict[str, TensorSpec] = {
        "weight": ((-(-rows * columns // 2), 1), torch.uint8),
        "weight.absmax": ((blocks,), torch.uint8 if form.double else torch.float32),
        "weight.quant_map": ((16,), torch.float32),
        f"weight.quant_state.bitsandbytes__{form.table}": ((len(_state(form, spec.shape, 0.0)),), torch.uint8),
    }
    if form.double:
        shapes["weight.nested_absmax"] = ((-(-blocks // tables.NESTED_BLOCK),), torch.float32)
        shapes["weight.nested_quant_map"] = ((256,), torch.float32)
    return Choice(f"bnb_{form.table}", "works", shapes, NOTE, BFLOAT16_KERNEL, spec.bias_bytes)


def _table_tensors(weight: QuantTensor, form: Lookup) -> dict[str, Tensor]:
    codes, _, table = form.unpack(weight.tensors, weight.shape)
    stored = weight.tensors
    offset = float(stored["scale_mean"]) if form.double else 0.0
    state = torch.frombuffer(bytearray(_state(form, weight.shape, offset)), dtype=torch.uint8)
    found = {
        "weight": nibbles(codes, table).reshape(-1, 1),
        "weight.absmax": stored["scale"].contiguous(),
        "weight.quant_map": table.clone(),
        f"weight.quant_state.bitsandbytes__{form.table}": state,
    }
    if form.double:
        found["weight.nested_absmax"] = stored["scale_max"].contiguous()
        found["weight.nested_quant_map"] = tables.dynamic_map().clone()
    return found


def _state(form: Lookup, shape: tuple[int, int], offset: float) -> bytes:
    """What is no tensor, as JSON. dtype is what the weight decodes to."""
    found: dict[str, Any] = {
        "quant_type": form.table,
        "blocksize": form.size,
        "dtype": "float32",
        "shape": list(shape),
    }
    if form.double:
        found |= {"nested_blocksize": tables.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(found).encode()
