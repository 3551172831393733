"""Export targets: one folder per target. Adding one: its folder, its test, one line in `TARGETS`.

The module is callable, so that `compress.export(result, …)` of the Python API and `compress.export.onnx` are both
right whatever was imported first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if __name__ != "compress.export":
    raise ImportError("Import this package as compress.export: a second copy would be a second registry.")

from compress.errors import UsageError, nearest

if TYPE_CHECKING:
    from compress.target import Target

# target → module, or module:object, with RUNTIME, FOLDER, plan_layer, predict_bytes, capture, write, session and
# probe_command (compress/target.py)
TARGETS: dict[str, str] = {
    "onnx": "compress.export.onnx.target",
    "tensorrt": "compress.export.tensorrt.target",
    "openvino": "compress.export.openvino.target",
    "native": "compress.export.native.target",
    "checkpoint": "compress.export.checkpoint.target:COMPRESSED_TENSORS",
    "checkpoint-gptq": "compress.export.checkpoint.target:GPTQ",
    "checkpoint-awq": "compress.export.checkpoint.target:AWQ",
    "checkpoint-bnb": "compress.export.checkpoint.target:BITSANDBYTES",
    "checkpoint-aqlm": "compress.export.checkpoint.target:AQLM",
    "checkpoint-vptq": "compress.export.checkpoint.target:VPTQ",
    "checkpoint-exl3": "compress.export.checkpoint.target:EXL3",
}


def find(name: str) -> Target:
    """The module, or object of a module, of a target. Raises: UsageError for an unknown one."""
    if name not in TARGETS:
        raise UsageError(f"Unknown export target '{name}'.{nearest(name, TARGETS)}")
    path, _, member = TARGETS[name].partition(":")
    module = import_module(path)
    return cast("Target", getattr(module, member) if member else module)


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`compress.artifact.export`."""
        return import_module("compress.artifact").export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
