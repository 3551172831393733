"""Gradual magnitude pruning: masks that a training loop raises step by step (Zhu and Gupta 2017, arXiv 1710.01878).

In a loop of one's own: `masks.step(t)` before step t, `masks.apply()` after the optimizer's. `prune` is such a loop,
for any module and loss. The schedule is the paper's equation 1; which weights go is decided anew at each raise, per
weight tensor, by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from compress.errors import UsageError, nearest
from compress.maths.masks import Pattern
from compress.training import distill
from compress.training.masked import GradualSchedule, Masked

__all__ = ["GradualSchedule", "Masks", "Pruned", "prune"]


class Masks:
    """The masks of several weights, raised together. `Masks.of` takes them from a module."""

    def __init__(self, weights: Sequence[Masked]) -> None:
        self.weights = tuple(weights)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        schedule: GradualSchedule,
        *,
        pattern: str = "layer",
        targets: Sequence[str] = ("*",),
        ignore: Sequence[str] = (),
    ) -> Masks:
        """Over the parameters of a module that have two dimensions or more, a parameter that modules share once.

        Args: pattern: see compress/maths/masks.py; targets, ignore: globs on the names of parameters, such as
        `conv1.weight` or `lstm.weight_hh_l0`.
        Raises: UsageError for a glob that names none, or a pattern that does not fit.
        """
        found = {name: each for name, each in module.named_parameters() if each.ndim > 1 and each.is_floating_point()}
        for glob in (*targets, *ignore):
            if not any(fnmatchcase(name, glob) for name in found):
                raise UsageError(f"'{glob}' names no weight of two dimensions or more.{nearest(glob, found)}")
        chosen = {name: each for name, each in found.items() if _named(name, targets) and not _named(name, ignore)}
        if not chosen:
            raise UsageError("No weight is left to prune: targets and ignore leave none.")
        form = Pattern.parse(pattern)
        return cls([Masked(name, each, schedule, form) for name, each in chosen.items()])

    def step(self, step: int) -> bool:
        """Before a step of training: raise the masks where the schedule says so. Returns whether any changed."""
        return self._raise({each.name: each.schedule.level(step) for each in self.weights})

    def finish(self) -> bool:
        """Raise all masks to their last, at once."""
        return self._raise({each.name: each.schedule.raises for each in self.weights})

    def apply(self) -> None:
        """After a step of training: what is pruned is zero again, whatever the optimizer added to it."""
        for each in self.weights:
            each.apply()

    def remove(self) -> None:
        """Take the masks off their tensors, which stay as they are."""
        for each in self.weights:
            if each.hook is not None:
                each.hook.remove()

    @property
    def sparsity(self) -> dict[str, float]:
        """The share that is pruned of each weight, as its mask says."""
        return {each.name: float(each.gone.float().mean()) for each in self.weights}

    def state_dict(self) -> dict[str, Any]:
        """To go on later: what is pruned, with the values aside."""
        return {each.name: [tensor.clone() for tensor in each.state] for each in self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises: UsageError where it is of other weights."""
        if state.keys() != {each.name for each in self.weights}:
            raise UsageError(f"The state holds masks of {', '.join(state)}, which are other weights than these.")
        for each in self.weights:
            for own, stored in zip(each.state, state[each.name], strict=True):
                own.copy_(stored)

    def _raise(self, levels: Mapping[str, int]) -> bool:
        changed = [each.raise_to(levels[each.name]) for each in self.weights]
        return any(changed)


@dataclass(frozen=True)
class Pruned:
    """What `prune` did: masks, whose tensors are pruned in place, and the loss on held-out batches."""

    masks: Masks
    outcome: distill.Outcome


def prune(
    module: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    held: Iterable[Any],
    schedule: GradualSchedule,
    budget: distill.Budget,
    *,
    lr: float = 1e-3,
    pattern: str = "layer",
    targets: Sequence[str] = ("*",),
    ignore: Sequence[str] = (),
    tell: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Train a module in place while its masks are raised, and on afterwards; of the iterates at the final sparsity the
    one of least loss on held-out batches is kept. All parameters that take gradients are trained (Adam, `lr` falling
    to 0 along a cosine).

    Args: loss: (module, batch) -> scalar; batches: of any kind, gone through as often as needed, a DataLoader say;
    held: batches that are not trained on, read once and kept in memory; budget: its `first` is set to the last raise;
    targets, ignore: see `Masks.of`; tell: called before each step with the steps done and those allowed.
    Raises: UsageError for a schedule that ends after the steps, masks that do not fit, or no batches; InputError where
    the loss is not finite.
    """
    if schedule.last >= budget.steps:
        raise UsageError(
            f"The last raise is at step {schedule.last} of {budget.steps}: nothing would be trained after it. Give "
            "more steps, or an earlier end."
        )
    masks = Masks.of(module, schedule, pattern=pattern, targets=targets, ignore=ignore)
    trained, was_training = [each for each in module.parameters() if each.requires_grad], module.training

    def before(done: int, steps: int) -> None:
        masks.step(done)
        if tell is not None:
            tell(done, steps)

    try:
        judged = list(held)
        outcome = distill.fit(
            [distill.Group(trained, lr, masks.apply, list(module.buffers()))],
            _by_number(module, loss, batches, judged),
            [_NEXT],
            range(len(judged)),
            replace(budget, first=schedule.last),
            schedule="cosine",
            tell=before,
            ready=masks.finish,
        )
    finally:
        masks.remove()
        module.train(was_training)
        for each in trained:
            each.requires_grad_(True)
    return Pruned(masks, outcome)


_NEXT = -1
"""The number of a batch: the next one to train on."""


def _by_number(
    module: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any], judged: Sequence[Any]
) -> distill.Loss:
    """The loss of a held-out batch by its place, or of the next one to train on."""
    if not judged:
        raise UsageError("held has no batch: the iterate that is kept is chosen by the loss on held-out batches.")
    stream = _endless(batches)

    def found(place: int) -> Tensor:
        module.train(place == _NEXT)
        return loss(module, next(stream) if place == _NEXT else judged[place])

    return found


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        count = 0
        for count, batch in enumerate(batches, 1):  # noqa: B007
            yield batch
        if not count:
            raise UsageError("There is no batch to train on, or no second time: give a list or a DataLoader.")


def _named(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)
