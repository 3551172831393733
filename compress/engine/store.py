"""The store of design §6: a compressed model as a folder, target-neutral, one safetensors file per block.

`model/` holds config.json and the tokenizer's files as the source had them, `structure.json`, and for each segment
`outer.safetensors` or `block-0000.safetensors`. A file's header carries, under the one key `compress`, JSON with the
layers in it: name, kind, users, shape, format text (null: a plain weight), input grid text, transforms of the input.
Tensor names are `<layer>.weight` (plain) or `<layer>.weight.<part>` (the format's tensors), `<layer>.bias`,
`<layer>.act.<part>` (a static input grid), and the names of plain tensors. A tensor that several layers hold in common
is written once, and the header's `aliases` give its name for the others. `caches.safetensors` holds what caches need
beside their spec (compress/models/cache_tensors.py). `open_store` gives a `Model` that reads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.engine.segment_files import SCHEMA, read_header, segment_file
from compress.errors import InputError, UsageError
from compress.files import read_json, sync_file, whole_file, write_text
from compress.formats import parse_format
from compress.formats.base import QuantTensor, TensorSpec
from compress.kv.spec import KvSpec, LayerTensors
from compress.layer import ActSpec, Layer, LayerKind, LayerSpec
from compress.models.cache_tensors import FILE, write_tensors
from compress.models.edits import Shape, read_edits
from compress.models.loading import load, reopen
from compress.models.model import Model
from compress.models.skeleton import Structure
from compress.models.weight_files import digest_files, open_file, read_tensor
from compress.transforms import parse_transform


def write_structure(
    folder: Path, model: Model, passes: Iterable[str], source_digest: str, config: Mapping[str, Any] | None = None
) -> None:
    """The files beside the segments: structure.json, config.json, tokenizer.

    Args: model: whose files are taken along; config: what the passes change in config.json.
    """
    structure: dict[str, Any] = {
        "schema": SCHEMA,
        "source_digest": source_digest,
        "blocks": len(model.structure.blocks),
        "passes": list(passes),
        "segments": [segment_file(segment) for segment in model.structure.segments],
        "edits": [edit.as_data() for edit in model.edits],
        "origin": list(model.origin),
        "kv": [spec.as_data() for spec in model.kv],
    }
    if model.image is not None:
        structure["module"] = model.image.keep(folder)
    beside = [*model.side_files()] if model.image is not None else [model.path / "config.json", *model.side_files()]
    for path in beside:
        with whole_file(folder / path.name) as copy:
            shutil.copyfile(path, copy)
    if config:
        changed = {**read_json(folder / "config.json"), **config}
        write_text(folder / "config.json", json.dumps(changed, indent=2) + "\n")
    write_text(folder / "structure.json", json.dumps(structure, indent=1) + "\n")
    sync_file(folder)


def write_caches(folder: Path, specs: Sequence[KvSpec], tensors: Sequence[LayerTensors]) -> None:
    """Say anew how a finished store's keys and values are cached."""
    write_tensors(folder, tensors)
    structure = {**read_json(folder / "structure.json"), "kv": [spec.as_data() for spec in specs]}
    write_text(folder / "structure.json", json.dumps(structure, indent=1) + "\n")
    sync_file(folder)


def read_shape(folder: Path) -> dict[str, Any]:
    """What a store is as far as its shape goes, for a journal: see `shape_of`."""
    info = read_json(folder / "structure.json")
    config = {} if "module" in info else read_json(folder / "config.json")
    return {"config": config, "edits": info["edits"], "origin": info["origin"]}


def shape_of(data: Mapping[str, Any]) -> Shape:
    """What `read_shape` gave, as a pass would say it."""
    edits, origin = read_edits(data)
    return Shape(dict(data["config"]), edits, origin)


