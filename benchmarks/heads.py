"""Heads of learned scorers with random weights: what a graph makes of them is known without training."""

from __future__ import annotations

import torch
from torch import Tensor

from compress.models.model import Model


def random_heads(model: Model) -> list[dict[str, Tensor]]:
    """By layer, for the caches of a model that want them; nothing for the others."""
    generator, found = torch.Generator().manual_seed(0), []
    hidden = int(model.config.get_text_config().hidden_size)
    for spec, (heads, kv_heads, size) in zip(model.kv, model.attentions, strict=True):
        inputs = (heads + 2 * kv_heads) * size if spec.scorer == "locret" else hidden
        shapes = {"head.first": (spec.head_width, inputs), "head.second": (kv_heads, spec.head_width or inputs)}
        shapes |= {"head.first_bias": (spec.head_width,), "head.second_bias": (kv_heads,)}
        found.append({name: torch.randn(shapes[name], generator=generator) for name in spec.wants})
    return found
