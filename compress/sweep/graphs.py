"""Captured float graphs, shared by the variants of a sweep whose structure is the same: tracing takes longest."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from compress import hwprofiles
from compress.hwprofiles import Profile
from compress.models.model import Model
from compress.target import Target


def shared_graph(target: Target, model: Model, profile: Profile, folder: Path) -> bytes:
    """What the target captures of a model's structure, from `folder` where that is known already."""
    path = folder / _key(model, profile)
    if path.is_file():
        return path.read_bytes()
    graph = target.capture(model, profile)
    folder.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        making.write_bytes(graph)
        making.replace(path)  # whole or absent, whoever else is writing the same
    finally:
        making.unlink(missing_ok=True)  # what a full disk cut off
    return graph


def _key(model: Model, profile: Profile) -> str:
    """Of all that a capture reads: no format, no weight. The model's code is the same throughout a sweep."""
    layers = [
        [spec.name, list(spec.users), str(spec.kind), list(spec.shape), spec.has_bias]
        for spec in model.structure.layers.values()
    ]
    plain = {name: [list(shape), str(dtype)] for name, (shape, dtype) in model.plain_shapes.items()}
    edits = [edit.as_data() for edit in model.edits]
    content = [hwprofiles.digest(profile), str(model.task), model.raw_config, layers, plain, edits]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
