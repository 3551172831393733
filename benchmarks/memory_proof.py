"""A 3 GiB checkpoint through load → passes → model/ inside a 1 GiB memory cgroup.

Makes a Llama of random bfloat16 weights (shard by shard, so that making it needs no memory either), then runs the
pipeline in a child process that a memory cgroup (v1 or v2, root needed) holds to 1 GiB, page cache included. Where no
cgroup can be made, the child's anonymous memory is sampled instead, and the result says so.

    python benchmarks/memory_proof.py --folder /somewhere/with/8GB [--passes "rtn(format=int4(group=32))"] [--no-cgroup]

The group counts page cache too, that of the libraries' own code among it: what comes near the limit finishes, but reads
its code from the disk again and again. `--no-cgroup` samples anonymous memory without one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 2**30
TARGET_BYTES = 3 * 2**30
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 8}
CHILD = """
import sys
from pathlib import Path
import torch
import compress
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.pipeline import Pipeline
from compress.progress import Progress
torch.set_num_threads({threads})
model = compress.load(sys.argv[1])
ids = torch.randint(0, 32000, (8, 128), generator=torch.Generator().manual_seed(0))
windows = Windows(ids, tuple(range(8)), "random", "random")
Pipeline.parse(sys.argv[3]).run(model, Calibration(windows, 0, "random"), folder=Path(sys.argv[2]), progress=Progress())
"""


def make_checkpoint(folder: Path) -> None:
    """config.json and one shard per eight blocks, at least 3 GiB in all."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, inner, kv = SHAPE["hidden_size"], SHAPE["intermediate_size"], 512
    block_bytes = 2 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden)
    count = -(-TARGET_BYTES // block_bytes)
    folder.mkdir(parents=True)
    config = LlamaConfig(**SHAPE, num_hidden_layers=count, vocab_size=32000, tie_word_embeddings=True, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    maker = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=maker) * 0.02).to(torch.bfloat16)

    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    weight_map: dict[str, str] = {}
    tensors = {"model.embed_tokens.weight": draw(32000, hidden), "model.norm.weight": torch.ones(hidden).bfloat16()}
    for index in range(count):
        place = f"model.layers.{index}."
        tensors |= {f"{place}{name}.weight": draw(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}{norm}.weight"] = torch.ones(hidden).bfloat16()
        if index % 8 == 7 or index == count - 1:
            name = f"model-{index:05d}.safetensors"
            save_file(tensors, folder / name)
            weight_map |= dict.fromkeys(tensors, name)
            tensors = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_cgroup() -> tuple[Path, str] | None:
    """A memory cgroup held to the limit, and the name of its peak file; None where none can be made."""
    name = f"compress-{os.getpid()}"
    for root, limit, peak in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    ):
        group = root / name
        try:
            group.mkdir()
            (group / limit).write_text(str(LIMIT))
        except OSError:
            continue
        return group, peak
    return None


def run_child(model: Path, out: Path, passes: str, confined: bool) -> dict[str, object]:
    """Run the pipeline in a child; its peak memory by the cgroup, and the largest anonymous memory sampled."""
    group = make_cgroup() if confined else None
    command = [sys.executable, "-c", CHILD.replace("{threads}", "2"), str(model), str(out), passes]

    def enter() -> None:
        if group is not None:
            (group[0] / "cgroup.procs").write_text(str(os.getpid()))

    started, anonymous = time.monotonic(), 0
    with subprocess.Popen(command, preexec_fn=enter) as child:
        while child.poll() is None:
            anonymous = max(anonymous, anonymous_bytes(child.pid))
            time.sleep(0.2)
    result: dict[str, object] = {
        "exit_code": child.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "largest_anonymous_bytes_sampled": anonymous,
        "cgroup": group is not None,
    }
    if group is not None:
        result["cgroup_limit_bytes"] = LIMIT
        result["cgroup_peak_bytes_with_page_cache"] = int((group[0] / group[1]).read_text())
        group[0].rmdir()
    return result


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--passes", action="append")
    parser.add_argument("--no-cgroup", action="store_true")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "memory_proof.json")
    given = parser.parse_args()
    model = given.folder / "checkpoint"
    if not model.exists():
        make_checkpoint(model)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    rows = []
    for passes in given.passes or ["rtn(format=int4(group=32))", "gptq(format=int4(group=32))"]:
        out = given.folder / "model"
        shutil.rmtree(out, ignore_errors=True)
        row = {"passes": passes, "checkpoint_bytes": size, **run_child(model, out, passes, not given.no_cgroup)}
        row["model_bytes"] = sum(path.stat().st_size for path in out.glob("*"))
        row["met"] = (
            row["exit_code"] == 0 and size >= TARGET_BYTES and int(str(row["largest_anonymous_bytes_sampled"])) < LIMIT
        )
        rows.append(row)
        print(json.dumps(row))
    before = json.loads(given.result.read_text())["rows"] if given.result.exists() else []
    done = {(row["passes"], row["cgroup"]) for row in rows}
    kept = [row for row in before if (row["passes"], row["cgroup"]) not in done]
    machine = platform.processor() or platform.machine()
    given.result.write_text(json.dumps({"machine": machine, "rows": kept + rows}, indent=1) + "\n")
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
