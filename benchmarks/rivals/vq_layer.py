"""Time, peak memory and proxy loss of quantizing one square layer to 2 bits: `vptq` against VPTQ's and AQLM's programs.

    VPTQ_SOURCE=… AQLM_SOURCE=… python benchmarks/rivals/vq_layer.py N --envs ENVS --work FOLDER [--sides NAME …]

Weights are Gaussian with rows of different size; the Hessian is a random rotation of a spectrum that falls as 1 / rank,
with some columns of large inputs. All sides take vectors of 8, two codebooks of 256 entries, and run alone, one after
the other, with the threads of OMP_NUM_THREADS. k-means: 100 iterations at most in both rivals; ours stops at 30 or
where a step gains less than a thousandth. AQLM runs to its README's tolerance of 1 %, without fine-tuning (which needs
a model).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from build_envs import HERE, python_of
from safetensors.torch import load_file, save_file

RESULT = HERE.parent / "results" / "rivals_vq_layer.json"
BOOK = "vector=8, entries=256, stages=2"
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("layer", {"ours": f"vptq(format=codebook({BOOK}))"}),
    "ours, as VPTQ": ("layer", {"ours": f"vptq(format=codebook({BOOK}, out))"}),
    "ours, no repairs": (
        "layer",
        {"ours": f"vptq(format=codebook({BOOK}, out), beam=1, metric=false, rescale=false, refit=0)"},
    ),
    "VPTQ": ("vptq", {"vector": 8, "entries": 256, "residual": 256}),
    "AQLM": ("aqlm", {"stages": 2, "bits_of_code": 8, "vector": 8}),
}
TIMEOUT_S = 1800
SEED = 0


def make_layer(folder: Path, size: int) -> None:
    """layer.safetensors: weight and hessian (size, size) float32, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "layer.safetensors").is_file():
        return
    maker = torch.Generator().manual_seed(SEED)
    weight = torch.randn(size, size, generator=maker) * (0.3 * torch.randn(size, 1, generator=maker)).exp() / size**0.5
    turned = torch.linalg.qr(torch.randn(size, size, generator=maker))[0]
    spectrum = 1 / torch.arange(1, size + 1)
    loud = torch.where(torch.rand(size, generator=maker) < 0.01, 8.0, 1.0)
    hessian = loud[:, None] * ((turned * spectrum) @ turned.T) * loud
    hessian = (hessian + hessian.T) / 2
    save_file({"weight": weight, "hessian": hessian.contiguous()}, folder / "layer.safetensors")
    save_file({"ids": torch.zeros(1, 8, dtype=torch.int64)}, folder / "windows.safetensors")


def run_side(name: str, envs: Path, folder: Path, size: int) -> dict[str, Any]:
    """One side's figures, with its proxy loss; `skipped` where it gave none."""
    client, settings = SIDES[name]
    python = Path(sys.executable) if client == "layer" else python_of(envs.absolute() / "vq")
    out = folder / name.replace(", ", "-").replace(" ", "-")
    out.mkdir(exist_ok=True)
    given = json.dumps({**settings, "layer": size, "keep": ["layer_proj.weight"]})
    command = [
        str(word) for word in (python, HERE / f"client_{client}.py", folder, folder / "windows.safetensors", out)
    ]
    load = os.getloadavg()[0]
    try:
        with (out / "log").open("w") as log:
            subprocess.run([*command, given], check=True, stdout=log, stderr=log, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not done after {TIMEOUT_S} s"}
    except subprocess.CalledProcessError:
        return {"skipped": (out / "log").read_text().strip().splitlines()[-1][-300:]}
    facts = json.loads((out / "job.json").read_text())
    given_tensors, weight = load_file(folder / "layer.safetensors"), load_file(out / "model.safetensors")
    truth, hessian = given_tensors["weight"].double(), given_tensors["hessian"].double()
    error = weight["layer_proj.weight"].double() - truth
    share = float(((error @ hessian) * error).sum() / ((truth @ hessian) * truth).sum())
    kept = ("seconds", "cpu_seconds", "peak_bytes", "version")
    bits = facts["bits_per_weight"]
    return {"bits": bits, "proxy": share, **{key: facts[key] for key in kept}, "load_before": load}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int)
    parser.add_argument("--envs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    given = parser.parse_args()
    folder = given.work.resolve() / f"layer-{given.size}"
    make_layer(folder, given.size)
    before = json.loads(RESULT.read_text())["sizes"] if RESULT.is_file() else {}
    rows = dict(before.get(str(given.size), {}))
    for name in given.sides:
        rows[name] = run_side(name, given.envs, folder, given.size)
        print(name, rows[name], flush=True)
        threads = os.environ.get("OMP_NUM_THREADS", "default")
        facts = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}
        RESULT.write_text(json.dumps({**facts, "sizes": before | {str(given.size): rows}}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
