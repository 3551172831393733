"""EXL3's layout (read by exllamav3, and by GPTQModel's torch layers).

Per module: `trellis` int16 (in / 16, out / 16, 16 · bits), the symbols of each tile of 16 by 16 as one stream;
`suh` (in) and `svh` (out) float16, signs and scales; `mcg` or `mul1` int32 (), which says by what states are
multiplied, neither for the code 3inst. Each layer has a width and a code of its own. exllamav3's kernels compute in
float16, GPTQModel's torch layers, and this package, in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.layout import Choice, Packed, refuse_common, weight_only
from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.trellis import BLOCK, Trellis
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths.trellis import MULTIPLIERS
from compress.target import Refusal

NOTE = "for exllamav3 on an NVIDIA GPU, or GPTQModel; this package decodes the weights to float"
# of exllamav3, whose files these are like
VERSION = "1.4.1"


class Exl3:
    """See compress.export.checkpoint.layout.Layout."""

    name = "exl3"
    transforms = False
    expert_reader = ""
    config_file = "quantization_config.json"

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes trellises with Hadamard matrices of order 128, inside the blocks."""
        form = spec.format
        refused = refuse_common(spec, "EXL3") or weight_only(spec, "EXL3")
        if refused is not None:
            return refused
        if not isinstance(form, Trellis):
            return Refusal(f"{form}: EXL3 stores trellises only. Give trellis(…), or another target")
        if spec.kind is LayerKind.EXPERT:
            return Refusal(f"{form}: experts are not written as EXL3 here. Leave them in float", usage=False)
        if form.block != BLOCK:
            return Refusal(f"{form}: EXL3's Hadamard matrices have order {BLOCK}. Leave out block")
        return Choice("exl3", "works", _specs(spec, form), NOTE, extra_bytes=spec.bias_bytes, decodes=True)

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """Nothing: each layer has settings of its own."""
        return {}

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor) and isinstance(weight.format, Trellis)
        code = weight.format.code
        return weight.tensors | ({} if code == "3inst" else {code: _marker(code)})

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """See Layout. `bits` is the mean, as a reader shows it; what a layer has stands in `tensor_storage`."""
        forms = [_form(item.spec) for item in packed]
        sizes = [prod(item.spec.shape) for item in packed]
        mean = sum(form.bits * size for form, size in zip(forms, sizes, strict=True)) / sum(sizes)
        weights = Counter[str]()
        for form, size in zip(forms, sizes, strict=True):
            weights[form.code] += size
        return {
            "quant_method": "exl3",
            "version": VERSION,
            "bits": round(mean, 2),
            "head_bits": 16,
            "codebook": weights.most_common(1)[0][0],  # readers know no word for several
            "tensor_storage": {item.module: _storage(item) for item in packed},
        }


def _form(spec: LayerSpec) -> Trellis:
    assert isinstance(spec.format, Trellis)
    return spec.format


def _marker(code: str) -> Tensor:
    """The bits of an unsigned number of 32."""
    return torch.tensor(MULTIPLIERS[code] - (1 << 32), dtype=torch.int32)


def _specs(spec: LayerSpec, form: Trellis) -> dict[str, TensorSpec]:
    marker: dict[str, TensorSpec] = {} if form.code == "3inst" else {form.code: ((), torch.int32)}
    return form.tensor_specs(spec.shape) | marker


def _storage(item: Packed) -> dict[str, Any]:
    """What readers learn of a module before they load it."""
    form = _form(item.spec)
    specs = _specs(item.spec, form)
    if item.spec.has_bias:
        specs = specs | {"bias": ((item.spec.shape[0],), item.spec.stored_bias_dtype)}
    stored = {
        f"{item.module}.{name}": {
            "shape": list(shape),
            "n_bytes": prod(shape) * dtype.itemsize,
            "dtype": str(dtype),
            "torch_dtype": str(dtype).removeprefix("torch."),  # GPTQModel's name for it
        }
        for name, (shape, dtype) in specs.items()
    }
    marker = {} if form.code == "3inst" else {f"{form.code}_multiplier": MULTIPLIERS[form.code]}
    return {"stored_tensors": stored, "quant_format": "exl3", "bits_per_weight": form.bits, **marker}
