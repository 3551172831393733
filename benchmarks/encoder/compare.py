"""An int8 encoder by this toolchain, by ONNX Runtime's `quantize_dynamic` and by NNCF, on the same sentences.

    python benchmarks/encoder/compare.py MODEL --sts FOLDER [--nncf PYTHON] [--passes TEXT] [--threads 2] [--out FILE]

MODEL: a Hugging Face folder (`train.py` makes one). Calibration: 300 sentences of STS-benchmark's train split; quality:
every sentence of its test split once. Per arm: cosine to the float model and the share of sentences that keep their
nearest neighbour, each with an interval, the difference to each rival paired by sentence, and latency at batch 1 and 16
in shuffled rounds against the float32 graph in ONNX Runtime. The rivals start from it in standard operators.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

import compress
from compress import hwprofiles
from compress.export.onnx import target
from compress.export.onnx.runtime import Session
from compress.inputs import datasets
from compress.inputs.windows import Windows
from compress.pipeline import Pipeline
from compress.quality import embedding_scores
from compress.recipe import load as load_recipe
from compress.speed.timing import pair
from compress.stats import intervals

Vectors = NDArray[np.float64]


class Rival:
    """`client_nncf.py` in its own environment."""

    def __init__(self, python: Path, model: Path, ids: Path, threads: int) -> None:
        command = [str(python), str(Path(__file__).with_name("client_nncf.py")), str(model), str(ids), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while True:  # its own progress bars come first
            line = self._line()
            if line.startswith("{"):
                self.versions: dict[str, str] = json.loads(line)
                break

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the NNCF client ended; its last words are above")
        return line

    def ask(self, words: str) -> Any:
        """One answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(words + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())


def sentences(folder: Path, part: str) -> list[str]:
    """Every sentence of a split once, in order."""
    with gzip.open(folder / f"stsb-en-{part}.csv.gz", "rt", encoding="utf8", newline="") as stream:
        return list(dict.fromkeys(text for row in csv.reader(stream) for text in row[:2]))


def embed(session: Session, rows: list[torch.Tensor]) -> Vectors:
    """(sentences, features), one sentence at a time."""
    return np.stack([session.logits(row.numpy()[None])[0].mean(0) for row in rows]).astype(np.float64)


def padded(rows: list[torch.Tensor]) -> dict[str, NDArray[np.int64]]:
    """Inputs for a batch, padded behind with 0."""
    longest = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row.numpy(), 1
    return {"input_ids": ids, "attention_mask": mask}


def latencies(
    sessions: dict[str, Session], rival: Rival | None, rows: list[torch.Tensor], budget_s: float
) -> dict[str, Any]:
    """Speed-ups over float32 with intervals, per batch."""
    found: dict[str, Any] = {}
    for batch in (1, 16):
        given = padded(rows[:batch])
        arms: dict[str, Callable[[], object]] = {
            name: (lambda one=one, given=given: one.session.run(None, given)) for name, one in sessions.items()
        }
        if rival is not None:
            arms["nncf"] = lambda batch=batch: rival.ask(f"time {batch}")
        samples = pair(arms, baseline="float32", seed=0, budget_s=budget_s)
        row: dict[str, Any] = {"float32_ms": 1e3 * float(np.median(samples.seconds["float32"]))}
        row["tokens"] = int(given["attention_mask"].sum())
        row["control"] = intervals.speedup(samples.control_log_ratios())[1].model_dump()
        for name in arms.keys() - {"float32"}:
            ratio, interval = intervals.speedup(samples.log_ratios(name))
            row[name] = {"speedup": ratio, "interval": interval.model_dump()}
        for name in arms.keys() - {"float32", "ours"}:
            ratio, interval = intervals.speedup(samples.log_ratios("ours") - samples.log_ratios(name))
            row[f"ours over {name}"] = {"ratio": ratio, "interval": interval.model_dump()}
        found[f"batch {batch}"] = row
    return found


