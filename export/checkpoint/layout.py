"""What a layout of quantized checkpoints offers to the target, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.formats.base import QuantTensor, TensorSpec
from compress.formats.int_grid import IntGrid
from compress.hwprofiles import KernelSpeed
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models.skeleton import OUTER
from compress.records import Bounds, Kernel
from compress.target import Refusal

# A reader fits the grid of activations by itself: codes move where summation order does, as in other runtimes.
ROUNDED_INPUTS = Bounds(shipped=0.25, exact=0.25)


@dataclass(frozen=True)
class Choice:
    """How a layer is stored: the tensors of a module by their names' ends. `copies`: of one tied weight."""

    operator: str
    kernel: Kernel
    tensors: Mapping[str, TensorSpec] = field(default_factory=dict)
    note: str = ""
    bounds: Bounds = field(default_factory=Bounds)
    extra_bytes: int = 0
    copies: int = 1
    rounds_inputs: bool = False
    decodes: bool = False
    speed: KernelSpeed | None = None

    @property
    def stored_bytes(self) -> int:
        """See compress.target.Choice."""
        own = sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())
        return own * self.copies + self.extra_bytes


@dataclass(frozen=True)
class Packed:
    """A quantized module of the files: what `Layout.config` tells its reader about."""

    module: str
    spec: LayerSpec


class Layout(Protocol):
    """A way to write quantized weights."""

    name: str
    transforms: bool
    """Whether a config can tell readers to transform a layer's inputs at run time."""
    expert_reader: str
    """The reader of packed experts, where it finds them under their names in memory only; empty for any."""
    config_file: str
    """A file that holds `quantization_config` once more, as some readers look for it; empty for none."""

    def choose(self, spec: LayerSpec) -> Choice | Refusal:
        """How a quantized layer is stored. spec.format is set."""
        ...

    def together(self, specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
        """Layers (by name) that cannot be stored beside the others of the model, with the reason."""
        ...

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """The tensors of one module by the ends of their names, biases apart."""
        ...

    def config(self, packed: Sequence[Packed], plain: Sequence[str]) -> dict[str, Any]:
        """`quantization_config`. plain: names of the modules that stay in float."""
        ...


def rows_of(layer: Layer, start: int, stop: int) -> Layer:
    """Some output rows of a layer. Tensors that all rows share are kept whole."""
    weight, rows = layer.weight, layer.shape[0]
    bias = None if layer.bias is None else layer.bias[start:stop]
    if (start, stop) == (0, rows):
        return layer
    if not isinstance(weight, QuantTensor):
        return replace(layer, weight=weight[start:stop], bias=bias)
    tensors = {
        name: tensor[start:stop].contiguous() if tensor.shape[0] == rows else tensor
        for name, tensor in weight.tensors.items()
    }
    return replace(layer, weight=QuantTensor(weight.format, tensors, (stop - start, weight.shape[1])), bias=bias)


def plain_choice(spec: LayerSpec) -> Choice:
    """A layer that stays in the source's dtype."""
    weight: TensorSpec = (spec.shape, spec.source_dtype)
    return Choice("dense", "fast", {"weight": weight}, extra_bytes=spec.bias_bytes)


def parts_of(spec: LayerSpec) -> int:
    """Modules of the files that share a layer's rows: gate and up of an expert are one tensor in memory."""
    return 2 if spec.kind is LayerKind.EXPERT and "gate_up" in spec.name else 1


def is_outer(spec: LayerSpec) -> bool:
    """An embedding or the head: what readers of older layouts keep in float."""
    return spec.segment == OUTER


def refuse_common(spec: LayerSpec, name: str) -> Refusal | None:
    """What no layout of this kind stores: (in, out) weights, and layers of other kinds."""
    if spec.turned and spec.kind is LayerKind.LINEAR:
        return Refusal(
            f"{spec.format}: this model keeps the weight as (in, out) in a Conv1D, which readers of {name} do not "
            "replace. Leave the layer in float, or export for onnx",
            usage=False,
        )
    if spec.turned:
        return Refusal(
            f"{spec.format}: this model's files hold all experts in one tensor, for which {name} has no form. Leave "
            "them in float, or export for onnx",
            usage=False,
        )
    if spec.kind is LayerKind.CONV:
        return Refusal(f"{spec.format}: {name} holds linear layers, not convolutions. Leave it in float", usage=False)
    if isinstance(spec.format, IntGrid) and spec.format.scheme == "float_zero":
        return Refusal(f"{spec.format}: {name} stores whole zero points only. Give asymmetric, or export for onnx")
    if spec.act is not None and isinstance(spec.act.format, IntGrid) and spec.act.format.outliers is not None:
        return Refusal(f"inputs in {spec.act}: {name} keeps no outliers in float. Give int8(token)")
    return None


def half(tensor: Tensor) -> Tensor:
    """Scales as they are stored: float16, contiguous."""
    return tensor.to(torch.float16).contiguous()


def size_of(form: IntGrid, columns: int) -> int:
    """Input columns per scale: all of them for one scale per row, or one for the tensor, repeated for each row."""
    return form.group if isinstance(form.group, int) else columns


def group_of(form: IntGrid) -> int:
    """The same as configs tell it: -1 for all of them."""
    return form.group if isinstance(form.group, int) else -1


def weight_only(spec: LayerSpec, name: str) -> Refusal | None:
    """What the weight-only layouts of old leave out: rounded inputs, embeddings and heads."""
    if spec.act is not None:
        return Refusal(f"inputs in {spec.act}: {name} rounds weights only. Leave out act_quant, or give another target")
    if is_outer(spec):
        return Refusal(
            f"{spec.format}: {name} keeps embeddings and the head in float. Leave {spec.name} out of the pass"
        )
    return None


def note_of(spec: LayerSpec, note: str) -> str:
    """The note of a layer in GPTQ's or AWQ's layout."""
    return f"{note}; experts are read by GPTQModel, not by transformers" if spec.kind is LayerKind.EXPERT else note
