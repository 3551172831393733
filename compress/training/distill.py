"""The one training loop of tuning, learned rounding and healing (design §2): a loss, a budget, the best kept.

Nothing here knows a model: what is trained are tensors, the loss is a function of a batch's number. The tensors are
changed in place and end as the best iterate by the loss on batches that were held out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import InputError, UsageError

Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adam", "sign"]

Loss = Callable[[int], Tensor]
"""The mean loss of one batch, by its number, with the tensors as they now are: a scalar with a gradient."""


@dataclass(frozen=True)
class Group:
    """Tensors that share a learning rate.

    project: called after each step, to keep them where they may be, or to decide codes by them; codes: tensors of whole
    numbers that it changes, which are kept and put back with the rest; betas: of Adam, where they are not `fit`'s.
    """

    tensors: Sequence[Tensor]
    lr: float
    project: Callable[[], None] | None = None
    codes: Sequence[Tensor] = ()
    betas: tuple[float, float] | None = None


@dataclass(frozen=True)
class Budget:
    """steps: at most so many; batch: batches whose gradients a step adds up; minutes: wall-clock limit (None: none);
    check: steps between two looks at the held-out loss; patience: looks without a gain before it stops (0: never)."""

    steps: int
    batch: int = 1
    minutes: float | None = None
    check: int = 25
    patience: int = 0


@dataclass(frozen=True)
class Outcome:
    """before, after: mean held-out loss at the start and of the iterate that was kept; best: its step (0: the start);
    steps: taken; stopped: `steps`, `minutes` or `patience`."""

    before: float
    after: float
    best: int
    steps: int
    stopped: Literal["steps", "minutes", "patience"]

    def describe(self) -> str:
        """For a report: 'held-out loss 0.012 → 0.008, step 150 of 200'."""
        why = "" if self.stopped == "steps" else f", stopped by {self.stopped}"
        return f"held-out loss {self.before:.3g} → {self.after:.3g}, step {self.best} of {self.steps}{why}"


def split(count: int, share: float = 0.125) -> tuple[list[int], list[int]]:
    """Batch numbers to train on and to hold out: every 1/share-th one, at least one; of a single batch both are it.

    Raises: UsageError for no batch at all.
    """
    if count < 1:
        raise UsageError("There is no batch to train on. Give more calibration text, or a smaller --length.")
    if count == 1:
        return [0], [0]
    every = max(2, round(1 / share))
    held = list(range(every - 1, count, every)) or [count - 1]
    return [place for place in range(count) if place not in set(held)], held


def fit(
    groups: Sequence[Group],
    loss: Loss,
    train: Sequence[int],
    held: Sequence[int],
    budget: Budget,
    *,
    optimizer: Optimizer = "adam",
    schedule: Schedule = "linear",
    betas: tuple[float, float] = (0.9, 0.95),
    seed: int = 0,
    tell: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Minimise a loss over the batches `train` by the tensors of `groups`, in place.

    optimizer: `adam` (Kingma & Ba 2015), or `sign`, plain sign descent (AutoRound, arXiv 2309.05516). schedule: of the
    learning rate, to zero at the last step. Batches are drawn in seeded epochs. tell: called before each step with the
    steps done and those allowed, may raise.
    Raises: InputError when the loss is not finite.
    """
    leaves = [tensor for group in groups for tensor in group.tensors]
    state = [*leaves, *(tensor for group in groups for tensor in group.codes)]
    before = best = _held_out(loss, held)
    kept, best_step, misses, step = _copies(state), 0, 0, 0
    order, deadline = _epochs(train, seed), _deadline(budget.minutes)
    stopped: Literal["steps", "minutes", "patience"] = "steps"
    for tensor in leaves:
        tensor.requires_grad_(True)
    descent = _optimizer(optimizer, groups, betas)
    while step < budget.steps:
        if tell is not None:
            tell(step, budget.steps)
        _descend(descent, groups, loss, [next(order) for _ in range(budget.batch)], _rate(schedule, step, budget.steps))
        step += 1
        late = time.monotonic() > deadline
        if step % budget.check and step != budget.steps and not late:
            continue
        now = _held_out(loss, held)
        misses = 0 if now < best else misses + 1
        if now < best:
            best, best_step, kept = now, step, _copies(state)
        if late or (budget.patience and misses >= budget.patience):
            stopped = "minutes" if late else "patience"
            break
    for tensor, value in zip(state, kept, strict=True):
        tensor.requires_grad_(False)
        tensor.grad = None
        tensor.copy_(value)
    return Outcome(before, best, best_step, step, stopped)


def _copies(state: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state]


class _Sign(torch.optim.Optimizer):
    """Each step moves every entry by the learning rate, against its gradient's sign."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    tensor -= group["lr"] * tensor.grad.sign()


def _optimizer(name: Optimizer, groups: Sequence[Group], betas: tuple[float, float]) -> torch.optim.Optimizer:
    listed: list[dict[str, Any]] = [
        {"params": list(group.tensors), "lr": group.lr, **({"betas": group.betas} if group.betas else {})}
        for group in groups
    ]
    return torch.optim.Adam(listed, betas=betas) if name == "adam" else _Sign(listed)


def _descend(
    descent: torch.optim.Optimizer, groups: Sequence[Group], loss: Loss, places: Sequence[int], rate: float
) -> None:
    """One step by the mean gradient of some batches, at a share of the learning rates."""
    descent.zero_grad(set_to_none=True)
    for place in places:
        (_finite(loss(place)) / len(places)).backward()  # type: ignore[no-untyped-call]
    for part, group in zip(descent.param_groups, groups, strict=True):
        part["lr"] = rate * group.lr
    descent.step()
    for group in groups:
        if group.project is not None:
            with torch.no_grad():
                group.project()


def _deadline(minutes: float | None) -> float:
    return math.inf if minutes is None else time.monotonic() + 60 * minutes


def _held_out(loss: Loss, held: Sequence[int]) -> float:
    with torch.no_grad():
        return sum(float(_finite(loss(place))) for place in held) / len(held)


def _finite(value: Tensor) -> Tensor:
    if not bool(torch.isfinite(value)):
        raise InputError(
            "A training loss is NaN or infinite. The run stops here; lower the learning rate, or check model and data "
            "where this is the first step."
        )
    return value


def _epochs(train: Sequence[int], seed: int) -> Iterator[int]:
    """Batch numbers without end, each epoch shuffled anew."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for place in torch.randperm(len(train), generator=generator).tolist():
            yield train[place]


def _rate(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the learning rate that counts at a step (from 0)."""
    if schedule == "constant":
        return 1.0
    done = step / steps
    return 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
