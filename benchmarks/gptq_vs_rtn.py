"""GPTQ against round-to-nearest at the same bits: KL to the original on held-out text, same windows, paired.

    python benchmarks/gptq_vs_rtn.py ASSETS/pycoder

Other marks, measured on the same model and windows by the authors of the assets' README (llm-compressor 0.14 GPTQ,
group 32, 128 × 512 calibration tokens): 4 bit 0.00454, 3 bit 0.02160, 2 bit 0.14382;
round-to-nearest 0.01389, 0.07445, 1.0577.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import compress
from compress.inputs import datasets
from compress.inputs.windows import Windows
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from compress.quality.token_scores import WindowScore, score_window
from compress.quality.token_summary import summarize
from compress.stats.intervals import paired_difference

RESULT = Path(__file__).parent / "results" / "gptq_vs_rtn.json"
MARKS = {4: 0.00454, 3: 0.02160, 2: 0.14382}


def scores(model: Any, ids: torch.Tensor, reference: list[torch.Tensor]) -> list[WindowScore]:
    """One score per window."""
    return [
        score_window(expected[:-1], found[:-1], row[1:])
        for row, expected, found in zip(ids, reference, stream_logits(model, ids), strict=True)
    ]


def row_of(bits: int, model: Any, calibration: Any, windows: Any, reference: list[torch.Tensor]) -> dict[str, Any]:
    """Both methods at one width, and the interval of their paired difference."""
    row: dict[str, Any] = {"bits": bits, "group": 32, "llm_compressor_gptq_kl": MARKS[bits]}
    found = {}
    for name in ("rtn", "gptq"):
        started = time.perf_counter()
        made = Pipeline.parse(f"{name}(format=int{bits}(group=32))").run(model, calibration)
        row[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
        found[name] = scores(made.model, windows.ids, reference)
        metrics = summarize(found[name], "compressed", "torch", windows.protocol, windows.digest).metrics
        row[name] = {key: metrics[key].model_dump() for key in ("kl", "top1_agreement", "perplexity")}
        row["bits_per_weight"] = made.passes[0].layers[0].bits_per_weight
    difference, interval = paired_difference(
        [score.kl for score in found["gptq"]], [score.kl for score in found["rtn"]], [s.tokens for s in found["rtn"]]
    )
    assert interval is not None
    row["gptq_minus_rtn"] = {"value": difference, "interval": interval.model_dump()}
    row["met"] = interval.high < 0
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=48)
    given = parser.parse_args()
    model = compress.load(given.model)
    calibration = datasets.calibrate(model, given.model / "text" / "calib.txt.gz", samples=128)
    whole = datasets.quality_windows(model, given.model / "text" / "test.txt.gz")
    windows = Windows(whole.ids[: given.windows], whole.documents[: given.windows], whole.protocol, whole.digest)
    reference = list(stream_logits(model, windows.ids))
    rows = [row_of(bits, model, calibration, windows, reference) for bits in (4, 3, 2)]
    RESULT.parent.mkdir(exist_ok=True)
    facts = {"model": given.model.name, "machine": platform.machine(), "torch": torch.__version__}
    RESULT.write_text(
        json.dumps({**facts, "windows": f"first {given.windows} of the test text", "rows": rows}, indent=1) + "\n"
    )
    for row in rows:
        print(
            row["bits"],
            "bit: rtn",
            round(row["rtn"]["kl"]["value"], 5),
            "gptq",
            round(row["gptq"]["kl"]["value"], 5),
            "difference",
            row["gptq_minus_rtn"],
            "other tool's gptq",
            row["llm_compressor_gptq_kl"],
        )
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
