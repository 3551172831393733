"""Vector quantization at equal counted bits: our `vptq` against the reference programs of VPTQ and AQLM.

    python benchmarks/rivals/build_envs.py ENVS --only vq
    git clone -b algorithm https://github.com/microsoft/VPTQ
    git clone https://github.com/Vahe1994/AQLM
    export VPTQ_SOURCE=VPTQ AQLM_SOURCE=AQLM
    python benchmarks/rivals/vq.py ASSETS/pycoder --envs ENVS --work FOLDER [--budget 2.0] [--only GLOB]

All get the same calibration windows and are scored on the same test windows. Bits count all that is stored for the
quantized linear layers: codes, codebooks, scales, norms and permutations. Rivals leave weights as their formats decode
(float16 codebooks and scales). Rows that were made before are kept in FOLDER and read again. `proxy` is the mean over
layers of tr(E H Eᵀ) / tr(W H Wᵀ), E the error of the weight and H the second moments of the original model's inputs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from build_envs import HERE
from client import Job
from quality import NotRunError, Rival, Scorer, divergences, quantized, run_client
from safetensors.torch import load_file, save_file
from torch import Tensor
from vq_client import float_model, input_moments

from compress.errors import CompressError
from compress.pipeline import Pipeline
from compress.quality.token_scores import WindowScore
from compress.stats.intervals import cluster_interval, paired_difference

RESULT = HERE.parent / "results" / "rivals_vq.json"
BUDGETS = ("2.0", "2.3", "3.0", "4.0")
APART = 1.01
"""Rows are compared where ours has at most this multiple of the rival's bits."""
EPOCHS = 5
"""Of AQLM's block fine-tuning: its program's default. Its README's command has 10, which takes over an hour here."""
AS_AQLM = "codebook(vector=8, entries=32, stages=3)"
BLOCKS, CODES = "block_tune(steps=200)", "pv_tuning(steps=100, batch=2)"
SCALAR = "autoround, tune(steps=200, batch=2)"


@dataclass(frozen=True)
class Row:
    """A method at a budget: a client with settings, or a pipeline of ours."""

    budget: str
    name: str
    client: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    ours: str = ""


def _vptq(budget: str, vector: int, entries: int, residual: int = -1, norm: bool = True) -> Row:
    name = f"VPTQ v{vector} k{entries}" + (f"+{residual}" if residual > 0 else "") + ("" if norm else " without norm")
    settings = {"bits": float(budget), "vector": vector, "entries": entries, "residual": residual, "norm": norm}
    return Row(budget, name, "vptq", settings)


def _aqlm(budget: str, stages: int, bits: int, vector: int, epochs: int = EPOCHS) -> Row:
    name = f"AQLM {stages}x{bits} g{vector}" + ("" if epochs else " without fine-tuning")
    settings = {"bits": float(budget), "stages": stages, "bits_of_code": bits, "vector": vector}
    return Row(budget, name, "aqlm", {**settings, "finetune_epochs": epochs})


def _ours(budget: str, pass_text: str, name: str) -> list[Row]:
    alone = Row(budget, name, ours=pass_text)
    return [alone, Row(budget, f"{name}, blocks tuned", ours=f"{pass_text}, {BLOCKS}")]


ROWS: list[Row] = [
    _vptq("2.0", 6, 256, 4),
    _vptq("2.0", 7, 128, 32),
    _vptq("2.0", 7, 256, 16, norm=False),
    _vptq("2.0", 5, 256, 2, norm=False),
    _aqlm("2.0", 3, 5, 8, epochs=0),
    _aqlm("2.0", 3, 5, 8),
    *_ours("2.0", f"vptq(format={AS_AQLM})", "vptq, AQLM's format"),
    Row("2.0", "vptq, AQLM's format, guided", ours=f"vptq(format={AS_AQLM}, guided=4)"),
    *_ours("2.0", f"aqlm(format={AS_AQLM})", "aqlm"),
    Row("2.0", "vptq, AQLM's format, blocks and codes tuned", ours=f"vptq(format={AS_AQLM}), {BLOCKS}, {CODES}"),
    *_ours("2.0", "vptq(bits=2.0, share=block)", "vptq, one codebook per block"),
    *_ours("2.0", "trellis(bits=2)", "trellis"),
    Row("2.0", "scalar, gptq + autoround + tune", ours=f"gptq(format=int2(channel, signed)), {SCALAR}"),
    _vptq("2.3", 7, 256, 32),
    _vptq("2.3", 5, 64, 32, norm=False),
    _aqlm("2.3", 3, 3, 4),
    *_ours("2.3", "vptq(bits=2.3, share=block)", "vptq, one codebook per block"),
    *_ours("2.3", "trellis(bits=2)", "trellis"),
    Row("2.3", "scalar, gptq + autoround + tune", ours=f"gptq(format=int2(group=64, signed)), {SCALAR}"),
    _vptq("3.0", 7, 512, 128),
    _vptq("3.0", 5, 128, 128, norm=False),
    _aqlm("3.0", 3, 4, 4),
    *_ours("3.0", "vptq(bits=3.06, share=block)", "vptq, one codebook per block"),
    *_ours("3.0", "trellis(bits=3)", "trellis"),
    Row("3.0", "scalar, gptq + autoround + tune", ours=f"gptq(format=int3(channel, signed)), {SCALAR}"),
    _vptq("4.0", 4, 256, 128),
    _vptq("4.0", 3, 64, 64, norm=False),
    _aqlm("4.0", 4, 4, 4),
    *_ours("4.0", "vptq(bits=4.08, share=block)", "vptq, one codebook per block"),
    *_ours("4.0", "trellis(bits=4)", "trellis"),
    Row("4.0", "scalar, gptq + autoround + tune", ours=f"gptq(format=int4(channel, signed)), {SCALAR}"),
]


