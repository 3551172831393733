"""bitsandbytes: NF4 in blocks of 64, with and without double quantization, and INT8 per row as in LLM.int8()."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import torch
from client import Job, Meter, check_levels, finish, linears, load_model, read_job
from torch import Tensor


def quantize(weight: Tensor, job: Job) -> Any:
    """What it stores of a weight."""
    if job.settings["method"] == "int8":
        return bnb.int8_vectorwise_quant(weight.half())
    double = job.settings["double"]
    return bnb.quantize_4bit(weight, blocksize=job.group, compress_statistics=double, quant_type="nf4")


def decode(stored: Any, job: Job) -> tuple[Tensor, float]:
    """The weight, and the bits of codes and scales (the table of 16 values, and one of 256, is shared by all)."""
    if job.settings["method"] == "int8":
        codes, rows, _ = stored
        return bnb.int8_vectorwise_dequant(codes, rows), 8 * (codes.nbytes + rows.nbytes)
    codes, state = stored
    scales = state.absmax.nbytes + (state.state2.absmax.nbytes + state.offset.nbytes if state.nested else 0)
    return bnb.dequantize_4bit(codes, state), 8 * (codes.nbytes + scales)


def main() -> None:
    meter, job = Meter(), read_job()
    layers = linears(load_model(job))
    with meter.timed(), torch.no_grad():
        stored = {name: quantize(layer.weight.data, job) for name, layer in layers.items()}
    figures, bits, weights = meter.figures(), 0.0, {}
    for name, one in stored.items():
        weight, counted = decode(one, job)
        check_levels(name, weight, job.group or weight.shape[1], 2**job.bits)
        weights[f"{name}.weight"], bits = weight, bits + counted
    finish(job, "bitsandbytes", weights, bits, figures)


if __name__ == "__main__":
    main()
