"""What a compressed model is trained to: the outputs of the original, and what its blocks put out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.model import Task


def outputs(module: nn.Module, batch: Tensor) -> Tensor:
    """Logits, or an encoder's hidden states: (…, features)."""
    if batch.is_floating_point():
        images: Tensor = module(batch)
        return images
    settings = {"use_cache": False} if hasattr(module.config, "use_cache") else {}
    found = module(input_ids=batch, **settings)
    result: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return result


def divergence(task: Task, wanted: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """wanted, found (…, features): the mean divergence KL(wanted || found), or for an encoder the share of error.

    temperature: logits are divided by it, and the divergence multiplied by its square, so that gradients keep their
    size (Hinton et al. 2015, arXiv 1503.02531 §2.1). An encoder has none.
    """
    if task is Task.ENCODER:
        return (found - wanted).square().mean() / wanted.square().mean()
    size = wanted.shape[-1]
    first, second = ((values.reshape(-1, size) / temperature).log_softmax(-1) for values in (wanted.detach(), found))
    total = torch.nn.functional.kl_div(second, first, reduction="batchmean", log_target=True)
    return total * temperature**2


@contextmanager
def watched(module: nn.Module, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect what some modules put out, (…, features) each, in the order in which they run; whoever runs the model
    clears the list before."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handles = [module.get_submodule(path).register_forward_hook(keep) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def hidden_error(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> Tensor:
    """wanted, found: per block (…, features): the squared error of each token as a share of what is wanted there, in
    the mean over tokens and blocks. Token by token, since a few tokens of language models are hundreds of times as
    large as all others."""
    shares = [
        (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
        for theirs, ours in zip(wanted, found, strict=True)
    ]
    return torch.stack([share.mean() for share in shares]).mean()