def judged(reference: Vectors, vectors: dict[str, Vectors]) -> dict[str, Any]:
    """Cosine and nearest neighbours of each arm, and ours against each other arm, paired by sentence."""
    scores = {name: embedding_scores.score_embeddings(reference, each) for name, each in vectors.items()}
    ones = np.ones(len(reference))
    found: dict[str, Any] = {}
    for name, score in scores.items():
        summary = embedding_scores.summarize_embeddings(score, "compressed", name, "cosine/mean-pool/sentences", "")
        found[name] = {key: metric.model_dump() for key, metric in summary.metrics.items()}
    for name in scores.keys() - {"ours"}:
        for key in ("cosines", "agreed"):
            ours, theirs = (getattr(scores[arm], key).astype(float) for arm in ("ours", name))
            value, interval = intervals.paired_difference(ours, theirs, ones)
            found[f"ours minus {name}: {key}"] = {"value": value, "interval": interval and interval.model_dump()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sts", type=Path, required=True)
    parser.add_argument("--nncf", type=Path, help="python of the environment that holds nncf and openvino")
    parser.add_argument("--passes", help="in place of the preset encoder-int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timing per batch size")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, profile = compress.load(given.model), hwprofiles.detect()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "calibration.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in sentences(given.sts, "train"))
        )
        (scratch / "quality.jsonl").write_text(
            "\n".join(json.dumps({"text": text}) for text in sentences(given.sts, "test"))
        )
        calibration = datasets.calibrate(model, scratch / "calibration.jsonl", samples=300, length=128)
        held = datasets.quality_windows(model, scratch / "quality.jsonl", length=128)
        assert isinstance(held, Windows) and isinstance(calibration.windows, Windows)
        passes = Pipeline.parse(given.passes or load_recipe("encoder-int8").passes)
        made = passes.run(model, calibration)
        graph = target.capture(model, profile)
        lowered = target.write(made.model, profile, scratch / "ours", graph)
        target.write(model, profile, scratch / "float32", graph)
        target.write(model, portable(profile), scratch / "portable", graph)
        quantize_dynamic(scratch / "portable", scratch / "quantize_dynamic")
        sessions = {arm: Session(scratch / arm, given.threads) for arm in ("float32", "ours", "quantize_dynamic")}
        rows = held.rows()
        texts = {"calibration": [row.tolist() for row in calibration.windows.rows()]}
        (scratch / "ids.json").write_text(json.dumps(texts | {"quality": [row.tolist() for row in rows]}))
        onnx_file = scratch / "portable" / target.GRAPH
        rival = Rival(given.nncf, onnx_file, scratch / "ids.json", given.threads) if given.nncf else None
        vectors = {arm: embed(session, rows) for arm, session in sessions.items()}
        reference = vectors.pop("float32")
        if rival is not None:
            vectors["nncf"] = np.array(rival.ask("embed"))
        result = {
            "model": given.model.name,
            "passes": str(passes),
            "operators": lowered.operators,
            "sentences": len(rows),
            "quality": judged(reference, vectors),
            "latency": latencies(sessions, rival, rows, given.budget),
            "threads": given.threads,
            "versions": {"onnxruntime": onnxruntime.__version__, **(rival.versions if rival else {})},
        }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


def portable(profile: hwprofiles.Profile) -> hwprofiles.Profile:
    """The profile of a provider for which the target rewrites nothing: OpenVINO lacks ONNX Runtime's own operators."""
    runtime = profile.runtime(target.RUNTIME).model_copy(update={"provider": "any"})
    return profile.model_copy(update={"runtimes": {**profile.runtimes, target.RUNTIME: runtime}})


def quantize_dynamic(source: Path, folder: Path) -> None:
    """ONNX Runtime's own, per channel."""
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    folder.mkdir()
    quantize(source / target.GRAPH, folder / target.GRAPH, per_channel=True, weight_type=QuantType.QInt8)


if __name__ == "__main__":
    sys.exit(main())
