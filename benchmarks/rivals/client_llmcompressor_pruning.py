"""llm-compressor: SparseGPT and Wanda. Everything but sparsity, mask and what is left out is its default."""

from __future__ import annotations

from typing import Any

import torch
from client import Job, Meter, finish, linears, load_model, read_job
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier


def recipe(job: Job) -> Any:
    """Its modifier for the asked method; `mask` 0:0 is unstructured."""
    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job.settings["method"]]
    more = {key: job.settings[key] for key in ("sparsity_profile", "owl_m", "owl_lmbda") if key in job.settings}
    return kind(sparsity=job.settings["sparsity"], mask_structure=job.settings["mask"], ignore=["re:.*lm_head"], **more)


def check_zeros(job: Job, weights: dict[str, torch.Tensor]) -> float:
    """The share of zeros over all layers. Raises: ValueError where it is not what was asked, so that weights which the
    rival left alone are never taken for its result."""
    found = sum(int((one == 0).sum()) for one in weights.values()) / sum(one.numel() for one in weights.values())
    if abs(found - job.settings["sparsity"]) > 0.005:
        raise ValueError(f"{found:.4f} of the weights are zero where {job.settings['sparsity']} were asked")
    kept, run = map(int, job.settings["mask"].split(":"))
    for name, one in weights.items() if run else ():
        if int((one != 0).reshape(-1, run).sum(1).max()) > run - kept:
            raise ValueError(f"{name} has a run of {run} with more than {run - kept} values")
    return found


def main() -> None:
    meter, job = Meter(), read_job()
    model = load_model(job)
    count, length = job.ids.shape
    rows = {"input_ids": job.ids.tolist(), "attention_mask": torch.ones_like(job.ids).tolist()}
    data = Dataset.from_dict(rows)
    with meter.timed():
        oneshot(model=model, dataset=data, recipe=recipe(job), num_calibration_samples=count, max_seq_length=length)
    weights = {f"{name}.weight": module.weight.detach() for name, module in linears(model).items()}
    figures = {**meter.figures(), "zeros": check_zeros(job, weights)}
    finish(job, "llmcompressor", weights, 32.0 * sum(one.numel() for one in weights.values()), figures)


if __name__ == "__main__":
    main()
