"""`native.json`: which layers of a folder are codebooks or sparse, and which tensors stand for several.

    {"schema": 1,
     "layers": {"model.layers.0.mlp.up_proj": {"format": "codebook(…)", "users": ["model.layers.0.mlp.up_proj"]}, …},
     "aliases": {"model.layers.0.mlp.up_proj.weight.codebook": "model.layers.0.mlp.gate_proj.weight.codebook", …},
     "edits": […], "kv": […]}

The last two are as in structure.json, and left out where they would be empty.
Beside it are config.json, the tokenizer's files, `caches.safetensors` where caches need tensors, and
`model*.safetensors`, whose tensors are called `<layer>.weight` (out, in) of a float layer, `<layer>.weight.<part>` of
another, `<layer>.bias`, and as the module calls its other tensors. Floats have the source's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import InputError, UsageError
from compress.formats import parse_format
from compress.formats.codebook import Codebook
from compress.formats.sparse import Sparse
from compress.kv.spec import KvSpec
from compress.layer import LayerSpec
from compress.models.edits import Edit, read_edits
from compress.models.folder import read_object
from compress.models.model import Model

NAME = "native.json"
SCHEMA = 1
AGAIN = "Export the artifact again."


@dataclass(frozen=True)
class Stored:
    """A layer that is no plain tensor: its format, and the module paths that compute with it."""

    format: Codebook | Sparse
    users: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """What `native.json` says. aliases: name of a tensor → of the one that is stored for it; edits: of the module tree;
    kv: how each layer's keys and values are cached."""

    layers: Mapping[str, Stored]
    aliases: Mapping[str, str] = field(default_factory=dict)
    edits: tuple[Edit, ...] = ()
    kv: tuple[KvSpec, ...] = ()


def of_specs(specs: Mapping[str, LayerSpec], aliases: Mapping[str, str], model: Model) -> Contents:
    """The contents of a folder with these layers of a model."""
    stored = {name: spec.format for name, spec in specs.items() if isinstance(spec.format, Codebook | Sparse)}
    layers = {name: Stored(form, specs[name].users) for name, form in stored.items()}
    return Contents(layers, aliases, model.edits, model.kv)


def to_text(contents: Contents) -> str:
    """As the file holds it."""
    layers = {name: {"format": str(one.format), "users": [*one.users]} for name, one in contents.layers.items()}
    told: dict[str, Any] = {"schema": SCHEMA, "layers": layers, "aliases": dict(contents.aliases)}
    more = {"edits": [edit.as_data() for edit in contents.edits], "kv": [spec.as_data() for spec in contents.kv]}
    told |= {name: items for name, items in more.items() if items}
    return json.dumps(told, indent=1, sort_keys=True) + "\n"


def read(folder: Path) -> Contents:
    """What a folder's file says. Raises: InputError where it is missing or malformed, or of another schema."""
    path = folder / NAME
    raw = read_object(path, AGAIN)
    if raw.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {str(raw.get('schema'))[:40]}; this version reads {SCHEMA}. {AGAIN}")
    try:
        layers = {str(name): _stored(item) for name, item in raw["layers"].items()}
        aliases = {name: owner for name, owner in raw["aliases"].items() if isinstance(owner, str)}
        if len(aliases) < len(raw["aliases"]):
            raise TypeError("an alias is no name of a tensor")
        edits, _ = read_edits(raw)
        caches = tuple(KvSpec.from_data(item) for item in raw.get("kv", ()))
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise InputError(f"{path} is malformed ({error!r}). {AGAIN}") from error
    return Contents(layers, aliases, edits, caches)


def _stored(item: Any) -> Stored:
    form, users = parse_format(item["format"]), item["users"]
    if not isinstance(form, Codebook | Sparse):
        raise ValueError(f"nothing reads {form}")
    if not isinstance(users, list) or not all(isinstance(user, str) for user in users):
        raise TypeError("users is no list of names")
    return Stored(form, tuple(users))
