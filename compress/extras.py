"""Modules of optional packages, imported where they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from compress.errors import UnsupportedError


def load(module: str, title: str, extra: str) -> Any:
    """A module by name. Raises: UnsupportedError naming the extra of this package that installs it."""
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: libraries of its own that are missing or not for this system
        raise UnsupportedError(
            f"{title} is not installed ({error}). Install it with: pip install 'compress[{extra}]'."
        ) from error
