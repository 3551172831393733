"""One 4096 × 4096 layer at 2 bits (two codebooks of 256 vectors of 8; one of 16 pairs), one token: the codebook kernels
against float32 and INT4 (MatMulNBits, blocks of 32, accuracy level 4) of ONNX Runtime and torch's float32, paired in
one run.

    python benchmarks/codebook_kernel.py [--threads 1 2] [--budget 30]

"memory": each arm goes round over copies of its layer that fill more than the caches, as in a model that decodes;
"cache": one layer again and again. Beside other work, times are of a shared processor; the best single call is nearly
free of it. Writes results/codebook_kernel.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from digits import rounded
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from torch import Tensor

from compress import hwprofiles
from compress.calibrate import read_bandwidth
from compress.kernels import CodebookProduct, kernel_paths
from compress.manifest import versions
from compress.speed.disturbance import watch
from compress.speed.timing import pair
from compress.stats.intervals import speedup

RESULT = Path(__file__).parent / "results" / "codebook_kernel.json"
SIZE, BLOCK = 4096, 32
# vector, stages, entries
LAYERS = {"": (8, 2, 256), ", 16 entries": (2, 1, 16)}
BEYOND_CACHE = 128 << 20
BASELINE = "onnxruntime float32"
Arm = Callable[[], object]


def layer(vector: int, stages: int, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, codebook, scale."""
    made = torch.Generator().manual_seed(0)
    codes = torch.randint(0, entries, (SIZE, SIZE // vector, stages), generator=made)
    return codes, torch.randn(1, stages, entries, vector, generator=made), torch.rand(SIZE, 1, generator=made) + 0.5


def products(paths: tuple[str, ...]) -> dict[str, CodebookProduct]:
    """Every layer by every path."""
    made = {}
    for name, sizes in LAYERS.items():
        parts = layer(*sizes)
        for path in paths:
            product = CodebookProduct(*parts, (SIZE, SIZE), path=path)
            made[f"{product.kernel}{name}"] = product
    return made


def session(operator: str, weights: dict[str, np.ndarray], threads: int, **attributes: int) -> ort.InferenceSession:
    """A graph of one operator, x (1, SIZE) → y."""
    domain = "com.microsoft" if attributes else ""
    node = helper.make_node(operator, ["x", *weights], ["y"], domain=domain, **attributes)
    held = [from_array(value, name) for name, value in weights.items()]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIZE]) for name in ("x", "y"))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "layer", [x], [y], held), opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def float_sessions(weight: Tensor, threads: int, copies: int) -> list[ort.InferenceSession]:
    values = weight.T.contiguous().numpy()
    return [session("MatMul", {"w": values}, threads) for _ in range(copies)]


def int4_sessions(weight: Tensor, threads: int, copies: int) -> list[ort.InferenceSession]:
    """Rounded to nearest, symmetric, zero at 8."""
    blocks = weight.reshape(SIZE, -1, BLOCK)
    scale = blocks.abs().amax(2, keepdim=True) / 7
    codes = ((blocks / scale).round() + 8).clamp(0, 15).to(torch.uint8)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).numpy()
    given = {"w": packed, "scales": scale.flatten().numpy()}
    settings = {"K": SIZE, "N": SIZE, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    return [session("MatMulNBits", given, threads, **settings) for _ in range(copies)]


def turning(calls: list[Arm]) -> Arm:
    """One after the other, for ever."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def copies_of(nbytes: int, where: str) -> int:
    return -(-BEYOND_CACHE // nbytes) if where == "memory" else 1


def arms(threads: int, where: str, x: Tensor) -> tuple[dict[str, Arm], dict[str, int]]:
    """Calls, and the bytes that one of them reads."""
    made = products(kernel_paths()[:-1])
    weight = next(iter(made.values())).dequantize()
    many, array = copies_of(weight.nbytes, where), x.numpy()
    found: dict[str, list[Arm]] = {}
    for name, sessions in (
        (BASELINE, float_sessions(weight, threads, many)),
        ("onnxruntime int4", int4_sessions(weight, threads, copies_of(SIZE * SIZE * 5 // 8, where))),
    ):
        found[name] = [lambda each=each: each.run(None, {"x": array}) for each in sessions]
    found["torch float32"] = [lambda each=each: x @ each.T for each in [weight.clone() for _ in range(many)]]
    for name, product in made.items():
        each_own = [copy.copy(product) for _ in range(copies_of(product.nbytes, where))]
        for each in each_own:
            each._codes = product._codes.clone()
        found[name] = [lambda each=each: each(x) for each in each_own]
    sizes = {BASELINE: weight.nbytes, "torch float32": weight.nbytes, "onnxruntime int4": SIZE * SIZE * 5 // 8}
    sizes |= {name: product.nbytes for name, product in made.items()}
    return {name: turning(calls) for name, calls in found.items()}, sizes


def measure(threads: int, where: str, budget_s: float) -> list[dict[str, Any]]:
    """A row per arm."""
    torch.set_num_threads(threads)
    x = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(1))
    calls, sizes = arms(threads, where, x)
    gb_s = read_bandwidth(threads)
    samples = pair(calls, baseline=BASELINE, seed=0, watch=watch(), budget_s=budget_s)
    kept, rows = samples.kept, []
    for name, seconds in samples.seconds.items():
        spent = float(np.median(seconds[kept]))
        row = {"arm": name, "threads": threads, "weights_from": where, "ms": spent * 1e3, "rounds": int(kept.sum())}
        single = [float(calls.min()) for calls in samples.calls.get(name, ()) if len(calls)]
        row["best_call_ms"] = 1e3 * min(single) if single else None  # calls too short to be timed singly
        row |= {"mbytes": sizes[name] / 1e6, "share_of_bandwidth": sizes[name] / 1e9 / spent / gb_s, "read_gb_s": gb_s}
        for rival in (BASELINE, "torch float32", "onnxruntime int4"):
            value, interval = speedup(np.log(samples.seconds[rival][kept] / seconds[kept]))
            row[f"times {rival}"] = [value, interval.low, interval.high]
        rows.append(row)
        print(json.dumps(rounded(row)), flush=True)
    return rows


def errors() -> dict[str, float]:
    """Relative error of each path against float64 on normal inputs: the kernel's own rounding."""
    found = {}
    x = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(2))
    for name, product in products(kernel_paths()).items():
        exact = x.double() @ product.dequantize().double().T
        found[name] = float((product(x).double() - exact).norm() / exact.norm())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--budget", type=float, default=30.0, help="seconds per table")
    given = parser.parse_args()
    rows = [row for n in given.threads for where in ("memory", "cache") for row in measure(n, where, given.budget)]
    shapes = [dict(zip(("vector", "stages", "entries"), sizes, strict=True)) for sizes in LAYERS.values()]
    shape = {"out": SIZE, "in": SIZE, "codebooks": shapes}
    told = {
        "machine": hwprofiles.machine_summary(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "onnx": onnx.__version__,
    }
    content = {**told, "versions": versions(), "layer": shape, "relative_error": errors(), "rows": rows}
    RESULT.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