@dataclass(frozen=True)
class Measured:
    """What a row's model came to."""

    bits: float
    seconds: float
    proxy: dict[str, float]
    scores: list[WindowScore]
    more: dict[str, Any]


class Judge:
    """Scores and proxy losses of models, both kept in the work folder."""

    def __init__(self, scorer: Scorer, folder: Path, kept: bool) -> None:
        self.scorer, self.kept = scorer, kept
        job = Job(folder, scorer.calibration.windows.ids, scorer.work, {})
        model = float_model(job)
        self.moments = {name: second.float() for name, (second, _) in input_moments(model, job.ids).items()}
        self.weights = {name: model.get_submodule(name).weight.detach() for name in self.moments}

    def proxy(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Layer → its loss as a share."""
        return {
            name: float(_energy(weight - found[name], self.moments[name]) / _energy(weight, self.moments[name]))
            for name, weight in self.weights.items()
        }

    def ours(self, text: str) -> Measured:
        """Of a pipeline of ours; kept for this state of the code. Raises: NotRunError where only kept ones count."""
        key = hashlib.sha256(f"vq {text} {self.scorer.digest} {self.scorer.code}".encode()).hexdigest()[:16]
        kept = self.scorer.work / f"ours-{key}.json"
        if self.kept and not kept.is_file():
            raise NotRunError("not made before with this state of the code")
        if not kept.is_file():
            started, processor = time.perf_counter(), time.process_time()
            made = Pipeline.parse(text).run(self.scorer.model, self.scorer.calibration)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - processor
            weights = quantized(made.model)
            bits = 8 * sum(one.nbytes for one in weights) / sum(one.shape[0] * one.shape[1] for one in weights)
            specs = [spec for spec in made.model.structure.layers.values() if spec.name in self.weights]
            proxy = self.proxy({spec.name: made.model.layer(spec).float_weight() for spec in specs})
            more = {"formats": sorted({str(spec.format) for spec in specs}), "cpu_seconds": cpu_seconds}
            found = Measured(bits, seconds, proxy, self.scorer.scores(made.model), more)
            kept.write_text(json.dumps(asdict(found)))
        return _read(json.loads(kept.read_text()))

    def rival(self, row: Row, envs: Path | None, folder: Path, windows: Path, out: Path) -> Measured:
        """Of a reference program. Raises: NotRunError."""
        facts = run_client(Rival("vq", row.client, row.settings, ""), envs, folder, windows, out)
        if facts["broken"]:
            raise NotRunError(f"left values in {facts['broken'][0]} that are not finite")
        stored = load_file(out / "model.safetensors")
        proxy = self.proxy({name: stored[f"{name}.weight"] for name in self.weights})
        more = {key: facts[key] for key in ("version", "cpu_seconds", "peak_bytes")}
        return Measured(facts["bits_per_weight"], facts["seconds"], proxy, self.scorer.kept_scores(out), more)


def _energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """tr(W H Wᵀ)."""
    return ((weight @ hessian) * weight).sum()


def _read(kept: dict[str, Any]) -> Measured:
    return Measured(**{**kept, "scores": [WindowScore(**score) for score in kept["scores"]]})


def described(row: Row, found: Measured) -> dict[str, Any]:
    """As the result file has it."""
    tokens = [score.tokens for score in found.scores]
    kl, spread = cluster_interval(divergences(found.scores), tokens)
    nll, nll_spread = cluster_interval([score.nll for score in found.scores], tokens)
    assert spread is not None and nll_spread is not None
    return {
        **({"ours": row.ours} if row.ours else {"settings": row.settings}),
        "bits": found.bits,
        "kl": kl,
        "kl_interval": [spread.low, spread.high],
        "perplexity": math.exp(nll),
        "perplexity_interval": [math.exp(nll_spread.low), math.exp(nll_spread.high)],
        "same_top": sum(score.agreed or 0 for score in found.scores) / sum(tokens),
        "proxy": sum(found.proxy.values()) / len(found.proxy),
        "proxy_of_layers": found.proxy,
        "seconds": found.seconds,
        **found.more,
    }


def verdict(mine: Measured, other: Measured) -> dict[str, Any]:
    """Ours against a rival, paired over windows."""
    tokens = [score.tokens for score in other.scores]
    difference, interval = paired_difference(divergences(mine.scores), divergences(other.scores), tokens)
    assert interval is not None
    return {"difference": difference, "interval": interval.model_dump(), "met": interval.high < 0}


def compare(rows: dict[str, dict[str, Any]], found: dict[str, Measured]) -> dict[str, Any] | None:
    """The best of ours, with no more than 1 % more bits, against the best rival; None where a side is missing."""
    rivals = [name for name in found if "settings" in rows[name]]
    if not rivals:
        return None
    best = min(rivals, key=lambda name: float(rows[name]["kl"]))
    ours = [name for name in found if "ours" in rows[name] and found[name].bits <= APART * found[best].bits]
    if not ours:
        return None
    mine = min(ours, key=lambda name: float(rows[name]["kl"]))
    return {"ours": mine, "rival": best, **verdict(found[mine], found[best])}


def table(budgets: dict[str, dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| budget | method | bits | KL (95 %) | perplexity (95 %) | proxy | s |", "|---|---|---|---|---|---|---|"]
    for budget, made in budgets.items():
        for name, row in made["rows"].items():
            if "skipped" in row:
                lines.append(f"| {budget} | {name} | not run: {row['skipped']} | | | | |")
                continue
            (low, high), (least, most) = row["kl_interval"], row["perplexity_interval"]
            cells = [budget, name, f"{row['bits']:.3f}", f"{row['kl']:.4f} ({low:.4f} to {high:.4f})"]
            cells += [f"{row['perplexity']:.3f} ({least:.3f} to {most:.3f})", f"{row['proxy']:.4f}"]
            lines.append("| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def measure(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Budget → rows and the comparison."""
    work = given.work.resolve()
    scorer = Scorer(given.model, work, given.windows)
    windows = work / "windows.safetensors"
    save_file({"ids": scorer.calibration.windows.ids}, windows)
    judge, budgets = Judge(scorer, given.model, given.kept), {}
    for budget in given.budget:
        rows: dict[str, dict[str, Any]] = {}
        found: dict[str, Measured] = {}
        for row in ROWS:
            if row.budget != budget or not fnmatch(row.name, given.only):
                continue
            out = work / f"{budget}-{row.name}".replace(" ", "-").replace(",", "").lower()
            try:
                if row.ours:
                    found[row.name] = judge.ours(row.ours)
                else:
                    envs = None if given.kept else given.envs
                    found[row.name] = judge.rival(row, envs, given.model, windows, out)
                rows[row.name] = described(row, found[row.name])
                print(
                    f"{budget} {row.name}: {rows[row.name]['bits']:.3f} bits, KL {rows[row.name]['kl']:.4f}", flush=True
                )
            except (NotRunError, subprocess.TimeoutExpired, CompressError) as error:
                rows[row.name] = {"skipped": str(error)}
                print(f"{budget} {row.name}: {error}", flush=True)
            budgets[budget] = {"rows": rows, "compared": compare(rows, found)}
    return budgets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--envs", type=Path, help="of build_envs.py; left out, only checkpoints that are there count")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints and scores are made and kept")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument(
        "--budget", nargs="+", choices=("2.0", "2.3", "3.0", "4.0"), default=["2.0", "2.3", "3.0", "4.0"]
    )
    parser.add_argument("--only", default="*", help="rows to run, as a glob on the table's names")
    parser.add_argument("--kept", action="store_true", help="make nothing: put together what FOLDER holds")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    budgets = measure(given)
    facts = {
        "model": given.model.name,
        "machine": platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "torch": torch.__version__,
        "windows": f"first {given.windows} of the test text",
    }
    if given.only == "*":
        before = json.loads(RESULT.read_text())["budgets"] if RESULT.is_file() else {}
        RESULT.write_text(json.dumps({**facts, "budgets": before | budgets}, indent=1) + "\n")
    print(table(budgets))
    compared = [made["compared"] for made in budgets.values()]
    for budget, each in zip(budgets, compared, strict=True):
        print(budget, each)
    return 0 if all(each is not None and each["met"] for each in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
