"""`transform_config` of compressed-tensors 0.20: which inputs a reader multiplies by which matrix at run time.

A scheme of type `hadamard` is Sylvester's matrix, divided by the root of its order, in blocks of `head_dim` inputs:
ours without signs, known from the config alone. Ours with signs is of type `random-hadamard`, whose matrix readers take
from the files: `<module>.<scheme>_input.weight` (block, block) float32 of ±1, before that division. It is stored once,
with the scheme's first module, since all of a scheme share it. The inverse is in the stored weights already, so a
scheme has the location `input` alone, and may be attached before or after they are read.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.export.checkpoint.layout import Packed
from compress.formats.base import TensorSpec
from compress.layer import LayerKind, LayerSpec
from compress.target import Refusal
from compress.transforms import Hadamard

NOTE = (
    "transformers 5.23 passes over transform_config and computes wrongly unless compressed-tensors' "
    "apply_transform_config is called on the model; vLLM applies it on one GPU"
)
PASSED_OVER = (
    "transformers passes over transform_config, so that this folder gives wrong outputs in it as it is: here "
    "compressed-tensors' own apply_transform_config attached the transforms to the loaded model, and took their "
    "matrices from the folder"
)


def refuse(spec: LayerSpec, layout: str, stores: bool) -> Refusal | None:
    """Why a layer's transforms cannot be told to readers. stores: whether the layout (a name) has a place for any."""
    listed = ", ".join(map(str, spec.pre))
    if not spec.pre:
        return None
    if not stores:
        return Refusal(
            f"{listed} of its inputs at run time: {layout} folders have no place for that. Leave online transforms "
            "(hadamard) out of the recipe, or export for checkpoint (--target checkpoint), which stores them"
        )
    if len(spec.pre) > 1:
        return Refusal(f"{listed} of its inputs: readers of {layout} apply one transform to a layer. Keep one of them")
    if spec.kind is not LayerKind.LINEAR or spec.turned:
        kind = "a Conv1D" if spec.turned else f"one of kind {spec.kind}"
        return Refusal(f"{listed} of its inputs: readers of {layout} transform those of linear layers, never of {kind}")
    if spec.shape[1] % spec.pre[0].block:
        return Refusal(f"{listed} of its inputs: {spec.shape[1]} of them are no multiple of the block")
    return None


def refuse_alone(specs: Mapping[str, LayerSpec]) -> dict[str, Refusal]:
    """Layers with transforms in a model without any quantized one: transform_config is a part of its config."""
    if any(spec.format is not None for spec in specs.values()):
        return {}
    reason = (
        "a transform of its inputs, but no quantized layer in the model: compressed-tensors declares transforms beside "
        "quantized weights only. Add a pass that quantizes, or leave the transform out"
    )
    return {name: Refusal(reason) for name, spec in specs.items() if spec.pre}


def config(moved: Sequence[Packed]) -> dict[str, Any]:
    """`transform_config` of the modules whose inputs are transformed, one scheme for each transform."""
    return {"config_groups": {_scheme_name(pre): _scheme(pre, items) for pre, items in _by_transform(moved).items()}}


def tensors(moved: Sequence[Packed]) -> dict[str, Tensor]:
    """The matrices that no reader can make by itself, by their names in the files."""
    found = {}
    for pre, items in _by_transform(moved).items():
        if pre.seed is not None:
            found[_parameter(items[0].module, pre)] = (pre.matrix() * pre.block**0.5).round().float().contiguous()
    return found


def tensor_specs(moved: Sequence[Packed]) -> dict[str, TensorSpec]:
    """Shapes and dtypes of `tensors`."""
    named = {_parameter(items[0].module, pre): pre for pre, items in _by_transform(moved).items()}
    return {name: ((pre.block, pre.block), torch.float32) for name, pre in named.items() if pre.seed is not None}


def suffixes(declared: Mapping[str, Any]) -> tuple[str, ...]:
    """How the names of the matrices of a `transform_config` end in the files."""
    return tuple(f".{name}_input.weight" for name in declared.get("config_groups", {}))


def is_attached(model: Any) -> bool:
    """Whether a reader has applied a `transform_config` by itself: compressed-tensors leaves it on the model."""
    return getattr(model, "transform_config", None) is not None


def attach(model: Any, declared: Mapping[str, Any], matrices: Mapping[str, Tensor]) -> None:
    """Let compressed-tensors apply a `transform_config` to a loaded model, with the matrices of the folder.

    Raises: RuntimeError where a matrix has no place in the model.
    """
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    with contextlib.redirect_stderr(io.StringIO()):  # it draws progress bars
        apply_transform_config(model, TransformConfig.model_validate(declared))
    unexpected = model.load_state_dict(dict(matrices), strict=False).unexpected_keys
    if unexpected:
        raise RuntimeError(f"compressed-tensors made no place for {unexpected[0]}")


def _by_transform(moved: Sequence[Packed]) -> dict[Hadamard, list[Packed]]:
    found: dict[Hadamard, list[Packed]] = {}
    for item in moved:
        found.setdefault(item.spec.pre[0], []).append(item)
    return found


def _scheme(pre: Hadamard, items: Sequence[Packed]) -> dict[str, Any]:
    targets = [item.module for item in items]
    return {
        "type": "hadamard" if pre.seed is None else "random-hadamard",
        "apply": [{"targets": targets, "location": "input", "inverse": False, "ignore": []}],
        "randomize": False,
        "requires_grad": False,
        "head_dim": pre.block,
        "precision": "torch.float32",
    }


def _scheme_name(pre: Hadamard) -> str:
    """No dots: it becomes the name of a submodule."""
    return f"hadamard_{pre.block}" + ("" if pre.seed is None else f"_seed_{pre.seed}")


def _parameter(module: str, pre: Hadamard) -> str:
    return f"{module}.{_scheme_name(pre)}_input.weight"
