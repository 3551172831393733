"""Depth pruning of a small language model: what one to four blocks less cost and save.

    python benchmarks/depth.py ASSETS/pycoder
    python benchmarks/depth.py ASSETS/pycoder --suffix "heal(tokens=2000000)" --no-speed --out results/depth_heal.json

Quality: KL to the original and perplexity on windows of a text that is disjoint from the calibration text, for blocks
chosen by greedy KL, by cosine, as a run of neighbours by cosine, and simply the last ones. Bar: at each count greedy KL
loses no more than cosine (interval of the paired difference not above 0). With `--suffix` the passes after it are run
on the greedy choice; bar: they take back at least half of the KL that was lost.

Speed: one token decoded in ONNX Runtime in float32, models of all depths timed in paired rounds of one process, by
processor time where there is one thread, since other work on the machine takes wall time from long calls more than from
short ones. Bar: every time within 10 % of the least-squares line over the number of blocks. `--speed-only` times again
what an earlier result chose.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

import compress
from compress.export import find
from compress.inputs import datasets
from compress.inputs.windows import Windows
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from compress.profiles import as_profile
from compress.quality.evaluate import stream_logits
from compress.quality.token_scores import WindowScore, score_window
from compress.quality.token_summary import summarize
from compress.speed.timing import pair
from compress.stats.intervals import paired_difference, speedup

RESULTS = Path(__file__).parent / "results"
COUNTS = (1, 2, 3, 4)
PROMPT = 128
ALLOWED = 0.1
"""Of a time beside the line."""


def scores(model: Model, windows: Windows, reference: list[torch.Tensor]) -> list[WindowScore]:
    """One score per window."""
    return [
        score_window(expected[:-1], found[:-1], row[1:])
        for row, expected, found in zip(windows.ids, reference, stream_logits(model, windows.ids), strict=True)
    ]


def order(result: Result) -> list[int]:
    """The blocks that a pass dropped, in the order in which it chose them."""
    found = {}
    for row in result.passes[0].layers:
        if row.changed:
            before = re.search(r"beside the (\d+) chosen", row.notes[0])
            found[int(before.group(1)) if before else 0] = int(row.layer.rpartition(".")[2])
    return [found[number] for number in sorted(found)]


def difference(first: list[WindowScore], second: list[WindowScore]) -> dict[str, Any]:
    """Of the KL, first - second, paired by window."""
    pairs = [score.kl for score in first], [score.kl for score in second]
    value, interval = paired_difference(*pairs, [score.tokens for score in first])
    assert interval is not None
    return {"value": value, "interval": interval.model_dump()}


class Quality:
    """All arms on the same windows."""

    def __init__(self, model: Model, given: argparse.Namespace) -> None:
        texts = given.model / "text"
        self.model, self.suffix = model, given.suffix
        self.calibration = datasets.calibrate(model, texts / "calib.txt.gz", samples=given.samples)
        self.healing = datasets.calibrate(model, texts / "calib.txt.gz", samples=given.suffix_samples)
        whole = datasets.quality_windows(model, texts / "test.txt.gz")
        count = given.windows
        self.windows = Windows(whole.ids[:count], whole.documents[:count], whole.protocol, whole.digest)
        self.reference = list(stream_logits(model, self.windows.ids))
        started = time.perf_counter()
        greedy = Pipeline.parse(f"drop_blocks(count={max(COUNTS)})").run(model, self.calibration)
        self.greedy_seconds = round(time.perf_counter() - started, 1)
        self.greedy = order(greedy)

    def scored(self, text: str, calibration: Any = None) -> tuple[dict[str, Any], list[WindowScore]]:
        """What a recipe makes, and its scores by window."""
        made = Pipeline.parse(text).run(self.model, calibration).model
        found = scores(made, self.windows, self.reference)
        metrics = summarize(found, "compressed", "torch", self.windows.protocol, self.windows.digest).metrics
        gone = sorted(set(range(len(self.model.structure.blocks))) - set(made.origins))
        kept = {key: metrics[key].model_dump() for key in ("kl", "perplexity", "top1_agreement")}
        return {"dropped": gone, **kept}, found

    def row(self, count: int) -> dict[str, Any]:
        """All choices of one size."""
        blocks = len(self.model.structure.blocks)
        texts = {
            "kl": f"drop_blocks(blocks={sorted(self.greedy[:count])})",
            "cosine": f"drop_blocks(count={count}, by=cosine)",
            "neighbours": f"drop_blocks(count={count}, by=cosine, contiguous=true)",
            "last": f"drop_blocks(blocks={list(range(blocks - count, blocks))})",
        }
        row: dict[str, Any] = {"count": count}
        found: dict[str, list[WindowScore]] = {}
        for name, text in texts.items():
            row[name], found[name] = self.scored(text, self.calibration)
        row["kl_minus_cosine"] = difference(found["kl"], found["cosine"])
        row["met"] = row["kl_minus_cosine"]["interval"]["low"] <= 0
        if self.suffix:
            row["suffix"], later = self.scored(f"{texts['kl']}, {self.suffix}", self.healing)
            row["regained"] = 1 - row["suffix"]["kl"]["value"] / row["kl"]["kl"]["value"]
            row["suffix_minus_kl"] = difference(later, found["kl"])
            row["suffix_met"] = row["regained"] >= 0.5
        told = (f"{name} {row[name]['dropped']} {row[name]['kl']['value']:.4f}" for name in texts)
        print(count, *told, *([f"regained {row['regained']:.2f}"] if self.suffix else []), flush=True)
        return row


def timed(model: Model, gone: list[int], budget: float, threads: int) -> dict[str, Any]:
    """Decode times of all depths in ONNX Runtime, as shares of the whole model's, and the line through them."""
    target, profile = find("onnx"), as_profile("cpu-x86-avx2", "onnx")
    total = len(model.structure.blocks)
    with tempfile.TemporaryDirectory() as folder:
        arms, sizes = {}, {}
        for count in (0, *COUNTS):
            text = f"drop_blocks(blocks={sorted(gone[:count])})"
            made = Pipeline.parse(text).run(model).model if count else model
            target.write(made, profile, Path(folder) / str(count))
            session = target.session(Path(folder) / str(count), threads)
            ids = np.ones((1, 1), dtype=np.int64)
            arms[str(total - count)] = session.call(ids, PROMPT)
            sizes[total - count] = made.source_bytes
        clock = time.thread_time if threads == 1 else time.perf_counter
        samples = pair(arms, baseline=str(total), seed=0, budget_s=budget, clock=clock)
    whole = float(np.median(samples.seconds[str(total)]))
    row: dict[str, Any] = {"prompt": PROMPT, "threads": threads, "rounds": len(samples.control), "whole_s": whole}
    row["clock"] = clock.__name__
    row["control"] = speedup(samples.control_log_ratios())[1].model_dump()
    shares = {total: 1.0}
    for name in arms:
        if name != str(total):
            ratio, interval = speedup(samples.log_ratios(name))
            shares[int(name)] = 1 / ratio
            row[name] = {"speedup": ratio, "interval": interval.model_dump(), "weight_bytes": sizes[int(name)]}
    depths = sorted(shares)
    slope, constant = np.polyfit(depths, [shares[each] for each in depths], 1)
    line = {each: float(constant + slope * each) for each in depths}
    row["line"] = {"per_block_share": float(slope), "constant_share": float(constant)}
    row["off_line"] = {str(each): shares[each] / line[each] - 1 for each in depths}
    # a line whose constant may not be below zero, which it is where smaller models fit the caches better
    slope = sum(shares[each] * each for each in depths) / sum(each**2 for each in depths)
    row["off_proportional"] = {str(each): shares[each] / (slope * each) - 1 for each in depths}
    row["met"] = max(abs(each) for each in row["off_line"].values()) <= ALLOWED
    return row


