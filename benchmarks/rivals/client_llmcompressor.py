"""llm-compressor: GPTQ (symmetric) and AWQ. Everything but bits, group and scheme is its default."""

from __future__ import annotations

from typing import Any

import torch
from client import Job, Meter, check_levels, finish, linears, load_model, read_job, stored_bits
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, forward_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache

if not torch.accelerator.is_available():
    # AWQ pins what it caches, which torch refuses without an accelerator; a copy to one is all that pinning serves
    IntermediatesCache.pin_memory = lambda self, *args, **kwargs: None


def recipe(job: Job) -> list[Any]:
    """Its modifiers for the asked method."""
    weights = QuantizationArgs(
        num_bits=job.bits,
        type="int",
        symmetric=not job.settings.get("asymmetric", False),
        strategy="group",
        group_size=job.group,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if job.settings["method"] == "awq":
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]


def decoded(module: Any) -> torch.Tensor:
    """The weight as its codes, scales and zero points decode to it."""
    args, zero = module.quantization_scheme.weights, getattr(module, "weight_zero_point", None)
    with torch.no_grad():
        weight: torch.Tensor = forward_quantize(module, module.weight, "weight", args)
    assert zero is None or zero.shape == module.weight_scale.shape
    return weight


def main() -> None:
    meter, job = Meter(), read_job()
    model = load_model(job)
    count, length = job.ids.shape
    rows = {"input_ids": job.ids.tolist(), "attention_mask": torch.ones_like(job.ids).tolist()}
    data = Dataset.from_dict(rows)
    with meter.timed():
        oneshot(model=model, dataset=data, recipe=recipe(job), num_calibration_samples=count, max_seq_length=length)
    figures, bits = meter.figures(), 0.0
    weights = {}
    for name, module in linears(model).items():
        weights[f"{name}.weight"] = weight = decoded(module)
        check_levels(name, weight, job.group, 2**job.bits)
        zero_bits = job.bits if job.settings.get("asymmetric") else 0
        bits += stored_bits(weight, job.bits, job.group, zero_bits=zero_bits)
    # AWQ also folds its factors into the norms
    weights |= {name: tensor for name, tensor in model.state_dict().items() if name.endswith("norm.weight")}
    finish(job, "llmcompressor", weights, bits, figures)


if __name__ == "__main__":
    main()
