"""Formats: how a tensor is stored and decoded. Adding one: its file, its test, one line in `FORMATS`."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from compress.errors import UsageError, nearest
from compress.spec import Call, parse_call

if TYPE_CHECKING:
    from compress.formats.base import Format

# pattern of the name → class, imported on first use
FORMATS: dict[str, str] = {
    r"int(?P<bits>[2-8])": "compress.formats.int_grid:IntGrid",
}

# what a user may type, for error texts
NAMES = tuple(f"int{bits}" for bits in range(2, 9))


@lru_cache(maxsize=1024)
def _parse_text(text: str) -> Format:
    return parse_format(parse_call(text))


def parse_format(value: str | Call) -> Format:
    """`int4(group=128)`, `int8(channel)` … as a format.

    Raises: UsageError for an unknown name or setting, with the nearest one.
    """
    if isinstance(value, str):
        return _parse_text(value)
    for pattern, path in FORMATS.items():
        match = re.fullmatch(pattern, value.name)
        if match is not None:
            module, _, name = path.partition(":")
            cls: type[Format] = getattr(import_module(module), name)
            return cls.from_call(value, **match.groupdict())
    raise UsageError(f"Unknown format '{value.name}'.{nearest(value.name, NAMES)}")
