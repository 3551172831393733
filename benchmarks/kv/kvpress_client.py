"""kvpress's presses on the examples of evaluate.py: runs in an environment of its own (kvpress.txt).

    python benchmarks/kv/kvpress_client.py MODEL EXAMPLES.npz OUT.npz PROCESSES

As its pipeline does it: the context is read under the press, which drops what it drops at its end; the question follows
at its true positions, without the press. Settings are kvpress's own defaults; `window=16` besides, since the default
window of 64 is a large part of these contexts. Writes which answers were right, and the bytes of all tensors that the
cache and the masks hold.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

ROWS = 64
KEPT = (0.5, 0.25, 0.1)
SEVERAL = ("passkey", "induction")
EAGER = ("observed_attention",)

PRESSES: dict[str, Callable[[float], Any]] = {
    "knorm": lambda ratio: kvpress.KnormPress(ratio),
    "streaming_llm": lambda ratio: kvpress.StreamingLLMPress(ratio),
    "tova": lambda ratio: kvpress.TOVAPress(ratio),
    "observed_attention": lambda ratio: kvpress.ObservedAttentionPress(ratio),
    "snapkv": lambda ratio: kvpress.SnapKVPress(ratio),
    "snapkv, window=16": lambda ratio: kvpress.SnapKVPress(ratio, window_size=16),
    "pyramidkv": lambda ratio: kvpress.PyramidKVPress(ratio),
    "pyramidkv, window=16": lambda ratio: kvpress.PyramidKVPress(ratio, window_size=16),
    "expected_attention": lambda ratio: kvpress.ExpectedAttentionPress(ratio),
    "keydiff": lambda ratio: kvpress.KeyDiffPress(ratio),
    "adakv(snapkv)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio)),
    "adakv(snapkv, window=16)": lambda ratio: kvpress.AdaKVPress(kvpress.SnapKVPress(ratio, window_size=16)),
    "adakv(expected_attention)": lambda ratio: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(ratio)),
    "random": lambda ratio: kvpress.RandomPress(ratio),
}


def held(model: Any, cache: Any) -> int:
    """Bytes of the cache's tensors, and of the masks of methods that drop nothing."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for layer in model.model.layers:
        tensors += list(getattr(layer.self_attn, "masked_key_indices", None) or ())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def examine(model: Any, press: Any, parts: list[Tensor], aware: bool) -> tuple[Tensor, int]:
    """Which answers are right, and bytes: as protocol.py has it. parts: context, question, answer (rows, tokens)."""
    context, question, answer = parts
    read = torch.cat([context, question], 1) if aware else context
    cache = DynamicCache()
    with press(model):
        first = model(input_ids=read, past_key_values=cache).logits[:, -1:]
    size = held(model, cache)
    rest = answer[:, :-1] if aware else torch.cat([question, answer], 1)[:, :-1]
    found = [first]  # token by token: layers that hold different numbers of tokens share no mask
    for place, token in enumerate(rest.split(1, 1)):
        position = torch.full((1, 1), read.shape[1] + place)
        found.append(model(input_ids=token, past_key_values=cache, position_ids=position).logits)
    logits = torch.cat(found, 1)[:, -answer.shape[1] :]
    return (logits.argmax(-1) == answer).all(1), size


def answer(folder: str, examples: str, task: str) -> dict[str, Any]:
    """Of one task, by cell: which answers were right, and bytes per example."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    asked = np.load(examples)
    whole = [torch.from_numpy(asked[f"{task}/{part}"]) for part in ("context", "question", "answer")]
    protocols = ("blind", "aware") if task in SEVERAL else ("blind",)
    for name, make in PRESSES.items():
        attention = "eager" if name in EAGER else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        for kept, protocol in product(KEPT, protocols):
            right, size = [], 0
            for start in range(0, len(whole[0]), ROWS):
                torch.manual_seed(start)
                rows = [part[start : start + ROWS] for part in whole]
                part_right, part_size = examine(model, make(1 - kept), rows, protocol == "aware")
                right.append(part_right)
                size += part_size
            cell = f"{protocol}/{task}/{name}/{kept}"
            found[cell], found[f"bytes/{cell}"] = torch.cat(right).numpy(), np.array(size / len(whole[0]))
    print(task, flush=True)
    return found


def main() -> None:
    folder, examples, out, processes = sys.argv[1:5]
    tasks = sorted({name.split("/")[0] for name in np.load(examples)})
    work, found = [(folder, examples, task) for task in tasks], dict[str, Any]()
    if processes == "1":
        for each in work:
            found |= answer(*each)
    else:
        with ProcessPoolExecutor(int(processes), get_context("spawn")) as pool:
            for more in pool.map(answer, *zip(*work, strict=True)):
                found |= more
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    read = (Path(folder) / "model.safetensors", Path(examples))
    told = {"versions": versions, "of": [hashlib.sha256(path.read_bytes()).hexdigest() for path in read]}
    np.savez(out, told=np.array(json.dumps(told)), **found)


if __name__ == "__main__":
    main()
