"""AQLM's layout (read by transformers with the package aqlm; Egiazarian et al. 2024, arXiv 2401.06118).

Per module: `codes` (out, in / vector, stages), int8 for codebooks of up to 256 entries and int16 above, codes of the
upper half stored as negative numbers; `codebooks` float16 (stages, entries, 1, vector); `scales` float16 (out, 1, 1,
1). One vector length, number of entries and of codebooks holds for the whole model, and each linear layer has codebooks
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.layout import Choice, Packed, refuse_common, weight_only
from compress.export.checkpoint.packing import wrap_codes
from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.codebook import Codebook
from compress.layer import Layer, LayerKind, LayerSpec
from compress.target import Refusal

NOTE = "for transformers with aqlm (on a CPU with dtype=torch.float32); this package decodes the weights to float"


class Aqlm:
    """See compress.export.checkpoint.layout.Layout."""

    name = "aqlm"
    transforms = False
    expert_reader = ""
    config_file = ""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes codebooks of vectors along the inputs, with a scale per row or none, inside the blocks."""
        form = spec.format
        refused = refuse_common(spec, "AQLM") or weight_only(spec, "AQLM")
        if refused is not None:
            return refused
        if not isinstance(form, Codebook):
            return Refusal(f"{form}: AQLM stores codebooks only. Give codebook(…), or another target")
        if spec.kind is LayerKind.EXPERT:
            return Refusal(f"{form}: AQLM's reader has no experts. Leave them in float", usage=False)
        if form.axis == "out":
            return Refusal(
                f"{form}: AQLM's vectors run along the inputs. Leave out the word out, or export for checkpoint-vptq"
            )
        if form.scale == "column":
            return Refusal(f"{form}: AQLM scales rows. Give scale=row or scale=none")
        if form.groups > 1:
            return Refusal(f"{form}: AQLM has one set of codebooks per layer. Leave out groups")
        if form.extras:
            return Refusal(
                f"{form}: AQLM stores codes, codebooks and scales only. Leave out {' and '.join(form.extras)}"
            )
        return Choice("aqlm", "works", _specs(spec, form), _note(form), extra_bytes=spec.bias_bytes, decodes=True)

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """One vector length, number of entries and of stages for all."""
        sizes = {name: _sizes(spec) for name, spec in specs.items() if spec.format is not None}
        if len(set(sizes.values())) <= 1:
            return {}
        listed = ", ".join("{} x {} entries of {}".format(*found) for found in sorted(set(sizes.values())))
        reason = f"codebooks of {listed} in one model: AQLM has one size for all layers. Give them one"
        return dict.fromkeys(sizes, Refusal(reason))

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor) and isinstance(weight.format, Codebook)
        form, rows = weight.format, weight.shape[0]
        codes, books, scale = form.unpack(weight.tensors, weight.shape)
        return {
            "codes": wrap_codes(codes, form.bits),
            "codebooks": books[0].half()[:, :, None].contiguous(),
            "scales": scale.half().expand(rows, 1)[:, :, None, None].contiguous(),
        }

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """See Layout. Modules that stay in float are named as transformers 5 compares them, and as older ones did, by
        the parameter."""
        stages, entries, vector = _sizes(packed[0].spec)
        return {
            "quant_method": "aqlm",
            "nbits_per_codebook": entries.bit_length() - 1,
            "num_codebooks": stages,
            "out_group_size": 1,
            "in_group_size": vector,
            "linear_weights_not_to_quantize": [name for each in plain for name in (each, f"{each}.weight")],
        }


def _sizes(spec: LayerSpec) -> tuple[int, int, int]:
    """Stages, entries and vector length."""
    form = spec.format
    assert isinstance(form, Codebook)
    return form.stages, form.entries, form.vector


def _note(form: Codebook) -> str:
    """What of the format takes more room here."""
    stored = 8 if form.bits <= 8 else 16
    parts = [NOTE]
    if form.bits != stored:
        parts.append(f"codes of {form.bits} bits take {stored} in these files")
    if form.share > 1:
        parts.append("shared codebooks are written for each layer")
    return "; ".join(parts)


def _specs(spec: LayerSpec, form: Codebook) -> dict[str, TensorSpec]:
    rows, columns = spec.shape
    return {
        "codes": ((rows, columns // form.vector, form.stages), torch.int8 if form.bits <= 8 else torch.int16),
        "codebooks": ((form.stages, form.entries, 1, form.vector), torch.float16),
        "scales": ((rows, 1, 1, 1), torch.float16),
    }
