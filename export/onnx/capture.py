"""Capture the float graph once per structure, without weights: placeholders for layers and attention.

Domain `compress`: `Linear(x) {layer}`, `Embedding(ids) {layer}`, `Conv(x) {layer, kernel, strides, pads, dilations,
group}` with ONNX Conv's own meaning (compress/export/onnx/conv.py), and those of `interfaces`. Other parameters become
graph inputs named like them, so nothing is baked in; the target turns them into initializers.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from compress.errors import UnsupportedError
from compress.export.onnx import conv, interfaces
from compress.export.onnx.interfaces import DOMAIN, PLACEHOLDER, PastSlots
from compress.kv import heads
from compress.kv.observed import attentions_in
from compress.layer import LayerSpec
from compress.models import experts
from compress.models.model import Model, Task

PARAMETER = "parameter::"


@contextmanager
def _placeholders(module: nn.Module, model: Model) -> Iterator[None]:
    """Meanwhile every compressible layer's forward is one placeholder node; subclasses keep what they add."""
    from transformers.pytorch_utils import Conv1D

    names = {user: spec for spec in model.structure.layers.values() for user in spec.users}
    for name, child in module.named_modules():
        if name in names:
            child.__dict__["_compress_layer"] = name
        elif experts.is_experts(child):
            child.__dict__["_compress_experts"] = name
    saved: dict[Any, Any] = {cls: cls.forward for cls in (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)}

    def forward(self: nn.Module, values: Tensor) -> Tensor:
        spec = names.get(self.__dict__.get("_compress_layer", ""))
        if spec is None:
            original: Tensor = next(f for c, f in saved.items() if isinstance(self, c))(self, values)
            return original
        name = self.__dict__["_compress_layer"]
        out = _placeholder(self, values, name, spec)
        lowered = spec.has_bias and name == spec.name  # with the layer; a tied head's own bias is a plain tensor
        bias = None if lowered else getattr(self, "bias", None)
        if bias is None:
            return out
        biased: Tensor = out + (bias[:, None, None] if isinstance(self, nn.Conv2d) else bias)
        return biased

    for cls in saved:
        cls.forward = forward
    try:
        yield
    finally:
        for cls, original in saved.items():
            cls.forward = original


def _placeholder(module: nn.Module, values: Tensor, name: str, spec: LayerSpec) -> Tensor:
    """The node that stands for one compressible layer."""
    attributes: dict[str, Any] = {"layer": name}
    if isinstance(module, nn.Conv2d):
        kind, more, size = "Conv", conv.geometry(module), conv.output_shape(module, values)
        attributes |= more
    elif isinstance(module, nn.Embedding):
        kind, size = "Embedding", (*values.shape, spec.shape[1])
    else:
        kind, size = "Linear", (*values.shape[:-1], spec.shape[0])
    out: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}", (values,), attributes, dtype=torch.float32, shape=size, version=1
    )
    return out


class _Decoder(nn.Module):
    """(input_ids, attention_mask, past, parameters) → (logits, present); positions follow from the mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[tuple[Tensor, Tensor]],
        parameters: dict[str, Tensor],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        slots = PastSlots(past)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": slots,
            "use_cache": True,
        }
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            arguments["position_ids"] = position_ids
        interfaces.current.append(slots)
        try:
            output = torch.func.functional_call(self.model, parameters, (), arguments)
        finally:
            interfaces.current.pop()
        without = [index for index in range(len(past)) if index not in slots.present]
        if without:
            raise UnsupportedError(
                f"{type(self.model).__name__}: layer {without[0]} keeps no keys and values through transformers' "
                "attention interface (a state space, say, or attention of its own), which the onnx target needs."
            )
        return output.logits, [slots.present[index] for index in range(len(past))]


class _Encoder(nn.Module):
    """(input_ids, attention_mask, parameters) → last_hidden_state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if hasattr(self.model.config, "use_cache"):
            arguments["use_cache"] = False
        hidden: Tensor = torch.func.functional_call(self.model, parameters, (), arguments).last_hidden_state
        return hidden


class _Images(nn.Module):
    """(images, parameters) → logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        logits: Tensor = torch.func.functional_call(self.model, parameters, (images,))
        return logits


def cache_shapes(model: Model) -> list[tuple[int, int]]:
    """(key-value heads, head size) of each layer's cache."""
    return [(each.kv_heads, each.size) for each in model.attentions]


