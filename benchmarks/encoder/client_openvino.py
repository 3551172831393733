"""OpenVINO in an environment of its own: an ONNX encoder in float32 or, quantized by NNCF, in int8.

    python client_openvino.py MODEL.onnx THREADS LENGTH float32|int8

First it prints a line with the versions. Then, per line read, a batch size: it runs so many rows of tokens without
padding and prints the seconds that took.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import openvino


def feeds(batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Random tokens without padding."""
    ids = np.random.default_rng(seed).integers(0, 30_000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def main() -> None:
    path, threads, length, kind = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    core, versions = openvino.Core(), {"openvino": openvino.__version__}
    model = core.read_model(path)
    if kind == "int8":
        import nncf

        rows = nncf.Dataset([feeds(1, length, seed) for seed in range(16)])
        model = nncf.quantize(model, rows, model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
        versions["nncf"] = nncf.__version__
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", settings)
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        given = feeds(int(line), length)
        started = time.perf_counter()
        compiled(given)
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
