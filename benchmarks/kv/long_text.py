"""Perplexity of a long text that a model reads token by token with a cache that forgets or rounds.

    python benchmarks/kv/long_text.py ASSETS/pycoder [--windows 8] [--length 576] [--budgets 128]

Teacher-forced one token at a time, as in decoding, so that what is dropped is missed by every later token; KL from the
model with the full cache and top-token agreement, overall and by position; bytes are those of the tensors held at the
end. The model was trained on 512 tokens: beyond, the full cache itself is outside of what it knows. Writes
results/kv_long_text.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import evicting, storing
from texts import mean, read, scored, windows
from torch import Tensor
from transformers import AutoModelForCausalLM

from compress import hwprofiles
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.manifest import versions

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from digits import rounded  # noqa: E402  (the benchmarks folder is no package)

RESULT = HERE.parent / "results" / "kv_long_text.json"
BUCKET = 128
"""Positions that are told together."""


def row(full: Tensor, logits: Tensor, ids: Tensor) -> dict[str, Any]:
    """Figures of one cache: each a value with its interval over windows; KL by position too."""
    scores = scored(full[:, :-1], logits[:, :-1], ids[:, 1:])
    nats, plain = (np.stack(each) for each in zip(*((score.nll, score.reference_nll) for score in scores), strict=True))
    found: dict[str, Any] = {"perplexity": math.exp(nats.mean()), "nats more than full": mean(nats - plain)}
    found["kl"], found["same top"] = mean(score.kl for score in scores), mean(score.agreed for score in scores)
    found["kl by position"] = {
        f"{start}-{min(start + BUCKET, nats.shape[1]) - 1}": mean(score.kl[start : start + BUCKET] for score in scores)
        for start in range(0, nats.shape[1], BUCKET)
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model, with text/test.txt.gz")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=576)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    layers = model.config.num_hidden_layers
    ids = windows(given.model, given.model / "text" / "test.txt.gz", given.windows, given.length)
    methods: dict[str, tuple[int | None, list[KvSpec]]] = {"full": (None, [KvSpec()] * layers)}
    methods |= {name: (None, specs) for name, specs in storing(layers).items()}
    for budget in given.budgets:
        methods |= {f"{name}, {budget}": (budget, specs) for name, specs in evicting(layers, budget).items()}
    told: dict[str, Any] = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0]}
    told |= {"versions": versions(), "model": given.model.name, "windows": given.windows, "length": given.length}
    full, rows = torch.empty(0), list[dict[str, Any]]()
    for name, (budget, specs) in methods.items():
        cache = KvCache.attach(model, specs)
        logits = read(model, ids, cache, 1)
        full = logits if name == "full" else full
        rows.append({"cache": name, "tokens": budget, "bytes": cache.nbytes / len(ids)} | row(full, logits, ids))
        print(json.dumps(rounded(rows[-1])), flush=True)
        given.out.write_text(json.dumps(rounded(told | {"rows": rows}), indent=1) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
