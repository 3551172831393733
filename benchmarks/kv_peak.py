"""Peak memory of reading a long prompt: all kept, dropped after the prompt was read, dropped between its pieces.

    python benchmarks/kv_peak.py [--tokens 4096] [--budget 512]

A Llama of random weights in torch, one row, each arm in a process of its own; the figure is the process's largest
resident memory less what it had before it read, lowest of three. `after` is what is usual where a method drops tokens
at the end of the prompt: nothing is dropped before all of it was read. Every arm attends by the same code, in pieces of
256 tokens. Writes results/kv_peak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from digits import rounded
from transformers import LlamaConfig, LlamaForCausalLM

from compress import hwprofiles
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.manifest import versions

RESULT = Path(__file__).parent / "results" / "kv_peak.json"
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
CHUNK = 256
ARMS = ("all kept", "dropped after the prompt", "dropped between pieces")
APART = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
"""The C library gives every larger tensor pages of its own, so that holes between tensors are not counted."""


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def read(arm: str, tokens: int, budget: int) -> dict[str, Any]:
    """Read a prompt and one token more. Returns: bytes that came on top, and those of the cache in the end."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_key_value_heads=8, max_position_embeddings=tokens + 8, **SIZES)
    model = LlamaForCausalLM(config).eval()
    drops = KvSpec(scorer="h2o", budget=budget)
    spec = drops if "between" in arm else KvSpec()
    cache = KvCache.attach(model, [spec] * config.num_hidden_layers)
    ids = torch.randint(0, 512, (1, tokens + 1))
    model(ids[:, :8], past_key_values=KvCache.attach(model, [spec] * config.num_hidden_layers), use_cache=True)
    before = memory("VmRSS")
    for at in range(0, tokens, CHUNK):
        model(ids[:, at : min(at + CHUNK, tokens)], past_key_values=cache, use_cache=True, logits_to_keep=1)
    if "after" in arm:
        for layer in cache.layers:
            index = layer.position[..., -budget:].argsort(-1) + tokens - budget
            for store in layer.stores:
                store.keep(index)
    return {"on_top": memory("VmHWM") - before, "cache": sum(s.nbytes for each in cache.layers for s in each.stores)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--budget", type=int, default=512, help="tokens that are kept")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps(read(given.arm, given.tokens, given.budget)))
        return
    rows = []
    for arm in ARMS:
        command = [sys.executable, __file__, "--tokens", str(given.tokens), "--budget", str(given.budget), "--arm", arm]
        tries = [json.loads(subprocess.run(command, check=True, stdout=-1, env=APART).stdout) for _ in range(3)]
        rows.append(
            {"arm": arm, "bytes_on_top": min(each["on_top"] for each in tries), "cache_bytes": tries[0]["cache"]}
        )
        print(json.dumps(rows[-1]), flush=True)
    told = {"machine": hwprofiles.machine_summary(), "versions": versions(), "model": SIZES}
    told |= {"tokens": given.tokens, "budget": given.budget, "chunk": CHUNK, "rows": rows}
    RESULT.write_text(json.dumps(rounded(told), indent=1) + "\n")


if __name__ == "__main__":
    main()
