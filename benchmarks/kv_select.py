"""A cache that keeps every token and attends to chosen ones (kv_select): what it finds of the true top keys, and the
time of a step of decoding against attention to all, by how long the context is.

    python benchmarks/kv_select.py ASSETS/pycoder [--windows 3] [--budget 20] [--contexts 1024 4096 16384]

First the answers: with room for everything, logits are those of the cache without it, bit for bit. Text: windows of 512
tokens of the test text, which the model never saw, the first 256 as a prompt, the others one by one; of these KL to
attention to all, and recall. Indexes are built there from 64 candidates on (as shipped: 512), or they would never be.
Time: four blocks of random weights, one row, one thread, processor time of one step (other work on the machine counts
little), arms in turn; the cache of every arm is that of one prompt of random tokens, and indexes are built before. The
growing cache is transformers' own with its fastest attention. Random queries and keys have no structure to search by,
and products with a standard deviation near 2: recall there is about the worst that can come. Writes
results/kv_select.json; with --kept-text its part about text stays as it was.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import rounded
from paired import rounds
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import compress
from compress import hwprofiles
from compress.inputs import datasets
from compress.kv import retrieval
from compress.kv.cache import KvCache, layer_of, use_attention
from compress.kv.retrieval import RetrievalLayer
from compress.kv.spec import KvSpec
from compress.manifest import versions
from compress.quality.token_scores import score_window
from compress.stats.intervals import cluster_interval, speedup

RESULT = Path(__file__).parent / "results" / "kv_select.json"
TIMED = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
CHUNK, LENGTH, PROMPT, STEPS = 512, 512, 256, 12
GROWING, ALL = "growing, transformers", "all tokens, this cache"


def arms(of: dict[str, dict[str, Any]], sinks: int, recent: int) -> dict[str, KvSpec]:
    return {name: KvSpec(sinks=sinks, recent=recent, **settings) for name, settings in of.items()}


def votes(keep: int, **more: Any) -> dict[str, Any]:
    return {"selector": "token_select", "select": keep, **more}


def search(keep: int, index: str, effort: int) -> dict[str, Any]:
    return {"selector": "retrieval", "select": keep, "index": index, "effort": effort}


TEXT = arms(
    {
        "token_select, 64": votes(64),
        "token_select, 64, pages of 8": votes(64, page=8),
        "token_select, 64, reuse 0.9": votes(64, reuse=0.9),
        "retrieval, 16, exact": search(16, "exact", 16),
        "retrieval, 16, hnsw, effort 16": search(16, "hnsw", 16),
        "retrieval, 16, linked, effort 16": search(16, "linked", 16),
    },
    sinks=4,
    recent=32,
)
LONG = arms(
    {
        "token_select, 512": votes(512),
        "token_select, 512, pages of 16": votes(512, page=16),
        "token_select, 512, reused": votes(512, reuse=0.9),
        "retrieval, 128, exact": search(128, "exact", 512),
        "retrieval, 128, hnsw, effort 128": search(128, "hnsw", 128),
        "retrieval, 128, linked, effort 128": search(128, "linked", 128),
        "retrieval, 128, linked, effort 512": search(128, "linked", 512),
    },
    sinks=4,
    recent=128,
)


@torch.no_grad()
def read(model: Any, cache: Any, ids: torch.Tensor, chunk: int = 1) -> torch.Tensor:
    """Logits of tokens, so many at a time."""
    pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split(chunk, 1)]
    return torch.cat(pieces, 1)


def check_answers(model: Any, ids: torch.Tensor) -> None:
    """Stops where a cache with room for everything is not the cache without it."""
    layers = model.config.num_hidden_layers
    expected = read(model, KvCache.attach(model, [KvSpec()] * layers), ids)
    for spec in (KvSpec(**votes(ids.shape[1])), KvSpec(**search(ids.shape[1], "linked", 16))):
        if not torch.equal(read(model, KvCache.attach(model, [spec] * layers), ids), expected):
            sys.exit(f"{spec.told()} with room for everything is not attention to all")


def on_text(folder: str, count: int) -> list[dict[str, Any]]:
    """A row per arm: KL to attention to all with its interval, and recall."""
    source = compress.load(folder)
    ids = datasets.quality_windows(source, Path(folder) / "text" / "test.txt.gz", length=LENGTH).ids[:count]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    check_answers(model, ids[:1, :64])
    layers = model.config.num_hidden_layers
    expected = continued(model, KvCache.attach(model, [KvSpec()] * layers), ids)
    rows = []
    for name, spec in TEXT.items():
        cache = KvCache.attach(model, [spec] * layers)
        cache.watch()
        found = continued(model, cache, ids)
        judged = zip(expected, found, ids[:, PROMPT:], strict=True)
        scores = [score_window(first[:-1], second[:-1], tokens[1:]) for first, second, tokens in judged]
        value, interval = cluster_interval([s.kl for s in scores], [s.tokens for s in scores])
        row: dict[str, Any] = {"arm": name, "kl": value, "kl_interval": interval and [interval.low, interval.high]}
        row |= told(cache)
        if spec.reuse:
            row["choices taken again"] = sum(layer.reused for layer in cache.layers) / sum(
                layer.choices for layer in cache.layers
            )
        rows.append(row)
        print(json.dumps(rounded(row)), flush=True)
    return rows


def continued(model: Any, cache: KvCache, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens after the prompt."""
    read(model, cache, ids[:, :PROMPT], PROMPT)
    return read(model, cache, ids[:, PROMPT:])


