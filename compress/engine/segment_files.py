"""One segment of a store as a safetensors file: see compress/engine/store.py for what is in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compress.errors import InputError
from compress.files import parse_json, umask, whole_file
from compress.formats.base import QuantTensor, alike
from compress.layer import Layer
from compress.models.skeleton import OUTER
from compress.models.weight_files import library_errors

SCHEMA = 1
HEADER = "compress"


def segment_file(segment: int) -> str:
    """File name of a segment."""
    return "outer.safetensors" if segment == OUTER else f"block-{segment:04d}.safetensors"


def write_segment(folder: Path, segment: int, layers: Mapping[str, Layer], plain: Mapping[str, Tensor]) -> None:
    """Write one segment's file, complete or absent. Raises: OSError for a full disk and the like."""
    tensors = {name: tensor.contiguous() for name, tensor in plain.items()}
    for layer in layers.values():
        tensors |= _layer_tensors(layer)
    aliases = _held_in_common(layers.values())
    tensors = {name: tensor for name, tensor in tensors.items() if name not in aliases}
    _part_shared(tensors)
    described = {"schema": SCHEMA, "layers": [_describe(layer) for layer in layers.values()]}
    header = json.dumps({**described, **({"aliases": aliases} if aliases else {})}, sort_keys=True)
    for stale in folder.glob(".tmp*"):  # the library's own scratch file, where a run was killed while it wrote
        stale.unlink()
    path = folder / segment_file(segment)
    with whole_file(path) as beside, library_errors(path):
        save_file(dict(sorted(tensors.items())), beside, metadata={HEADER: header})
        beside.chmod(0o666 & ~umask())  # the library writes files that only their owner can read


def _held_in_common(layers: Iterable[Layer]) -> dict[str, str]:
    """Name of a tensor that its format shares with other layers → the first name with these values, which alone is
    written."""
    written: list[tuple[Tensor, str]] = []
    aliases: dict[str, str] = {}
    for layer in layers:
        weight = layer.weight
        parts = weight.format.holders if isinstance(weight, QuantTensor) else {}
        for part in (part for part, count in parts.items() if count > 1):
            assert isinstance(weight, QuantTensor)
            name, tensor = f"{layer.name}.weight.{part}", weight.tensors[part]
            owner = alike(tensor, written)
            if owner is None:
                written.append((tensor, name))
            else:
                aliases[name] = owner
    return aliases


def _part_shared(tensors: dict[str, Tensor]) -> None:
    """Give names that share a tensor one each, such as users of a tied weight that a later stage tells apart."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())


def _layer_tensors(layer: Layer) -> dict[str, Tensor]:
    if isinstance(layer.weight, QuantTensor):
        tensors = {f"{layer.name}.weight.{part}": tensor for part, tensor in layer.weight.tensors.items()}
    else:
        tensors = {f"{layer.name}.weight": layer.weight.contiguous()}
    if layer.bias is not None:
        tensors[f"{layer.name}.bias"] = layer.bias.contiguous()
    if layer.act is not None:
        tensors |= {f"{layer.name}.act.{part}": tensor for part, tensor in (layer.act.params or {}).items()}
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _describe(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": str(layer.kind),
        "users": list(layer.users),
        "shape": list(layer.shape),
        "format": str(layer.format) if layer.format else None,
        "act": str(layer.act.format) if layer.act else None,
        "act_static": sorted(layer.act.params or {}) if layer.act and layer.act.static else None,
        "bias": layer.bias is not None,
        **({"pre": [str(transform) for transform in layer.pre]} if layer.pre else {}),
    }


def read_header(handle: Any, path: Path) -> dict[str, Any]:
    """What a segment's file says of itself. Raises: InputError for a file that is no store's."""
    try:
        header: dict[str, Any] = dict(parse_json((handle.metadata() or {})[HEADER]))
        header["layers"] = [dict(item) for item in header["layers"]]
        header["aliases"] = dict(header.get("aliases", {}))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a file of a compress store ({error!r}). Run `compress run` again.") from error
    if header.get("schema") != SCHEMA:
        raise InputError(f"{path} has store schema {header.get('schema')}; this version reads {SCHEMA}.")
    return header
