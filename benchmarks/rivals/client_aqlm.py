"""AQLM's own program from a checkout named by AQLM_SOURCE: its quantize_aq on our windows, with its README's settings.

Nothing of it is replaced but the import of `datasets`. Of the windows an eighth are held out for the early stop of the
block fine-tuning, as in its README (128 of 1024). Sequences of a fine-tuning step go through 8 at a time instead of one
(the same gradient). A single layer goes through its AQEngine alone, which is what it does before fine-tuning.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from typing import Any

import torch
from client import BLOCKS, Job, Meter, finish, read_job
from torch import Tensor, nn
from vq_client import commit_of, float_model, given_layer, source_of, stand_in

HELD_OUT = 8
SEED = 0


def settings_of(job: Job) -> Namespace:
    """Defaults of its main.py, and over them those of its README's command."""
    given = job.settings
    return Namespace(
        devices=[torch.device("cpu")],
        model_seqlen=job.ids.shape[1],
        offload_activations=False,
        true_sequential=False,
        resume=False,
        save=None,
        on_save=None,
        wandb=False,
        skip_out_loss=True,
        use_checkpointing=False,
        mix_compression=False,
        num_codebooks=given["stages"],
        nbits_per_codebook=given["bits_of_code"],
        in_group_size=given["vector"],
        out_group_size=1,
        scale_nbits=0,
        codebook_value_nbits=16,
        codebook_value_num_groups=1,
        init_max_iter=100,
        init_max_points_per_centroid=None,
        use_faiss=False,
        lr=1e-4,
        beam_size=1,
        max_epochs=1000,
        relative_mse_tolerance=0.01,
        steps_per_epoch=100,
        print_frequency=100,
        finetune_lr=1e-5,
        finetune_batch_size=32,
        local_batch_size=8,
        finetune_max_epochs=given.get("finetune_epochs", 10),
        finetune_early_stop=3,
        finetune_adam_beta1=0.9,
        finetune_adam_beta2=0.95,
        finetune_keep_best=True,
    )


def stored(weight: Any) -> tuple[Tensor, float]:
    """(out, in) with codebooks and scales as float16 keeps them, and the stored bits by its own count."""
    for parameter in (weight.codebooks, weight.scales):
        parameter.data = parameter.data.half().float()
    with torch.no_grad():
        return weight(), weight.estimate_nbits_per_parameter() * weight.out_features * weight.in_features


def quantize_model(job: Job, args: Namespace) -> tuple[dict[str, Tensor], float]:
    """Its whole program: weights and norms by their names, and the bits of the weights."""
    import main as reference  # of the checkout

    model = float_model(job).train(False)
    order = torch.randperm(len(job.ids))
    held = len(order) // HELD_OUT
    windows = [job.ids[int(at)][None] for at in order]
    reference.quantize_aq(model, windows[held:], windows[:held], args)
    weights, bits = {}, 0.0
    for name, module in model.named_modules():
        if not name.startswith(BLOCKS):
            continue
        if hasattr(module, "quantized_weight"):
            weights[f"{name}.weight"], own = stored(module.quantized_weight)
            bits += own
        elif name.endswith("layernorm"):
            weights[f"{name}.weight"] = module.weight.data
    return weights, bits


def quantize_layer(layer: dict[str, Tensor], args: Namespace) -> tuple[dict[str, Tensor], float]:
    """Its engine on one layer."""
    from aq_engine import AQEngine

    linear = nn.Linear(*reversed(layer["weight"].shape), bias=False)
    linear.weight.data = layer["weight"].clone()
    engine = AQEngine(linear)
    engine.XTX.copy_(layer["hessian"])
    weight, bits = stored(engine.quantize(args=args))
    return {"layer_proj.weight": weight}, bits


def main() -> None:
    meter, job = Meter(), read_job()
    source = source_of("AQLM_SOURCE")
    sys.modules.pop("main", None)
    sys.path.insert(0, str(source))
    stand_in("datasets", load_dataset=None)
    torch.manual_seed(SEED)
    random.seed(SEED)
    single, args = given_layer(job), settings_of(job)
    with meter.timed():
        weights, bits = quantize_model(job, args) if single is None else quantize_layer(single, args)
    finish(job, "aqlm", weights, bits, {**meter.figures(), "version": f"main {commit_of(source)}"})


if __name__ == "__main__":
    main()
