"""AutoAWQ's GEMM layout (read by vLLM, SGLang and, through GPTQModel, transformers).

Per module: `qweight` int32 (in, out / 8), the nibbles of a word in the order of `packing.AWQ_ORDER`; `qzeros` int32
(groups, out / 8) in the same order; `scales` float16 (groups, out). There is a zero point always, 8 where the grid is
symmetric, and one group size for the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.layout import (
    Choice,
    Packed,
    group_of,
    half,
    note_of,
    parts_of,
    refuse_common,
    size_of,
    weight_only,
)
from compress.export.checkpoint.packing import pack_awq
from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.int_grid import IntGrid
from compress.layer import Layer, LayerSpec
from compress.target import Refusal

NOTE = "for engines with AWQ kernels (vLLM, GPTQModel); torch here decodes the weights to float and runs no faster"


class Awq:
    """See compress.export.checkpoint.layout.Layout."""

    name = "awq"
    transforms = False
    expert_reader = "GPTQModel"
    config_file = ""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes int4 inside the blocks and of experts, in whole groups and words."""
        form = spec.format
        refused = refuse_common(spec, "AWQ") or weight_only(spec, "AWQ")
        if refused is not None:
            return refused
        if not isinstance(form, IntGrid) or form.bits != 4:
            return Refusal(f"{form}: AWQ stores int4 only. Give int4, or another target")
        rows, columns = spec.shape[0] // parts_of(spec), spec.shape[1]
        if rows % 8:
            return Refusal(f"{form}: AWQ packs 8 outputs into a word, and {rows} rows are no multiple of that. "
                           "Leave the layer in float", usage=False)  # fmt: skip
        if columns % size_of(form, columns):
            return Refusal(f"{form}: {columns} columns are no multiple of the group {form.group}")
        return Choice("awq", "works", _specs(spec, form), note_of(spec, NOTE), extra_bytes=spec.bias_bytes)

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """One group size for all."""
        sizes = {name: _group(spec) for name, spec in specs.items() if spec.format is not None}
        if len(set(sizes.values())) <= 1:
            return {}
        listed = ", ".join(str(size) for size in sorted(set(sizes.values())))
        reason = f"groups of {listed} in one model: AWQ has one size for all layers. Give them one"
        return dict.fromkeys(sizes, Refusal(reason))

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
        codes, scale, zero = weight.format.unpack(weight.tensors, weight.shape)
        return {
            "qweight": pack_awq(codes.T.contiguous()),
            "qzeros": pack_awq(zero.T.contiguous()),
            "scales": half(scale.T),
        }

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """See Layout."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": _group(packed[0].spec),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(plain),
            # GPTQModel passes over the list above, and would take float layers for packed ones
            "dynamic": {f"-:^{re.escape(name)}$": {} for name in plain},
        }


def _group(spec: LayerSpec) -> int:
    form = spec.format
    assert isinstance(form, IntGrid)
    return group_of(form)


def _specs(spec: LayerSpec, form: IntGrid) -> dict[str, TensorSpec]:
    rows, columns = spec.shape
    groups = columns // size_of(form, columns)
    return {
        "qweight": ((columns, rows // 8), torch.int32),
        "qzeros": ((groups, rows // 8), torch.int32),
        "scales": ((groups, rows), torch.float16),
    }
