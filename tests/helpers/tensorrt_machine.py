"""A machine with TensorRT and its GPU, both stand-ins: tests/stubs/tensorrt has the real bindings' names, and tensors
lie in this machine's memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from compress.export.tensorrt import builder, gpu

VERSIONS = ("10.16.1.11", "11.4.0.106")
CARD = "NVIDIA H100 80GB HBM3"
STUBS = Path(__file__).parents[1] / "stubs"
TAKEN_BYTES = 12_000_000
"""Of the GPU's memory, by each look at what is free."""
Machine = Callable[..., None]


class HostBuffers:
    """gpu.Buffers in this machine's memory."""

    stream = 7

    def put(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(values.copy())

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def wait(self) -> None:
        pass


def becoming(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Machine:
    """`machine(version, sm)`: from there on TensorRT of this version and this GPU are here. cache: its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    process = builder._run
    free = iter(range(80 * 10**9, 0, -TAKEN_BYTES))

    def become(
        version: str = VERSIONS[1], sm: int | None = 90, card: str = CARD, shift: float = 0, child: bool = False
    ) -> None:
        for name, value in (("TENSORRT", version), ("GPU", card if sm else ""), ("SHIFT", str(shift))):
            monkeypatch.setenv(f"STUB_{name}", value)
        monkeypatch.setenv("PYTHONPATH", str(STUBS))
        monkeypatch.setitem(sys.modules, "tensorrt", stand_in())
        monkeypatch.setattr(gpu, "capability", lambda: sm)
        monkeypatch.setattr(gpu, "name", lambda: card)
        monkeypatch.setattr(gpu, "total_bytes", lambda: 80 * 10**9)
        monkeypatch.setattr(gpu, "free_bytes", lambda: next(free))
        monkeypatch.setattr(gpu, "Buffers", HostBuffers)
        monkeypatch.setattr(builder, "_run", process if child else in_this_process)

    return become


def stand_in() -> ModuleType:
    """tests/stubs/tensorrt, as the environment says; not left among the imported modules."""
    found = importlib.util.spec_from_file_location("tensorrt", STUBS / "tensorrt" / "__init__.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def in_this_process(request: dict[str, Any], *_: object) -> subprocess.CompletedProcess[str]:
    """The builder without its process, which takes longer to start than all that it does here."""
    return subprocess.CompletedProcess([], 0, json.dumps(builder.compile_engine(request)), "")
