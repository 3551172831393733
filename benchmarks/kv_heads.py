"""Learned heads that choose what a cache keeps, on a small language model: training cost, rank correlation, loss.

    python benchmarks/kv_heads.py ASSETS/pycoder --models FOLDER
    python benchmarks/kv_heads.py ASSETS/pycoder --models FOLDER --text valid --windows 8 --out -

Heads are trained by `kv_evict` on `text/calib.txt.gz` and kept in FOLDER, so that a second call only judges them. They
are judged on windows of another text: rank correlation of each score with the attention that the last quarter of a
window gives a token (per window, layer and head; without sinks and recent tokens), and the KL to the model with its
whole cache, read through the cache `--chunk` tokens at a time. All arms have the same sinks, recent tokens and windows;
intervals of 95 % over windows, differences paired by window. Bars: a head of locret for all layers in under ten minutes
on two cores; its KL below that of key norms and of the newest at every budget.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digits import rounded
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress import hwprofiles
from compress.engine import store
from compress.inputs import datasets
from compress.kv import heads, importance
from compress.kv.cache import KvCache
from compress.kv.observed import Attended, use_seen, watching
from compress.kv.spec import KvSpec, LayerTensors
from compress.manifest import versions
from compress.models.model import Model
from compress.passes import KvEvict
from compress.pipeline import Pipeline
from compress.quality.token_scores import WindowScore, score_window
from compress.quality.token_summary import summarize
from compress.stats.intervals import cluster_interval, paired_difference

RESULTS = Path(__file__).parent / "results"
BUDGETS = (256, 128, 64)
SINKS, RECENT = 4, 32
TRAINED: dict[str, dict[str, Any]] = {
    "locret": {"by": "locret"},
    "kvzap": {"by": "kvzap"},
    "locret, attention": {"by": "locret", "labels": "attention"},
    "kvzap, attention": {"by": "kvzap", "labels": "attention"},
    "kvzap, outputs by age": {"by": "kvzap", "labels": "outputs", "by_age": True},
    "kvzap, attention by age": {"by": "kvzap", "labels": "attention", "by_age": True},
}
FIXED = {"streaming": "position", "key_norm": "key_norm", "h2o": "h2o"}
RIVALS = ("streaming", "key_norm")

Arm = tuple[KvSpec, list[LayerTensors]]


def trained(model: Model, name: str, given: argparse.Namespace) -> tuple[Arm, dict[str, Any]]:
    """An arm's heads, made or taken from the folder, and what making them took."""
    folder = given.models / name.replace(", ", "-")
    told = folder.with_suffix(".json")
    if not told.is_file():
        calibration = datasets.calibrate(model, given.model / "text" / "calib.txt.gz", samples=given.samples)
        item = KvEvict(budget=BUDGETS[0], sinks=SINKS, recent=RECENT, **TRAINED[name])
        wall, spent = time.perf_counter(), time.process_time()
        result = Pipeline(item).run(model, calibration, folder=folder)
        took = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - spent}
        took |= {"threads": torch.get_num_threads(), "load_average": os.getloadavg()[0]}
        notes = [row.notes for row in result.passes[0].layers]
        content = {"arm": name, "pass": str(item), "windows": len(calibration.windows.ids), **took, "layers": notes}
        told.write_text(json.dumps(rounded(content), indent=1))
    made = store.open_store(folder)
    return (made.kv[0], list(made.kv_tensors)), json.loads(told.read_text())


@torch.no_grad()
def ranks(module: Any, windows: list[Tensor], arms: dict[str, Arm]) -> dict[str, Any]:
    """Rank correlation with later attention by arm: mean and interval over windows, and the mean of each layer."""
    found: dict[str, list[list[list[float]]]] = {name: [] for name in arms}
    if not arms:
        return {}
    use_seen(module)
    tokens = importance.judged(windows[0].shape[1], SINKS, RECENT)
    for ids in windows:
        hidden = module.model.embed_tokens(ids)
        turned = module.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
        of_layers: dict[str, list[Tensor]] = {name: [] for name in arms}
        for layer, block in enumerate(module.model.layers):
            with watching(block.self_attn) as seen:
                hidden = block(hidden, attention_mask=None, position_embeddings=turned)
            mass = importance.attention_mass(seen[0], tokens)
            ages = importance.log_ages(ids.shape[1], tokens)
            for name, (spec, tensors) in arms.items():
                score = scores(spec, tensors[layer], seen[0])[..., tokens] - (ages if spec.by_age else 0)
                of_layers[name].append(importance.rank_correlation(score, mass).mean(1))
        for name, each in of_layers.items():
            found[name] += torch.stack(each, 1).tolist()
    rows: dict[str, Any] = {}
    for name, by_window in found.items():
        table = np.array(by_window)
        value, interval = cluster_interval(table.mean(1), np.ones(len(table)))
        assert interval is not None
        rows[name] = {"value": [value, interval.low, interval.high], "by layer": table.mean(0).tolist()}
    return rows


