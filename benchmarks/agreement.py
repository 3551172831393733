"""How far each lowering's kernels move the logits from the in-memory model: the source of the published bounds.

    python benchmarks/agreement.py ASSETS

For each real model and each recipe: largest logit difference relative to the largest logit over 4,096 positions, and
the share of positions with the same top token. The bounds stand beside each lowering (`export/onnx/*.py`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import compress
from compress import hwprofiles, manifest
from compress.export.onnx import target
from compress.export.onnx.runtime import Session
from compress.inputs import datasets
from compress.pipeline import Pipeline
from compress.quality.verification import agreement
from compress.speed.measure import thread_count

RESULT = Path(__file__).parent / "results" / "agreement.json"
RECIPES = {
    "float32": "",
    "int4(group=32) MatMulNBits": "rtn(format=int4(group=32))",
    "int8(group=32) MatMulNBits": "rtn(format=int8(group=32))",
    "int3(group=32) MatMulNBits": "rtn(format=int3(group=32))",
    "int2(group=32) MatMulNBits": "rtn(format=int2(group=32))",
    "int8 inputs DynamicQuantizeMatMul": "rtn(format=int8(channel)), act_quant",
}
MODELS = {
    "pycoder": ("pycoder", "pycoder/text/test.txt.gz"),
    "stories260k": ("lm_stories260k/hf", "text/tinystories/tinystories_ids_tok512.json.gz"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    given = parser.parse_args()
    profile = hwprofiles.detect()
    rows = []
    for name, (folder, text) in MODELS.items():
        model = compress.load(given.assets / folder)
        windows = datasets.quality_windows(model, given.assets / text, samples=32, length=128)
        graph = target.capture(model, profile)
        for label, passes in RECIPES.items():
            made = Pipeline.parse(passes).run(model).model if passes else model
            with tempfile.TemporaryDirectory() as scratch:
                lowered = target.write(made, profile, Path(scratch), graph)
                threads, folder_out = thread_count(profile), Path(scratch)
                runners = Session(folder_out, threads), Session(folder_out, threads, exact=True)
                found = agreement(runners[0], made, windows.ids, lowered.bounds, runners[1])
            row = {"model": name, "lowering": label, "largest_relative_difference": found.max_relative_difference}
            row |= {"exact_kernels": found.exact_relative_difference, "exact_bound": found.exact_bound}
            row |= {"bound": found.bound, "same_top_token": found.top1_agreement, "agrees": found.agrees}
            rows.append({**row, "positions": found.positions})
            print(json.dumps(rows[-1]))
    facts = {"profile": profile.id, "machine": platform.machine(), "versions": manifest.versions()}
    RESULT.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
