"""Capture the float graph once per structure, without weights: placeholders for layers and attention.

Domain `compress`: `Linear(x) {layer}`, `Embedding(ids) {layer}`, `Attention(q, k, v[, past_k, past_v]) {…}` with q, k
after rotary. Other parameters become graph inputs named like them, so nothing is baked in; the target turns them into
initializers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError
from compress.layer import LayerKind
from compress.model import Model, Task

DOMAIN = "compress"
PARAMETER = "parameter::"
_ATTENTION = "compress_placeholder"
_KNOWN_EXTRAS = {"position_ids", "use_cache", "output_attentions", "cache_position", "position_bias", "head_mask",
                 "output_router_logits", "return_dict", "is_causal", "layer_head_mask", "cu_seq_lens_q"}


class _PastSlots:
    """Passed as `past_key_values`: hands the graph's past to the attention placeholder and takes the present."""

    is_compileable = False

    def __init__(self, past: list[tuple[Tensor, Tensor]]) -> None:
        self.past = past
        self.present: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self.past[0][0].shape[2]

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def __len__(self) -> int:
        return len(self.past)


_current: list[_PastSlots] = []


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface → one placeholder node. query (b, heads, s, d); returns (b, s, heads, d)."""
    unknown = {name for name, value in extras.items() if value is not None} - _KNOWN_EXTRAS
    if unknown:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, which the onnx target "
            "does not know. Supported: scaled dot products with causal, sliding-window or full masks and soft caps."
        )
    attributes = {
        "scale": float(scaling if scaling is not None else query.shape[-1] ** -0.5),
        "window": int(sliding_window or 0),
        "softcap": float(softcap or 0.0),
    }
    batch, heads, length, _ = query.shape
    shape = (batch, length, heads, value.shape[-1])
    if not _current:
        out = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Attention", (query, key, value), attributes | {"causal": 0},
            dtype=query.dtype, shape=shape, version=1,
        )
        return out, None
    slots = _current[-1]
    past_key, past_value = slots.past[module.layer_idx]  # type: ignore[index]
    total = past_key.shape[2] + length
    shapes = (shape, (batch, key.shape[1], total, key.shape[3]), (batch, value.shape[1], total, value.shape[3]))
    out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Attention", (query, key, value, past_key, past_value), attributes | {"causal": 1},
        dtypes=(query.dtype,) * 3, shapes=shapes, version=1,
    )
    slots.present[module.layer_idx] = (present_key, present_value)  # type: ignore[index]
    return out, None


@contextmanager
def _placeholders(module: nn.Module, model: Model) -> Iterator[None]:
    """Meanwhile every compressible layer's forward is one placeholder node; subclasses keep what they add."""
    from transformers.pytorch_utils import Conv1D

    names = {user: spec for spec in model.structure.layers.values() for user in spec.users}
    for name, child in module.named_modules():
        if name in names:
            child.__dict__["_compress_layer"] = (name, names[name].kind, names[name].shape)
    saved = {cls: cls.forward for cls in (nn.Linear, nn.Embedding, Conv1D)}

    def forward(self: nn.Module, values: Tensor) -> Tensor:
        known = self.__dict__.get("_compress_layer")
        if known is None:
            original: Tensor = next(f for c, f in saved.items() if isinstance(self, c))(self, values)
            return original
        name, _, shape = known
        is_gather = isinstance(self, nn.Embedding)
        size = (*values.shape, shape[1]) if is_gather else (*values.shape[:-1], shape[0])
        op = "Embedding" if is_gather else "Linear"
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{op}", (values,), {"layer": name}, dtype=torch.float32, shape=size, version=1
        )

    for cls in saved:
        cls.forward = forward
    try:
        yield
    finally:
        for cls, original in saved.items():
            cls.forward = original


class _Decoder(nn.Module):
    """(input_ids, attention_mask, past, parameters) → (logits, present); positions follow from the mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[tuple[Tensor, Tensor]], parameters: dict[str, Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        slots = _PastSlots(past)
        _current.append(slots)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": slots,
            "use_cache": True,
        }
        try:
            output = torch.func.functional_call(self.model, parameters, (), arguments)
        finally:
            _current.pop()
        return output.logits, [slots.present[index] for index in range(len(past))]


class _Encoder(nn.Module):
    """(input_ids, attention_mask, parameters) → last_hidden_state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        arguments = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden: Tensor = torch.func.functional_call(self.model, parameters, (), arguments).last_hidden_state
        return hidden


def cache_shapes(config: Any) -> list[tuple[int, int]]:
    """(key-value heads, head size) of each layer's cache."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    return [(kv_heads, size)] * int(text.num_hidden_layers)


def capture(model: Model, opset: int) -> bytes:
    """The weight-free graph of a model's structure, as a serialized ONNX model.

    Raises: UnsupportedError when the model cannot be traced, naming why.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
    if any(spec.kind is LayerKind.EXPERT for spec in model.structure.layers.values()):
        raise UnsupportedError(f"{model.source}: mixtures of experts are not exported to ONNX yet.")
    module = model.skeleton(_ATTENTION)
    # sizes of plain tensors only: their values come from the store, as initializers
    parameters = {
        name: torch.zeros(shape)
        for name, (shape, dtype) in model.plain_shapes.items()
        if dtype.is_floating_point
    }
    with _placeholders(module, model), _quiet():
        if model.task is Task.ENCODER:
            return _export(_Encoder(module), _encoder_inputs(parameters), opset)
        return _export(_Decoder(module), _decoder_inputs(model, parameters), opset)


Inputs = tuple[tuple[Any, ...], tuple[Any, ...], list[str], list[str]]


def _decoder_inputs(model: Model, parameters: dict[str, Tensor]) -> Inputs:
    """Sample arguments, dynamic shapes, input names, output names. Sizes are distinct and above 1."""
    dim = torch.export.Dim.DYNAMIC
    shapes = cache_shapes(model.config)
    past = [(torch.zeros(2, heads, 5, size), torch.zeros(2, heads, 5, size)) for heads, size in shapes]
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    kv = {0: dim, 2: dim}
    dynamic = ({0: dim, 1: dim}, {0: dim, 1: dim}, [(kv, kv) for _ in shapes], {name: {} for name in parameters})
    pairs = [(index, part) for index in range(len(shapes)) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{i}.{part}" for i, part in pairs)]
    names += [PARAMETER + name for name in parameters]
    outputs = ["logits", *(f"present.{i}.{part}" for i, part in pairs)]
    return (ids, mask, past, parameters), dynamic, names, outputs


def _encoder_inputs(parameters: dict[str, Tensor]) -> Inputs:
    dim = torch.export.Dim.DYNAMIC
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
    dynamic = ({0: dim, 1: dim}, {0: dim, 1: dim}, {name: {} for name in parameters})
    names = ["input_ids", "attention_mask", *(PARAMETER + name for name in parameters)]
    return (ids, mask, parameters), dynamic, names, ["last_hidden_state"]


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
    """The exporter's own chatter is not for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
