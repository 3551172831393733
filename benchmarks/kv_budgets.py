"""What caches that drop tokens lose, by scorer and by how the budget is shared out.

    python benchmarks/kv_budgets.py ASSETS/pycoder [--windows 24]

Windows of 512 tokens of held-out text; the first 480 are read as a prompt, 96 tokens a call, the other 32 follow one by
one, as in generating. KL per token of those 32 between the model with all tokens in its cache and with a budget per
head of 256, 128 or 64 (4 first and 32 newest among them), and its paired difference from `h2o` with even budgets, with
windows as clusters. Bytes are of the tensors held at the end of one window. Budgets that are `measured` come from 16
windows of other text. Writes results/kv_budgets.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from digits import rounded
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import compress
from compress.inputs import datasets
from compress.kv.cache import KvCache
from compress.kv.spec import KvSpec
from compress.manifest import versions
from compress.pipeline import Pipeline
from compress.stats.intervals import cluster_interval, paired_difference

RESULT = Path(__file__).parent / "results" / "kv_budgets.json"
BUDGETS, LENGTH, PROMPT, CHUNK = (128, 64, 256), 512, 480, 96
REFERENCE = "by=h2o"
ARMS = (
    "by=streaming",
    "by=key_norm",
    REFERENCE,
    "by=tova",
    "by=snapkv",
    "by=expected",
    *(f"by=snapkv, layers={layers}" for layers in ("pyramid", "measured")),
    *(f"by={by}, heads=adaptive" for by in ("h2o", "snapkv", "expected")),
    "by=snapkv, layers=measured, heads=adaptive",
)


@torch.no_grad()
def continued(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Log probabilities after each token from the last of the prompt on, (windows, 32, vocabulary)."""
    found = []
    for at in range(0, PROMPT, CHUNK):
        found = [model(ids[:, at : at + CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
    for at in range(PROMPT, LENGTH - 1):
        found.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1).log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    given = parser.parse_args()
    model = compress.load(given.model)
    text = given.model / "text"
    calibration = datasets.calibrate(model, text / "calib.txt.gz", samples=16, length=LENGTH)
    chosen = datasets.calibrate(model, text / "test.txt.gz", samples=given.windows, length=LENGTH)
    ids = torch.cat([batch for batch in chosen.batches() if batch.shape[1] == LENGTH])
    module = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32, attn_implementation="eager").eval()
    expected = continued(module, DynamicCache(), ids)

    def divergence(specs: tuple[KvSpec, ...]) -> tuple[list[float], int]:
        cache = KvCache.attach(module, specs)
        found = continued(module, cache, ids)
        return (expected.exp() * (expected - found)).sum(-1).sum(1).tolist(), cache.nbytes // len(ids)

    rows = []
    counts = [expected.shape[1]] * len(ids)
    for budget in BUDGETS:
        sums = {}
        for arm in (REFERENCE, *(each for each in ARMS if each != REFERENCE)):
            needs = calibration if "measured" in arm else None
            specs = Pipeline.parse(f"kv_evict(budget={budget}, {arm})").run(model, needs).model.kv
            sums[arm], held = divergence(specs)
            kl, interval = cluster_interval(sums[arm], counts)
            row: dict[str, Any] = {"budget": budget, "arm": arm, "kl": kl, "bytes": held}
            row["interval"] = [interval.low, interval.high] if interval else None
            if arm != REFERENCE:
                value, apart = paired_difference(sums[arm], sums[REFERENCE], counts)
                row |= {"less than h2o": -value, "by": [-apart.high, -apart.low] if apart else None}
            if "layers" in arm:
                row["budgets"] = [spec.budget for spec in specs]
            rows.append(row)
            print(json.dumps(rounded(row)), file=sys.stderr, flush=True)
            content = {"windows": len(ids), "rows": rows, "versions": versions()}
            RESULT.write_text(json.dumps(rounded(content), indent=1) + "\n")


if __name__ == "__main__":
    main()
