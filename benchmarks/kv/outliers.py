"""What stores of keys and values cost where keys have outlier channels: attention-output error, KL, counted bytes.

    python benchmarks/kv/outliers.py ASSETS/pycoder [--windows 12]

The model as it is, and with outliers injected into keys, or keys and values, that do not change what it computes
(`inject.py`). A context of 448 tokens is read at once and stored; the next 64 attend to what was stored. The error of
an attention's output is that of each attention by itself, on the hidden states of the model with a float cache. Writes
results/kv_outliers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inject import CHANNELS, FACTOR, inject
from methods import storing
from numpy.typing import NDArray
from texts import mean, scored, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress import hwprofiles
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.manifest import versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from digits import rounded  # noqa: E402  (the benchmarks folder is no package)

RESULT = HERE.parent / "results" / "kv_outliers.json"
CONTEXT, ASKED = 448, 64
INJECTED = {"as it is": None, "outliers in keys": 0, "outliers in keys and values": CHANNELS}
Call = tuple[nn.Module, dict[str, Any], Tensor]
"""An attention, what it was called with, what it gave."""


@torch.no_grad()
def recorded(model: nn.Module, ids: Tensor) -> tuple[list[Call], list[Call], Tensor]:
    """With a float cache: the calls of each attention for the context, those for the rest, logits of the rest."""
    calls: list[Call] = []

    def keep(module: nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((module, kwargs, output[0]))

    hooks = [
        module.register_forward_hook(keep, with_kwargs=True)
        for module in model.modules()
        if hasattr(module, "q_proj") and hasattr(module, "o_proj")
    ]
    cache = KvCache.attach(model, [KvSpec()] * len(hooks))
    model(ids[:, :CONTEXT], past_key_values=cache, use_cache=True)
    logits = model(ids[:, CONTEXT:], past_key_values=cache, use_cache=True).logits
    for hook in hooks:
        hook.remove()
    return calls[: len(hooks)], calls[len(hooks) :], logits


@torch.no_grad()
def attention_error(
    model: nn.Module, specs: list[KvSpec], before: list[Call], after: list[Call]
) -> NDArray[np.float64]:
    """Relative error of each attention's output, (layers, rows)."""
    cache, found = KvCache.attach(model, specs), []
    for (module, context, _), (_, rest, expected) in zip(before, after, strict=True):
        module(**context | {"past_key_values": cache})
        output = module(**rest | {"past_key_values": cache})[0]
        error = (output - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        found.append(error.double().numpy())
    return np.array(found)


def table(model: nn.Module, ids: Tensor) -> list[dict[str, Any]]:
    """A row per store."""
    config: Any = model.config
    layers = config.num_hidden_layers
    before, after, full = recorded(model, ids)
    rows = []
    values = 2 * config.num_key_value_heads * config.head_dim * layers * CONTEXT * len(ids)
    for name, specs in ({"float": [KvSpec()] * layers} | storing(layers)).items():
        errors = attention_error(model, specs, before, after)
        cache = KvCache.attach(model, specs)
        with torch.no_grad():
            model(ids[:, :CONTEXT], past_key_values=cache, use_cache=True)
            held = cache.nbytes
            logits = model(ids[:, CONTEXT:], past_key_values=cache, use_cache=True).logits
        row: dict[str, Any] = {"store": name, "bits per value": 8 * held / values, "bytes": held / len(ids)}
        row["attention error"] = mean(errors.T)
        row["attention error by layer"] = errors.mean(1).tolist()
        scores = scored(full, logits, ids[:, CONTEXT:])  # any targets do: neither figure below asks for the truth
        row["kl"], row["same top"] = mean(score.kl for score in scores), mean(score.agreed for score in scores)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model, with text/test.txt.gz")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ids = windows(given.model, given.model / "text" / "test.txt.gz", given.windows, CONTEXT + ASKED)
    told: dict[str, Any] = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0]}
    told |= {"versions": versions(), "model": given.model.name, "windows": given.windows}
    told |= {"context": CONTEXT, "asked": ASKED, "factor": FACTOR}
    found = {}
    for name, channels in INJECTED.items():
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
        if channels is not None:
            inject(model, channels=channels)
        found[name] = table(model, ids)
    for name, rows in found.items():
        for row in rows:
            print(
                name, json.dumps(rounded({key: value for key, value in row.items() if "layer" not in key})), flush=True
            )
    given.out.write_text(json.dumps(rounded(told | {"tables": found}), indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
