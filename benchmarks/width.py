"""Narrower models: KL to the original on held-out text, bytes of the artifact, and latency beside the original's.

    python benchmarks/width.py ASSETS/pycoder [--after "heal(steps=200)"] [--budget 20] [--out FILE]

Every row is `prune_width` with some settings, calibrated on the same windows and judged on the same others; the paired
difference of its KL is against the default settings at the same width. Shapes are exported as they are for ONNX Runtime
and timed in shuffled rounds against the model as it was, all in one run: its seconds as a multiple of theirs (above 1:
the narrow one is faster), with a 95 % interval. --after: passes that follow each, such as one that trains what is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import hwprofiles, manifest
from compress.export.onnx import target
from compress.inputs import datasets
from compress.inputs.windows import Windows
from compress.models.loading import load
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from compress.quality.token_scores import WindowScore, score_window
from compress.quality.token_summary import summarize
from compress.speed.measure import loads_of, sample_setting, thread_count
from compress.stats.intervals import paired_difference, speedup

RESULT = Path(__file__).parent / "results" / "width.json"
SHAPES = {
    "ffn 12.5 %": "ffn=0.125",
    "ffn 25 %": "ffn=0.25",
    "ffn 50 %": "ffn=0.5",
    "2 of 4 groups of heads": "kv_groups=2",
    "hidden 12.5 %": "hidden=0.125",
}
CHOICES = {
    "ffn 25 %": ("by=wanda", "by=activation", "refit=false"),
    "2 of 4 groups of heads": ("refit=false",),
    "hidden 12.5 %": ("refit=false",),
}
"""Other settings at the same width."""
SETTINGS = (("decode", 1, 128), ("prefill", 1, 128))


def scores(model: Any, ids: torch.Tensor, reference: list[torch.Tensor]) -> list[WindowScore]:
    """One score per window."""
    found = stream_logits(model, ids)
    return [
        score_window(expected[:-1], logits[:-1], row[1:])
        for row, expected, logits in zip(ids, reference, found, strict=True)
    ]


def compared(found: list[WindowScore], base: list[WindowScore]) -> dict[str, Any]:
    """The paired difference of the KL."""
    kl = [[score.kl for score in each] for each in (found, base)]
    value, interval = paired_difference(kl[0], kl[1], [score.tokens for score in base])
    return {"value": value, "interval": None if interval is None else interval.model_dump()}


def timed(folders: dict[str, Path], profile: Any, vocabulary: int, budget: float) -> dict[str, Any]:
    """Per setting, how many times as fast as the original each is."""
    rows: dict[str, Any] = {}
    for setting in SETTINGS:
        samples = sample_setting(loads_of(folders, profile, 0), setting, vocabulary, seed=0, budget_s=budget)
        row: dict[str, Any] = {"original_ms": 1e3 * float(np.median(samples.seconds["baseline"]))}
        row |= {"rounds": samples.rounds, "stopped": samples.stopped}
        row["control"] = speedup(samples.control_log_ratios())[1].model_dump()
        for name in folders.keys() - {"baseline"}:
            ratio, interval = speedup(samples.log_ratios(name))
            row[name] = {"times as fast": ratio, "interval": interval.model_dump()}
        rows[" ".join(map(str, setting))] = row
        print(json.dumps(row), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--after", default="", help="passes that follow")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per setting and shape")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    model, profile = load(str(given.model)), hwprofiles.detect()
    calibration = datasets.calibrate(model, given.model / "text" / "calib.txt.gz", samples=given.samples)
    whole = datasets.quality_windows(model, given.model / "text" / "test.txt.gz")
    windows = Windows(whole.ids[: given.windows], whole.documents[: given.windows], whole.protocol, whole.digest)
    reference, after = list(stream_logits(model, windows.ids)), f", {given.after}" if given.after else ""
    facts = {
        "model": given.model.name,
        "machine": hwprofiles.machine_summary(),
        "threads": thread_count(profile),
        "versions": manifest.versions(),
        "windows": f"first {len(windows.ids)} of the test text, calibrated on {given.samples}",
    }
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {**facts, "rows": rows, "artifact_bytes": {}, "speed": {}}
    base: dict[str, list[WindowScore]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"baseline": Path(scratch) / "baseline"}

        def export(made: Any, name: str) -> None:
            folder = target.write(made, profile, folders[name], target.capture(made, profile)).folder
            result["artifact_bytes"][name] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

        def row_of(shape: str, settings: str) -> None:
            recipe = f"prune_width({', '.join(filter(None, (SHAPES[shape], settings)))}){after}"
            started = time.perf_counter()
            made = Pipeline.parse(recipe).run(model, calibration, folder=Path(scratch) / "model").model
            row: dict[str, Any] = {"shape": shape, "recipe": recipe, "seconds": round(time.perf_counter() - started, 1)}
            found = scores(made, windows.ids, reference)
            metrics = summarize(found, "compressed", "torch", windows.protocol, windows.digest).metrics
            row |= {key: metrics[key].model_dump() for key in ("kl", "top1_agreement", "perplexity")}
            if settings:
                row["kl against the default"] = compared(found, base[shape])
            else:
                base[shape], folders[shape] = found, Path(scratch) / f"arm-{len(folders)}"
                export(made, shape)
            rows.append(row)
            print(recipe, round(row["kl"]["value"], 5), row["seconds"], "s", flush=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")

        export(model, "baseline")
        for shape in SHAPES:
            row_of(shape, "")
        result["speed"] = timed(folders, profile, model.vocabulary, given.budget * len(folders))
        for shape, choices in CHOICES.items():
            for settings in choices:
                row_of(shape, settings)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
