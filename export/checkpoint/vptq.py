"""VPTQ's layout, with packed indices (read by the package vptq; Liu et al. 2024, arXiv 2409.17066).

Per module, for rows of codes that stand for `vector` neighbouring outputs each, the last row filled up: `indices` int32
(groups, ceil(out / vector), ceil(in / groups · b / 32)), of each input column the code of the main codebook in the low
bits and that of the residual one above it, b together, as one stream of bits, lowest first; `centroids.weight` and
`res_centroids.weight` float16 (groups, entries · vector); `weight_scale` and `weight_bias` float16 (in,). Outlier
columns come before these groups: `outlier_indices` int16 (1, ceil(out / vector), columns), bits of unsigned numbers,
not packed, and `outlier_centroids.weight` float16 (1, entries · vector); `perm` int16 (in,), unsigned as well, is
the column of the weight at each place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.layout import Choice, Packed, refuse_common, weight_only
from compress.export.checkpoint.packing import pack_words
from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.codebook import Codebook
from compress.layer import Layer, LayerKind, LayerSpec
from compress.target import Refusal

# What the kernels in the wheel of vptq 0.0.5.post1 are compiled for; others end with an error there (its issue #71).
VECTORS = (2, 4, 6, 8, 10, 12, 16)
MAIN_BITS = (4, 8, 10, 12, 13, 14, 15, 16)
BOTH_BITS = (4, 8, 10, 12, 15, 16)
OUTLIER_VECTOR = 4
# columns whose places its files can name
MOST_COLUMNS = 1 << 16
# columns above which its kernel for single tokens works
LEAST_COLUMNS = 257
NOTE = "for the package vptq on an NVIDIA GPU; this package decodes the weights to float"


class Vptq:
    """See compress.export.checkpoint.layout.Layout."""

    name = "vptq"
    transforms = False
    expert_reader = ""
    config_file = ""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes one or two codebooks of vectors along the outputs, with a scale per column or none, inside the blocks,
        in the sizes that its reader has kernels for."""
        form = spec.format
        refused = refuse_common(spec, "VPTQ") or weight_only(spec, "VPTQ")
        if refused is not None:
            return refused
        if not isinstance(form, Codebook):
            return Refusal(f"{form}: VPTQ stores codebooks only. Give codebook(…, out), or another target")
        if spec.kind is LayerKind.EXPERT:
            return Refusal(f"{form}: VPTQ's reader has no experts. Leave them in float", usage=False)
        wrong = _refuse_settings(form) or _refuse_columns(form, spec.shape[1])
        if wrong is not None:
            return wrong
        return Choice(
            "vptq", "works", _specs(spec, form), _note(form, spec.shape[1]), extra_bytes=spec.bias_bytes, decodes=True
        )

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """Nothing: each layer has settings of its own in the config."""
        return {}

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout. Without a scale of the format's it is 1: the kernels want one."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor) and isinstance(weight.format, Codebook)
        form, columns = weight.format, weight.shape[1]
        *outliers, main = form.pieces(weight.tensors, weight.shape)
        codes, books, _ = main.form.unpack(main.tensors, main.shape)
        runs = [run.flatten(1) for run in torch.split(codes, form.run(columns), 1)]
        stages = books.half().flatten(2).unbind(1)
        found = {
            "indices": torch.stack([pack_words(run, form.bits) for run in runs]),
            **{f"{name}.weight": book.contiguous() for name, book in zip(_books(form), stages, strict=True)},
            "weight_scale": weight.tensors.get("scale", torch.ones(columns, dtype=torch.float16)),
            "weight_bias": weight.tensors.get("bias", torch.zeros(columns, dtype=torch.float16)),
        }
        for each in outliers:
            own, entries, _ = each.form.unpack(each.tensors, each.shape)
            found["outlier_indices"] = own[None, ..., 0].to(torch.int16)
            found["outlier_centroids.weight"] = entries.half().reshape(1, -1)
        if form.only_learned:
            found["perm"] = torch.cat([each.columns for each in (*outliers, main)]).to(torch.int16)
        return found

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """See Layout."""
        return {
            "quant_method": "vptq",
            "config_for_layers": {item.module: _settings(item.spec) for item in packed},
            "modules_to_not_convert": list(plain),
        }


