"""What the clients of the vector quantizers share: where their sources lie, the model, and Hessians of its inputs.

Both references are repositories, not packages: they run from checkouts named by VPTQ_SOURCE and AQLM_SOURCE.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from client import BLOCKS, Job
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BATCH = 8


def source_of(variable: str) -> Path:
    """The checkout that an environment variable names. Raises: SystemExit."""
    folder = Path(os.environ.get(variable, ""))
    if not os.environ.get(variable) or not folder.is_dir():
        sys.exit(f"{variable} names no checkout of the reference")
    return folder


def commit_of(folder: Path) -> str:
    """Its commit, from git or from a file COMMIT beside an unpacked archive; else unknown."""
    written = folder / "COMMIT"
    if written.is_file():
        return written.read_text().strip()[:12]
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:12] or "unknown"


def stand_in(name: str, **members: Any) -> ModuleType:
    """A module of that name with these members, for an import that this machine cannot satisfy."""
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


def float_model(job: Job) -> Any:
    """The causal LM in float32."""
    return AutoModelForCausalLM.from_pretrained(job.model, torch_dtype=torch.float32).eval()


def given_layer(job: Job) -> dict[str, Tensor] | None:
    """weight (out, in) and hessian (in, in) where the job is one layer instead of a model."""
    return load_file(job.model / "layer.safetensors") if job.settings.get("layer") else None


@torch.no_grad()
def input_moments(model: nn.Module, ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of each linear layer in the blocks → mean of x xᵀ (in, in) and of x (in,), float64, of its inputs."""
    sums: dict[str, list[Tensor]] = {}

    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.flatten(0, -2).double()
        second, first = rows.T @ rows, rows.sum(0)
        if name in sums:
            sums[name][0] += second
            sums[name][1] += first
        else:
            sums[name] = [second, first]

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name, module in model.named_modules()
        if name.startswith(BLOCKS) and isinstance(module, nn.Linear)
    ]
    for batch in ids.split(BATCH):
        model(batch)
    for hook in hooks:
        hook.remove()
    return {name: (second / ids.numel(), first / ids.numel()) for name, (second, first) in sums.items()}


def as_float16(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What float16 storage keeps of them."""
    return {name: tensor.half().float() for name, tensor in tensors.items()}


__all__ = [
    "as_float16",
    "commit_of",
    "float_model",
    "given_layer",
    "input_moments",
    "source_of",
    "stand_in",
]
