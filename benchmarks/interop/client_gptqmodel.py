"""Read a GPTQ or AWQ folder with GPTQModel's torch kernel. Imports nothing of compress: it runs in its own environment.

    python client_gptqmodel.py FOLDER EXPECTED

EXPECTED: safetensors with `ids` (N, length), `logits` (N, length, vocabulary) float32, and the weight (out, in) of
each packed layer by module name. Prints one JSON object: versions, packed layers found, the largest difference of a
weight as a share of the largest weight, and of a logit as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

# on fewer than three cores it would start one worker and then refuse to start, since it needs two
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file

PACKAGES = ("gptqmodel", "transformers", "torch")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("expected", type=Path)
    given = parser.parse_args()
    expected = load_file(given.expected)
    ids, logits = expected.pop("ids"), expected.pop("logits")
    awq = json.loads((given.folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    backend = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    # left to itself it takes bfloat16, which rounds the scales
    model = GPTQModel.load(str(given.folder), backend=backend, device="cpu", dtype=torch.float16).model
    packed = {name: one for name, one in model.named_modules() if hasattr(one, "qweight")}
    weights = {
        name: one.dequantize_weight().T.float() for name, one in packed.items() if hasattr(one, "dequantize_weight")
    }
    with torch.no_grad():
        found = model(input_ids=ids).logits.float()
    apart = [float((weights[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in weights]
    result = {
        "versions": {name: version(name) for name in PACKAGES},
        "kernels": sorted({type(one).__name__ for one in packed.values()}),
        "packed": len(packed),
        "expected": len(expected),
        "compared": len(weights),
        "weights": max(apart, default=None),
        "logits": float((found - logits).abs().max() / logits.abs().max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
