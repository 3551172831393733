"""NVIDIA's two builders, and in what they differ: TensorRT-RTX, which builds for other machines, and TensorRT (10 and
11), which times kernels on the GPU that it builds for.

What they share needs no table: types come from the graph, no precision flag is set, no plugin is loaded, and
`build_serialized_network` makes the engine. tests/data/tensorrt_api.json lists what each version really offers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress import extras
from compress.errors import UnsupportedError


@dataclass(frozen=True)
class Flavour:
    """One builder. runtime: its name in hardware profiles; ahead: SMs that it builds for on any machine (none: for the
    GPU that is here); timing_cache: whether it times kernels, and so can be given what was timed before."""

    runtime: str
    module: str
    title: str
    extra: str
    ahead: tuple[int, ...]
    timing_cache: bool


# Timing caches of TensorRT-RTX are no-ops since 1.2, as its own warning says.
RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "TensorRT-RTX", "tensorrt-rtx", (75, 80, 86, 89, 120, 121), False)
FULL = Flavour("tensorrt", "tensorrt", "TensorRT", "tensorrt", (), True)
FLAVOURS = {each.runtime: each for each in (RTX, FULL)}
OLDEST, NEWEST = 10, 11
"""Major versions of TensorRT that this was written for."""


def load_module(flavour: Flavour = RTX) -> Any:
    """Its Python module. Raises: UnsupportedError naming what to install."""
    module = extras.load(flavour.module, flavour.title, flavour.extra)
    major = str(module.__version__).split(".")[0]
    if flavour is FULL and not (major.isdigit() and OLDEST <= int(major) <= NEWEST):
        raise UnsupportedError(
            f"TensorRT {module.__version__} is installed; engines are built with {OLDEST} or {NEWEST}. "
            "Install one of these: pip install 'tensorrt>=10.13,<12'."
        )
    return module


def typed(trt: Any) -> int:
    """Flags of `create_network`: TensorRT 10 takes types from the graph only if told to; later ones always do, and what
    is left of the flag there has another number."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def lacking(flavour: Flavour, sm: int) -> str:
    """Why this machine does not run engines of a builder for an SM (nor, without `ahead`, build them); empty where it
    does. The sentence ends with a period."""
    from compress.export.tensorrt import gpu

    here = gpu.capability()
    if here is None:
        return f"PyTorch sees no NVIDIA GPU here ({gpu.describe()}), and it takes one of SM {sm}."
    if here != sm:
        return f"The GPU here is of SM {here} ({gpu.name()}), and it takes one of SM {sm}."
    try:
        load_module(flavour)
    except UnsupportedError as error:
        return str(error)
    return ""
