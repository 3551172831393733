"""The rotary embedding of a model of transformers, as far as scores need it: to turn queries back, and on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedError

_FIXED = ("default", "linear", "llama3", "yarn")
"""Kinds whose frequencies do not change with the length of the text."""


@dataclass(frozen=True)
class Rotation:
    """Channel i turns with channel i + size / 2, by frequencies[i] (size / 2,) radians per position. scale: what sines
    and cosines are multiplied by (yarn), else 1."""

    frequencies: Tensor
    scale: float = 1.0

    def back(self, states: Tensor, positions: Tensor) -> Tensor:
        """States (batch, heads, n, size) as they were before they were rotated at positions (batch, n), in float32."""
        angles = positions[:, None, :, None] * self.frequencies.to(states.device).float()
        return turned(states.float(), angles.cos() / self.scale, -angles.sin() / self.scale)

    def ahead(self, now: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The mean cosine and sine over the next `count` positions after now (batch,), (batch, size / 2) float32."""
        frequencies = self.frequencies.to(now.device).float()
        positions = now[:, None] + torch.arange(1, count + 1, device=now.device)
        angles = positions[..., None] * frequencies
        return angles.cos().mean(1) * self.scale, angles.sin().mean(1) * self.scale


def turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(…, size) by (…, size / 2): the pairs of channels i and i + size / 2."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rotation_of(model: nn.Module) -> Rotation:
    """Raises: UnsupportedError where the model's is none of pairs half a head apart, over all channels of a head, with
    frequencies that stay."""
    found = [module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    config: Any = model.config
    text = config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    reason = "has no rotary embedding that is the same in all layers" if len(found) != 1 else ""
    if not reason:
        embedding: Any = found[0]
        kind = getattr(embedding, "rope_type", "default")
        if kind not in _FIXED:
            reason = f"has a rotary embedding of kind {kind}, whose frequencies change with the length"
        elif 2 * embedding.inv_freq.numel() != size:
            reason = f"rotates {2 * embedding.inv_freq.numel()} of the {size} channels of a head"
        elif not _turns_halves(type(embedding).__module__):
            reason = "rotates channels that are not half a head apart"
    if reason:
        raise UnsupportedError(
            f"{type(model).__name__} {reason}, so expected attention cannot turn its queries. Take by=snapkv or by=h2o."
        )
    return Rotation(embedding.inv_freq.detach().clone(), float(getattr(embedding, "attention_scaling", 1.0)))


def _turns_halves(module: str) -> bool:
    """Whether a model's own code rotates (a, b, c, d) with (−c, −d, a, b)."""
    rotate = getattr(sys.modules[module], "rotate_half", None)
    probe = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return rotate is not None and rotate(probe).tolist() == [-3.0, -4.0, 1.0, 2.0]
