"""Growing caches in codes in ONNX Runtime (export/onnx/growing.py, grouped_codes.py): against the torch cache, and
their time per step against growing caches in float.

    python benchmarks/kv_growing.py [--part parity] [--steps 200] [--budget 20]

Parity: two blocks of random weights, teacher-forced token by token in two rows: the portable graph against the torch
cache; each graph against the portable one in float on the values of its codes, which is what `verify` does, with the
share of codes that are not the nearest. Time: four blocks of random weights, one row, one thread, one step of decoding
after so many tokens, in processor time (other work on the machine counts little), arms in turn. Static scales are the
largest magnitudes of 64 random tokens. Writes results/kv_growing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import rounded
from kv_slots import PROFILE, SMALL, TIMED, saved
from paired import rounds
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from compress import hwprofiles
from compress.export.onnx import target
from compress.export.onnx.cache import Cache, Concatenated
from compress.export.onnx.growing_check import compare_rounded
from compress.export.onnx.growing_session import GrowingSession
from compress.export.onnx.runtime import PORTABLE, ROUNDED, SHARED, Session
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.manifest import versions
from compress.models.cache_tensors import write_tensors
from compress.models.model import Model
from compress.stats.intervals import speedup

RESULT = Path(__file__).parent / "results" / "kv_growing.json"
STORES = {
    "int8(token)": KvSpec(keys="int8(token)", values="int8(token)"),
    "int4(group=32)": KvSpec(keys="int4(group=32)", values="int4(group=32)"),
    "int8(channel), static": KvSpec(keys="int8(channel)", values="int8(channel)", static=True),
    "int4(channel), static": KvSpec(keys="int4(channel)", values="int4(channel)", static=True),
}
CONTEXTS, LIMIT = (1024, 4096, 16384), 1e-4
GROWING, CONCATENATED = "float, one buffer", "float, concatenated"


@torch.no_grad()
def scales_of(model: Model, spec: KvSpec) -> list[dict[str, Tensor]]:
    """The largest magnitude of each channel by the largest code, by layer."""
    in_torch = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    cache = DynamicCache()
    in_torch(
        torch.randint(0, model.vocabulary, (1, 64), generator=torch.Generator().manual_seed(0)), past_key_values=cache
    )
    top = 7 if spec.keys.startswith("int4") else 127
    held = [{"key_scale": layer.keys, "value_scale": layer.values} for layer in cache.layers]
    return [{name: each[name].abs().amax((0, 2)) / top for name in spec.wants} for each in held]


def written(model: Model, graph: bytes, spec: KvSpec, folder: Path) -> Model:
    """Writes the folder. Returns the model with its caches."""
    write_tensors(model.path, scales_of(model, spec))
    made = replace(model, kv=(spec,) * len(model.attentions))
    target.write(made, PROFILE, folder, graph)
    return made


def codes_apart(cache: Cache, torch_cache: KvCache) -> list[float]:
    """By layer, the share of bytes of codes that differ in the end; only the first layer's inputs are the same."""
    assert isinstance(cache, Concatenated)
    found = []
    for layer, held in enumerate(torch_cache.layers):
        differing = count = 0
        for name, store in zip(("key", "value"), held.stores, strict=True):
            codes = cache.held(f"past_key_values.{layer}.{name}")
            codes = codes.astype(np.int16) + 128 if codes.dtype == np.int8 else codes
            expected = store.held["codes"].numpy()  # type: ignore[attr-defined]
            differing, count = differing + int((codes != expected).sum()), count + codes.size
        found.append(differing / count)
    return found


@torch.no_grad()
def parity(scratch: Path, steps: int) -> list[dict[str, Any]]:
    """A row per store: the largest relative difference of logits from torch, and what `verify` finds."""
    model = saved(scratch / "small", 1024, SMALL)
    graph = target.capture(model, PROFILE)
    in_torch = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    ids, rows = np.random.default_rng(0).integers(0, 1024, (2, steps)), []
    for name, spec in STORES.items():
        if spec.keys == "int4(group=32)":  # heads of 16
            spec = replace(spec, keys="int4(group=8)", values="int4(group=8)")
        folder = scratch / f"parity {name}"
        made = written(model, graph, spec, folder)
        cache = GrowingSession(folder, 1, graph=ROUNDED).cache(2, 0)
        torch_cache, widest = KvCache.attach(in_torch, made.kv, made.kv_tensors), 0.0
        for at in range(steps):
            found = cache.run(ids[:, at : at + 1], np.ones((2, at + 1), np.int64))
            token = torch.from_numpy(ids[:, at : at + 1])
            expected = in_torch(token, past_key_values=torch_cache, use_cache=True).logits.numpy()
            widest = max(widest, float(np.abs(found - expected).max() / np.abs(expected).max()))
        differing = codes_apart(cache, torch_cache)
        agrees, notes = compare_rounded(folder, Session(folder, 1, exact=True), ids, LIMIT)
        assert agrees, notes
        row = {"store": spec.told(), "steps": steps, "largest difference from torch": widest}
        rows.append({**row, "codes that differ from torch": differing, "verify": notes})
        print(json.dumps(rounded(rows[-1])), flush=True)
    return rows


def timing(scratch: Path, budget_s: float) -> list[dict[str, Any]]:
    """A row per arm and context: milliseconds per step, bytes of the cache, and times the float one in a buffer."""
    model = saved(scratch / "timed", 1024, TIMED)
    graph, plain = target.capture(model, PROFILE), scratch / "plain"
    target.write(model, PROFILE, plain, graph)
    arms: dict[str, Session] = {
        GROWING: Session(plain, 1, graph=SHARED),
        CONCATENATED: Session(plain, 1, graph=PORTABLE),
    }
    for name, spec in STORES.items():
        folder = scratch / f"timed {name}"
        written(model, graph, spec, folder)
        for graph_name in (ROUNDED, SHARED):
            if (folder / graph_name).is_file():
                arms[f"{name}, {graph_name}"] = GrowingSession(folder, 1, graph=graph_name)
    return [row for context in CONTEXTS for row in timed(arms, context, budget_s)]


def timed(arms: Mapping[str, Session], context: int, budget_s: float) -> Sequence[dict[str, Any]]:
    """The rows of one context."""
    token, rows = np.ones((1, 1), np.int64), []
    spent = rounds({name: session.call(token, context) for name, session in arms.items()}, budget_s)
    for name, seconds in spent.items():
        value, interval = speedup(np.log(spent[GROWING] / seconds))
        tokens, held = arms[name].cache_use()
        row: dict[str, Any] = {"context": context, "arm": name, "rounds": len(seconds)}
        row |= {"ms": float(np.median(seconds)) * 1e3, f"times {GROWING}": [value, interval.low, interval.high]}
        rows.append({**row, "cache_bytes": held // tokens * context})
        print(json.dumps(rounded(rows[-1])), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="tokens that are compared with torch")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per context")
    parser.add_argument("--part", choices=("parity", "timing"), help="leave the other part of the results as it is")
    given = parser.parse_args()
    parts = {"parity": partial(parity, steps=given.steps), "timing": partial(timing, budget_s=given.budget)}
    torch.set_num_threads(1)
    told = json.loads(RESULT.read_text()) if given.part else {}
    told |= {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0], "versions": versions()}
    told["models"] = {"parity": SMALL, "timing": TIMED}
    for name in [given.part] if given.part else list(parts):
        with tempfile.TemporaryDirectory() as scratch:
            told[name] = parts[name](Path(scratch))
    RESULT.write_text(json.dumps(rounded(told), indent=1) + "\n")


if __name__ == "__main__":
    main()
