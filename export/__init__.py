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

# target → module with RUNTIME, FOLDER, plan_layer, predict_bytes, capture, write, session and probe_command
# (compress/target.py)
TARGETS: dict[str, str] = {
    "onnx": "compress.export.onnx.target",
}


def find(name: str) -> Target:
    """The module of a target. Raises: UsageError for an unknown one."""
    if name not in TARGETS:
        raise UsageError(f"Unknown export target '{name}'.{nearest(name, TARGETS)}")
    return cast("Target", import_module(TARGETS[name]))


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`compress.artifact.export`."""
        return import_module("compress.artifact").export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
