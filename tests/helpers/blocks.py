"""A block as a pass sees it."""

from __future__ import annotations

from typing import Any

from compress.engine.blockpass import Block


def block_of(name: str, layers: Any, plain: Any, runner: Any, chosen: Any = None, stats: Any = None) -> Block:
    return Block(
        name=name, layers=layers, source=layers, chosen=chosen or {}, plain=plain, stats=stats or {}, runner=runner
    )
