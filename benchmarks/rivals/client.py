"""What the rivals' clients share: they run in environments of their own, so nothing of compress is imported here.

A client is called as `client_NAME.py MODEL WINDOWS OUT SETTINGS`: a folder with a Hugging Face causal LM, a safetensors
file with `ids` (windows, length) int64, the folder to make, and JSON. It leaves in OUT an ordinary checkpoint with the
weights as the rival's codes decode to, and `job.json`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  (an import, so below the level that memory counts from)
from meter import Meter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

BLOCKS = "model.layers."
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Job:
    """What the client was asked to do."""

    model: Path
    ids: Tensor
    out: Path
    settings: dict[str, Any]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return int(self.settings["bits"])

    @property
    def group(self) -> int:
        """Input columns that share a scale."""
        return int(self.settings["group"])


def read_job() -> Job:
    """From the command line."""
    model, windows, out, settings = sys.argv[1:5]
    return Job(Path(model), load_file(windows)["ids"], Path(out), json.loads(settings))


def load_model(job: Job) -> Any:
    """The causal LM, in the settings' dtype: float32 unless they say otherwise."""
    dtype = getattr(torch, job.settings.get("dtype", "float32"))
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks, also where the rival put a module of its own in its place."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.startswith(BLOCKS) and name.endswith("_proj") and hasattr(module, "weight")
    }


def stored_bits(weight: Tensor, bits: float, group: int, *, scale_bits: float = 16, zero_bits: float = 0) -> float:
    """Bits of a weight (out, in) in codes, scales and zero points, one of each per group."""
    rows, columns = weight.shape
    groups = rows * -(-columns // group)
    return bits * weight.numel() + groups * (scale_bits + zero_bits)


def check_levels(name: str, weight: Tensor, group: int, levels: int, rows: int = 8) -> None:
    """What was decoded must lie on a grid: no group of the first rows has more values than there are codes.

    Raises: ValueError, so that a rival's unquantized weights are never taken for its result.
    """
    for row in weight[:rows]:
        for part in row.split(group):
            found = int(part.unique().numel())
            if found > levels:
                raise ValueError(f"{name}: a group has {found} values where its codes allow {levels}")


def finish(job: Job, package: str, weights: Mapping[str, Tensor], bits: float, figures: Mapping[str, Any]) -> None:
    """Write the checkpoint and job.json. With the setting `keep`, a list of tensor names, only those are written.

    Args: weights: tensors by their name in the checkpoint, linear layers and whatever else was changed; bits: of all
    quantized weights together.
    """
    broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    count = sum(weights[name].numel() for name in weights if name.endswith("_proj.weight"))
    job.out.mkdir(parents=True, exist_ok=True)
    if "keep" in job.settings:
        kept = {name: weights[name] for name in job.settings["keep"]}
    else:
        kept = load_file(job.model / "model.safetensors")
        if strange := sorted(set(weights) - set(kept)):
            raise ValueError(f"{strange[0]} is no tensor of {job.model}")
        kept |= weights
        copy_sides(job)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in kept.items()}
    save_file(tensors, job.out / "model.safetensors", metadata={"format": "pt"})
    facts = {
        "rival": package,
        "version": figures["version"] if "version" in figures else version(package),
        "torch": torch.__version__,
        "settings": job.settings,
        "calibration": ids_digest(job.ids),
        "bits_per_weight": bits / count,
        "broken": broken,
        **figures,
    }
    (job.out / "job.json").write_text(json.dumps(facts, indent=1) + "\n")


def ids_digest(ids: Tensor) -> str:
    """Names the calibration windows that a result was made with."""
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()


def copy_sides(job: Job) -> None:
    """The config, now of float32 weights, and the tokenizer."""
    config = json.loads((job.model / "config.json").read_text())
    (job.out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))
    for name in COPIED:
        if (job.model / name).is_file():
            shutil.copy(job.model / name, job.out / name)


__all__ = ["Job", "Meter", "check_levels", "finish", "ids_digest", "linears", "load_model", "read_job", "stored_bits"]
