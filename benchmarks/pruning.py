"""Masks of our passes on a small language model: KL, perplexity and calibration error on held-out text, and against
llm-compressor's SparseGPT and Wanda.

    python benchmarks/pruning.py ASSETS/pycoder --work FOLDER [--envs ENVS] [--only GLOB]

All sides get the same calibration windows and are scored on the same test windows, paired. Rivals run once each in
their own environment (`rivals/build_envs.py`) and leave a checkpoint in FOLDER; scores of ours are kept there too, for
one state of the code. The test windows are the last ones of the text: earlier ones were looked at while settings of
`sparsegpt` were chosen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import rounded
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "rivals"))

from quality import NotRunError, Rival, run_client  # noqa: E402  (the benchmarks folder is no package)

import compress  # noqa: E402
from compress.engine.blockpass import Block, BlockPass  # noqa: E402
from compress.engine.image_stream import open_stream  # noqa: E402
from compress.engine.layer_stats import LayerStats, Stat  # noqa: E402
from compress.engine.layerpass import LayerPass, Pass  # noqa: E402
from compress.inputs import datasets  # noqa: E402
from compress.layer import Layer  # noqa: E402
from compress.maths.hessian import weighted_error  # noqa: E402
from compress.models.skeleton import OUTER  # noqa: E402
from compress.pipeline import Pipeline  # noqa: E402
from compress.quality.calibration_error import Answers, calibration_figures  # noqa: E402
from compress.quality.evaluate import stream_logits  # noqa: E402
from compress.quality.token_scores import score_tokens  # noqa: E402
from compress.stats.intervals import cluster_interval, paired_difference, transform  # noqa: E402

RESULT = HERE / "results" / "pruning.json"
SHARES = {
    "30 %": ("sparsity=0.30078125", 0.30078125, "0:0"),
    "50 %": ("sparsity=0.5", 0.5, "0:0"),
    "70 %": ("sparsity=0.69921875", 0.69921875, "0:0"),
}
"""Whole weights of rows of 256 and 768, so that both sides prune as many: the rival rounds down, ours to nearest."""
SETTINGS = {**SHARES, "2:4": ("pattern=2:4", 0.5, "2:4"), "4:8": ("pattern=4:8", 0.5, "4:8")}
"""Ours as text; the rival's sparsity and mask."""
CRITERIA = ("magnitude", "wanda", "ria", "sparsegpt")
ALONE = {
    "wanda 70 % owl": "wanda(sparsity=0.69921875, allocate=owl)",
    "sparsegpt 70 % owl": "sparsegpt(sparsity=0.69921875, allocate=owl)",
    "sparsegpt 50 % with int4": "sparsegpt(sparsity=0.5, format=int4(group=128))",
    "sparsegpt 50 %, then gptq int4": "sparsegpt(sparsity=0.5), gptq(format=int4(group=128))",
    "sparsegpt 2:4 with int4": "sparsegpt(pattern=2:4, format=int4(group=128))",
    "sparsegpt 2:4, then gptq int4": "sparsegpt(pattern=2:4), gptq(format=int4(group=128))",
}
PAIRS = (
    ("wanda 70 % owl", "wanda 70 %"),
    ("sparsegpt 70 % owl", "sparsegpt 70 %"),
    ("sparsegpt 50 % with int4", "sparsegpt 50 %, then gptq int4"),
    ("sparsegpt 2:4 with int4", "sparsegpt 2:4, then gptq int4"),
)
"""Rows of ours that are held against each other."""

Score = dict[str, list[float]]
"""Per window sums of nll and KL; per token, in order, whether the top answer was right and its probability."""


def ours() -> dict[str, str]:
    """Row → pipeline."""
    found = {f"{name} {label}": f"{name}({text})" for label, (text, *_) in SETTINGS.items() for name in CRITERIA}
    return found | ALONE


def rivals() -> dict[str, Rival]:
    """Row of ours → the rival's program for the same."""
    return {
        f"{method} {label}": Rival(
            "llmcompressor", "llmcompressor_pruning", {"method": method, "sparsity": share, "mask": mask}, ""
        )
        for label, (_, share, mask) in SETTINGS.items()
        for method in ("sparsegpt", "wanda")
    }


