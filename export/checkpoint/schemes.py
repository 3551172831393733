"""Formats in the words of compressed-tensors: the arguments of weights and of input activations, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.formats.base import Format, TensorSpec
from compress.formats.float_grid import FloatGrid
from compress.formats.int_grid import IntGrid
from compress.layer import ActSpec
from compress.target import Refusal

Args = dict[str, Any]

FP8 = (4, 3)
FP4 = (2, 1)


def arguments(
    bits: int,
    kind: str,
    strategy: str,
    *,
    symmetric: bool = True,
    group: int | None = None,
    dynamic: bool | str = False,
) -> Args:
    """QuantizationArgs as config.json has them."""
    found: Args = {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "dynamic": dynamic,
    }
    return found | ({"observer": None} if dynamic is True else {})


def weight_scheme(form: Format) -> tuple[str, Args] | Refusal:
    """The name of the compressor for weights alone, and their arguments."""
    if isinstance(form, IntGrid) and form.group != "token":
        strategy = "group" if isinstance(form.group, int) else form.group
        size = form.group if isinstance(form.group, int) else None
        return "pack-quantized", arguments(
            form.bits, "int", strategy, symmetric=form.scheme != "asymmetric", group=size
        )
    if isinstance(form, FloatGrid):
        return _float_scheme(form)
    return Refusal(
        f"{form}: compressed-tensors has no such format. Stored are int2 … int8, fp8_e4m3, mxfp8_e4m3, mxfp4 and nvfp4"
    )


def _float_scheme(form: FloatGrid) -> tuple[str, Args] | Refusal:
    kind = (form.exponent, form.mantissa)
    if kind == FP8 and form.scale == "float32" and form.group in ("channel", "tensor"):
        return "float-quantized", arguments(8, "float", str(form.group))
    if kind == FP8 and (form.group, form.scale) == (32, "e8m0"):
        return "mxfp8-quantized", arguments(8, "float", "group", group=32) | {"scale_dtype": "torch.uint8"}
    if kind == FP4 and (form.group, form.scale) == (32, "e8m0"):
        return "mxfp4-pack-quantized", arguments(4, "float", "group", group=32) | {"scale_dtype": "torch.uint8"}
    if kind == FP4 and (form.group, form.scale) == (16, "float8_e4m3"):
        scales = {"scale_dtype": "torch.float8_e4m3fn"}
        return "nvfp4-pack-quantized", arguments(4, "float", "tensor_group", group=16) | scales
    return Refusal(
        f"{form}: compressed-tensors stores fp8_e4m3(channel), fp8_e4m3(tensor), mxfp8_e4m3, mxfp4 and nvfp4 of the "
        "small floats"
    )


def activation_scheme(act: ActSpec) -> Args | Refusal:
    """The arguments of input activations."""
    form, dynamic = act.format, not act.static
    if isinstance(form, IntGrid) and form.bits == 8 and form.group in ("token", "tensor"):
        if act.static and form.group == "token":
            return Refusal(f"inputs in {act}: compressed-tensors has static grids per tensor only. Give int8(tensor)")
        return arguments(8, "int", form.group, symmetric=form.scheme == "symmetric", dynamic=dynamic)
    if isinstance(form, FloatGrid):
        found = _float_activations(form, act)
        if found is not None:
            return found
    return Refusal(
        f"inputs in {act}: compressed-tensors rounds them to int8(token), int8(tensor), fp8_e4m3(token), "
        "fp8_e4m3(tensor), mxfp4, or nvfp4 with a static range"
    )


def _float_activations(form: FloatGrid, act: ActSpec) -> Args | None:
    kind, dynamic = (form.exponent, form.mantissa), not act.static
    if kind == FP8 and form.scale == "float32" and (form.group == "tensor" or (form.group == "token" and dynamic)):
        return arguments(8, "float", str(form.group), dynamic=dynamic)
    if kind == FP4 and (form.group, form.scale) == (16, "float8_e4m3") and act.static:
        scales = {"scale_dtype": "torch.float8_e4m3fn"}
        return arguments(4, "float", "tensor_group", group=16, dynamic="local") | scales
    if kind == FP4 and (form.group, form.scale) == (32, "e8m0") and dynamic:
        return arguments(4, "float", "group", group=32, dynamic=True) | {"scale_dtype": "torch.uint8"}
    return None


def activation_format(args: Any) -> IntGrid | FloatGrid:
    """The grid that a reader's QuantizationArgs (of input activations) mean: the way back of `activation_scheme`."""
    strategy = str(getattr(args.strategy, "value", args.strategy))
    if str(getattr(args.type, "value", args.type)) == "int":
        scheme = "symmetric" if args.symmetric else "asymmetric"
        return IntGrid(args.num_bits, strategy, scheme)  # type: ignore[arg-type]
    if args.num_bits == 8:
        return FloatGrid(*FP8, strategy, "float32")  # type: ignore[arg-type]
    return FloatGrid(*FP4, args.group_size, "e8m0" if args.group_size == 32 else "float8_e4m3")


def input_specs(act: ActSpec | None) -> dict[str, TensorSpec]:
    """Shapes and dtypes of a static grid's tensors; none where it is fitted at run time."""
    if act is None or not act.static:
        return {}
    if isinstance(act.format, FloatGrid) and act.format.shares_peak:
        return {"input_global_scale": ((1,), torch.float32)}
    found: dict[str, TensorSpec] = {"input_scale": ((1,), torch.float32)}
    is_shifted = isinstance(act.format, IntGrid) and act.format.scheme == "asymmetric"
    return found | ({"input_zero_point": ((1,), torch.int8)} if is_shifted else {})


def input_tensors(act: ActSpec | None) -> dict[str, Tensor]:
    """A static grid's tensors, in compressed-tensors' names: a zero point counts from the middle of the codes."""
    if act is None or not act.static:
        return {}
    assert act.params is not None
    params = {name: tensor.reshape(1).float() for name, tensor in act.params.items()}
    if "global_scale" in params:
        return {"input_global_scale": params["global_scale"]}
    found = {"input_scale": params["scale"]}
    if isinstance(act.format, IntGrid) and act.format.scheme == "asymmetric":
        found["input_zero_point"] = (params["zero"] - 2 ** (act.format.bits - 1)).to(torch.int8)
    return found
