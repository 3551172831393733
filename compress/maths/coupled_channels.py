"""Channels that several layers read: which of them all can do without, and what a layer must be to put out the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.maths.channels import damped


@dataclass(frozen=True, eq=False)
class Reading:
    """A layer that reads channels.

    weight: (out, in) float64; moment: (in, in) float64, mean of x xᵀ; columns: (units, k) int64, the columns of each
    unit. A last column that is 1 throughout holds the bias; no unit has it.
    """

    weight: Tensor
    moment: Tensor
    columns: Tensor


def removal_order(readings: Sequence[Reading], count: int, damp: float) -> list[int]:
    """The first `count` units to take out, each time the one whose loss the rest of its layer makes up for best.

    Taking the columns S out of W, the others adjusted by least squares, adds tr(W_S [H⁻¹]_SS⁻¹ W_Sᵀ) to the squared
    error of the output (optimal brain surgeon for groups of columns: Kurtic et al. 2023, ZipLM, arXiv 2302.04089, eq.
    2 and 3); W and H⁻¹ are then those of the columns that are left. Of several layers the errors count as shares of
    what each puts out.
    """
    states = [_State(each, damp) for each in readings]
    left = list(range(len(readings[0].columns)))
    order: list[int] = []
    for _ in range(count):
        scores = torch.stack([state.scores(left) for state in states]).sum(0)
        unit = left.pop(int(scores.argmin()))
        order.append(unit)
        for state in states:
            state.remove(unit)
    return order


class _State:
    """A layer's weight and inverse moment as units go."""

    def __init__(self, reading: Reading, damp: float) -> None:
        moment, _ = damped(reading.moment, damp)
        self.weight = reading.weight.clone()
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        self.columns = reading.columns
        self.energy = ((self.weight @ moment) * self.weight).sum().clamp(min=1e-30)

    def scores(self, units: Sequence[int]) -> Tensor:
        """(units,) share of the output's energy that each would cost."""
        chosen = self.columns[list(units)]
        blocks = self.inverse[chosen[:, :, None], chosen[:, None, :]]
        parts = self.weight[:, chosen].permute(1, 2, 0)  # (units, k, out)
        solved: Tensor = torch.linalg.solve(blocks, parts)
        return (parts * solved).sum((1, 2)) / self.energy

    def remove(self, unit: int) -> None:
        """Adjust the rest, as if the columns had been solved for without it."""
        places = self.columns[unit]
        turn = torch.linalg.solve(self.inverse[places][:, places], self.inverse[places])
        self.weight -= self.weight[:, places] @ turn
        self.inverse -= self.inverse[:, places] @ turn
        self.inverse[places, places] += 1.0  # never chosen again, and not singular


def solve(weight: Tensor, moment: Tensor, cross: Tensor, damp: float) -> Tensor:
    """W' that puts out z from x best: min E‖W'x − z‖² + λ‖W' − W‖², λ = damp · mean diagonal of the moment.

    Args: weight (out, in) float64: W, which stays where data say nothing; moment (in, in) float64: mean of x xᵀ; cross
    (out, in) float64: mean of z xᵀ. Returns: (out, in) float64.
    """
    factor = torch.linalg.cholesky(damped(moment, damp)[0])
    return weight + torch.cholesky_solve((cross - weight @ moment).T, factor).T
