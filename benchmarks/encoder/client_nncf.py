"""OpenVINO with NNCF, in an environment of its own: quantizes an ONNX encoder, then answers on stdin and stdout.

    python client_nncf.py MODEL.onnx IDS.json THREADS

IDS.json: {"calibration": [[ids …] …], "quality": [[ids …] …]}. First it prints a line with the versions. Then, per line
read: `embed` prints the pooled vectors of the quality sentences as JSON, `time BATCH` runs the first BATCH of them,
padded with a mask, and prints the seconds that took.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino


def feeds(rows: list[list[int]]) -> dict[str, Any]:
    """Inputs for some sentences, padded behind with 0."""
    longest = max(map(len, rows))
    ids = np.array([row + [0] * (longest - len(row)) for row in rows], np.int64)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    model, data, threads = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), int(sys.argv[3])
    core = openvino.Core()
    calibration = nncf.Dataset([feeds([row]) for row in data["calibration"]])
    quantized = nncf.quantize(
        core.read_model(model),
        calibration,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(data["calibration"]),
    )
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(quantized, "CPU", settings)
    print(json.dumps({"nncf": nncf.__version__, "openvino": openvino.__version__}), flush=True)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "embed":
            vectors = [compiled(feeds([row]))[0][0].mean(0).tolist() for row in data["quality"]]
            print(json.dumps(vectors), flush=True)
        else:
            given = feeds(data["quality"][: int(words[1])])
            started = time.perf_counter()
            compiled(given)
            print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
