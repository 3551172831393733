"""The schedule of gradual magnitude pruning, and one weight under it (Zhu and Gupta 2017, arXiv 1710.01878)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from compress.errors import InputError, UsageError
from compress.maths import products
from compress.maths.masks import Pattern


@dataclass(frozen=True)
class GradualSchedule:
    """How sparse weights are at a step: from `begin` on `start`, then raised every `every` steps, steeply first, up to
    `final` at the last raise, which is at `end` or less than `every` steps before it; 0 before `begin`.

    Raises: UsageError for shares outside 0 to 1, or steps that leave no raise.
    """

    final: float
    end: int
    begin: int = 0
    every: int = 1
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.final < 1:
            raise UsageError(
                f"A schedule from sparsity {self.start:g} to {self.final:g}: 0 <= start < final < 1 is wanted."
            )
        if self.begin < 0 or self.every < 1 or self.raises < 1:
            raise UsageError(
                f"A schedule from step {self.begin} to {self.end}, raised every {self.every} steps, has no raise. Give "
                "0 <= begin, and an end that is at least `every` steps later."
            )

    @property
    def raises(self) -> int:
        """How often sparsity goes up: n of the paper."""
        return (self.end - self.begin) // self.every

    @property
    def last(self) -> int:
        """The step of the last raise, from which on sparsity is `final`."""
        return self.begin + self.raises * self.every

    def level(self, step: int) -> int:
        """Raises up to a step, that one included; -1 before `begin`."""
        return -1 if step < self.begin else min(self.raises, (step - self.begin) // self.every)

    def sparsity(self, step: int) -> float:
        """s_f + (s_i - s_f) (1 - (t - t0) / (n Δt))³, constant between raises."""
        return self.of_level(self.level(step))

    def of_level(self, level: int) -> float:
        """The sparsity after so many raises."""
        if level < 0:
            return 0.0
        return self.final + (self.start - self.final) * (1 - level / self.raises) ** 3


class Masked:
    """A weight tensor in place, with what is pruned of it at a time.

    As in the paper a weight that is pruned keeps its value aside and takes no gradient; it comes back where at a later
    raise enough others have become smaller. After the last raise none comes back. The count is that of
    `Pattern.kept` exactly; runs of N:M go from M down to N.

    Args: tensor: float, (out, …), seen as (out, in) with `in` the product of the rest; name: for errors; scale: what
    magnitudes are multiplied by before they are compared, (out, 1).
    Raises: UsageError where the pattern does not fit.
    """

    def __init__(
        self, name: str, tensor: Tensor, schedule: GradualSchedule, pattern: Pattern, scale: Tensor | float = 1.0
    ) -> None:
        self.name, self.tensor, self.schedule, self.pattern = name, tensor, schedule, pattern
        self.shape = int(tensor.shape[0]), prod(tensor.shape[1:])
        self._check()
        self.scale = scale
        self.reached = torch.full((), -1, dtype=torch.int64)
        self.gone = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
        self.aside = tensor.detach().clone()
        self.hook: Any = None
        if tensor.requires_grad:
            self.hook = tensor.register_hook(self._without_gone)  # type: ignore[no-untyped-call]

    @property
    def level(self) -> int:
        """Raises that are decided; -1 before the first."""
        return int(self.reached)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What is pruned, values aside, and the raises so far: changed in place, to be kept and put back."""
        return self.gone, self.aside, self.reached

    def raise_to(self, level: int) -> bool:
        """Decide anew, where this level is not decided yet. Returns whether it was."""
        if level <= self.level:
            return False
        with torch.no_grad():
            whole = torch.where(self.gone, self.aside, self.tensor)
            if not products.all_finite(whole):
                raise InputError(
                    f"{self.name} holds NaN or infinite values: lower the learning rate, or check the loss."
                )
            scores = whole.abs().float().reshape(self.shape) * self.scale
            keep = self.pattern.keep(scores, self.kept(level))
            self.gone.copy_(~keep.reshape(self.tensor.shape))
            self.tensor.copy_(whole.masked_fill(self.gone, 0.0))
            self.aside.copy_(whole)
            self.reached.fill_(level)
        return True

    def kept(self, level: int) -> int:
        """Of the pattern's rivals, how many stay after so many raises."""
        sparsity = self.schedule.of_level(level)
        if self.pattern.kind != "n:m":
            return self.pattern.kept(self.shape, sparsity)
        least, run = self.pattern.size
        return least if level == self.schedule.raises else max(least, run - round(sparsity * run))

    def apply(self) -> None:
        """Set what is pruned to zero."""
        with torch.no_grad():
            self.tensor.masked_fill_(self.gone, 0.0)

    def _without_gone(self, gradient: Tensor) -> Tensor:
        return gradient.masked_fill(self.gone, 0.0)

    def _check(self) -> None:
        pattern, final = self.pattern, self.schedule.final
        try:
            pattern.check(self.shape)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error} Choose another pattern, or leave it out with ignore.") from error
        if pattern.kind == "n:m" and self.tensor.ndim > 2 and prod(self.tensor.shape[2:]) > 1:
            raise UsageError(
                f"{self.name}: pattern={pattern} runs along input channels, and its columns are taps of a kernel too. "
                "Choose layer or row, or leave it out with ignore."
            )
        if pattern.fixed is not None and final != pattern.fixed:
            raise UsageError(f"{self.name}: pattern={pattern} is a sparsity of {pattern.fixed:g}, not {final:g}.")
        if self.kept(self.schedule.raises) in (0, pattern.rivals(self.shape)):
            raise UsageError(
                f"{self.name}: a sparsity of {final:g} (pattern={pattern}) of {self.shape[0]} x {self.shape[1]} rounds "
                "to nothing or to all of it. Choose another one, or leave it out with ignore."
            )
