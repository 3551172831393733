"""How many tokens each layer's cache keeps, under a total: pure functions on numbers."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import Tensor


def pyramid(average: int, layers: int, beta: float, least: int) -> list[int]:
    """Budgets that fall in equal steps from the first layer to the last, whose is average / beta (PyramidKV, Cai et al.
    2024, arXiv 2406.02069): the first has as much more than the average. Their sum is average · layers.

    None is below `least` ≤ average: where the pyramid would be, all give up the same share of what they have above it.
    """
    low = average / beta
    high = 2 * average - low
    steps = [high - (high - low) * layer / max(layers - 1, 1) for layer in range(layers)] if layers > 1 else [average]
    above = [max(step - least, 0.0) for step in steps]
    share = (average - least) * layers / (sum(above) or 1.0)
    return _whole([least + share * each for each in above], average * layers)


def _whole(wishes: Sequence[float], total: int) -> list[int]:
    """Rounded down, and the largest remainders up, the earlier first, so that the sum is the total."""
    found = [int(wish + 1e-9) for wish in wishes]
    order = sorted(range(len(wishes)), key=lambda place: (found[place] - wishes[place], place))
    for place in order[: total - sum(found)]:
        found[place] += 1
    return found


def fairest(losses: Sequence[Tensor], total: int, least: int) -> list[int]:
    """The budgets with the least sum of losses: each of one layer more goes where it spares most.

    That is the best there is, since what a token spares never grows with the budget. Args: losses: of each layer, by
    its budget from 0, 1-D and convex from `least` on; nothing is lost beyond. total ≥ least · layers.
    """
    curves = [curve.double().tolist() for curve in losses]
    budgets = [least] * len(curves)

    def spared(layer: int) -> float:
        now = budgets[layer]
        return float(curves[layer][now] - curves[layer][now + 1]) if now + 1 < len(curves[layer]) else 0.0

    # of equal gains the smaller budget grows first, so that what spares nothing is spread
    queue = [(-spared(layer), least, layer) for layer in range(len(curves))]
    heapq.heapify(queue)
    for _ in range(total - least * len(curves)):
        _, _, layer = heapq.heappop(queue)
        budgets[layer] += 1
        heapq.heappush(queue, (-spared(layer), budgets[layer], layer))
    return budgets
