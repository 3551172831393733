"""Reading a checkpoint tensor by tensor: file names → module names through transformers' own conversion mapping."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError, UnsupportedError, nearest
from compress.layer import Layer, LayerKind, LayerSpec
from compress.maths import products
from compress.models.experts import owner
from compress.models.weight_files import keys, open_file, read_tensor


@dataclass(frozen=True)
class Origin:
    """Where one module parameter comes from: (file, key) pairs in order, and the converter that joins them."""

    parts: tuple[tuple[Path, str], ...]
    patterns: tuple[str, ...] = ()
    converter: Any = None


@dataclass
class Checkpoint:
    """The safetensors files of a folder, indexed by the parameter names of the module tree."""

    files: tuple[Path, ...]
    origins: dict[str, Origin]
    unused: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False)
    _stacks: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> Tensor:
        """One parameter in its stored dtype.

        Raises: InputError for an unreadable file, or NaN or infinite values.
        """
        self._stacks.clear()
        return self._read(name)

    def _expert(self, name: str) -> Tensor:
        """One expert's slice. The module's converted parameters are kept until something else is read."""
        module, key, index = owner(name)
        if any(not kept.startswith(f"{module}.") for kept in self._stacks):
            self._stacks.clear()
        stack = f"{module}.{key}"
        if stack not in self._stacks:
            self._stacks[stack] = self._read(stack)
        return self._stacks[stack][index]

    def _read(self, name: str) -> Tensor:
        origin = self._origin(name)
        is_whole = origin.converter is None
        tensor = self._tensor(*origin.parts[0]) if is_whole else self._convert(name, origin)
        if tensor.is_floating_point() and not products.all_finite(tensor):
            where = ", ".join(sorted({path.name for path, _ in origin.parts}))
            raise InputError(
                f"{name} in {where} holds NaN or infinite values; compressing it would hide that. "
                "Use a checkpoint whose weights are finite."
            )
        return tensor

    def _origin(self, name: str) -> Origin:
        return self.origins[self.aliases.get(name, name)]

    def _tensor(self, path: Path, key: str) -> Tensor:
        if path not in self._handles:
            self._handles[path] = open_file(path)
        return read_tensor(self._handles[path], key, path)

    def _convert(self, name: str, origin: Origin) -> Tensor:
        converter = deepcopy(origin.converter)
        for (path, key), pattern in zip(origin.parts, origin.patterns, strict=True):
            converter.add_tensor(name, key, pattern, _reader(self._tensor, path, key))
        converted = converter.convert(name)
        tensor = converted[name]
        result: Tensor = tensor[0] if isinstance(tensor, list) else tensor
        return result.contiguous()

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a parameter, from the header alone."""
        path, key = self._origin(name).parts[0]
        if path not in self._handles:
            self._handles[path] = open_file(path)
        stored = str(self._handles[path].get_slice(key).get_dtype())
        if stored not in _DTYPES:
            raise UnsupportedError(
                f"{path.name}: {key} is stored as {stored}. Read are {', '.join(_DTYPES)}: start from the model before "
                "it was quantized."
            )
        return _DTYPES[stored]

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer, its weight turned to (out, in), in the stored dtype."""
        if spec.kind is LayerKind.EXPERT:
            weight = self._expert(spec.name)
            return Layer(spec.name, spec.kind, (weight.T if spec.turned else weight).contiguous(), users=spec.users)
        weight = self.read(f"{spec.name}.weight")
        bias = self.read(f"{spec.name}.bias") if spec.has_bias else None
        return Layer(spec.name, spec.kind, weight.T.contiguous() if spec.turned else weight, bias, users=spec.users)

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are no layer's, in their stored dtype."""
        return {name: self.read(name) for name in names}

    def release(self) -> None:
        """Let go of the mapped files and of converted experts; tensors that were read stay valid."""
        self._handles.clear()
        self._stacks.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}


def _reader(read: Callable[[Path, str], Tensor], path: Path, key: str) -> Callable[[], Tensor]:
    return lambda: read(path, key)


def index_checkpoint(files: tuple[Path, ...], module: nn.Module, aliases: dict[str, str]) -> Checkpoint:
    """Match the keys of the files with the state dict of a (meta) module.

    Args: aliases: tied names, which need no key of their own → the name that is stored.
    Raises: InputError naming the parameters that no file holds.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted = dict(module.state_dict())
    transforms = get_model_conversion_mapping(module)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    prefix = getattr(module, "base_model_prefix", None)
    found: dict[str, list[tuple[Path, str, str | None]]] = {}
    unused = []
    for path, key in keys(files):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = key, None
        for target in _targets(name, by_pattern.get(str(pattern))):
            if target in wanted:
                found.setdefault(target, []).append((path, key, pattern))
        if name not in wanted:
            unused.append(key)
    for alias, name in aliases.items():  # a file may hold a tied weight under its other name
        if name not in found and alias in found:
            found[name] = found[alias]
    missing = sorted(set(wanted) - set(found) - set(aliases))
    if missing:
        raise InputError(
            f"{files[0].parent}: the checkpoint lacks {len(missing)} parameter(s) that config.json asks for, first "
            f"'{missing[0]}'.{nearest(missing[0], unused[:50]) if unused else ''} Check that both belong together."
        )
    origins = {name: _origin(parts, by_pattern) for name, parts in found.items()}
    _check_shapes(origins, wanted)
    return Checkpoint(files, origins, tuple(sorted(unused)), aliases)


def _targets(name: str, converter: Any) -> list[str]:
    """All parameters that a converter makes of the tensor that `name` is made of (a fused one gives several)."""
    patterns = converter.target_patterns if converter is not None else []
    first = next((pattern for pattern in patterns if pattern in name), None)
    return [name.replace(first, pattern, 1) for pattern in patterns] if first is not None else [name]


def _check_shapes(origins: dict[str, Origin], wanted: dict[str, Tensor]) -> None:
    """Converted tensors are left to their converter, which knows how parts join."""
    handles = {path: open_file(path) for origin in origins.values() for path, _ in origin.parts[:1]}
    for name, origin in origins.items():
        path, key = origin.parts[0]
        shape = tuple(handles[path].get_slice(key).get_shape())
        if origin.converter is None and shape != tuple(wanted[name].shape):
            raise InputError(
                f"{path.name}: {key} has shape {shape}, but config.json makes it {tuple(wanted[name].shape)}. "
                "Check that both belong together."
            )


def _origin(parts: list[tuple[Path, str, str | None]], by_pattern: dict[str, Any]) -> Origin:
    pattern = parts[0][2]
    if pattern is None:
        return Origin(tuple((path, key) for path, key, _ in parts))
    return Origin(
        tuple((path, key) for path, key, _ in parts),
        tuple(str(found) for _, _, found in parts),
        by_pattern[pattern],
    )
