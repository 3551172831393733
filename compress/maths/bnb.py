"""bitsandbytes, where it is installed (extra `bitsandbytes`)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from compress.errors import UnsupportedError


def require_bitsandbytes(user: str) -> None:
    """Raises: UnsupportedError naming the extra, and `user` that asked for it."""
    if find_spec("bitsandbytes") is None:
        raise UnsupportedError(
            f"{user} asks for bitsandbytes' own quantizers (library=true), which are not installed. Install the extra: "
            "pip install 'compress[bitsandbytes]'. Or leave library out: ours make the same codes."
        )


def functional(user: str) -> Any:
    """The module bitsandbytes.functional, imported late, since it takes seconds. Raises: as above."""
    require_bitsandbytes(user)
    return import_module("bitsandbytes.functional")