def judged(model: Model, given: argparse.Namespace) -> dict[str, Any]:
    """Quality at all counts."""
    quality = Quality(model, given)
    facts: dict[str, Any] = {"model": given.model.name, "machine": platform.machine(), "torch": torch.__version__}
    facts |= {"onnxruntime": onnxruntime.__version__, "calibration_windows": given.samples, "suffix": given.suffix}
    facts |= {"test_windows": given.windows, "greedy_order": quality.greedy, "greedy_seconds": quality.greedy_seconds}
    facts["rows"] = [quality.row(count) for count in COUNTS]
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=48, help="windows of the test text")
    parser.add_argument("--suffix", default="", help="passes after drop_blocks, such as heal")
    parser.add_argument("--suffix-samples", type=int, default=128, help="calibration windows of theirs")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--speed-only", action="store_true")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "depth.json")
    given = parser.parse_args()
    model = compress.load(given.model)
    facts: dict[str, Any] = json.loads(given.out.read_text()) if given.speed_only else judged(model, given)
    if not given.no_speed:
        facts["decode"] = timed(model, facts["greedy_order"], given.budget, given.threads)
        print("decode", facts["decode"]["line"], facts["decode"]["off_line"])
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(facts, indent=1) + "\n")
    met = [row["met"] and row.get("suffix_met", True) for row in facts["rows"]]
    return 0 if all(met) and facts.get("decode", {"met": True})["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
