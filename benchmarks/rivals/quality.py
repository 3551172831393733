"""Quality of our passes against rivals at no more bits: KL to the original on held-out text, same windows, paired.

    python benchmarks/rivals/build_envs.py ENVS
    python benchmarks/rivals/quality.py ASSETS/pycoder --envs ENVS --work FOLDER [--only GLOB]

Each rival runs once in its own environment, on the calibration windows that our passes get, and leaves a checkpoint of
decoded weights in FOLDER (kept: a second run reads it). All are scored by compress.quality.evaluate. A rival whose
environment is missing, or that stopped, is named in the result with the reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from build_envs import HERE, python_of
from client import ids_digest
from safetensors.torch import load_file, save_file

import compress
from compress.inputs import datasets
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from compress.quality.token_scores import WindowScore, score_window
from compress.stats.intervals import cluster_interval, paired_difference

RESULT = HERE.parent / "results" / "rivals_quality.json"
TIMEOUT_S = 3600
LOSS_AT_8_BITS = 0.05
"""At 8 bits the interval of the difference may reach this share of the rival's KL."""


class NotRunError(Exception):
    """A rival gave no result, or none at as many bits as ours; the row says why."""


@dataclass(frozen=True)
class Rival:
    """Where it runs, what it is asked for, and our pipeline at no more bits."""

    environment: str
    client: str
    settings: dict[str, Any]
    ours: str


def _rival(environment: str, client: str, ours: str, **settings: Any) -> Rival:
    return Rival(environment, client, settings, ours)


def _llmc(method: str, bits: int, group: int, ours: str, **more: Any) -> Rival:
    return _rival("llmcompressor", "llmcompressor", ours, method=method, bits=bits, group=group, **more)


def _gptqmodel(bits: int, group: int, ours: str) -> Rival:
    return _rival("gptqmodel", "gptqmodel", ours, method="gptq", bits=bits, group=group)


def _hqq(bits: int, group: int, ours: str) -> Rival:
    return _rival("light", "hqq", ours, method="hqq", bits=bits, group=group)


def _bnb(ours: str, **settings: Any) -> Rival:
    return _rival("light", "bitsandbytes", ours, **settings)


RIVALS: dict[str, Rival] = {
    "llm-compressor GPTQ 8 bit g32": _llmc("gptq", 8, 32, "gptq(format=int8(group=32))"),
    "llm-compressor GPTQ 4 bit g32": _llmc("gptq", 4, 32, "gptq(format=int4(group=32))"),
    "llm-compressor GPTQ 4 bit g128": _llmc("gptq", 4, 128, "gptq(format=int4(group=128))"),
    "llm-compressor GPTQ 3 bit g32": _llmc("gptq", 3, 32, "gptq(format=int3(group=32))"),
    "llm-compressor GPTQ 2 bit g32": _llmc("gptq", 2, 32, "gptq(format=int2(group=32))"),
    "llm-compressor AWQ 4 bit g32": _llmc("awq", 4, 32, "gptq(format=int4(group=32))", asymmetric=True),
    "llm-compressor AWQ 4 bit g128": _llmc("awq", 4, 128, "gptq(format=int4(group=128))", asymmetric=True),
    "llm-compressor AWQ 3 bit g32": _llmc("awq", 3, 32, "gptq(format=int3(group=32))", asymmetric=True),
    "llm-compressor AWQ 2 bit g32": _llmc("awq", 2, 32, "gptq(format=int2(group=32))", asymmetric=True),
    "GPTQModel 8 bit g32": _gptqmodel(8, 32, "gptq(format=int8(group=32))"),
    "GPTQModel 4 bit g32": _gptqmodel(4, 32, "gptq(format=int4(group=32))"),
    "GPTQModel 4 bit g128": _gptqmodel(4, 128, "gptq(format=int4(group=128))"),
    "GPTQModel 3 bit g32": _gptqmodel(3, 32, "gptq(format=int3(group=32))"),
    "GPTQModel 2 bit g32": _gptqmodel(2, 32, "gptq(format=int2(group=32))"),
    "HQQ 8 bit g64": _hqq(8, 64, "gptq(format=int8(group=32))"),
    "HQQ 4 bit g64": _hqq(4, 64, "gptq(format=int4(group=32))"),
    "HQQ 4 bit g32": _hqq(4, 32, "gptq(format=int4(group=32))"),
    "HQQ 3 bit g64": _hqq(3, 64, "gptq(format=int3(group=32))"),
    "HQQ 3 bit g32": _hqq(3, 32, "gptq(format=int3(group=32))"),
    "HQQ 2 bit g64": _hqq(2, 64, "gptq(format=int2(group=32))"),
    "HQQ 2 bit g32": _hqq(2, 32, "gptq(format=int2(group=32))"),
    "bitsandbytes NF4": _bnb("gptq(format=int4(group=32))", method="nf4", bits=4, group=64, double=False),
    "bitsandbytes NF4 double": _bnb("gptq(format=int4(group=128))", method="nf4", bits=4, group=64, double=True),
    "bitsandbytes INT8 rows": _bnb("gptq(format=int8(channel))", method="int8", bits=8, group=0),
}