class Scorer:
    """Scores models on the last windows of the test text."""

    def __init__(self, folder: Path, work: Path, samples: int, count: int) -> None:
        self.work, self.model = work, compress.load(folder)
        self.calibration = datasets.calibrate(self.model, folder / "text" / "calib.txt.gz", samples=samples)
        whole = datasets.quality_windows(self.model, folder / "text" / "test.txt.gz")
        self.first, self.ids = len(whole.ids) - count, whole.ids[-count:]
        self.digest = f"{self.model.source_digest} {whole.digest} {count} {samples} {code_digest()}"
        self.reference = list(stream_logits(self.model, self.ids))
        self.counts = [row.shape[0] - 1 for row in self.ids]
        self.original = self.scored(self.model)

    def scored(self, model: Any) -> Score:
        found: Score = {"nll": [], "kl": [], "right": [], "confidence": []}
        for row, expected, logits in zip(self.ids, self.reference, stream_logits(model, self.ids), strict=True):
            tokens = score_tokens(expected[:-1], logits[:-1], row[1:])
            found["nll"].append(float(tokens.nll.sum()))
            found["kl"].append(float(tokens.kl.sum()))
            found["right"] += tokens.right.astype(float).tolist()
            found["confidence"] += tokens.confidence.tolist()
        return found

    def path(self, key: str) -> Path:
        """Of what is kept for one model."""
        return self.work / f"{hashlib.sha256(f'{key} {self.digest}'.encode()).hexdigest()[:16]}.json"

    def kept(self, key: str, make: Any) -> dict[str, Any]:
        """Facts and scores of one model, kept in the work folder. make: gives the model and its facts."""
        path = self.path(key)
        if not path.is_file():
            model, facts = make()
            path.write_text(json.dumps({"key": key, **facts, "scores": self.scored(model)}))
        return dict(json.loads(path.read_text()))

    def has(self, key: str) -> bool:
        """Whether there are scores for it."""
        return self.path(key).is_file()

    def ours(self, text: str) -> dict[str, Any]:
        def make() -> tuple[Any, dict[str, Any]]:
            made = Pipeline.parse(text).run(self.model, self.calibration)
            assert made.sparsity is not None and all(layer.met for layer in made.sparsity.layers), text
            rows = [row for row in made.passes[-1].layers if row.changed]
            errors = [row.output_error for row in rows if row.output_error is not None]
            facts = {"zeros": made.sparsity.zeros / made.sparsity.pruned_weights, "seconds": made.passes[-1].seconds}
            return made.model, facts | {"output_error": sum(errors) / len(errors) if errors else None}

        return self.kept(text, make)

    def figures(self, scores: Score) -> dict[str, Any]:
        """With intervals by windows."""
        kl, kl_interval = cluster_interval(scores["kl"], self.counts)
        nll, nll_interval = cluster_interval(scores["nll"], self.counts)
        calibration = calibration_figures(self.answers(scores), self.answers(self.original))
        return {
            "kl": with_interval(kl, kl_interval),
            "perplexity": with_interval(exp(nll), transform(nll_interval, exp)),
            "accuracy": sum(scores["right"]) / sum(self.counts),
            "ece": with_interval(*calibration["ece"]),
            "ece_change": with_interval(*calibration["ece_change"]),
        }

    def answers(self, scores: Score) -> Answers:
        ends = np.cumsum(self.counts)[:-1]
        right, confidence = (np.split(np.array(scores[name]), ends) for name in ("right", "confidence"))
        return Answers(confidence, [each.astype(bool) for each in right])

    def against(self, mine: Score, other: Score) -> dict[str, Any]:
        """KL of one less that of another, paired by window."""
        return with_interval(*paired_difference(mine["kl"], other["kl"], self.counts))


def with_interval(value: float, interval: Any) -> dict[str, float]:
    return {"value": value} | ({} if interval is None else {"low": interval.low, "high": interval.high})


