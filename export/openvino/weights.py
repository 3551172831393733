"""Weights in OpenVINO's graph: constants of 4 or 8 bits, converted, shifted and scaled as its kernels know it.

Each is kept in a file until the model is written, so that one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.export.onnx import conv as convolution
from compress.export.onnx.dynamic_quantize import signed_weight
from compress.export.onnx.lowering import Source
from compress.export.openvino.lowering import WEIGHT
from compress.export.openvino.runtime import load_openvino
from compress.formats.base import QuantTensor
from compress.formats.int_grid import IntGrid
from compress.layer import LayerKind, LayerSpec


def put_in(model: Any, sources: Mapping[str, Source], scratch: Path) -> list[Any]:
    """Replace every open weight of an OpenVINO model, in place. sources: by layer name. Returns what must outlive the
    model: its constants point into it."""
    kept: list[Any] = []
    for parameter in list(model.get_parameters()):
        name = parameter.get_friendly_name()
        if not name.startswith(WEIGHT):
            continue
        source = sources[name.removeprefix(WEIGHT)]
        decoded = _Builder(source.spec, scratch, kept).weight(source)
        for use in list(parameter.output(0).get_target_inputs()):
            node = use.get_node()
            if node.get_type_name() == "Transpose":
                _multiply_turned(node, decoded)
            else:
                use.replace_source_output(decoded.output(0))
        model.remove_parameter(parameter)
    return kept


def _multiply_turned(transpose: Any, decoded: Any) -> None:
    """Let the products that read a transposed weight turn it themselves."""
    from openvino import opset13

    for use in list(transpose.output(0).get_target_inputs()):
        old = use.get_node()
        new = opset13.matmul(old.input_value(0), decoded, transpose_a=False, transpose_b=True)
        for reader in list(old.output(0).get_target_inputs()):
            reader.replace_source_output(new.output(0))
        new.output(0).get_tensor().set_names(old.output(0).get_names())


class _Builder:
    """The nodes of one weight."""

    def __init__(self, spec: LayerSpec, scratch: Path, kept: list[Any]) -> None:
        from openvino import opset13

        self._spec, self._scratch, self._kept = spec, scratch, kept
        self._opset, self._ov = opset13, load_openvino()

    def weight(self, source: Source) -> Any:
        """(out, in) float32, or (out, in/groups, h, w)."""
        spec = source.spec
        if spec.format is None:
            stored = source.read().weight
            assert isinstance(stored, Tensor)
            return self._float(stored)
        if spec.act is not None:
            codes, scale = signed_weight(source)
            node = self._opset.multiply(self._wide(self._constant(codes, "i8")), self._constant(scale[:, None], "f32"))
            return self._shaped(node)
        return self._shaped(self._grid(source))

    def _float(self, stored: Tensor) -> Any:
        kind = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}[stored.dtype]
        node = self._constant(stored, kind)
        return self._shaped(node if kind == "f32" else self._wide(node))

    def _grid(self, source: Source) -> Any:
        """Codes of an integer grid, decoded: (out, in) or (out, groups, columns per group)."""
        weight = source.read().weight
        assert isinstance(weight, QuantTensor) and isinstance(weight.format, IntGrid)
        codes, scale, zero = weight.format.unpack(weight.tensors, weight.shape)
        rows, groups = scale.shape
        shape = (rows, -1) if groups == 1 else (rows, groups, -1)
        aside = (rows, 1) if groups == 1 else (rows, groups, 1)
        bits = source.choice.stored_bits
        if weight.format.scheme in ("symmetric", "signed"):
            signed = (codes.to(torch.int16) - 2 ** (weight.format.bits - 1)).to(torch.int8)
            node = self._wide(self._constant(signed.reshape(shape), f"i{bits}"))
        else:
            node = self._wide(self._constant(codes.reshape(shape), f"u{bits}"))
            kind = "f16" if weight.format.scheme == "float_zero" else f"u{bits}"
            node = self._opset.subtract(node, self._wide(self._constant(zero.reshape(aside), kind)))
        return self._opset.multiply(node, self._wide(self._constant(scale.reshape(aside), "f16")))

    def _shaped(self, node: Any) -> Any:
        spec = self._spec
        shape = convolution.weight_shape(spec) if spec.kind is LayerKind.CONV else spec.shape
        if list(node.get_output_shape(0)) == list(shape):
            return node
        return self._opset.reshape(node, np.asarray(shape, np.int64), special_zero=False)

    def _wide(self, node: Any) -> Any:
        return self._opset.convert(node, "f32")

    def _constant(self, values: Tensor, kind: str) -> Any:
        """A constant whose values lie in a file, 4-bit codes two in a byte, the first one lower."""
        values = values.detach().contiguous()
        shape = list(values.shape)
        if kind in ("i4", "u4"):
            flat = values.reshape(-1).to(torch.int16) & 15
            flat = torch.nn.functional.pad(flat, (0, flat.numel() % 2))
            array = (flat[0::2] | flat[1::2] << 4).to(torch.uint8).numpy()
        elif kind == "bf16":
            array = values.view(torch.uint16).numpy()
        else:
            array = values.numpy()
        path = self._scratch / f"{len(self._kept)}.npy"
        np.save(path, array)
        self._kept.append(np.load(path, mmap_mode="c"))
        tensor = self._ov.Tensor(self._kept[-1], self._ov.Shape(shape), getattr(self._ov.Type, kind))
        return self._ov.op.Constant(tensor, shared_memory=True)
