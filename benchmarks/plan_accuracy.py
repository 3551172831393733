"""What `compress plan` predicts against what a run takes: artifact bytes, peak memory, time.

    python benchmarks/plan_accuracy.py MODEL --data TEXT [--recipe w4a16 …] --folder SCRATCH
    python benchmarks/plan_accuracy.py --random-1b --folder SCRATCH      (makes a 1 B-parameter Llama first)

Bars: artifact bytes within 2 %, peak memory within 20 %, time within a factor of 2 (reported).
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "plan_accuracy.json"
SHAPE_1B = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def make_1b(folder: Path) -> tuple[Path, Path]:
    """The shape of TinyLlama 1.1B with random bfloat16 weights, and token ids to run it on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = folder / "llama-1b"
    if not model.exists():
        torch.set_default_dtype(torch.bfloat16)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE_1B)).save_pretrained(model, max_shard_size="1GB")
    maker, data = random.Random(0), folder / "ids.json"
    data.write_text(json.dumps([[maker.randrange(32000) for _ in range(520)] for _ in range(60)]))
    return model, data


def compress(*arguments: object) -> dict[str, Any]:
    """Run the command in a process of its own; its JSON."""
    command = [sys.executable, "-m", "compress", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def compare(model: Path, data: Path, recipe: str, sizes: list[object], folder: Path) -> dict[str, Any]:
    """Plan from the config alone, then run."""
    config_only = folder / "config-only"
    shutil.rmtree(config_only, ignore_errors=True)
    config_only.mkdir(parents=True)
    for path in model.iterdir():
        if path.is_file() and not path.name.endswith(".safetensors"):
            shutil.copyfile(path, config_only / path.name)
    plan = compress("plan", config_only, "--recipe", recipe, *sizes)
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    run = compress("run", model, "--recipe", recipe, *sizes, "--data", data, "-o", out, "--overwrite", "--quiet")
    pairs = {
        "artifact_bytes": (plan["predicted_artifact_bytes"], run["artifact_bytes"]),
        "peak_memory_bytes": (plan["predicted_peak_memory_bytes"], run["cost"]["peak_memory_bytes"]),
        "seconds": (plan["predicted_seconds"], run["cost"]["seconds"]),
    }
    row: dict[str, Any] = {
        "model": model.name,
        "recipe": recipe,
        "passes_peak_memory_bytes": run["cost"]["passes_peak_memory_bytes"],
    }
    for name, (predicted, measured) in pairs.items():
        row[name] = {"predicted": predicted, "measured": measured, "ratio": predicted / measured}
    row["verdict"] = run["verdict"]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--random-1b", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    model, data, sizes = given.model, given.data, ["--samples", 64, "--quality-samples", 32]
    if given.random_1b:
        model, data = make_1b(given.folder)
        sizes = ["--samples", 8, "--quality-samples", 4]
    rows = [compare(model, data, recipe, sizes, given.folder) for recipe in given.recipe or ["w4a16", "w8a8-int8"]]
    before = json.loads(given.result.read_text())["rows"] if given.result.exists() else []
    done = {(row["model"], row["recipe"]) for row in rows}
    kept = [row for row in before if (row["model"], row["recipe"]) not in done]
    given.result.parent.mkdir(exist_ok=True)
    given.result.write_text(json.dumps({"machine": platform.machine(), "rows": kept + rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
