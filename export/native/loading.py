"""A folder as a module of transformers: float layers in float32, sparse ones too with their zeros filled in, codebook
layers as what computes from their codes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import InputError, UsageError
from compress.export.native import contents, modules
from compress.export.native.contents import AGAIN, Contents, Stored
from compress.formats.base import Format
from compress.formats.codebook import Codebook
from compress.kernels import CodebookProduct, Part, PiecedProduct
from compress.kv.spec import KvSpec
from compress.layer import Layer, LayerKind, LayerSpec
from compress.models.loading import load
from compress.models.placing import put_layer, put_plain
from compress.models.skeleton import Structure
from compress.models.weight_files import find_files, keys, open_file, read_tensor


def load_module(folder: Path, path: str | None = None) -> tuple[Any, Counter[str], tuple[KvSpec, ...]]:
    """The module with all its weights, how many layers each kernel computes, and how each layer's cache is.

    Args: path: of the kernels, as `CodebookProduct` takes it; None: the fastest that this machine has.
    Raises: InputError for files that are malformed or do not fit each other, or what the exporter does not write.
    """
    told = contents.read(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json. {AGAIN}")
    model = load(folder, weights=False, edits=told.edits)
    if model.image is not None:
        raise InputError(f"{folder} holds an ONNX graph, which the exporter did not write. {AGAIN}")
    structure = model.structure
    _check(told, structure, folder)
    module, kernels = model.skeleton(), Counter[str]()
    tensors = Tensors(folder, told.aliases)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for spec in structure.layers.values():
        stored = told.layers.get(spec.name)
        if stored is not None and isinstance(stored.format, Codebook):
            kernels[_put_codebook(module, structure, spec, stored.format, tensors, path)] += 1
            continue
        weight = _plain(spec, stored, tensors)
        put_layer(module, Layer(spec.name, spec.kind, weight, tensors.bias(spec), users=spec.users))
    names = [name for group in structure.plain.values() for name in group]
    put_plain(module, {name: tensors.take(name, shapes[name]) for name in names}, structure.aliases)
    tensors.require_all_taken()
    return module, kernels, told.kv


def _plain(spec: LayerSpec, stored: Stored | None, tensors: Tensors) -> Tensor:
    """The weight (out, in) of a float layer, or of a sparse one."""
    if stored is None:
        return tensors.take(f"{spec.name}.weight", spec.shape)
    return stored.format.dequantize(_parts(spec, stored.format, tensors), spec.shape)


def _parts(spec: LayerSpec, form: Format, tensors: Tensors) -> dict[str, Tensor]:
    specs = form.tensor_specs(spec.shape)
    return {part: tensors.take(f"{spec.name}.weight.{part}", *told) for part, told in specs.items()}


def _put_codebook(
    module: nn.Module, structure: Structure, spec: LayerSpec, form: Codebook, tensors: Tensors, path: str | None
) -> str:
    """Replace all users of a layer. Returns: the kernel."""
    found = _parts(spec, form, tensors)
    product = product_of(form, found, spec.shape, path)
    bias, kernel = tensors.bias(spec), ""
    for user in spec.users:
        if reason := modules.why_not(module.get_submodule(user)):
            raise InputError(f"{user} cannot be a codebook: {reason}. {AGAIN}")
        if structure.user_kind(spec, user) == "embedding":
            modules.put(module, user, modules.CodebookEmbedding(form, found, spec.shape))
            kernel = kernel or "codebook rows"
        else:
            own = bias.float() if bias is not None and user == spec.name else None
            modules.put(module, user, modules.CodebookLinear(product, spec.shape, own))
            kernel = product.kernel
    return kernel


def product_of(
    form: Codebook, tensors: dict[str, Tensor], shape: tuple[int, int], path: str | None
) -> CodebookProduct | PiecedProduct:
    """What computes with a weight; path: see `load_module`."""
    if not form.extras:
        return CodebookProduct(*form.unpack(tensors, shape), shape, form.axis, path=path)
    parts = []
    for piece in form.pieces(tensors, shape):
        unpacked = piece.form.unpack(piece.tensors, piece.shape)
        product = CodebookProduct(*unpacked, piece.shape, form.axis, path=path)
        parts.append(Part(product, piece.columns, piece.bias))
    return PiecedProduct(parts, shape)


class Tensors:
    """The tensors of a folder, each asked for by name. Args: aliases: see `Contents`."""

    def __init__(self, folder: Path, aliases: Mapping[str, str]) -> None:
        self._folder, self._aliases = folder, aliases
        self._homes = {key: path for path, key in keys(find_files(folder))}
        self._handles = {path: open_file(path) for path in set(self._homes.values())}
        self._left = set(self._homes)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape and, where it is given, dtype. Raises: InputError."""
        key = self._aliases.get(name, name)
        if key not in self._homes:
            raise InputError(f"{self._folder} has no tensor {name}. {AGAIN}")
        path = self._homes[key]
        found = read_tensor(self._handles[path], key, path)
        self._left.discard(key)
        if tuple(found.shape) != tuple(shape) or (dtype is not None and found.dtype != dtype):
            wanted = f"{dtype or ''} {tuple(shape)}".strip()
            raise InputError(f"{path}: {name} is {found.dtype} {tuple(found.shape)}, but should be {wanted}. {AGAIN}")
        return found

    def bias(self, spec: LayerSpec) -> Tensor | None:
        """(out,), of the architecture's or a pass's making."""
        name = f"{spec.name}.bias"
        return self.take(name, (spec.shape[0],)) if spec.has_bias or name in self._homes else None

    def require_all_taken(self) -> None:
        """Raises: InputError for tensors that belong to nothing: the files are of another model."""
        if self._left:
            raise InputError(f"{self._folder}: {min(self._left)} is no part of the model of its config.json. {AGAIN}")


def _check(told: Contents, structure: Structure, folder: Path) -> None:
    """Raises: InputError for layers that the model of config.json does not have, or whose codes cannot fit."""
    for name, stored in told.layers.items():
        spec = structure.layers.get(name)
        where = f"{folder / contents.NAME}: layer {name}"
        if spec is None or spec.users != stored.users:
            found = "there is none" if spec is None else f"it is used by {', '.join(spec.users)}"
            raise InputError(f"{where}: by config.json {found}. {AGAIN}")
        if not isinstance(stored.format, Codebook):
            _check_density(stored, where)
            continue
        if spec.kind not in (LayerKind.LINEAR, LayerKind.EMBEDDING):
            raise InputError(f"{where}: a layer of kind {spec.kind} cannot be a codebook here. {AGAIN}")
        if not stored.format.fits(spec.shape[1]):
            raise InputError(f"{where}: {stored.format} cannot hold {spec.shape[0]} x {spec.shape[1]}. {AGAIN}")


def _check_density(stored: Stored, where: str) -> None:
    """Raises: InputError for a sparse layer whose text does not say how much is stored."""
    try:
        stored.format.tensor_specs((1, 1))
    except UsageError as error:
        raise InputError(f"{where}: {error} {AGAIN}") from error
