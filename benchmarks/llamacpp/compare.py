"""Decode speed of an INT4 Llama with random weights: our graphs in onnxruntime against llama.cpp with Q4_0.

    python benchmarks/llamacpp/compare.py --python ENV/bin/python [--groups 32 128] [--small] [--threads 2] [--json OUT]

ENV holds llamacpp.txt. The arms take turns, a round each: a prompt is read, then tokens are decoded one at a time. GB/s
are bytes of weights that a token reads as the kernel holds them, by the median time of a token; where the machine
does other work too, the fastest round says more. Without --python only our own two graphs are measured. --work keeps
the models, 3 GB of them, for the next time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import compress
from compress import hwprofiles, manifest
from compress.export.onnx import target
from compress.export.onnx.runtime import PORTABLE, SHARED, Session
from compress.hwprofiles import machine_summary
from compress.pipeline import Pipeline

LARGE = {
    "hidden": 2048,
    "inner": 5632,
    "blocks": 16,
    "heads": 32,
    "kv_heads": 8,
    "vocabulary": 32000,
    "context": 512,
}
SMALL = {"hidden": 128, "inner": 256, "blocks": 2, "heads": 4, "kv_heads": 2, "vocabulary": 512, "context": 512}
PASSES = "rtn(format=int4(group={group})), rtn(format=int4(group={group}), targets=[kind:embedding, kind:head])"
CLIENT = Path(__file__).with_name("client.py")
Arm = Callable[[int, int], tuple[float, float]]


def export(shape: dict[str, int], folder: Path, group: int) -> Path:
    """Our graphs of a random Llama of this shape, INT4 in groups of this size throughout."""
    import torch
    import transformers

    made_before = folder / f"onnx-g{group}"
    if (made_before / PORTABLE).is_file():
        return made_before
    config = transformers.LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["blocks"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        vocab_size=shape["vocabulary"],
        max_position_embeddings=shape["context"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "source")
    passes = PASSES.format(group=group)
    made = Pipeline.parse(passes).run(compress.load(folder / "source"), folder=folder / f"model-g{group}").model
    target.write(made, hwprofiles.load("cpu-x86-avx512-vnni"), made_before)
    return made_before


def bytes_read(shape: dict[str, int], group: int) -> int:
    """Bytes of weights that a token reads as the kernel holds them: 4 bits, and for each group a float32 scale and a
    float32 sum (MLAS's 8-bit compute); the embedding table is left out, of which a token reads one row."""
    hidden, inner = shape["hidden"], shape["inner"]
    attention = hidden * hidden * 2 + 2 * hidden * hidden * shape["kv_heads"] // shape["heads"]
    weights = shape["blocks"] * (attention + 3 * hidden * inner) + shape["vocabulary"] * hidden
    return weights // 2 + weights // group * 8


def ours(folder: Path, graph: str, threads: int) -> Arm:
    """One of our graphs."""
    session = Session(folder, threads, graph=graph)

    def measure(count: int, prompt: int) -> tuple[float, float]:
        cache = session.cache(1, prompt + count)
        started = time.perf_counter()
        cache.run(np.arange(3, 3 + prompt)[None], np.ones((1, prompt), np.int64))
        read = time.perf_counter()
        for token in range(count):
            cache.run(np.asarray([[3 + token]]), np.ones((1, prompt + token + 1), np.int64))
        return read - started, time.perf_counter() - read

    return measure


class Theirs:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, shape: dict[str, int], folder: Path, threads: int) -> None:
        command = [str(python), str(CLIENT), str(folder / "q4_0.gguf"), json.dumps(shape), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts: dict[str, Any] = json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp did not start; its message is above. Its environment is llamacpp.txt.")
        return line

    def __call__(self, count: int, prompt: int) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count} {prompt}\n")
        self.process.stdin.flush()
        first, second = json.loads(self._line())
        return first, second

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(shape: dict[str, int], folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per arm: medians over the rounds."""
    arms: dict[str, tuple[Arm, int]] = {}
    for group in given.groups:
        exported = export(shape, folder, group)
        for graph in (PORTABLE, SHARED):
            arms[f"onnxruntime {graph} group {group}"] = (
                ours(exported, graph, given.threads),
                bytes_read(shape, group),
            )
    theirs = None
    if given.python:
        theirs = Theirs(given.python, shape, folder, given.threads)
        arms[f"llama.cpp Q4_0 ({theirs.facts['version']})"] = theirs, theirs.facts["read"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for turn in range(given.rounds + 1):
        for name, (arm, _) in arms.items():
            found = arm(given.tokens, given.prompt)
            times[name] += [found] if turn else []  # the first round warms up
    if theirs is not None:
        theirs.close()
    rows = []
    for name, (_, size) in arms.items():
        prefill, decode = (statistics.median(each) for each in zip(*times[name], strict=True))
        each = decode / given.tokens
        rows.append(
            {
                "arm": name,
                "decode_tokens_s": 1 / each,
                "decode_gb_s": size / each / 1e9,
                "prefill_tokens_s": given.prompt / prefill,
                "fastest_decode_tokens_s": given.tokens / min(row[1] for row in times[name]),
                "bytes_read_per_token": size,
                "decode_s": [row[1] for row in times[name]],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, help="the interpreter of an environment with llamacpp.txt")
    parser.add_argument("--small", action="store_true", help="a model of a few layers, to try the script")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--groups", type=int, nargs="*", default=[32, 128], help="sizes of our groups")
    parser.add_argument("--work", type=Path, help="where the models are made, and kept")
    parser.add_argument("--json", type=Path, help="where the result is written")
    given = parser.parse_args()
    shape = SMALL if given.small else LARGE
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.work or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        rows = compare(shape, folder, given)
    for row in rows:
        print(
            f"{row['arm']:<36} decode {row['decode_tokens_s']:7.1f} tokens/s, {row['decode_gb_s']:5.1f} GB/s; "
            f"fastest round {row['fastest_decode_tokens_s']:7.1f}; prefill {row['prefill_tokens_s']:7.1f} tokens/s"
        )
    if given.json:
        facts = {"machine": machine_summary(), "versions": manifest.versions(), "threads": given.threads}
        content = {**facts, "shape": shape, "prompt": given.prompt, "tokens": given.tokens, "rows": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