@dataclass
class StoreReader:
    """Reads layers and plain tensors of a store. `keeper` holds a temporary folder alive while it is read."""

    folder: Path
    structure: Structure
    keeper: object = None
    _handles: dict[int, Any] = field(default_factory=dict, repr=False)
    _aliases: dict[int, dict[str, str]] = field(default_factory=dict, repr=False)

    def _handle(self, segment: int) -> Any:
        if segment not in self._handles:
            self._handles[segment] = open_file(self.folder / segment_file(segment))
        return self._handles[segment]

    def layer(self, spec: LayerSpec) -> Layer:
        """One layer with its stored tensors."""
        handle = self._handle(spec.segment)
        bias = self._tensor(spec.segment, f"{spec.name}.bias") if spec.has_bias else None
        weight: Tensor | QuantTensor
        if spec.format is None:
            weight = self._tensor(spec.segment, f"{spec.name}.weight")
        else:
            wanted = spec.format.tensor_specs(spec.shape)
            tensors = {part: self._tensor(spec.segment, f"{spec.name}.weight.{part}") for part in wanted}
            self._check(spec, tensors, wanted)
            weight = QuantTensor(spec.format, tensors, spec.shape)
        act = self._act(handle, spec)
        return Layer(spec.name, spec.kind, weight, bias, act, spec.users, spec.groups, pre=spec.pre)

    def _tensor(self, segment: int, key: str) -> Tensor:
        handle, path = self._handle(segment), self.folder / segment_file(segment)
        if segment not in self._aliases:
            aliases = read_header(handle, path)["aliases"]
            held = {str(name): str(owner) for name, owner in aliases.items()}
            # a tied weight that a pass is about to treat by itself
            self._aliases[segment] = held | {k: v for k, v in self.structure.aliases.items() if k not in handle.keys()}  # noqa: SIM118
        return read_tensor(handle, self._aliases[segment].get(key, key), path)

    def _check(self, spec: LayerSpec, tensors: Mapping[str, Tensor], wanted: Mapping[str, TensorSpec]) -> None:
        """Codes of another shape would be read as if they had the right one. Raises: InputError."""
        for part, (size, dtype) in wanted.items():
            found = tensors[part]
            if tuple(found.shape) != tuple(size) or found.dtype != dtype:
                raise InputError(
                    f"{self.folder / segment_file(spec.segment)}: {spec.name}.weight.{part} is {found.dtype} "
                    f"{tuple(found.shape)}, but {spec.format} stores {dtype} {tuple(size)}. Run `compress run` again."
                )

    def _act(self, handle: Any, spec: LayerSpec) -> ActSpec | None:
        """The input grid; a static one with its tensors."""
        if spec.act is None or not spec.act.static:
            return spec.act
        prefix = f"{spec.name}.act."
        names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118 (a handle, not a dict)
        params = {name.removeprefix(prefix): handle.get_tensor(name) for name in names}
        return replace(spec.act, params=params)

    def plain(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors that are no layer's."""
        home = {name: segment for segment, group in self.structure.plain.items() for name in group}
        return {name: self._tensor(home[name], name) for name in names}

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a plain tensor."""
        tensor: Tensor = self.plain([name])[name]
        return tensor.dtype

    def release(self) -> None:
        """Let go of the mapped files; tensors that were read stay valid."""
        self._handles.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the segment files."""
        return sum((self.folder / segment_file(s)).stat().st_size for s in self.structure.segments)


def _read_specs(folder: Path, segment: int, structure: Structure) -> dict[str, LayerSpec]:
    """The layers of a segment by name, as its file describes them. Raises: InputError for a file that is no store."""
    path = folder / segment_file(segment)
    handle = open_file(path)
    layers: list[dict[str, Any]] = read_header(handle, path)["layers"]
    specs = (_read_spec(item, handle, path, structure) for item in layers)
    return {spec.name: replace(spec, segment=segment) for spec in specs}


def read_segment(folder: Path, segment: int, structure: Structure) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Layers and plain tensors of one written segment."""
    specs = _read_specs(folder, segment, structure)
    reader = StoreReader(folder, structure)
    return {name: reader.layer(spec) for name, spec in specs.items()}, reader.plain(structure.plain[segment])


def open_store(folder: Path, keeper: object = None, *, hashed: bool = True) -> Model:
    """A store as a Model whose layers carry their formats.

    Args: keeper: kept alive as long as the model; hashed=False: its digest stays empty, and no file is read whole.
    Raises: InputError for a malformed store.
    """
    info_path = folder / "structure.json"
    if not info_path.is_file():
        raise InputError(f"{folder} has no structure.json: it is not the model/ folder of an artifact.")
    try:
        info = read_json(info_path)
        source_digest, module = str(info["source_digest"]), dict(info.get("module", {}))
        edits, origin = read_edits(info)
        caches = tuple(KvSpec.from_data(item) for item in info.get("kv", ()))
    except (OSError, ValueError, AttributeError, KeyError, TypeError, UsageError) as error:
        raise InputError(f"{info_path} is malformed ({error!r}). Run `compress run` again.") from error
    model = reopen(module, folder, edits) if module else load(folder, weights=False, edits=edits)
    if origin and len(origin) != len(model.structure.blocks):
        raise InputError(f"{info_path} tells the origin of {len(origin)} blocks, config.json of another number.")
    if caches and len(caches) != len(replace(model, edits=edits).attentions):
        raise InputError(f"{info_path} tells of {len(caches)} caches, and the model has another number. Copy it again.")
    layers: dict[str, LayerSpec] = {}
    for segment in model.structure.segments:
        layers |= _read_specs(folder, segment, model.structure)
    _check_whole(folder, model.structure, layers)
    order = {name: place for place, name in enumerate(model.structure.layers)}
    ordered = dict(sorted(layers.items(), key=lambda item: order.get(item[0], len(order))))
    structure = replace(model.structure, layers=ordered)
    files = [folder / segment_file(segment) for segment in structure.segments]
    files += [path for path in (folder / FILE,) if path.is_file()]
    return replace(
        model,
        structure=structure,
        weights=StoreReader(folder, structure, keeper),
        digest=digest_files(files) if hashed else "",
        source_digest=source_digest,
        origin=origin,
        kv=caches,
    )


def _read_spec(item: dict[str, Any], handle: Any, path: Path, structure: Structure) -> LayerSpec:
    """One layer of an opened segment."""
    try:
        name = str(item["name"])
        base = structure.layers.get(name) or _untied(structure, name)
        users = tuple(str(user) for user in item["users"])
        shape = (int(item["shape"][0]), int(item["shape"][1]))
        form = parse_format(item["format"]) if item["format"] else None
        act = ActSpec(parse_format(item["act"]), item.get("act_static") is not None) if item["act"] else None
        pre = tuple(parse_transform(str(text)) for text in item.get("pre", []))
        has_bias = bool(item["bias"])
        if form is not None:
            form.tensor_specs(shape)
    except (KeyError, TypeError, ValueError, IndexError, UsageError) as error:
        raise InputError(f"{path} describes a layer badly ({error!r}). Run `compress run` again.") from error
    if not users or not set(users) <= set(base.users):
        raise InputError(f"{path}: layer {name} is used by {users}, but by config.json only by {base.users}.")
    if shape != base.shape:
        raise InputError(f"{path.parent}: layer {name} is {shape} in the store, but {base.shape} by config.json.")
    dtype = base.source_dtype if form is not None else read_tensor(handle, f"{name}.weight", path).dtype
    return replace(
        base,
        name=name,
        users=users,
        format=form,
        act=act,
        pre=pre,
        source_dtype=dtype,
        has_bias=has_bias,
        bias_dtype=read_tensor(handle, f"{name}.bias", path).dtype if has_bias else None,
    )


def _check_whole(folder: Path, structure: Structure, layers: Mapping[str, LayerSpec]) -> None:
    """Raises: InputError where a layer of the model is in none of the files."""
    described = {user for spec in layers.values() for user in spec.users}
    lacking = sorted({user for spec in structure.layers.values() for user in spec.users} - described)
    if lacking:
        raise InputError(f"{folder} describes no layer {lacking[0]}, which config.json asks for. Copy it again.")


def _untied(structure: Structure, name: str) -> LayerSpec:
    """The tied layer that a module left when a pass changed it alone."""
    for spec in structure.layers.values():
        if name in spec.users:
            return replace(spec, kind=LayerKind.LINEAR)
    raise KeyError(name)