def _skeleton(model: Model) -> Any:
    """The module with placeholders for attention and experts.

    Raises: UnsupportedError where it has an attention of its own.
    """
    interfaces.register()
    try:
        module: Any = model.skeleton(PLACEHOLDER, PLACEHOLDER)
        replaced = module._can_set_attn_implementation()
    except (KeyError, ValueError):  # a table of its own attention classes, or none that can be chosen
        replaced = False
    if not replaced:
        raise UnsupportedError(
            f"{model.source}: '{model.config.model_type}' computes attention by itself, not through transformers' "
            "attention interface, which the onnx target needs."
        )
    return module


def capture_graph(model: Model, opset: int) -> bytes:
    """The weight-free graph of a model's structure, as a serialized ONNX model.

    Raises: UnsupportedError when the model cannot be traced, naming why.
    """
    module = _skeleton(model) if model.image is None else model.skeleton()
    # sizes of plain tensors only: their values come from the store, as initializers
    parameters = {
        name: torch.zeros(shape) for name, (shape, dtype) in model.plain_shapes.items() if dtype.is_floating_point
    }
    with _placeholders(module, model), _quiet():
        if model.image is not None:
            return _export(_Images(module), _image_inputs(model.image.shape, parameters), opset)
        if model.task is Task.ENCODER:
            return _export(_Encoder(module), _encoder_inputs(parameters), opset)
        if attentions_in(module):
            heads.catch(module)
        return _export(_Decoder(module), _decoder_inputs(model, parameters), opset)


Inputs = tuple[tuple[Any, ...], tuple[Any, ...], list[str], list[str]]


def _decoder_inputs(model: Model, parameters: dict[str, Tensor]) -> Inputs:
    """Sample arguments, dynamic shapes, input names, output names. Sizes are distinct and above 1."""
    dim = torch.export.Dim.DYNAMIC
    shapes = cache_shapes(model)
    past = [(torch.zeros(2, heads, 5, size), torch.zeros(2, heads, 5, size)) for heads, size in shapes]
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    kv = {0: dim, 2: dim}
    dynamic: tuple[Any, ...] = (
        {0: dim, 1: dim},
        {0: dim, 1: dim},
        [(kv, kv) for _ in shapes],
        {name: {} for name in parameters},
    )
    pairs = [(index, part) for index in range(len(shapes)) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{i}.{part}" for i, part in pairs)]
    names += [PARAMETER + name for name in parameters]
    outputs = ["logits", *(f"present.{i}.{part}" for i, part in pairs)]
    return (ids, mask, past, parameters), dynamic, names, outputs


def _fixed(parameters: Iterable[str]) -> dict[str, dict[int, Any]]:
    return {name: {} for name in parameters}


def _encoder_inputs(parameters: dict[str, Tensor]) -> Inputs:
    dim = torch.export.Dim.DYNAMIC
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    dynamic = ({0: dim, 1: dim}, {0: dim, 1: dim}, _fixed(parameters))
    names = ["input_ids", "attention_mask", *(PARAMETER + name for name in parameters)]
    return (ids, mask, parameters), dynamic, names, ["last_hidden_state"]


def _image_inputs(shape: tuple[int, ...], parameters: dict[str, Tensor]) -> Inputs:
    dynamic = ({0: torch.export.Dim.DYNAMIC}, _fixed(parameters))
    names = ["images", *(PARAMETER + name for name in parameters)]
    return (torch.zeros(2, *shape), parameters), dynamic, names, ["logits"]


def _export(wrapper: nn.Module, inputs: Inputs, opset: int) -> bytes:
    arguments, dynamic, names, outputs = inputs
    try:
        with torch.no_grad():
            traced = torch.export.export(wrapper, arguments, dynamic_shapes=dynamic, strict=False)
        program = torch.onnx.export(
            traced, arguments, dynamo=True, opset_version=opset, input_names=names, output_names=outputs, verbose=False
        )
    except UnsupportedError:
        raise
    except Exception as error:  # the tracer raises many kinds
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, GuardOnDataDependentSymNode):
            reason = f"what it computes depends on the values it is given; {reason}"
        raise UnsupportedError(f"The model cannot be traced for ONNX ({type(error).__name__}: {reason}).") from error
    assert program is not None
    _strip(program.model)
    data: bytes = ir.to_proto(program.model).SerializeToString()
    return data


def _strip(document: ir.Model) -> None:
    """Drop the exporter's notes: they hold stack traces with the paths of this machine."""
    document.metadata_props.clear()
    document.graph.metadata_props.clear()
    values = [*document.graph.inputs, *document.graph.initializers.values()]
    for node in document.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own chatter is not for our users: what fails comes back as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    quiet = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
