"""Training of the heads that score tokens (compress/kv/heads.py): on features and labels of one layer, both fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compress.kv.heads import scores_of
from compress.training import distill

Batch = tuple[Tensor, Tensor]
"""Features (batch, n, inputs) and labels (batch, kv heads, n), both float32."""

SMOOTH = 0.0025
"""Weight of the difference of neighbours' scores in the loss of Locret."""
WARMUP = 0.1
AGEING, LEAST_AGEING = "ageing", 0.01
"""While it is trained: how much the logarithm of its age takes from a token, (kv heads,), and the least for a score."""
RIDGE = 1e-3
"""Of the mean second moment of the features."""


@dataclass(frozen=True)
class Fitting:
    """width: of the head between its layers, 0 for linear; biased: whether its layers have biases; steps, lr: of Adam;
    smooth: weight of the squared difference of neighbours' scores; seed; ages: logarithms (n,) of which labels lose a
    multiple, learned for each head, that the cache takes off by itself: scores are in units of it."""

    width: int
    biased: bool
    steps: int
    lr: float
    smooth: float = 0.0
    seed: int = 0
    ages: Tensor | None = None


@dataclass(frozen=True)
class Trained:
    """A head and how its loss on held-out windows fell; held: whether they were really held out."""

    tensors: dict[str, Tensor]
    before: float
    after: float
    held: bool


def train(batches: Sequence[Batch], how: Fitting) -> Trained:
    """A head that says the labels: Smooth-L1 by Adam where it has two layers, ridge regression where it is linear.

    An eighth of the batches is held out, and the iterate of least loss on it kept. Features are divided by their root
    mean square meanwhile, which the first layer then takes up.
    """
    places, held = distill.split(len(batches))
    scale = _scale([batches[place][0] for place in places])
    scaled = _Scaled(batches, scale)
    if how.width:
        tensors, before, after = _descended(scaled, places, held, how)
    else:
        tensors, before, after = _solved(scaled, places, held, how.ages)
    name = "head.first" if how.width else "head.second"
    tensors[name] = tensors[name] / scale
    if how.ages is not None:
        multiple = tensors.pop(AGEING).clamp(min=LEAST_AGEING)
        for each in ("head.second", "head.second_bias"):
            if each in tensors:
                over = multiple[:, None] if tensors[each].ndim > 1 else multiple
                tensors[each] = tensors[each] / over
    return Trained(tensors, before, after, held=set(places).isdisjoint(held))


@dataclass(frozen=True)
class _Scaled:
    """Batches whose features are divided as they are asked for: no second copy of all."""

    batches: Sequence[Batch]
    scale: Tensor

    def __getitem__(self, place: int) -> Batch:
        features, labels = self.batches[place]
        return features / self.scale, labels


def _scale(features: Sequence[Tensor]) -> Tensor:
    """Root mean square of each feature, (inputs,), one where it is always zero."""
    count = sum(each.shape[0] * each.shape[1] for each in features)
    found = (torch.stack([each.square().sum((0, 1)) for each in features]).sum(0) / count).sqrt()
    return torch.where(found > 0, found, torch.ones_like(found))


def loss_of(scores: Tensor, labels: Tensor, smooth: float) -> Tensor:
    """Smooth-L1, and the smoothness of neighbouring tokens: of (batch, kv heads, n) each."""
    near = functional.smooth_l1_loss(scores, labels)
    return near + smooth * (scores[..., 1:] - scores[..., :-1]).square().mean() if smooth else near


def _aged(scores: Tensor, tensors: dict[str, Tensor], ages: Tensor | None) -> Tensor:
    return scores if ages is None else scores - tensors[AGEING][:, None] * ages.to(scores.device)


def _descended(
    batches: _Scaled, places: Sequence[int], held: Sequence[int], how: Fitting
) -> tuple[dict[str, Tensor], float, float]:
    inputs, kv_heads = batches[0][0].shape[-1], batches[0][1].shape[1]
    generator = torch.Generator().manual_seed(how.seed)

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-1])

    tensors = {"head.first": uniform(how.width, inputs), "head.second": uniform(kv_heads, how.width)}
    if how.biased:
        middle = torch.stack([batches[place][1].mean((0, 2)) for place in places]).mean(0)
        tensors |= {"head.first_bias": torch.zeros(how.width), "head.second_bias": middle}
    if how.ages is not None:
        tensors[AGEING] = torch.ones(kv_heads)
    tensors = {name: tensor.to(batches[0][0].device) for name, tensor in tensors.items()}

    def loss(place: int) -> Tensor:
        features, labels = batches[place]
        return loss_of(_aged(scores_of(features, tensors), tensors, how.ages), labels, how.smooth)

    budget = distill.Budget(how.steps, warmup=int(WARMUP * how.steps))
    group = distill.Group(list(tensors.values()), how.lr)
    outcome = distill.fit([group], loss, places, held, budget, schedule="cosine", seed=how.seed)
    return {name: tensor.detach() for name, tensor in tensors.items()}, outcome.before, outcome.after


def _solved(
    batches: _Scaled, places: Sequence[int], held: Sequence[int], ages: Tensor | None
) -> tuple[dict[str, Tensor], float, float]:
    """Ridge regression in closed form; its loss before is that of each head's mean label."""
    inputs, kv_heads = batches[0][0].shape[-1], batches[0][1].shape[1]
    products = torch.zeros(inputs + 2, inputs + 2, dtype=torch.float64, device=batches[0][0].device)
    targets = torch.zeros(inputs + 2, kv_heads, dtype=torch.float64, device=batches[0][0].device)
    for features, labels in (batches[place] for place in places):
        ones = features.new_ones(features.shape[1])
        older = torch.zeros_like(ones) if ages is None else -ages.to(ones)
        more = torch.stack([older, ones], -1)
        rows = torch.cat([features, more.expand(len(features), -1, -1)], -1).reshape(-1, inputs + 2).double()
        products += rows.T @ rows
        targets += rows.T @ labels.transpose(1, 2).reshape(-1, kv_heads).double()
    mean = targets[-1] / products[-1, -1]
    products[:-1, :-1].diagonal().add_(RIDGE * products[-1, -1])  # of all but the bias
    found = torch.linalg.solve(products, targets).float().T.contiguous()
    tensors = {"head.second": found[:, :-2], "head.second_bias": found[:, -1], AGEING: found[:, -2]}
    flat = {**tensors, "head.second": torch.zeros_like(found[:, :-2]), "head.second_bias": mean.float()}
    flat[AGEING] = torch.zeros_like(found[:, -2])

    def mean_loss(head: dict[str, Tensor]) -> float:
        each = [loss_of(_aged(scores_of(batches[at][0], head), head, ages), batches[at][1], 0.0) for at in held]
        return float(torch.stack(each).mean())

    kept = {name: tensor for name, tensor in tensors.items() if ages is not None or name != AGEING}
    return kept, mean_loss(flat), mean_loss(tensors)
