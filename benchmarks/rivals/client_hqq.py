"""HQQ: data-free, asymmetric, with its default solver. Bits are counted from what it packs (3 bit: ten codes in 32)."""

from __future__ import annotations

from client import Meter, check_levels, finish, linears, load_model, read_job
from hqq.core.quantize import Quantizer, hqq_base_quant_config

SCALE_BITS = 16
"""HQQ keeps scales and zero points in the compute dtype, by default float16; this run's float32 is not counted."""


def main() -> None:
    meter, job = Meter(), read_job()
    layers = linears(load_model(job))
    config = hqq_base_quant_config(nbits=job.bits, group_size=job.group)["weight_quant_params"]
    with meter.timed():
        stored = {name: Quantizer.quantize(layer.weight.data, device="cpu", **config) for name, layer in layers.items()}
    figures, bits, weights = meter.figures(), 0.0, {}
    for name, (codes, meta) in stored.items():
        meta["compute_dtype"] = layers[name].weight.dtype
        weights[f"{name}.weight"] = weight = Quantizer.dequantize(codes, meta)
        check_levels(name, weight, job.group, 2**job.bits)
        bits += 8 * codes.nbytes + SCALE_BITS * (meta["scale"].numel() + meta["zero"].numel())
    finish(job, "hqq", weights, bits, figures)


if __name__ == "__main__":
    main()