def scores(spec: KvSpec, tensors: LayerTensors, seen: Attended) -> Tensor:
    """What a write-time scorer says of all tokens, (batch, kv heads, n)."""
    if spec.learned:
        return heads.scores_of(seen.hidden if spec.scorer == "kvzap" else seen.projected, tensors)
    if spec.scorer == "key_norm":
        return -torch.linalg.vector_norm(seen.key, dim=-1)
    return torch.arange(seen.key.shape[2]).expand(seen.key.shape[:3])


@torch.no_grad()
def read(module: Any, ids: Tensor, arm: Arm, budget: int, chunk: int) -> Tensor:
    """Logits of all tokens through a cache."""
    spec, tensors = arm
    settings = {**spec.as_data(), "budget": budget, "sinks": SINKS, "recent": RECENT}
    layers = module.config.num_hidden_layers
    cache = KvCache.attach(module, [KvSpec(**settings)] * layers, tensors)
    pieces = [
        module(input_ids=ids[:, at : at + chunk], past_key_values=cache, use_cache=True).logits
        for at in range(0, ids.shape[1], chunk)
    ]
    return torch.cat(pieces, 1)


@torch.no_grad()
def wholes(module: Any, windows: list[Tensor]) -> list[Tensor]:
    """Logits of the model with its whole cache."""
    module.set_attn_implementation("sdpa")
    return [module(input_ids=ids, use_cache=False).logits for ids in windows]


def losses(
    module: Any, windows: list[Tensor], reference: list[Tensor], arm: Arm, budget: int, chunk: int
) -> list[WindowScore]:
    """One score per window, against the model with its whole cache."""
    found = []
    for ids, whole in zip(windows, reference, strict=True):
        logits = read(module, ids, arm, budget, chunk)
        found += [
            score_window(expected[:-1], got[:-1], row[1:])
            for expected, got, row in zip(whole, logits, ids, strict=True)
        ]
    return found


def difference(first: list[WindowScore], second: list[WindowScore]) -> list[float]:
    """Of the KL, first - second, paired by window: value, low, high."""
    counts = [score.tokens for score in first]
    value, interval = paired_difference([s.kl for s in first], [s.kl for s in second], counts)  # type: ignore[misc]
    assert interval is not None
    return [value, interval.low, interval.high]


def row_of(name: str, budget: int, mine: list[WindowScore], others: dict[str, list[WindowScore]]) -> dict[str, Any]:
    metrics = summarize(mine, "compressed", "torch", "cache", "").metrics
    row: dict[str, Any] = {"arm": name, "budget": budget}
    for key in ("kl", "perplexity", "top1_agreement"):
        interval = metrics[key].interval
        row[key] = [metrics[key].value, *([interval.low, interval.high] if interval else [])]
    return row | {f"kl minus {other}": difference(mine, theirs) for other, theirs in others.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="pycoder, with its texts")
    parser.add_argument("--models", type=Path, required=True, help="where heads are kept")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--text", default="test", help="what they are judged on: valid or test")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8, help="windows that are read at once")
    parser.add_argument("--chunk", type=int, default=8, help="tokens that are read at once, with dropping in between")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--arms", nargs="+", default=[*FIXED, *TRAINED])
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--no-ranks", action="store_true", help="leave the rank correlations out")
    parser.add_argument("--out", default="kv_heads.json", help="in results/; - for none")
    given = parser.parse_args()
    given.models.mkdir(parents=True, exist_ok=True)
    model = compress.load(given.model)
    arms: dict[str, Arm] = {}
    made = []
    for name in given.arms:
        if name in FIXED:
            spec = KvSpec(scorer=FIXED[name], budget=BUDGETS[0], sinks=SINKS, recent=RECENT)  # type: ignore[arg-type]
            arms[name] = spec, [{}] * len(model.attentions)
            continue
        arms[name], told = trained(model, name, given)
        made.append(told)
        print(json.dumps(told), flush=True)
    if given.train_only:
        return
    whole = datasets.quality_windows(model, given.model / "text" / f"{given.text}.txt.gz", samples=given.windows)
    windows = list(torch.split(whole.ids, given.batch))  # type: ignore[union-attr]
    module = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    ranked = {} if given.no_ranks else {name: arm for name, arm in arms.items() if name != "h2o"}
    correlated = ranks(module, windows, ranked)
    for name, row in correlated.items():
        print(name, json.dumps(rounded(row)), flush=True)
    rows, reference = [], wholes(module, windows)
    for budget in given.budgets:
        by_arm: dict[str, list[WindowScore]] = {}
        for name, arm in arms.items():
            by_arm[name] = losses(module, windows, reference, arm, budget, given.chunk)
            others = {other: by_arm[other] for other in RIVALS if other in by_arm and name not in FIXED}
            rows.append(row_of(name, budget, by_arm[name], others))
            print(json.dumps(rounded(rows[-1])), flush=True)
    told_all = {"machine": hwprofiles.machine_summary(), "load_average": os.getloadavg()[0], "versions": versions()}
    told_all |= {"text": given.text, "windows": given.windows, "chunk": given.chunk, "trained": made}
    told_all |= {"rank_correlation": correlated, "through_the_cache": rows}
    if given.out != "-":
        (RESULTS / given.out).write_text(json.dumps(rounded(told_all), indent=1) + "\n")


if __name__ == "__main__":
    main()
