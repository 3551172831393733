"""The layouts of compressed-tensors (compressed-tensors 0.20, read by transformers, vLLM and SGLang).

Per module: `weight` or `weight_packed` with `weight_scale`, where needed `weight_zero_point`, `weight_shape`,
`weight_global_scale`; `input_scale` and the like for static activations. Words of int32 hold one dense stream of bits
per row, so that 3, 5, 6 and 7 bits cross words: versions before May 2026 put a whole number of codes into each and
read those widths wrongly, hence `version` in the config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from compress.errors import UnsupportedError
from compress.export.checkpoint import schemes
from compress.export.checkpoint.layout import (
    ROUNDED_INPUTS,
    Choice,
    Packed,
    half,
    parts_of,
    refuse_common,
)
from compress.export.checkpoint.packing import pack_words
from compress.formats.base import Format, QuantTensor, TensorSpec
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.records import Bounds
from compress.target import Refusal

NOTE = "transformers decodes the weights to float when it loads them, so it runs no faster; vLLM runs the packed form"
ODD_BITS = "readers older than compressed-tensors of May 2026 unpack 3, 5, 6 and 7 bits wrongly"
EMBEDDING = "read by transformers; vLLM takes embeddings in float only"
TIED = "a tied weight is stored for each of its users, and the tie is taken off"
# Whatever it was asked for, transformers decodes NVFP4 to bfloat16 and packed experts to their scales' float16: 0.024
# and 0.0003 of the largest logit on models of 64 and 32 features (tests), more where a route changes.
HALF_WEIGHTS = Bounds(shipped=0.1)
# What that moves falls on other points of a 4-bit grid, a quarter of the value away: 0.3 on the same models.
FOUR_BIT_INPUTS = Bounds(shipped=1.0, exact=ROUNDED_INPUTS.exact)
INT_QUANTIZED, PACKED = "int-quantized", "pack-quantized"


class CompressedTensors:
    """See compress.export.checkpoint.layout.Layout."""

    name = "compressed-tensors"
    transforms = True
    expert_reader = ""
    config_file = ""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """Takes what `schemes` knows, in whole groups, without activations for experts and embeddings."""
        answer = scheme_of(spec)
        if isinstance(answer, Refusal):
            return answer
        operator, _, inputs = answer
        notes = [NOTE]
        if isinstance(spec.format, IntGrid) and spec.format.bits in (3, 5, 6, 7):
            notes.append(ODD_BITS)
        if spec.kind is LayerKind.EMBEDDING:
            notes.append(EMBEDDING)
        if len(spec.users) > 1:
            notes.append(TIED)
        if tensor_specs(spec, operator).get("weight_zero_point", ((), None))[1] == torch.int32:
            notes.append("transformers 5.23 does not load packed zero points, vLLM does")
        rough = operator.startswith("nvfp4") or (operator == PACKED and spec.kind is LayerKind.EXPERT)
        return Choice(
            operator,
            "works",
            tensor_specs(spec, operator) | schemes.input_specs(spec.act),
            "; ".join(notes),
            _bounds(inputs, rough),
            spec.bias_bytes,
            len(spec.users),
        )

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """transformers decodes all experts of a model by one scheme, and float ones not beside packed layers."""
        experts = {name: spec for name, spec in specs.items() if spec.kind is LayerKind.EXPERT}
        forms = sorted({str(spec.format or "float") for spec in experts.values()})
        if len(forms) > 1:
            reason = f"experts in {' and '.join(forms)}: transformers reads one format for all experts. Give them one"
            return dict.fromkeys(experts, Refusal(reason))
        others = [spec for spec in specs.values() if spec.format is not None and spec.kind is not LayerKind.EXPERT]
        if forms == ["float"] and any(
            not isinstance(spec.format, FloatGrid) or spec.format.bits < 8 for spec in others
        ):
            reason = (
                "float experts beside packed layers: transformers takes the experts for packed as well, and fails. "
                "Give the experts a format too"
            )
            return dict.fromkeys(experts, Refusal(reason))
        return {}

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """See Layout."""
        weight = layer.weight
        assert isinstance(weight, QuantTensor)
        if not isinstance(weight.format, IntGrid):
            return _float_tensors(weight) | schemes.input_tensors(layer.act)
        packs = not _is_unpacked(weight.format, layer.act, layer.kind)
        return _int_tensors(weight, packs) | schemes.input_tensors(layer.act)

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """One group per scheme. A single scheme names the class Linear and lists what is left out; several name
        their modules."""
        groups: dict[str, dict[str, Any]] = {}
        members: dict[str, list[Packed]] = {}
        for item in packed:
            members.setdefault(
                f"{item.spec.format} {item.spec.act} {item.spec.kind is LayerKind.EMBEDDING}", []
            ).append(item)
        for number, items in enumerate(members.values()):
            answer = scheme_of(items[0].spec)
            if isinstance(answer, Refusal):
                raise UnsupportedError(f"{items[0].module}: {answer.reason}.")
            operator, weights, inputs = answer
            groups[f"group_{number}"] = {
                "targets": _targets(items, len(members) == 1),
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": operator,
            }
        formats = {group["format"] for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "version": metadata.version("compressed-tensors"),
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(plain),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "sparsity_config": {},
            "transform_config": {},
        }


def _bounds(inputs: schemes.Args | None, rough: bool) -> Bounds:
    if inputs is None:
        return HALF_WEIGHTS if rough else Bounds()
    return FOUR_BIT_INPUTS if inputs["num_bits"] == 4 else ROUNDED_INPUTS


def scheme_of(spec: LayerSpec) -> tuple[str, schemes.Args, schemes.Args | None] | Refusal:
    """Compressor, arguments of the weights, arguments of the inputs."""
    assert spec.format is not None
    refused = refuse_common(spec, "compressed-tensors")
    weights = schemes.weight_scheme(spec.format)
    if refused is not None or isinstance(weights, Refusal):
        return refused or weights  # type: ignore[return-value]
    operator, args = weights
    if _is_unpacked(spec.format, spec.act, spec.kind):
        operator = INT_QUANTIZED
    group = args["group_size"]
    if group and spec.shape[1] % group:
        return Refusal(f"{spec.format}: {spec.shape[1]} columns are no multiple of the group {group}")
    if spec.kind is LayerKind.EMBEDDING and operator not in (INT_QUANTIZED, "float-quantized"):
        return Refusal(
            f"{spec.format}: transformers loads no packed embedding. Leave {spec.name} in float, or give int8(channel) "
            "or fp8_e4m3(channel)"
        )
    if spec.kind is LayerKind.EXPERT and (operator, args["symmetric"]) not in EXPERT_SCHEMES:
        return Refusal(
            f"{spec.format}: of experts, transformers reads symmetric integers and fp8_e4m3, not this. Give one of them"
        )
    if spec.act is None:
        return operator, args, None
    if spec.kind is not LayerKind.LINEAR:
        return Refusal(f"inputs in {spec.act}: transformers rounds none for a {spec.kind}. Leave them in float")
    inputs = schemes.activation_scheme(spec.act)
    if isinstance(inputs, Refusal):
        return inputs
    if operator == PACKED and not args["symmetric"] and not _is_unpacked(spec.format, spec.act, spec.kind):
        return Refusal(f"{spec.format} with inputs in {spec.act}: no reader here takes asymmetric weights of that kind "
                       "with rounded inputs. Give symmetric weights, or int8")  # fmt: skip
    return operator, args, inputs


EXPERT_SCHEMES = {(PACKED, True), ("float-quantized", True)}


def _is_unpacked(form: Format, act: ActSpec | None, kind: LayerKind) -> bool:
    """Whether int8 weights are stored byte by byte: engines have kernels for that with int8 inputs, and embeddings
    load in no other way."""
    if not isinstance(form, IntGrid) or form.bits != 8:
        return False
    return kind is LayerKind.EMBEDDING or (act is not None and isinstance(act.format, IntGrid))


def _targets(items: Sequence[Packed], alone: bool) -> list[str]:
    if alone and all(item.spec.kind is not LayerKind.EMBEDDING and len(item.spec.users) == 1 for item in items):
        return ["Linear"]
    names = [item.module for item in items if item.spec.kind is not LayerKind.EXPERT]
    # transformers knows the experts' group by a pattern that names them
    leaves = sorted({_expert_pattern(item.module) for item in items if item.spec.kind is LayerKind.EXPERT})
    return names + leaves


def _expert_pattern(module: str) -> str:
    """`model.layers.3.mlp.experts.7.up_proj` → `re:.*[.]experts[.][0-9]+[.]up_proj$`."""
    path, _, leaf = module.rpartition(".")
    return f"re:.*[.]{re.escape(path.rpartition('.')[0].rpartition('.')[2])}[.][0-9]+[.]{re.escape(leaf)}$"


def tensor_specs(spec: LayerSpec, operator: str) -> dict[str, TensorSpec]:
    """Shapes and dtypes of the weight's tensors; an expert's parts as if they were one."""
    (rows, columns), form = spec.shape, spec.format
    parts = parts_of(spec)
    if isinstance(form, FloatGrid):
        return _float_specs(form, rows, columns, parts)
    assert isinstance(form, IntGrid)
    groups = columns // form.group if isinstance(form.group, int) else 1
    scale: TensorSpec = ((parts,) if form.group == "tensor" else (rows, groups), torch.float16)
    found: dict[str, TensorSpec] = {"weight_scale": scale}
    if operator == INT_QUANTIZED:
        found["weight"] = ((rows, columns), torch.int8)
    else:
        found["weight_packed"] = ((rows, -(-columns * form.bits // 32)), torch.int32)
        found["weight_shape"] = ((2 * parts,), torch.int64)
    if form.scheme == "asymmetric":
        is_packed = operator != INT_QUANTIZED and form.group != "tensor"
        packed: TensorSpec = ((-(-rows * form.bits // 32), groups), torch.int32)
        found["weight_zero_point"] = packed if is_packed else (scale[0], torch.int8)
    return found


def _float_specs(form: FloatGrid, rows: int, columns: int, parts: int) -> dict[str, TensorSpec]:
    if form.bits == 8:
        scale: TensorSpec = ((parts,) if form.group == "tensor" else (rows, 1), torch.float32)
        if form.group == 32:
            scale = ((rows, columns // 32), torch.uint8)
        return {"weight": ((rows, columns), torch.float8_e4m3fn), "weight_scale": scale}
    size = int(form.group)
    dtype = torch.float8_e4m3fn if form.shares_peak else torch.uint8
    found: dict[str, TensorSpec] = {
        "weight_packed": ((rows, columns // 2), torch.uint8),
        "weight_scale": ((rows, columns // size), dtype),
    }
    return found | ({"weight_global_scale": ((parts,), torch.float32)} if form.shares_peak else {})


def _int_tensors(weight: QuantTensor, packs: bool) -> dict[str, Tensor]:
    form = weight.format
    assert isinstance(form, IntGrid)
    codes, scale, zero = form.unpack(weight.tensors, weight.shape)
    whole, middle = form.group == "tensor", 2 ** (form.bits - 1)
    found = {"weight_scale": half(scale[0, :1] if whole else scale)}
    if packs:
        found["weight_packed"] = pack_words(codes, form.bits)
        found["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int64)
    else:
        found["weight"] = _signed(codes, middle)
    if form.scheme == "asymmetric":
        shifted = _signed(zero[0, :1] if whole else zero, middle)
        # packed, the zero points of a column of groups are one stream along the rows
        found["weight_zero_point"] = pack_words(zero.T, form.bits).T.contiguous() if packs and not whole else shifted
    return found


def _signed(codes: Tensor, middle: int) -> Tensor:
    """Unsigned codes counted from their middle, int8."""
    return (codes.to(torch.int16) - middle).to(torch.int8).contiguous()


def _float_tensors(weight: QuantTensor) -> dict[str, Tensor]:
    form, stored = weight.format, weight.tensors
    assert isinstance(form, FloatGrid)
    codes, scale = stored["codes"], stored["scale"]
    if form.bits == 8:
        shaped = scale.reshape(1) if form.group == "tensor" else scale
        return {"weight": codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": shaped.contiguous()}
    found = {"weight_packed": codes.contiguous(), "weight_scale": scale.contiguous()}
    if form.shares_peak:
        found["weight_scale"] = scale.contiguous().view(torch.float8_e4m3fn)
        found["weight_global_scale"] = stored["global_scale"].reshape(1).float()
    return found
