"""The slot graph (export/onnx/slots.py) in ONNX Runtime: against the torch cache over many steps, and its time per step
against the growing cache.

    python benchmarks/kv_slots.py [--steps 570] [--budget 20] [--part parity|timing]

Parity: two blocks of random weights, teacher-forced token by token in two rows, nearly all steps past the budget; no
token occurs twice, since two keys of one token have one norm but for rounding. Time: four blocks of random weights, one
row, one thread, one step of decoding after so many tokens, in processor time (other work on the machine counts little),
arms in turn; the growing cache is that of GroupQueryAttention in one buffer, and that of the portable graph. What slots
take does not depend on how many tokens came before. Heads of learned scorers are random. Writes
results/kv_slots.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import rounded
from heads import random_heads
from paired import rounds
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import compress
from compress import hwprofiles
from compress.export.onnx import target
from compress.export.onnx.runtime import PORTABLE, SHARED, Session
from compress.export.onnx.slot_session import Slots, SlotSession
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.kv.stores import RowStore
from compress.manifest import versions
from compress.models.cache_tensors import read_tensors, write_tensors
from compress.models.model import Model
from compress.stats.intervals import speedup

RESULT = Path(__file__).parent / "results" / "kv_slots.json"
PROFILE = hwprofiles.load("cpu-x86-avx512-vnni")
INT8 = {"keys": "int8(token)", "values": "int8(token)"}
FLOAT, CODES = "float", "int8(token)"
STORES: dict[str, dict[str, str]] = {FLOAT: {}, CODES: INT8}
ASKED = ("key_norm", "h2o", "locret")
"""Scorers that are compared with codes too."""
SCORERS: dict[str, dict[str, Any]] = {
    "position": {"scorer": "position"},
    "key_norm": {"scorer": "key_norm"},
    "h2o": {"scorer": "h2o"},
    "h2o, decay 0.99": {"scorer": "h2o", "decay": 0.99},
    "h2o by age": {"scorer": "h2o", "by_age": True},
    "tova": {"scorer": "tova"},
    "locret": {"scorer": "locret", "head_width": 256},
    "kvzap": {"scorer": "kvzap"},
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TIMED = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
KEPT, CONTEXTS = 1024, (1024, 4096, 16384)
GROWING, CONCATENATED = "growing, one buffer", "growing, concatenated"


def saved(folder: Path, vocabulary: int, sizes: dict[str, int]) -> Model:
    """A Llama of random weights with two key-value heads and room for 20,000 tokens."""
    torch.manual_seed(0)
    more = {"num_key_value_heads": 2, "max_position_embeddings": 20_000, "initializer_range": 0.2}
    config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **sizes, **more)
    LlamaForCausalLM(config).save_pretrained(folder)
    return compress.load(folder)


def slots_of(model: Model, graph: bytes, spec: KvSpec, folder: Path) -> SlotSession:
    made = replace(model, kv=(spec,) * len(model.attentions))
    write_tensors(model.path, random_heads(made))
    target.write(made, PROFILE, folder, graph)
    return SlotSession(folder, 1)


def take_codes(cache: Slots, torch_cache: KvCache) -> tuple[int, int]:
    """Let the slots hold the codes and scales that torch holds of the same tokens. Returns: how many codes differed of
    those that the last call wrote, and how many it wrote."""
    differing, written = 0, 0
    for layer, held in enumerate(torch_cache.layers):
        ours, theirs = cache.held(layer, "position"), held.position.numpy()
        first, order = np.argsort(ours, -1)[..., -theirs.shape[-1] :], np.argsort(theirs, -1)
        if not np.array_equal(np.take_along_axis(ours, first, -1), np.take_along_axis(theirs, order, -1)):
            continue  # counted as a step with other slots
        for name, store in zip(("key", "value"), held.stores, strict=True):
            assert isinstance(store, RowStore)
            codes = np.take_along_axis(store.held["codes"].numpy(), order[..., None], 2).astype(np.int16) - 128
            differing += int((np.take_along_axis(cache.held(layer, name), first[..., None], 2) != codes).sum())
            written += int(codes[:, :, 0].size)
            _overwrite(cache, f"slots.{layer}.{name}", first[..., None], codes)
            scales = np.take_along_axis(store.held["scale"][..., 0].float().numpy(), order, 2)
            _overwrite(cache, f"slots.{layer}.{name}_scale", first, scales)
    return differing, written


def _overwrite(cache: Slots, name: str, index: np.ndarray, values: np.ndarray) -> None:
    whole = cache._buffers[name].numpy().copy()
    np.put_along_axis(whole, index, values.astype(whole.dtype), 2)
    cache._buffers[name].update_inplace(whole)


@torch.no_grad()
def parity(scratch: Path, steps: int) -> list[dict[str, Any]]:
    """A row per scorer and store: the largest relative difference of logits, and at how many steps any slot set
    differs; of codes also where each step begins with those of torch, so that what remains is not of earlier codes."""
    model = saved(scratch / "small", 2 * steps, SMALL)
    graph = target.capture(model, PROFILE)
    in_torch = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).permutation(2 * steps).reshape(2, steps)
    rows = []
    for name, settings in SCORERS.items():
        for store, takes in ((FLOAT, False), (CODES, False), (CODES, True))[: 3 if name in ASKED else 1]:
            spec = KvSpec(budget=64, sinks=4, recent=16, **settings, **STORES[store])
            session = slots_of(model, graph, spec, scratch / f"parity {name} {store} {takes}")
            heads = read_tensors(model.path, [spec] * 2)
            cache, torch_cache = session.cache(2, 0), KvCache.attach(in_torch, [spec] * 2, heads)
            widest, differing, codes, bytes_before = 0.0, 0, [0, 0], cache.nbytes
            for at in range(steps):
                token = ids[:, at : at + 1]
                found = cache.read(token, np.full((2, 1), at))
                expected = in_torch(torch.from_numpy(token), past_key_values=torch_cache, use_cache=True).logits.numpy()
                widest = max(widest, float(np.abs(found - expected).max() / np.abs(expected).max()))
                differing += at >= spec.budget and any(
                    not np.array_equal(np.sort(cache.held(layer, "position"), -1), np.sort(held.position.numpy(), -1))
                    for layer, held in enumerate(torch_cache.layers)
                )
                if takes:
                    codes = [a + b for a, b in zip(codes, take_codes(cache, torch_cache), strict=True)]
            assert cache.nbytes == bytes_before
            row = {"scorer": name, "store": store, "steps past the budget": steps - spec.budget}
            row |= {"largest relative difference": widest, "steps with other slots": differing}
            row |= {"codes of torch are taken": True, "codes that differed": codes[0], "of": codes[1]} if takes else {}
            rows.append(row)
            print(json.dumps(rounded(rows[-1])), flush=True)
    return rows


def timing(scratch: Path, budget_s: float) -> list[dict[str, Any]]:
    """A row per arm and context: milliseconds per step, bytes of the cache, and times the growing one in a buffer."""
    model = saved(scratch / "timed", 1024, TIMED)
    graph, plain = target.capture(model, PROFILE), scratch / "plain"
    target.write(model, PROFILE, plain, graph)
    growing = {GROWING: Session(plain, 1, graph=SHARED), CONCATENATED: Session(plain, 1, graph=PORTABLE)}
    held = {}
    for name in ("position", "key_norm", "h2o", "tova", "locret"):
        for store, formats in STORES.items():
            spec = KvSpec(budget=KEPT, **SCORERS[name], **formats)
            held[f"{KEPT} slots, {name}, {store}"] = slots_of(model, graph, spec, scratch / f"timed {name} {store}")
    token, rows = np.ones((1, 1), np.int64), []
    for context in CONTEXTS:
        calls = {name: session.call(token, context) for name, session in (growing | held).items()}
        spent = rounds(calls, budget_s)
        full = sum(2 * each.kv_heads * each.size * 4 for each in model.attentions) * context
        for name, seconds in spent.items():
            value, interval = speedup(np.log(spent[GROWING] / seconds))
            row: dict[str, Any] = {"context": context, "arm": name, "rounds": len(seconds)}
            row |= {"ms": float(np.median(seconds)) * 1e3, f"times {GROWING}": [value, interval.low, interval.high]}
            rows.append({**row, "cache_bytes": held[name].cache(1, 0).nbytes if name in held else full})
            print(json.dumps(rounded(rows[-1])), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("parity", "timing"), help="only one of the two; the other stays as it is")
    parser.add_argument("--steps", type=int, default=570, help="tokens that are compared with torch")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per context")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    about = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0], "versions": versions()}
    with tempfile.TemporaryDirectory() as name:
        for part in (given.part,) if given.part else ("parity", "timing"):
            rows = parity(Path(name), given.steps) if part == "parity" else timing(Path(name), given.budget)
            found[part] = {**about, "rows": rows}
    told = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    told |= {"models": {"parity": SMALL, "timing": TIMED}, **found}
    RESULT.write_text(json.dumps(rounded(told), indent=1) + "\n")


if __name__ == "__main__":
    main()
