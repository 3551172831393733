"""Exponent against mantissa bits at 4, 6 and 8 bits: what weights prefer after training, against the training law.

    python benchmarks/exmy_splits.py ASSETS/pycoder

"Scaling Laws for Floating-Point Quantization Training" (arXiv 2501.02423) finds, for training in P bits, the exponent
width E + 0.5 = δ · P / (δ + ν) with δ = 3.19, ν = 2.95: E2M1, E3M2 and E4M3 at 4, 6 and 8 bits. Here every split of
each width, and the integer grid of as many bits, rounds the weights of a trained model, by themselves (`rtn`, scale
search on) and with GPTQ; float16 scales throughout, one for 32 input columns or one for a row. KL to the original, per
token, on the same windows of held-out text.
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

RESULT = Path(__file__).parent / "results" / "exmy_splits.json"
BITS, SCALES, METHODS = (4, 6, 8), {"group=32": "groups of 32", "channel": "rows"}, ("rtn", "gptq")
DELTA, NU = 3.19, 2.95
NAMED = ("mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2")


def law(bits: int) -> str:
    """The split of the training law."""
    exponent = round(DELTA * bits / (DELTA + NU) - 0.5)
    return f"E{exponent}M{bits - 1 - exponent}"


def formats(bits: int, scale: str) -> dict[str, str]:
    """Name of a split → its format text, all with float16 scales."""
    splits = {f"E{x}M{bits - 1 - x}": f"fp{bits}_e{x}m{bits - 1 - x}({scale}, scale=float16)" for x in range(1, bits)}
    return {"INT": f"int{bits}({scale})", **splits}


class Bench:
    """One model, its calibration and the windows that everything is scored on."""

    def __init__(self, folder: Path, windows: int, samples: int) -> None:
        self.model = compress.load(folder)
        self.calibration = datasets.calibrate(self.model, folder / "text" / "calib.txt.gz", samples=samples)
        whole = datasets.quality_windows(self.model, folder / "text" / "test.txt.gz")
        self.windows = Windows(whole.ids[:windows], whole.documents[:windows], whole.protocol, whole.digest)
        self.reference = list(stream_logits(self.model, self.windows.ids))

    def scores(self, pipeline: str) -> tuple[list[WindowScore], dict[str, Any]]:
        """One score per window, and the row of the result."""
        started = time.perf_counter()
        made = Pipeline.parse(pipeline).run(self.model, self.calibration)
        seconds = time.perf_counter() - started
        pairs = zip(self.windows.ids, self.reference, stream_logits(made.model, self.windows.ids), strict=True)
        found = [score_window(expected[:-1], logits[:-1], row[1:]) for row, expected, logits in pairs]
        metrics = summarize(found, "compressed", "torch", self.windows.protocol, self.windows.digest).metrics
        rows = [row for row in made.passes[0].layers if row.changed]
        print(f"{pipeline}: KL {metrics['kl'].value:.6f}, {seconds:.0f} s", file=sys.stderr, flush=True)
        return found, {
            "pipeline": pipeline,
            "bits_per_weight": rows[0].bits_per_weight,
            "seconds": round(seconds, 1),
            **{key: metrics[key].model_dump() for key in ("kl", "top1_agreement")},
        }


def case(bench: Bench, bits: int, scale: str, method: str) -> dict[str, Any]:
    """All splits of one width under one method: their rows, the best, and the law's against the best."""
    clip = ", clip=true" if method == "rtn" else ""
    scored = {name: bench.scores(f"{method}(format={text}{clip})") for name, text in formats(bits, scale).items()}
    floats = {name: row["kl"]["value"] for name, (_, row) in scored.items() if name != "INT"}
    best, said = min(floats, key=lambda name: floats[name]), law(bits)
    difference = None
    if best != said:
        value, interval = paired_difference(
            [score.kl for score in scored[said][0]],
            [score.kl for score in scored[best][0]],
            [score.tokens for score in scored[best][0]],
        )
        difference = {"value": value, "interval": interval.model_dump() if interval else None}
    splits = {name: row for name, (_, row) in scored.items()}
    facts = {"bits": bits, "scale": scale, "method": method, "law": said, "best_float": best}
    return {**facts, "law_minus_best": difference, "splits": splits}


def named(bench: Bench) -> list[dict[str, Any]]:
    """The block formats that have names: plain rounding, with the scale search, and GPTQ."""
    settings = ("rtn(format={})", "rtn(format={}, clip=true)", "gptq(format={})")
    return [
        {"format": name, "kl": {text.format(name): bench.scores(text.format(name))[1] for text in settings}}
        for name in NAMED
    ]


def table(cases: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """Both results as Markdown; the best float of a row is bold, the law's has a star."""
    lines = []
    for bits in BITS:
        rows = [row for row in cases if row["bits"] == bits]
        names = list(rows[0]["splits"]) if rows else []
        lines += ["", f"| {bits} bit | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for row in rows:
            cells = []
            for name in names:
                cell = f"{row['splits'][name]['kl']['value']:.3g}" + ("*" if name == row["law"] else "")
                cells.append(f"**{cell}**" if name == row["best_float"] else cell)
            lines.append(f"| {row['method']}, {SCALES[row['scale']]} | " + " | ".join(cells) + " |")
    lines += ["", "| | bits | rtn | rtn, scale search | gptq |", "|---|---|---|---|---|"]
    for row in others:
        found = list(row["kl"].values())
        cells = [f"{found[0]['bits_per_weight']:.3g}", *(f"{one['kl']['value']:.3g}" for one in found)]
        lines.append(f"| {row['format']} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens, for GPTQ")
    given = parser.parse_args()
    bench = Bench(given.model, given.windows, given.samples)
    cases = [case(bench, bits, scale, method) for bits in BITS for scale in SCALES for method in METHODS]
    others = named(bench)
    facts = {
        "model": given.model.name,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "windows": f"first {given.windows} of the test text",
        "calibration": f"{given.samples} windows of 512",
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**facts, "cases": cases, "named": others}, indent=1) + "\n")
    text = table(cases, others)
    RESULT.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