def run_client(rival: Rival, envs: Path | None, model: Path, windows: Path, out: Path) -> dict[str, Any]:
    """job.json of the rival's checkpoint in `out`, made where it is not there for these settings.

    Raises: NotRunError with the client's last line.
    """
    done = out / "job.json"
    if done.is_file():
        facts = dict(json.loads(done.read_text()))
        if facts["settings"] == rival.settings and facts["calibration"] == ids_digest(load_file(windows)["ids"]):
            return facts
    if envs is None:
        raise NotRunError("its checkpoint is not there, and without --envs none is made")
    python = python_of(envs.absolute() / rival.environment)
    if not python.exists():
        raise NotRunError(f"no environment {rival.environment}: run build_envs.py")
    command = [python, HERE / f"client_{rival.client}.py", model.resolve(), windows, out, json.dumps(rival.settings)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with (out / "log").open("w") as log:
        child = subprocess.run(
            [str(word) for word in command], stdout=log, stderr=log, env=environment, check=False, timeout=TIMEOUT_S
        )
    if child.returncode:
        raise NotRunError((out / "log").read_text().strip().splitlines()[-1][-300:])
    return dict(json.loads(done.read_text()))


class Scorer:
    """Scores models on the same windows. What was scored is kept in the work folder, so a stopped run goes on."""

    def __init__(self, folder: Path, work: Path, count: int) -> None:
        self.work, self.code = work, code_digest()
        self.model = compress.load(folder)
        self.calibration = datasets.calibrate(self.model, folder / "text" / "calib.txt.gz", samples=128)
        whole = datasets.quality_windows(self.model, folder / "text" / "test.txt.gz")
        self.ids = whole.ids[:count]
        self.digest = f"{self.model.source_digest} {whole.digest} {count}"
        self.reference = list(stream_logits(self.model, self.ids))

    def scores(self, model: Any) -> list[WindowScore]:
        """One per window."""
        outputs = stream_logits(model, self.ids)
        return [
            score_window(expected[:-1], found[:-1], row[1:])
            for row, expected, found in zip(self.ids, self.reference, outputs, strict=True)
        ]

    def kept_scores(self, folder: Path) -> list[WindowScore]:
        """Scores of a rival's checkpoint, kept beside it for these windows."""
        kept = folder / "scores.json"
        if kept.is_file() and (found := json.loads(kept.read_text()))["windows"] == self.digest:
            return [WindowScore(**score) for score in found["scores"]]
        scores = self.scores(compress.load(folder))
        kept.write_text(json.dumps({"windows": self.digest, "scores": [asdict(score) for score in scores]}))
        return scores

    def ours(self, text: str) -> tuple[list[WindowScore], float]:
        """Scores of a pipeline of ours, and its stored bits per quantized weight; kept for this state of the code."""
        key = hashlib.sha256(f"{text} {self.digest} {self.code}".encode()).hexdigest()[:16]
        kept = self.work / f"ours-{key}.json"
        if kept.is_file():
            found = json.loads(kept.read_text())
            return [WindowScore(**score) for score in found["scores"]], found["bits"]
        made = Pipeline.parse(text).run(self.model, self.calibration)
        weights = quantized(made.model)
        bits = 8 * sum(one.nbytes for one in weights) / sum(one.shape[0] * one.shape[1] for one in weights)
        scores = self.scores(made.model)
        kept.write_text(json.dumps({"ours": text, "bits": bits, "scores": [asdict(score) for score in scores]}))
        return scores, bits


def code_digest() -> str:
    """Of the engine's, the formats' and the passes' source files, so that a changed pass is scored anew."""
    root, digest = Path(compress.__file__).parent, hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("formats/*.py"), *root.glob("passes/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def divergences(scores: list[WindowScore]) -> list[float]:
    """KL of each window, summed over its tokens."""
    found = [score.kl for score in scores if score.kl is not None]
    assert len(found) == len(scores)
    return found


def quantized(model: Any) -> list[Any]:
    """The stored weights that have a format."""
    layers = [model.layer(spec) for spec in model.structure.layers.values() if spec.format is not None]
    return [layer.weight for layer in layers]


def compare(scorer: Scorer, rival: Rival, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One row of the table."""
    theirs = scorer.kept_scores(folder)
    ours, bits = scorer.ours(rival.ours)
    if bits > facts["bits_per_weight"] + 1e-9:
        raise NotRunError(f"{rival.ours} stores {bits:.4f} bits, the rival {facts['bits_per_weight']:.4f}")
    tokens = [score.tokens for score in theirs]
    mine, other = divergences(ours), divergences(theirs)
    difference, interval = paired_difference(mine, other, tokens)
    assert interval is not None
    kl = cluster_interval(other, tokens)[0]
    at_8 = rival.settings["bits"] == 8
    return {
        "rival_bits": facts["bits_per_weight"],
        "ours": rival.ours,
        "our_bits": bits,
        "rival_kl": kl,
        "our_kl": cluster_interval(mine, tokens)[0],
        "rival_top1": sum(score.agreed or 0 for score in theirs) / sum(tokens),
        "our_top1": sum(score.agreed or 0 for score in ours) / sum(tokens),
        "difference": difference,
        "interval": interval.model_dump(),
        "met": interval.high < LOSS_AT_8_BITS * kl if at_8 else interval.low <= 0,
        "verdict": "better" if interval.high < 0 else "worse" if interval.low > 0 else "equal",
        "rival_version": facts["version"],
        "rival_seconds": facts["seconds"],
        "rival_peak_bytes": facts["peak_bytes"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| rival | bits | KL | same top | ours | bits | KL | same top | difference (95 %) | verdict | met |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "skipped" in row:
            lines.append(f"| {name} | not run: {row['skipped']} |" + " |" * 9)
            continue
        ends = f"{row['difference']:+.2e} ({row['interval']['low']:+.2e} to {row['interval']['high']:+.2e})"
        cells = [name, f"{row['rival_bits']:.3f}", f"{row['rival_kl']:.6f}", f"{row['rival_top1']:.1%}"]
        cells += [f"`{row['ours']}`", f"{row['our_bits']:.3f}", f"{row['our_kl']:.6f}", f"{row['our_top1']:.1%}"]
        lines.append("| " + " | ".join([*cells, ends, row["verdict"], "yes" if row["met"] else "**no**"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--envs", type=Path, help="of build_envs.py; left out, only checkpoints that are there count")
    parser.add_argument("--work", type=Path, required=True, help="where the rivals' checkpoints are made and kept")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--only", default="*", help="rivals to run, as a glob on the table's names")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(given.model, given.work.resolve(), given.windows)
    windows = given.work.resolve() / "windows.safetensors"
    save_file({"ids": scorer.calibration.windows.ids}, windows)
    rows: dict[str, dict[str, Any]] = {}
    for name, rival in RIVALS.items():
        if not fnmatch(name, given.only):
            continue
        folder = given.work.resolve() / name.replace(" ", "-").lower()
        try:
            facts = run_client(rival, given.envs, given.model, windows, folder)
            rows[name] = compare(scorer, rival, facts, folder)
        except (NotRunError, subprocess.TimeoutExpired) as error:
            rows[name] = {"skipped": str(error)}
        print(name, rows[name].get("verdict", rows[name]), file=sys.stderr, flush=True)
    machine = {"model": given.model.name, "machine": platform.machine(), "torch": torch.__version__}
    protocol = {"windows": f"first {given.windows} of the test text", "calibration": scorer.calibration.summary()}
    if given.only == "*":
        RESULT.write_text(json.dumps({**machine, **protocol, "rows": rows}, indent=1) + "\n")
    print(table(rows))
    return 0 if all(row.get("met", False) for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
