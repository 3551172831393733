"""What readers need, and how compressed-tensors' is told to decode."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.schemes import activation_format
from compress.layer import ActSpec

# quant_method → the packages that transformers reads it with, the leading one first
PACKAGES: dict[str | None, tuple[str, ...]] = {
    "compressed-tensors": ("compressed_tensors",),
    "gptq": ("gptqmodel", "optimum"),
    "awq": ("gptqmodel", "accelerate"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "aqlm": ("aqlm", "accelerate"),
    "vptq": ("vptq", "accelerate", "sentence_transformers"),
    "exl3": ("gptqmodel",),
}
NVFP4 = "nvfp4-pack-quantized"


PACKED_ZERO = (
    "transformers loads no packed zero points (of compressed-tensors 0.20 it expects them unpacked): "
    "compressed-tensors itself decoded the weights here, one module at a time, and the folder as a whole has not run "
    "in another tool"
)


PACKED_EXPERTS = (
    "transformers reads no packed experts of this layout (GPTQModel does, by itself): this package's own reader, "
    "written from the format's description, decoded the weights, and the folder has not run in another tool"
)
VPTQ_BY_LAYERS = (
    "transformers loads VPTQ on CUDA GPUs only, and vptq's own loader wants transformers 4: vptq's layers read and "
    "decoded the weights here, one module at a time, and the folder as a whole has not run in another tool"
)
EXL3_BY_LAYERS = (
    "transformers loads no EXL3 files: GPTQModel's layers read and decoded the weights here, one module at a time, and "
    "the folder as a whole has not run in another tool"
)
_EXPERT = re.compile(r"[.]experts[.][0-9]+[.]\w+[.]qweight$")


def has_packed_experts(names: Iterable[str]) -> bool:
    """Whether a GPTQ or AWQ folder with these tensors has experts that transformers cannot load."""
    return any(_EXPERT.search(name) for name in names)


def has_packed_zero(config: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors config has a group that transformers cannot load: see `PACKED_ZERO`."""
    return any(_packs_zero(group) for group in config["config_groups"].values())


def _packs_zero(group: Mapping[str, Any]) -> bool:
    weights = group["weights"]
    return group["format"] == "pack-quantized" and not weights["symmetric"] and weights["strategy"] != "tensor"


def needs_float32(config: Mapping[str, Any]) -> bool:
    """Whether a folder must be decoded beforehand to be computed exactly.

    transformers decodes packed experts to float16, and bitsandbytes' kernels round their inputs, to int8 or bfloat16.
    NVFP4 is left to `decode`: see there.
    """
    if config.get("quant_method") == "bitsandbytes":
        return True
    if config.get("quant_method") != "compressed-tensors":
        return False
    groups = config["config_groups"].values()
    return all(group["input_activations"] is None and group["format"] != NVFP4 for group in groups)


def decompress_files(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A folder's tensors by name, each packed module decoded by compressed-tensors, float32.

    Groups without rounded inputs only, since what is returned has none.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    found = dict(tensors)
    for group in config["config_groups"].values():
        scheme = QuantizationScheme.model_validate(group)
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        for module in _members(found, group["targets"]):
            names = [name for name in found if name.startswith(f"{module}.weight")]
            own = {name.removeprefix(f"{module}."): found.pop(name) for name in names}
            own = {name: value.float() if value.is_floating_point() else value for name, value in own.items()}
            found[f"{module}.weight"] = compressor.decompress(own, scheme)["weight"].float()
    return found


def _members(tensors: Mapping[str, Tensor], targets: list[str]) -> list[str]:
    """The packed modules of a group that names them, or the class of all."""
    packed = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return [
        name
        for name in packed
        if targets == ["Linear"] or name in targets or any(re.match(pattern, name) for pattern in patterns)
    ]


def decode(model: Any, exact: bool) -> None:
    """Decompress a model that compressed-tensors holds, and bring all of it to float32.

    Its own forward hook would do so at the first call, but leaves 4-bit floats in bfloat16, which float32 inputs do
    not go with. exact: 4-bit floats are decoded in float32, not rounded to bfloat16 first.
    """
    from compress.export.checkpoint.runtime import quiet

    whole = {module: _whole_nvfp4(module) for module in model.modules() if exact and _is_nvfp4(module)}
    with quiet():
        model.hf_quantizer.compressor.decompress_model(model)
    for module, weight in whole.items():
        del module.weight  # what is put over it would be cast to its dtype
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
    torch.nn.Module.float(model)  # transformers refuses its own `float` for what was quantized


def _is_nvfp4(module: Any) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return scheme is not None and str(getattr(scheme.format, "value", scheme.format)) == NVFP4


def _whole_nvfp4(module: Any) -> torch.Tensor:
    """compressed-tensors' own unpacking and decoding, in float32."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = module.weight_packed
    values = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)
    scale = module.weight_scale.to(torch.float32)
    whole: Tensor = dequantize(
        values,
        scale,
        args=module.quantization_scheme.weights,
        global_scale=module.weight_global_scale,
        dtype=torch.float32,
    )
    return whole


def our_rounding(model: Any) -> None:
    """Round dynamic inputs by our own grids: compressed-tensors divides symmetric integers by 127.5, not by 127."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        args = getattr(scheme, "input_activations", None)
        if args is None or args.dynamic is not True:  # those of caches are static
            continue
        module.quantization_enabled = False
        act = ActSpec(activation_format(args))
        module.register_forward_pre_hook(lambda _, inputs, act=act: (act.round(inputs[0]), *inputs[1:]))
