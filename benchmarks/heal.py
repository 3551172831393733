"""What `heal` regains of what pruning lost: KL to the original on held-out text, same windows, with intervals.

    python benchmarks/heal.py ASSETS/pycoder
    python benchmarks/heal.py ASSETS/lm_stories260k/hf --data ASSETS/text/tinystories/tinystories_ids_tok512.json.gz
    python benchmarks/heal.py ASSETS/pycoder --prefix "wanda(sparsity=0.7)" --heal "heal(tokens=100000)"

A prefix is what comes before healing: passes that prune, or make the model smaller. It runs once alone, then with each
way to heal. Calibration takes some windows of the calibration text, healing the rest of it, and the figures are of
windows of the test text: no text is used twice. With --data one file serves for all three, split by document. Rows are
added to those in the result file, one per model, prefix and way.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import compress
from compress.engine.shared_stages import SharedStages
from compress.inputs import datasets
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.models.model import Model
from compress.pipeline import Pipeline, Result
from compress.quality.evaluate import stream_logits
from compress.quality.token_scores import WindowScore, score_window
from compress.quality.token_summary import summarize
from compress.stats.intervals import cluster_interval, transform

RESULT = Path(__file__).parent / "results" / "heal.json"
PREFIXES = ("wanda(sparsity=0.5)", "wanda(pattern=2:4)")
WAYS = ("heal(tokens=100000)", "heal(mode=lora, tokens=100000)")


def scores(model: Model, windows: Windows, reference: list[torch.Tensor]) -> list[WindowScore]:
    """One score per window."""
    return [
        score_window(expected[:-1], found[:-1], row[1:])
        for row, expected, found in zip(windows.ids, reference, stream_logits(model, windows.ids), strict=True)
    ]


def figures(found: list[WindowScore], windows: Windows) -> dict[str, Any]:
    """KL, agreement and perplexity, with intervals over windows."""
    metrics = summarize(found, "compressed", "torch", windows.protocol, windows.digest).metrics
    return {key: metrics[key].model_dump() for key in ("kl", "top1_agreement", "perplexity")}


def regained(before: list[WindowScore], after: list[WindowScore]) -> dict[str, Any]:
    """The share of the lost KL that came back, and its interval over windows."""
    left, interval = cluster_interval([score.kl for score in after], [score.kl for score in before])
    turned = transform(interval, lambda value: 1 - value)
    assert turned is not None
    return {"value": 1 - left, "interval": turned.model_dump()}


def row_of(
    prefix: str, way: str, healed: Result, seconds: float, before: list[WindowScore], after: list[WindowScore]
) -> dict[str, Any]:
    """One way to heal after one prefix."""
    note = next(row.notes[0] for row in healed.passes[-1].layers if row.changed)
    share = regained(before, after)
    print(f"{prefix}, {way}: {100 * share['value']:.1f} % regained, {seconds:.0f} s; {note}", flush=True)
    return {"prefix": prefix, "heal": way, "regained": share, "seconds": round(seconds, 1), "note": note}


def measure(model: Model, calibration: Calibration, windows: Windows, prefix: str, ways: list[str]) -> list[Any]:
    """All ways after one prefix."""
    reference, rows = list(stream_logits(model, windows.ids)), []
    with tempfile.TemporaryDirectory() as folder:
        shared = SharedStages(Path(folder))
        pruned = Pipeline.parse(prefix).run(model, calibration, shared=shared)
        before = scores(pruned.model, windows, reference)
        for way in ways:
            started = time.perf_counter()
            healed = Pipeline.parse(f"{prefix}, {way}").run(model, calibration, shared=shared)
            seconds = time.perf_counter() - started
            after = scores(healed.model, windows, reference)
            row = row_of(prefix, way, healed, seconds, before, after)
            rows.append({**row, "pruned": figures(before, windows), "healed": figures(after, windows)})
    return rows


def data_of(model: Model, folder: Path, data: Path | None, count: int) -> tuple[Calibration, Windows]:
    """Calibration with what is left of its text, and the first test windows."""
    whole: datasets.Samples
    if data is not None:
        calibration, whole = datasets.split(
            model, data, samples=32, quality_samples=None, length=256, seed=0, rest=True
        )
    else:
        calibration = datasets.calibrate(model, folder / "text" / "calib.txt.gz", samples=128, rest=True)
        whole = datasets.quality_windows(model, folder / "text" / "test.txt.gz")
    assert isinstance(whole, Windows)
    first = Windows(whole.ids[:count], whole.documents[:count], whole.protocol, whole.digest)
    datasets.check_calibration(calibration, first)
    return calibration, first


def name_of(folder: Path) -> str:
    """Of a model's folder."""
    return folder.parent.name if folder.name == "hf" else folder.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, help="one file for calibration, healing and test")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--prefix", action="append", help="passes before healing; may be given several times")
    parser.add_argument("--heal", action="append", help="a way to heal; may be given several times")
    given = parser.parse_args()
    model = compress.load(given.model)
    calibration, windows = data_of(model, given.model, given.data, given.windows)
    facts = {"machine": platform.machine(), "torch": torch.__version__, "windows": given.windows}
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {"rows": []}
    for prefix in given.prefix or PREFIXES:
        for row in measure(model, calibration, windows, prefix, given.heal or list(WAYS)):
            now = {"model": name_of(given.model), **row, **facts}
            same = ("model", "prefix", "heal")
            rows = [old for old in known["rows"] if any(old[key] != now[key] for key in same)]
            known = {"rows": [*rows, now]}
            RESULT.write_text(json.dumps(known, indent=1) + "\n")
    return 0 if all(row["regained"]["interval"]["low"] >= 0.5 for row in known["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
