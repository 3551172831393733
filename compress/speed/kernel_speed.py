"""How fast ONNX Runtime's kernels are here: what `hardware calibrate` writes as figures of a profile.

A layer is timed within a chain of its like that no cache holds, each with a weight of its own, as in a model. The best
of several calls counts: what else runs only takes away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.speed import kernel_probe
from compress.speed.kernel_probe import Array, Product

CHAIN_BYTES = 1 << 27  # beyond what two cores have of any cache
ROWS, PEAK_ROWS = 64, 256
ONE_CALLS, ROWS_CALLS, PEAK_CALLS = 30, 4, 7
NODES, NODE_SIZE = 512, 16
BITS, BLOCKS = (4, 8, 2), (32, 128)


@dataclass(frozen=True)
class Speed:
    """Of a product's kernel, as `hwprofiles.KernelSpeed` has it: stored GB a second at one row, and billions of
    operations a second of each further one."""

    product: Product
    gb_s: float
    gflops: float


def products(size: int, seed: int = 0) -> Iterator[Product]:
    """All kernels that are timed, as square layers of `size` inputs and outputs (a multiple of 32), made one by one.

    Weights are scaled so that values neither grow nor vanish along a chain: subnormal numbers are slow.
    """
    weight = (np.random.default_rng(seed).standard_normal((size, size)) / np.sqrt(size)).astype(np.float32)
    yield kernel_probe.plain(weight)
    for bits in BITS:
        yield from (kernel_probe.blocks(weight, bits, block) for block in BLOCKS if size % block == 0)
    yield kernel_probe.dynamic(weight)


def measure(product: Product, threads: int, node_s: float = 0.0) -> Speed:
    """Of one kernel, with so many threads; node_s: seconds of each node, which are predicted apart."""
    count = max(2, -(-CHAIN_BYTES // product.stored_bytes))
    call = _call(kernel_probe.chain(product, count), len(product.decoded), threads)
    one = min(times(call(1), ONE_CALLS)) / count
    many = min(times(call(ROWS), ROWS_CALLS)) / count
    reading = max(one - node_s, one / 2)  # what is left of a timing so short says nothing
    further = many - one if many > one else many
    operations = 2 * len(product.decoded) ** 2 * (ROWS - 1)
    return Speed(product, product.stored_bytes / reading / 1e9, operations / further / 1e9)


def matmul_gflops(size: int, threads: int) -> float:
    """Billions of operations a second of a float32 product of `PEAK_ROWS` rows, a multiply-add being two; the best of
    several."""
    product = next(products(size))
    call = _call(kernel_probe.chain(product), size, threads)
    return 2 * size**2 * PEAK_ROWS / 1e9 / min(times(call(PEAK_ROWS), PEAK_CALLS))


def node_seconds(threads: int) -> float:
    """Of a node that computes next to nothing, in a chain of many."""
    product = next(products(NODE_SIZE))
    call = _call(kernel_probe.chain(product, NODES), NODE_SIZE, threads)
    return min(times(call(1), ONE_CALLS)) / NODES


def times(call: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of `count` calls after one that is not counted."""
    call()
    return [seconds(call) for _ in range(count)]


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _call(graph: bytes, size: int, threads: int) -> Callable[[int], Callable[[], Any]]:
    """Rows → a call with so many, in a session as artifacts have it."""
    session = kernel_probe.open_session(graph, threads)

    def made(rows: int) -> Callable[[], Any]:
        values: Array = kernel_probe.rows(size)(rows)
        return lambda: session.run(None, {"x": values})

    return made
