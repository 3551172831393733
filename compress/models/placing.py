"""Weights put into the modules of a skeleton and given back, and what the inputs of a module pass through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from compress.layer import ActSpec, Layer, LayerKind
from compress.models import experts
from compress.models.model import Model
from compress.models.skeleton import is_turned
from compress.transforms import Hadamard, transformed

PRE, TRANSFORMS, ROUNDING = "_compress_pre", "_compress_transforms", "_compress_rounding"
"""Attributes of a module: the hook that transforms its input, its transforms, the hook that rounds what follows."""


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where the parameter or buffer `name` is."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    if key in owner._parameters:
        owner._parameters[key] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[key] = tensor


def put_layer(module: nn.Module, layer: Layer, dtype: torch.dtype = torch.float32) -> None:
    """Decode a layer into every module that uses it, in `dtype`, with its input rounding as a hook."""
    weight = layer.weight if isinstance(layer.weight, Tensor) else layer.float_weight()
    weight = weight.to(dtype)
    for user in layer.users:
        if layer.kind is LayerKind.EXPERT:
            _put_expert(module, user, weight)
            continue
        child = module.get_submodule(user)
        turned = weight.T.contiguous() if is_turned(child) else weight
        child._parameters["weight"] = nn.Parameter(turned.reshape(child.weight.shape), requires_grad=False)  # type: ignore[arg-type]
        if layer.bias is not None and user == layer.name:
            child._parameters["bias"] = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        set_transforms(child, layer.pre)
        set_input_rounding(child, layer)


def _put_expert(module: nn.Module, user: str, weight: Tensor) -> None:
    path, key, index = experts.owner(user)
    child = module.get_submodule(path)
    stack = child._parameters[key]
    assert stack is not None
    if stack.device.type == "meta":
        stack = nn.Parameter(torch.zeros(stack.shape, dtype=weight.dtype), requires_grad=False)
        child._parameters[key] = stack
    stack.data[index] = weight.T if child.is_transposed else weight


def set_input_rounding(child: nn.Module, layer: Layer) -> None:
    """Round what enters a module as `layer.act` says; the hook of an earlier call is replaced."""
    act = None if layer.kind is LayerKind.EMBEDDING else layer.act
    replace_input_rounding(child, None if act is None else lambda values: _rounded(act, values))


def replace_input_rounding(child: nn.Module, rounding: Callable[[Tensor], Tensor] | None) -> None:
    """Pass what enters a module through a function, in place of the one of an earlier call; None: as it is."""
    _hook(child, ROUNDING, rounding)


def _hook(child: nn.Module, key: str, function: Callable[[Tensor], Tensor] | None) -> None:
    """Hang a function of the input on a module under a key, in place of the one of an earlier call."""
    handle = child.__dict__.pop(key, None)
    if handle is not None:
        handle.remove()
    if function is not None:
        hook = child.register_forward_pre_hook(
            lambda _module, inputs: (function(inputs[0]).to(inputs[0].dtype), *inputs[1:])
        )
        child.__dict__[key] = hook


def set_transforms(child: nn.Module, pre: tuple[Hadamard, ...]) -> None:
    """Transform what enters a module, before it is rounded."""
    _hook(child, PRE, partial(transformed, pre) if pre else None)
    child.__dict__[TRANSFORMS] = pre


def transforms(child: nn.Module) -> tuple[Hadamard, ...]:
    """Those of a module's input. A hook that comes before all others sees the input without them."""
    found: tuple[Hadamard, ...] = child.__dict__.get(TRANSFORMS, ())
    return found


def _rounded(act: ActSpec, values: Tensor) -> Tensor:
    """Rounded inputs, whose gradient in training is that of the inputs themselves (straight through)."""
    if not (torch.is_grad_enabled() and values.requires_grad):
        return act.round(values)
    return values + (act.round(values.detach()) - values.detach())


def put_plain(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put stored tensors in place, floats as `dtype`, also where they are known by other names."""
    others = [(alias, name) for alias, name in aliases.items() if name in tensors]
    for place, name in (*((name, name) for name in tensors), *others):
        tensor = tensors[name]
        set_tensor(module, place, tensor.to(dtype) if tensor.is_floating_point() else tensor)


def release(module: nn.Module, path: str) -> None:
    """Give a block's memory back: its parameters return to `meta`, its hooks go."""
    for child in module.get_submodule(path).modules():
        set_transforms(child, ())
        _hook(child, ROUNDING, None)
        for key, parameter in child._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                child._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def whole_module(model: Model) -> nn.Module:
    """A model with all its weights in memory, decoded to float32."""
    module = model.skeleton()
    for segment in model.structure.segments:
        for layer in model.layers(segment).values():
            put_layer(module, layer)
        put_plain(module, model.plain(segment), model.structure.aliases)
        model.release()  # of a file that is read as another type nothing stays
    return module
