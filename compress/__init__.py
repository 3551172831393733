"""compress: smaller, faster models for the hardware at hand, with a report that can be trusted.

The names below are imported on first use, so `import compress` stays light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Else ONNX Runtime starts a thread that reports to its makers, and leaves a file in the temporary folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_EXPORTS = {
    "CompressError": "compress.errors",
    "Pipeline": "compress.pipeline",
    "Recipe": "compress.recipe",
    "export": "compress.artifact",
    "open_artifact": "compress.artifact",
    "load": "compress.opening",
    "profile": "compress.artifact",
    "run": "compress.run",
    "verify": "compress.artifact",
}

__all__ = [
    "CompressError",
    "Pipeline",
    "Recipe",
    "__version__",
    "export",
    "load",
    "open_artifact",
    "profile",
    "run",
    "verify",
]

if TYPE_CHECKING:
    from compress.artifact import open_artifact, profile, verify
    from compress.errors import CompressError
    from compress.opening import load
    from compress.pipeline import Pipeline
    from compress.recipe import Recipe
    from compress.run import run


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