def code_digest() -> str:
    """Of the source files that decide what is pruned and how it is scored."""
    root, digest = Path(compress.__file__).parent, hashlib.sha256()
    folders = ("", "engine/", "formats/", "maths/", "passes/", "quality/")
    for path in sorted(path for folder in folders for path in root.glob(f"{folder}*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def alone(item: Pass, layer: Layer, stats: LayerStats) -> Layer:
    """One layer by itself."""
    if isinstance(item, LayerPass):
        return item.layer(layer, stats)
    assert isinstance(item, BlockPass)
    one = {layer.name: layer}
    return item.block(Block(layer.name, one, one, {layer.name: item}, {}, {layer.name: stats})).layers[layer.name]


def kept_oracle(scorer: Scorer) -> dict[str, Any]:
    """`oracle`, kept in the work folder."""
    path = scorer.path("oracle")
    if not path.is_file():
        path.write_text(json.dumps(oracle(scorer)))
    return dict(json.loads(path.read_text()))


def oracle(scorer: Scorer) -> dict[str, Any]:
    """Relative output error of each layer of the original on its own inputs, by criterion, all with one pattern (single
    weights by row): means over layers, and in how many sparsegpt ≤ wanda and wanda ≤ magnitude holds."""
    passes = {
        label: {name: Pipeline.parse(text_of(name, text)).passes[0] for name in CRITERIA}
        for label, (text, *_) in SETTINGS.items()
    }
    errors: dict[str, list[dict[str, float]]] = {label: [] for label in SETTINGS}
    stream = open_stream(scorer.model, scorer.calibration.batches())
    stream.start(scorer.model.layers(OUTER))
    for index in range(len(scorer.model.structure.blocks)):
        layers = scorer.model.layers(index)
        stream.load(index, layers, scorer.model.plain(index))
        stats = stream.collect(index, list(layers), {Stat.HESSIAN})
        stream.advance(index)
        for name, layer in layers.items():
            hessian, weight = stats[name].hessian, layer.float_weight()
            assert hessian is not None
            whole = weighted_error(weight, hessian)
            for label, items in passes.items():
                found = {key: alone(item, layer, stats[name]).float_weight() for key, item in items.items()}
                errors[label].append({k: weighted_error(one - weight, hessian) / whole for k, one in found.items()})
    return {
        label: {
            "layers": len(rows),
            "sparsegpt_no_worse_than_wanda": sum(row["sparsegpt"] <= row["wanda"] for row in rows),
            "wanda_no_worse_than_magnitude": sum(row["wanda"] <= row["magnitude"] for row in rows),
            **{name: sum(row[name] for row in rows) / len(rows) for name in CRITERIA},
        }
        for label, rows in errors.items()
    }


def text_of(name: str, settings: str) -> str:
    """A pass that sees nothing but the layer's own inputs."""
    settings = f"{settings}, pattern=row" if "pattern" not in settings else settings
    return f"{name}({settings}, mismatch=0)" if name == "sparsegpt" else f"{name}({settings})"


def against_rivals(scorer: Scorer, given: argparse.Namespace, rows: Mapping[str, Any]) -> dict[str, Any]:
    windows = given.work / "windows.safetensors"
    save_file({"ids": scorer.calibration.windows.ids}, windows)
    found: dict[str, Any] = {}
    for name, rival in rivals().items():
        if name not in rows:
            continue
        folder = given.work / f"llmcompressor-{name.replace(' ', '-').replace('%', 'percent').replace(':', 'of')}"
        try:
            facts = run_client(rival, given.envs, given.model, windows, folder)
        except (NotRunError, subprocess.TimeoutExpired) as error:
            found[name] = {"skipped": str(error)}
            continue
        theirs = scorer.kept(f"rival {name} {facts['calibration']}", lambda at=folder: (compress.load(at), {}))[
            "scores"
        ]
        difference = scorer.against(rows[name]["scores"], theirs)
        found[name] = {
            **scorer.figures(theirs),
            "zeros": facts["zeros"],
            "version": facts["version"],
            "seconds": facts["seconds"],
            "ours_less_theirs": difference,
            "met": difference["low"] <= 0,
            "verdict": "better" if difference["high"] < 0 else "worse" if difference["low"] > 0 else "equal",
        }
        print(f"llm-compressor {name}: {found[name]['verdict']}", file=sys.stderr, flush=True)
    return found


def told(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})" if "low" in figure else "-"


def table(result: Mapping[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| row | zeros | KL | perplexity | calibration error | llm-compressor's KL | difference |",
        "|---" * 7 + "|",
    ]
    for name, row in result["rows"].items():
        rival = result["rivals"].get(name, {})
        theirs = (
            [told(rival["kl"]), f"{told(rival['ours_less_theirs'])}, {rival['verdict']}"] if "kl" in rival else ["", ""]
        )
        cells = [name, f"{row['zeros']:.2%}", told(row["kl"]), told(row["perplexity"]), told(row["ece"]), *theirs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--envs", type=Path, help="of rivals/build_envs.py; left out, only checkpoints there count")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and scores are kept")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=32, help="test windows, from the end of the text")
    parser.add_argument("--kept", action="store_true", help="only what FOLDER has scores of; the rest is named")
    parser.add_argument("--only", default="*", help="rows to make, as a glob; then no result is written")
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(given.model, given.work, given.samples, given.windows)
    rows: dict[str, Any] = {}
    for name, text in ours().items():
        if fnmatch(name, given.only) and (not given.kept or scorer.has(text)):
            rows[name] = scorer.ours(text)
            print(f"{name}: KL {scorer.figures(rows[name]['scores'])['kl']['value']:.4f}", file=sys.stderr, flush=True)
    compared = against_rivals(scorer, given, rows)
    result = {
        "model": given.model.name,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "calibration": scorer.calibration.summary(),
        "test": f"windows {scorer.first} to {scorer.first + given.windows - 1} of 512 tokens of the test text",
        "original": scorer.figures(scorer.original),
        "rows": {
            name: {"pipeline": ours()[name], **scorer.figures(row["scores"]), "zeros": row["zeros"]}
            for name, row in rows.items()
        },
        "pairs": {
            f"{mine} less {other}": scorer.against(rows[mine]["scores"], rows[other]["scores"])
            for mine, other in PAIRS
            if {mine, other} <= rows.keys()
        },
        "rivals": compared,
        "not_made": [name for name in ours() if name not in rows],
    }
    if given.only == "*":
        result["layers"] = kept_oracle(scorer)
        RESULT.write_text(json.dumps(rounded(result), indent=1) + "\n")
    print(table(result))
    return 0 if all(row.get("met", False) for row in compared.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
