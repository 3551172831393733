"""What outlier columns, a bias and an order of columns bring `vptq` at about 2 bits, each at what it costs.

    python benchmarks/codebook_columns.py ASSETS/pycoder [--samples 16] [--windows 24]

All rows have one budget of counted bits, for which `vptq` picks the codebook: what a setting stores is taken from the
codes. KL divergence from the original model per token of held-out text, with 95 % intervals over windows, and the
paired difference from the row without any of them. Writes results/codebook_columns.json row by row.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import compress
from compress.formats.base import QuantTensor
from compress.inputs.datasets import calibrate
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.evaluate import stream_logits
from compress.stats.intervals import Interval, cluster_interval, paired_difference

RESULT = Path(__file__).parent / "results" / "codebook_columns.json"
LENGTH = 512
BUDGET = "bits=2.1, share=block"
ADDED = ("", "outliers=0.01", "bias=row", "permute=hessian")


def divergences(expected: list[Tensor], model: Model, ids: Tensor) -> list[float]:
    """KL of each window, summed over its tokens."""
    found = []
    for wanted, logits in zip(expected, stream_logits(model, ids), strict=True):
        kl = (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)
        found += kl.reshape(-1, LENGTH).sum(1).tolist()
    return found


def counted_bits(model: Model) -> float:
    layers = [model.layer(spec).weight for spec in model.structure.layers.values() if spec.format is not None]
    stored = [weight for weight in layers if isinstance(weight, QuantTensor)]
    return 8 * sum(each.nbytes for each in stored) / sum(each.shape[0] * each.shape[1] for each in stored)


def ends(interval: Interval | None) -> list[float]:
    assert interval is not None
    return [interval.low, interval.high]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=24)
    given = parser.parse_args()
    model = compress.load(given.model)
    calibration = calibrate(model, given.model / "text/calib.txt.gz", samples=given.samples, length=LENGTH)
    held_out = calibrate(model, given.model / "text/test.txt.gz", samples=given.windows, length=LENGTH)
    ids = torch.cat(list(held_out.batches()))[: given.windows]
    expected = [logits.log_softmax(-1) for logits in stream_logits(model, ids)]
    counts, rows = [LENGTH] * given.windows, list[dict[str, Any]]()
    plain: list[float] = []
    for more in ADDED:
        text, started = f"vptq({', '.join(filter(None, (BUDGET, more)))})", time.process_time()
        made = Pipeline.parse(text).run(model, calibration).model
        spent, sums = time.process_time() - started, divergences(expected, made, ids)
        plain = plain or sums
        kl, interval = cluster_interval(sums, counts)
        difference, between = paired_difference(sums, plain, counts)
        row = {"passes": text, "bits": counted_bits(made), "kl": kl, "kl_interval": ends(interval)}
        row |= {"difference": difference, "difference_interval": ends(between) if more else None}
        rows.append(row | {"seconds": spent})
        print(f"{kl:.4f} {difference:+.4f} {row['bits']:.3f} bits {spent:.0f} s  {text}", flush=True)
        told = {"samples": given.samples, "windows": given.windows, "length": LENGTH, "rows": rows}
        RESULT.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