def _refuse_settings(form: Codebook) -> Refusal | None:
    if form.axis == "in":
        return Refusal(f"{form}: VPTQ's vectors run along the outputs. Add the word out, or export for checkpoint-aqlm")
    if form.scale == "row":
        return Refusal(f"{form}: VPTQ scales columns. Give scale=column or scale=none")
    if form.stages > 2:
        return Refusal(f"{form}: VPTQ has a main and a residual codebook. Give stages=1 or stages=2")
    if form.vector not in VECTORS:
        return Refusal(f"{form}: VPTQ's kernels have vectors of {_listed(VECTORS)}. Give one of them")
    if form.bias == "row":
        return Refusal(f"{form}: VPTQ's bias is one of columns. Give bias=column, or leave it out")
    if form.outliers and form.outlier_vector != OUTLIER_VECTOR:
        return Refusal(
            f"{form}: VPTQ's kernels have outlier columns in vectors of {OUTLIER_VECTOR}. Give "
            f"outlier_vector={OUTLIER_VECTOR}"
        )
    widths = MAIN_BITS if form.stages == 1 else BOTH_BITS
    if form.bits not in widths:
        sizes = _listed([1 << bits for bits in widths])
        return Refusal(f"{form}: VPTQ's kernels have, with stages={form.stages}, entries of {sizes}. Give one of them")
    return None


def _refuse_columns(form: Codebook, columns: int) -> Refusal | None:
    if not form.fits(columns):
        return Refusal(f"{form}: {columns} columns are no multiple of {form.groups} groups")
    if form.only_learned and columns > MOST_COLUMNS:
        return Refusal(f"{form}: VPTQ names {MOST_COLUMNS} columns at most, and there are {columns}", usage=False)
    bits = form.run(columns) * form.bits * form.stages
    if -bits % 32 >= bits:  # its reader takes the padding of a row for what is left over of whole rows
        return Refusal(
            f"{form}: VPTQ's reader wants more than 16 bits of codes per row and group, and {columns} columns in "
            f"{form.groups} group(s) have {bits}. Leave the layer in float",
            usage=False,
        )
    return None


def _listed(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _note(form: Codebook, columns: int) -> str:
    parts = [NOTE]
    if columns < LEAST_COLUMNS:
        parts.append(
            f"its kernel for single tokens wants more than {LEAST_COLUMNS - 1} columns, and this has {columns}"
        )
    if form.share > 1:
        parts.append("shared codebooks are written for each layer")
    if form.outliers:
        parts.append("codes of outlier columns take 16 bits each, and the order of all columns is written")
    if form.only_learned:
        parts.append("its kernels were not run with outliers or an order of columns, only its torch code")
    return "; ".join(parts)


def _books(form: Codebook) -> tuple[str, ...]:
    return ("centroids", "res_centroids")[: form.stages]


def _settings(spec: LayerSpec) -> dict[str, Any]:
    """The arguments of the reader's layer; the first of each pair is of outlier columns."""
    form = spec.format
    assert isinstance(form, Codebook)
    vector, entries = (form.outlier_vector, form.outlier_entries) if form.outliers else (-1, -1)
    return {
        "in_features": spec.shape[1],
        "out_features": spec.shape[0],
        "vector_lens": [vector, form.vector],
        "num_centroids": [entries, form.entries],
        "num_res_centroids": [-1, form.entries if form.stages == 2 else -1],
        "group_num": form.groups,
        "group_size": form.run(spec.shape[1]),
        "outlier_size": spec.shape[1] - form.main_columns(spec.shape[1]),
        "indices_as_float": False,
        "enable_norm": True,
        "enable_perm": bool(form.only_learned),
        "is_indice_packed": True,
        "bias": spec.has_bias,
        "vector_quant_dim": "out",
    }


def _specs(spec: LayerSpec, form: Codebook) -> dict[str, TensorSpec]:
    rows, columns = spec.shape
    words = -(-form.run(columns) * form.bits * form.stages // 32)
    book: TensorSpec = ((form.groups, form.entries * form.vector), torch.float16)
    found: dict[str, TensorSpec] = {
        "indices": ((form.groups, form.code_rows(rows), words), torch.int32),
        **{f"{name}.weight": book for name in _books(form)},
        "weight_scale": ((columns,), torch.float16),
        "weight_bias": ((columns,), torch.float16),
    }
    if form.outliers:
        count, vector = columns - form.main_columns(columns), form.outlier_vector
        found["outlier_indices"] = ((1, -(-rows // vector), count), torch.int16)
        found["outlier_centroids.weight"] = ((1, form.outlier_entries * vector), torch.float16)
    if form.only_learned:
        found["perm"] = ((columns,), torch.int16)
    return found
