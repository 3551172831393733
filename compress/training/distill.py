"""The one training loop of tuning, learned rounding and healing (design §2): a loss, a budget, the best kept.

Nothing here knows a model: what is trained are tensors, the loss is a function of a batch's number. The tensors are
changed in place and end as the best iterate by the loss on batches that were held out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compress.errors import InputError, UsageError
from compress.training.checkpoint import Position, Saved

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
    """steps: at most so many; batch: batches whose gradients a step adds up; minutes: wall-clock limit (None: none),
    those of an earlier try that is taken up counted in; check: steps between two looks at the held-out loss; patience:
    looks without a gain before it stops (0: never); warmup: steps in which the learning rate rises to its schedule;
    first: the step at which what is trained has become what it is to be: no iterate from before it is kept."""

    steps: int
    batch: int = 1
    minutes: float | None = None
    check: int = 25
    patience: int = 0
    warmup: int = 0
    first: int = 0


@dataclass(frozen=True)
class Outcome:
    """before, after: mean held-out loss at the start (`Budget.first`) and of the iterate that was kept; best: its step;
    steps: taken; stopped: `steps`, `minutes` or `patience`; held: whether these batches were really held out, which a
    single one is not."""

    before: float
    after: float
    best: int
    steps: int
    stopped: Literal["steps", "minutes", "patience"]
    held: bool = True

    @property
    def on(self) -> str:
        """What it was judged on: 'held-out', or 'training', where there was nothing else."""
        return "held-out" if self.held else "training"

    def describe(self, with_loss: bool = True) -> str:
        """For a report: 'held-out loss 0.012 → 0.008, step 150 of 200'."""
        why = "" if self.stopped == "steps" else f", stopped by {self.stopped}"
        loss = f"{self.on} loss {self.before:.3g} → {self.after:.3g}, " if with_loss else ""
        only = "" if self.held else "; nothing could be held out of a single batch"
        return f"{loss}step {self.best} of {self.steps}{why}{only}"


MOST_HELD = 8
"""Batches that are held out where there may be any number of them."""


def split(count: int, share: float = 0.125, most: int | None = None) -> tuple[list[int], list[int]]:
    """Batch numbers to train on and to hold out: every 1/share-th one, at least one, at most `most`; of a single batch
    both are it.

    Raises: UsageError for no batch at all.
    """
    if count < 1:
        raise UsageError("There is no batch to train on. Give more calibration text, or a smaller --length.")
    if count == 1:
        return [0], [0]
    every = max(2, round(1 / share), 0 if most is None else -(-count // most))
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
    tell: Callable[[int, int], None] = lambda done, steps: None,
    saved: Saved | None = None,
    ready: Callable[[], object] | None = None,
) -> Outcome:
    """Minimise a loss over the batches `train` by the tensors of `groups`, in place.

    optimizer: `adam` (Kingma & Ba 2015), or `sign`, plain sign descent (AutoRound, arXiv 2309.05516). schedule: of the
    learning rate, to zero at the last step. Batches are drawn in seeded epochs. tell: called before each step with the
    steps done and those allowed, may raise. saved: where the state is kept, and taken up from.
    ready: called before the first look, at `budget.first` or where time is up before it: makes of what is trained what
    it is to be.
    Raises: InputError when the loss is not finite.
    """
    leaves = [tensor for group in groups for tensor in group.tensors]
    state = [*leaves, *(tensor for group in groups for tensor in group.codes)]
    at = Position([tensor.detach().clone() for tensor in state])
    order, descent, started = _epochs(train, seed), _optimizer(optimizer, groups, betas), time.monotonic()
    if (saved is None or not saved.load(state, at, descent)) and not budget.first:
        at.before = at.best = _held_out(loss, held)
    for _ in range(at.step * budget.batch):
        next(order)
    started -= at.seconds
    stopped: Literal["steps", "minutes", "patience"] = "steps"
    for tensor in leaves:
        tensor.requires_grad_(True)
    while at.step < budget.steps:
        with nullcontext() if saved is None else saved.when_stopped(state, at, descent):
            tell(at.step, budget.steps)
        if at.step and at.step == budget.first:
            at.begin(state, _held_out(loss, held, ready))
        _descend(descent, groups, loss, [next(order) for _ in range(budget.batch)], _rate(schedule, at.step, budget))
        at.step += 1
        at.seconds = time.monotonic() - started
        late = budget.minutes is not None and at.seconds > 60 * budget.minutes
        if late and at.step <= budget.first:
            at.begin(state, _held_out(loss, held, ready))
            stopped = "minutes"
            break
        if at.step > budget.first and (at.step % budget.check == 0 or at.step == budget.steps or late):
            at.judge(state, _held_out(loss, held))
            impatient = bool(budget.patience) and at.misses >= budget.patience
            if late or impatient:
                stopped = "minutes" if late else "patience"
                break
        if saved is not None:
            saved.keep(state, at, descent)
    _put_back(state, at.kept)
    return Outcome(at.before, at.best, at.best_step, at.step, stopped, held=set(train).isdisjoint(held))


def _put_back(state: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    for tensor, value in zip(state, kept, strict=True):
        tensor.requires_grad_(False)
        tensor.grad = None
        tensor.copy_(value)


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


def _held_out(loss: Loss, held: Sequence[int], ready: Callable[[], object] | None = None) -> float:
    if ready is not None:
        ready()
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


def _rate(schedule: Schedule, step: int, budget: Budget) -> float:
    """Share of the learning rate that counts at a step (from 0)."""
    done = step / budget.steps
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[schedule]
    return shape * min(1.0, (step + 1) / (budget.warmup + 1))
