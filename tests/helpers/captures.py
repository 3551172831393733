"""Tracing is most of a tiny model's run: models of one structure share what the first of them was captured as."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.models.model import Model

Capture = Callable[["Model", int], bytes]


def structure_of(model: Model, opset: int) -> str:
    """All that a capture of a model of tokens depends on."""
    layers = [(name, spec.kind, spec.shape, spec.users, spec.has_bias) for name, spec in model.structure.layers.items()]
    plain = [(name, shape, str(dtype)) for name, (shape, dtype) in model.plain_shapes.items()]
    architectures = model.raw_config.get("architectures")
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    return json.dumps([opset, model.task, architectures, config, layers, plain], default=str, sort_keys=True)


def remembered(capture: Capture, folder: Path) -> Capture:
    """The same function, which traces each structure once for all processes that share the folder. Images and models
    without weights are always traced."""
    folder.mkdir(exist_ok=True)

    def once(model: Model, opset: int) -> bytes:
        if model.image is not None or model.weights is None:
            return capture(model, opset)
        path = folder / hashlib.sha256(structure_of(model, opset).encode()).hexdigest()
        if not path.is_file():
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(capture(model, opset))
            unfinished.replace(path)
        return path.read_bytes()

    return once


def capture_once(folder: Path) -> None:
    """From now on, in this process, every target captures each structure once."""
    from compress.export.onnx import capture
    from compress.export.onnx import target as onnx_target
    from compress.export.openvino import target as openvino_target
    from compress.export.tensorrt import target as tensorrt_target

    once = remembered(capture.capture_graph, folder)
    for target in (onnx_target, openvino_target, tensorrt_target):
        target.capture_graph = once
