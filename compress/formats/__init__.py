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
    r"fp(?P<bits>\d)_e(?P<exponent>\d)m(?P<mantissa>\d)|mxfp4|mxfp6_e2m3|mxfp6_e3m2|mxfp8_e4m3|mxfp8_e5m2|nvfp4": (
        "compress.formats.float_grid:FloatGrid"
    ),
    r"(?P<table>nf4|fp4|table)": "compress.formats.lookup:Lookup",
    r"codebook": "compress.formats.codebook:Codebook",
    r"trellis": "compress.formats.trellis:Trellis",
    r"sparse": "compress.formats.sparse:Sparse",
}

# what a user may type, for error texts
NAMES = (
    *(f"int{bits}" for bits in range(2, 9)),
    *("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"),
    *("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4"),
    *("nf4", "fp4", "table", "codebook", "trellis", "sparse"),
)


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


def name_of(form: Format) -> str:
    """A format's name without its settings, as in "nf4": what hardware profiles call `format`."""
    return str(form).partition("(")[0]
