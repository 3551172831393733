"""The packages aqlm, vptq and gptqmodel (for EXL3), told to decode what they read."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import InputError

EXL3_TENSORS = ("trellis", "suh", "svh", "mcg", "mul1")


def decode_aqlm(model: Any) -> None:
    """Put a float layer in the place of each of aqlm's, with the weight that its own code decodes.

    Its CPU kernel for 256 entries adds to one output from several threads at once, and permutes the stored codes at the
    first call (aqlm 1.1.7).
    """
    from aqlm import QuantizedLinear
    from aqlm.utils import _dequantize_weight, unpack_int_data

    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        codes = unpack_int_data(module.codes, module.nbits_per_codebook)
        weight = _dequantize_weight(codes, module.codebooks, module.scales).detach()
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = module.bias
        model.set_submodule(name, linear)


def decode_vptq(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A folder's tensors by name, each packed module read by vptq's own layer and decoded by its torch code, float32.

    Raises: InputError where the installed package does not work, or a layer has tensors that it does not know.
    """
    layer_class, dequantize = _vptq()
    found = dict(tensors)
    for module, settings in config["config_for_layers"].items():
        prefix = f"{module}."
        own = {name.removeprefix(prefix): found.pop(name) for name in list(found) if name.startswith(prefix)}
        layer = layer_class(**settings, enable_proxy_error=False, dtype=torch.float32)
        try:
            layer.load_state_dict(own)
        except RuntimeError as error:
            raise InputError(f"vptq's layer does not take the tensors of {module} ({error}).") from error
        found[f"{module}.weight"] = _weight(layer, dequantize)
        if "bias" in own:
            found[f"{module}.bias"] = own["bias"]
    return found


def decode_exl3(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A folder's tensors by name, each packed module read and decoded by GPTQModel's torch layer, float32.

    Raises: InputError where the installed package does not work.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from gptqmodel.nn_modules.exllamav3_torch import ExllamaV3TorchLinear
    except (ImportError, OSError) as error:
        raise InputError(f"The package gptqmodel is installed, but does not work here ({error}).") from error
    found = dict(tensors)
    for module in config["tensor_storage"]:
        own = {name: found.pop(f"{module}.{name}") for name in EXL3_TENSORS if f"{module}.{name}" in found}
        sizes = {"in_features": len(own["suh"]), "out_features": len(own["svh"])}
        layer = ExllamaV3TorchLinear.from_tensors(**sizes, name=module, tensors=own)
        found[f"{module}.weight"] = layer.get_weight_tensor(torch.float32).T.contiguous()
    return found


def _vptq() -> tuple[Any, Any]:
    """Its layer and its decoder. It prints at import whether its kernels are there."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from vptq.layers import VQuantLinear
            from vptq.ops import dequant
    except (ImportError, OSError) as error:
        raise InputError(f"vptq is installed but cannot be imported ({error}). Install what it asks for.") from error
    return VQuantLinear, dequant


@torch.no_grad()
def _weight(layer: Any, dequantize: Any) -> Tensor:
    """(out, in) float32."""
    outliers = layer.enable_outlier
    shape = 1, layer.num_outlier_centroids, layer.outlier_vector_len
    books = layer.num_codebooks, layer.num_centroids, layer.vector_len
    weight: Tensor = dequantize(
        indices=layer.indices,
        centroids=layer.centroids.weight.view(books),
        res_indices=None,
        res_centroids=layer.res_centroids.weight if layer.enable_residual else None,
        weight_scale=layer.weight_scale,
        weight_bias=layer.weight_bias,
        num_centroids=layer.num_centroids,
        num_res_centroids=layer.num_res_centroids,
        num_codebooks=layer.num_codebooks,
        group_size=layer.group_size,
        vector_len=layer.vector_len,
        padding=layer.padding,
        is_indice_packed=True,
        enable_residual=layer.enable_residual,
        enable_norm=True,
        enable_perm=layer.enable_perm,
        perm=getattr(layer, "perm", None),
        enable_outlier=outliers,
        outlier_indices=layer.outlier_indices,
        outlier_centroids=layer.outlier_centroids.weight.view(shape) if outliers else None,
        num_outlier_centroids=layer.num_outlier_centroids,
        outlier_padding=layer.outlier_padding,
        outlier_size=layer.outlier_size,
        outlier_vector_len=layer.outlier_vector_len,
    )
    return weight