def told(cache: KvCache) -> dict[str, float]:
    recall = cache.recall
    return {
        "top keys found": recall.found,
        "attention of these found": recall.mass,
        "attention covered": recall.covered,
    }


def prompt(model: Any, ids: torch.Tensor) -> KvCache:
    """A prompt read by attention to all, of which every arm's cache is made."""
    spec = KvSpec(
        selector="retrieval", select=ids.shape[1], index="linked", queries=LONG["retrieval, 128, exact"].queries
    )
    cache = KvCache.attach(model, [spec] * model.config.num_hidden_layers)
    for piece in ids.split(CHUNK, 1):
        with torch.no_grad():
            model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def filled(cache: KvCache, spec: KvSpec) -> KvCache:
    """What an arm's cache would hold of the prompt that another read."""
    layers = []
    for held in cache.layers:
        layer = layer_of(spec)
        keys, values = (store.read() for store in held.stores)
        assert keys is not None and values is not None
        layer.update(keys, values)
        asked = layer.asked(None)
        if spec.selects:
            layer._store(keys, values, asked)  # type: ignore[attr-defined]
        else:
            layer.commit(asked, None)
        if isinstance(layer, RetrievalLayer) and isinstance(held, RetrievalLayer) and spec.index == "linked":
            layer.asks, layer.asks_valid, layer.stride = held.asks, held.asks_valid, held.stride
        layers.append(layer)
    return KvCache(layers=layers)


def timing(contexts: list[int], budget_s: float) -> Iterator[list[dict[str, Any]]]:
    """After each context all rows so far: milliseconds per step, times the growing one, bytes held, recall."""
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "max_position_embeddings": 20_000, "initializer_range": 0.06}
    config = LlamaConfig(vocab_size=1024, tie_word_embeddings=True, **TIMED, **more)
    model = LlamaForCausalLM(config).eval()
    own = copy.deepcopy(model)
    own.set_attn_implementation("sdpa")
    use_attention(model)
    ids = torch.randint(0, 1024, (1, max(contexts) + STEPS), generator=torch.Generator().manual_seed(0))
    rows = []
    for context in contexts:
        read_once = prompt(model, ids[:, :context])
        caches: dict[str, Any] = {ALL: filled(read_once, KvSpec())}
        caches |= {name: filled(read_once, spec) for name, spec in LONG.items()}
        growing = DynamicCache()
        for place, layer in enumerate(read_once.layers):
            growing.update(*(store.read() for store in layer.stores), place)
        found: dict[str, dict[str, Any]] = {}
        built: dict[str, KvCache] = {}
        for name, cache in caches.items():
            kind = cache.layers[0].spec.index
            if kind in built:
                share_indexes(built[kind], cache)
            found[name] = begun(model, cache, ids[:, context : context + STEPS])
            if cache.layers[0].spec.selector == "retrieval":
                built.setdefault(kind, cache)
        calls = {GROWING: step(own, growing, ids[:, context : context + 1])}
        calls |= {name: step(model, cache, ids[:, context : context + 1]) for name, cache in caches.items()}
        spent = rounds(calls, budget_s)
        for name, seconds in spent.items():
            value, interval = speedup(np.log(spent[GROWING] / seconds))
            row: dict[str, Any] = {"context": context, "arm": name, "rounds": len(seconds)}
            row |= {"ms": float(np.median(seconds)) * 1e3, f"times {GROWING}": [value, interval.low, interval.high]}
            rows.append(row | found.get(name, {}))
            print(json.dumps(rounded(rows[-1])), flush=True)
        yield rows


def share_indexes(built: KvCache, cache: KvCache) -> None:
    """What another arm built, searched with an effort of its own."""
    for source, layer in zip(built.layers, cache.layers, strict=True):
        if isinstance(source, RetrievalLayer) and isinstance(layer, RetrievalLayer):
            layer.span = source.span
            layer.indexes = [[copy.copy(index) for index in row] for row in source.indexes]
            for index in (index for row in layer.indexes for index in row):
                index.effort = layer.spec.effort


def begun(model: Any, cache: KvCache, ids: torch.Tensor) -> dict[str, Any]:
    """Bytes of a cache after its first step, seconds of that step (in which indexes are built), and recall."""
    started = time.process_time()
    read(model, cache, ids[:, :1])
    row: dict[str, Any] = {"first_step_s": time.process_time() - started, "cache_bytes": cache.nbytes}
    if not any(layer.spec.selects for layer in cache.layers):
        return row
    probe = cache.fork()
    probe.watch()
    read(model, probe, ids[:, 1:])
    if probe.recall.heads:
        row |= told(probe)
    return row


def step(model: Any, cache: Any, token: torch.Tensor) -> Any:
    """One step after a cache, which stays as it is."""

    @torch.no_grad()
    def once() -> None:
        if isinstance(cache, KvCache):
            grown: Any = cache.fork()
        else:
            grown = copy.copy(cache)
            grown.layers = [copy.copy(layer) for layer in cache.layers]
        model(token, past_key_values=grown, use_cache=True)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of pycoder, with its text")
    parser.add_argument("--windows", type=int, default=3, help="of 512 tokens")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per context")
    parser.add_argument("--kept-text", action="store_true", help="take the part about text from the last result")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384])
    given = parser.parse_args()
    torch.set_num_threads(1)
    least, retrieval.LEAST = retrieval.LEAST, 64
    text = json.loads(RESULT.read_text())["text"] if given.kept_text else on_text(given.model, given.windows)
    retrieval.LEAST = least
    content = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0], "versions": versions()}
    content |= {"timed": TIMED, "text": text}
    for rows in timing(given.contexts, given.budget):
        content |= {"timing": rows}
        RESULT.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
