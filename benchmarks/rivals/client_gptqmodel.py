"""GPTQModel: GPTQ with its defaults (symmetric, group-aware order). Its own torch kernel decodes what it saved."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# on fewer than three cores it would start one worker and then refuse to start, since it needs two
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from client import Meter, check_levels, finish, read_job
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file

STORED = ("qweight", "scales", "qzeros")
"""g_idx, a table of the column's group, is left out of the count: here it says nothing that the order does not."""


def main() -> None:
    meter, job = Meter(), read_job()
    model = GPTQModel.load(str(job.model), QuantizeConfig(bits=job.bits, group_size=job.group), dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in job.ids]
    with meter.timed():
        model.quantize(rows, batch_size=1)
    figures = meter.figures()
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        files = [load_file(path) for path in Path(folder).glob("*.safetensors")]
        read = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu").model
        bits = sum(8.0 * t.nbytes for file in files for name, t in file.items() if name.rpartition(".")[2] in STORED)
        weights = {
            f"{name}.weight": one.dequantize_weight().T
            for name, one in read.named_modules()
            if hasattr(one, "dequantize_weight")
        }
    for name, weight in weights.items():
        check_levels(name, weight, job.group, 2**job.bits)
    finish(job, "gptqmodel", weights, bits, figures)


if __name__ == "__main__":
    main()
