"""The text of `FloatGrid`: names, scale formats, and what a call may hold."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from compress.errors import UsageError, nearest
from compress.spec import Call

Granularity = Literal["channel", "tensor", "token", "head"]
ScaleFormat = Literal["float32", "float16", "float8_e4m3", "e8m0"]

SCALE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}

# name → exponent bits, mantissa bits, group, scale format (OCP MX v1.0 table 1; NVIDIA's NVFP4)
NAMED: dict[str, tuple[int, int, int, ScaleFormat]] = {
    "mxfp4": (2, 1, 32, "e8m0"),
    "mxfp6_e2m3": (2, 3, 32, "e8m0"),
    "mxfp6_e3m2": (3, 2, 32, "e8m0"),
    "mxfp8_e4m3": (4, 3, 32, "e8m0"),
    "mxfp8_e5m2": (5, 2, 32, "e8m0"),
    "nvfp4": (2, 1, 16, "float8_e4m3"),
}


def usual_scale(group: Any) -> ScaleFormat:
    """The scale format that text need not name: float16 for groups, of which there are many, else float32."""
    return "float16" if isinstance(group, int) else "float32"


def settings_of(call: Call) -> dict[str, Any]:
    """`group`, if given, and `scale` of a call. Raises: UsageError for words and names that are neither."""
    settings: dict[str, Any] = dict(call.kwargs)
    for word in call.args:
        key = "scale" if word in get_args(ScaleFormat) else "group"
        if key == "group" and word not in get_args(Granularity):
            words = (*get_args(Granularity), *SCALE_DTYPES)
            raise UsageError(f"{call.name}: unknown word '{word}'.{nearest(str(word), words)}")
        if key in settings:
            raise UsageError(f"{call.text()}: {key} is given twice. Keep one of them.")
        settings[key] = word
    call.require_known(("group", "scale"))
    return {"scale": usual_scale(settings.get("group")), **settings}
