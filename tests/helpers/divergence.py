"""How far one language model is from another, the slow and obvious way."""

from torch import Tensor

from compress.models.model import Model
from compress.quality.evaluate import stream_logits


def kl_between(model: Model, other: Model, ids: Tensor) -> float:
    """KL(model || other) in nats per token of some windows, ids (N, length)."""
    total = 0.0
    for first, second in zip(stream_logits(model, ids), stream_logits(other, ids), strict=True):
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(ids)
