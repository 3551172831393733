"""One layer at 2 bits (two codebooks of 256 vectors of 8) on an NVIDIA GPU: Triton's kernels for codebooks, and torch
in their place, against torch's dense float16 product, paired in one run.

    python benchmarks/codebook_gpu.py [--sizes 4096 8192] [--tokens 1 4 16 128] [--budget 20]

"memory": calls go round over copies of the layer that fill more than any cache, as in a model that decodes; "cache":
one layer again and again. "graph": so many calls as a CUDA graph, the GPU's own time; "called": one after the other
from Python, as a model without graphs does. Each arm ends when the GPU is done. Writes results/codebook_gpu.json;
without a GPU or without Triton it says so and writes nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import rounded
from torch import Tensor

from compress.kernels import GpuProduct, missing_triton
from compress.manifest import versions
from compress.speed.disturbance import watch
from compress.speed.timing import pair
from compress.stats.intervals import speedup

RESULT = Path(__file__).parent / "results" / "codebook_gpu.json"
VECTOR, STAGES, ENTRIES = 8, 2, 256
BEYOND_CACHE = 512 << 20
CALLS = 128
BASELINE = "torch float16"
Call = Callable[[], Tensor]


def products(size: int) -> dict[str, GpuProduct]:
    """The layer by each path."""
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(0, ENTRIES, (size, size // VECTOR, STAGES), generator=made)
    book = torch.randn(1, STAGES, ENTRIES, VECTOR, generator=made).half().float()
    scale = (torch.rand(size, 1, generator=made) + 0.5).half().float()
    return {
        f"codebook {path}": GpuProduct(codes, book, scale, (size, size), device="cuda", path=path)
        for path in ("triton", "torch")
    }


def layers(size: int, where: str, x: Tensor) -> tuple[dict[str, list[Call]], dict[str, int], dict[str, float]]:
    """Per arm: one call per copy, the bytes that one of them reads, its relative error against float64."""
    found: dict[str, list[Call]] = {}
    sizes, errors = {}, {}
    each = products(size)
    exact = each["codebook triton"].dequantize().double()
    dense = exact.half()
    sizes[BASELINE] = dense.nbytes
    found[BASELINE] = [lambda own=own: x @ own.T for own in [dense.clone() for _ in range(copies(dense.nbytes, where))]]
    for name, product in each.items():
        sizes[name] = product.nbytes
        found[name] = [(lambda own=own: own(x)) for own in clones(product, copies(product.nbytes, where))]
    expected = x.double() @ exact.T
    for name, calls in found.items():
        errors[name] = float((calls[-1]().double() - expected).norm() / expected.norm())
    return found, sizes, errors


def clones(product: GpuProduct, count: int) -> list[GpuProduct]:
    """With codes of their own."""
    made = [copy.copy(product) for _ in range(count)]
    for each in made:
        each._codes = product._codes.clone()
        if product._weight:
            each._weight = product._weight._replace(codes=product._weight.codes.clone())
    return made


def copies(nbytes: int, where: str) -> int:
    return min(-(-BEYOND_CACHE // nbytes), CALLS) if where == "memory" else 1


def arm(calls: list[Call], how: str) -> Callable[[], object]:
    """CALLS calls, round over the copies."""
    turn = [calls[place % len(calls)] for place in range(CALLS)]

    def once() -> None:
        for call in turn:
            call()
        torch.cuda.synchronize()

    once()  # Triton compiles
    if how == "called":
        return once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in turn:
            call()

    def replayed() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return replayed


def measure(size: int, tokens: int, where: str, how: str, budget_s: float) -> list[dict[str, Any]]:
    """A row per arm."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, size, generator=made).half().cuda()
    calls, sizes, errors = layers(size, where, x)
    if max(errors.values()) > 5e-3:
        raise SystemExit(f"Wrong products: relative errors {errors}.")
    arms = {name: arm(each, how) for name, each in calls.items()}
    samples = pair(arms, baseline=BASELINE, seed=0, watch=watch(), budget_s=budget_s)
    kept, rows = samples.kept, []
    for name, seconds in samples.seconds.items():
        spent = float(np.median(seconds[kept])) / CALLS
        value, interval = speedup(np.log(samples.seconds[BASELINE][kept] / seconds[kept]))
        row = {"arm": name, "size": size, "tokens": tokens, "weights_from": where, "how": how, "us": spent * 1e6}
        row |= {"rounds": int(kept.sum()), "mbytes": sizes[name] / 1e6, "read_gb_s": sizes[name] / 1e9 / spent}
        row |= {"relative_error": errors[name], f"times {BASELINE}": [value, interval.low, interval.high]}
        rows.append(row)
        print(json.dumps(rounded(row)), flush=True)
    return rows


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per table")
    given = parser.parse_args(words)
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here: nothing was timed.")
    if why := missing_triton():
        raise SystemExit(f"{why} Nothing was timed.")
    rows = [
        row
        for size in given.sizes
        for tokens in given.tokens
        for where in ("memory", "cache")
        for how in ("graph", "called")
        for row in measure(size, tokens, where, how, given.budget)
    ]
    device = torch.cuda.get_device_properties(0)
    machine = {"gpu": device.name, "sm": f"{device.major}.{device.minor}", "memory_gb": device.total_memory / 1e9}
    layer = {"vector": VECTOR, "stages": STAGES, "entries": ENTRIES}
    told = {"machine": machine, "load_average": os.getloadavg()[0], "python": platform.python_version()}
    content = {**told, "versions": versions(), "layer": layer, "rows": rows}
    RESULT.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
