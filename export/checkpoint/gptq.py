"""The GPTQ layout, version 2 (read by GPTQModel, vLLM, SGLang, exllamav2).

Per module: `qweight` int32 (in · b / 32, out), packed along the inputs; `qzeros` int32 (groups, out · b / 32), packed
along the outputs; `scales` float16 (groups, out); `g_idx` int32 (in,), the group of each input. A zero point is stored
as it is; version 1 stores it less one, and so loses an asymmetric zero point of 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress import __version__
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
from compress.export.checkpoint.packing import pack_words
from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.int_grid import IntGrid
from compress.layer import Layer, LayerSpec
from compress.target import Refusal

BITS = (2, 3, 4, 8)
NOTE = "for engines with GPTQ kernels (GPTQModel, vLLM); torch here decodes the weights to float and runs no faster"


class Gptq:
    """See compress.export.checkpoint.layout.Layout."""

    name = "gptq"
    transforms = False
    expert_reader = "GPTQModel"
    config_file = ""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes integer weights of 2, 3, 4 and 8 bits inside the blocks and of experts, in whole groups and words."""
        form = spec.format
        refused = refuse_common(spec, "GPTQ") or weight_only(spec, "GPTQ")
        if refused is not None:
            return refused
        if not isinstance(form, IntGrid) or form.bits not in BITS:
            return Refusal(f"{form}: GPTQ stores int2, int3, int4 and int8. Give one of them, or another target")
        rows, columns = spec.shape[0] // parts_of(spec), spec.shape[1]
        if columns % 32 or rows % 32:
            return Refusal(f"{form}: GPTQ packs whole words of 32 bits, so {rows} rows and {columns} columns must be "
                           "multiples of 32. Leave the layer in float", usage=False)  # fmt: skip
        if columns % size_of(form, columns):
            return Refusal(f"{form}: {columns} columns are no multiple of the group {form.group}")
        return Choice("gptq_v2", "works", _specs(spec, form), note_of(spec, NOTE), extra_bytes=spec.bias_bytes)

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """Nothing: `dynamic` in the config tells what differs."""
        return {}

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
        form, columns = weight.format, weight.shape[1]
        codes, scale, zero = form.unpack(weight.tensors, weight.shape)
        return {
            "qweight": pack_words(codes, form.bits).T.contiguous(),
            "qzeros": pack_words(zero.T.contiguous(), form.bits),
            "scales": half(scale.T),
            "g_idx": torch.arange(columns, dtype=torch.int32) // size_of(form, columns),
        }

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """The settings of most layers, and in `dynamic` those that differ and those that stay in float."""
        settings = [_settings(item.spec) for item in packed]
        usual = Counter(tuple(sorted(found.items())) for found in settings).most_common(1)[0][0]
        common = dict(usual)
        dynamic: dict[str, dict[str, Any]] = {
            f"+:^{re.escape(item.module)}$": found
            for item, found in zip(packed, settings, strict=True)
            if found != common
        }
        dynamic |= {f"-:^{re.escape(name)}$": {} for name in plain}
        return {
            **common,
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "format": "gptq_v2",
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": False,
            "pack_dtype": "int32",
            "damp_percent": 0.01,
            "dynamic": dynamic,
            "meta": {"quantizer": [f"compress:{__version__}"]},
        }


def _settings(spec: LayerSpec) -> dict[str, Any]:
    form = spec.format
    assert isinstance(form, IntGrid)
    return {"bits": form.bits, "group_size": group_of(form), "sym": form.scheme != "asymmetric"}


def _specs(spec: LayerSpec, form: IntGrid) -> dict[str, TensorSpec]:
    rows, columns = spec.shape
    groups = columns // size_of(form, columns)
    return {
        "qweight": ((columns * form.bits // 32, rows), torch.int32),
        "qzeros": ((groups, rows * form.bits // 32), torch.int32),
        "scales": ((groups, rows), torch.float16),
        "g_idx": ((columns * parts_of(spec),), torch.int32),
    }
