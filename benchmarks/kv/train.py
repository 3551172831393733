"""Trains the model of the cache benchmarks: a Llama of a few hundred thousand parameters on the tasks of `tasks.py`.

    python benchmarks/kv/train.py --out FOLDER [--steps 1400] [--layers 2] [--seed 0] [--threads 1]

RMSNorm, RoPE, four query heads to two key-value heads of size 32. Loss on the answers alone. Sequences grow from 48 to
96, 192 and 256 tokens, on as soon as nine tenths of the answers are right: induction forms on short ones. Prints
accuracies of whole answers as the model learns; `--out` is a Hugging Face folder, with what was reached in train.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tasks import TASKS, VOCABULARY, batch, drill, lesson
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

LENGTHS = (48, 96, 192, 256)
TOKENS = 2304
"""Of a step."""
WARM_UP, STEADY = 100, 0.6
"""Steps until the full rate; share of all steps until it falls."""
ENOUGH, EVERY = 0.9, 100
CONTEXT = 160
"""Tokens of the contexts that the model is tested on."""


def make(layers: int) -> LlamaForCausalLM:
    """The model, untrained."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=False,
        )
    )


def lessons(rng: np.random.Generator, length: int) -> tuple[Tensor, Tensor]:
    """A step's sequences, of all tasks in turn and half as many drills: ids and which are answers, (n, length)."""
    names, count = list(TASKS), max(len(TASKS), TOKENS // length // 2)
    drawn = [lesson(rng, names[row % len(names)], length) for row in range(count)]
    drawn += [drill(rng, length) for _ in range(count // 2)]
    return torch.from_numpy(np.stack([ids for ids, _ in drawn])), torch.from_numpy(np.stack([a for _, a in drawn]))


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, name: str, length: int, seed: int, count: int = 128) -> float:
    """Share of whole answers that are right, greedily."""
    asked = batch(name, seed, count, length)
    ids = torch.from_numpy(np.concatenate([asked.context, asked.question, asked.answer], 1))
    answer = ids[:, -asked.answer.shape[1] :]
    found = model(ids[:, :-1]).logits[:, -answer.shape[1] :].argmax(-1)
    return float((found == answer).all(1).float().mean())


def step(model: LlamaForCausalLM, ids: Tensor, is_answer: Tensor) -> tuple[Tensor, float]:
    """Loss over answers, and the share of their tokens that are right."""
    hidden = model.model(ids[:, :-1]).last_hidden_state[is_answer[:, 1:]]
    logits, wanted = model.lm_head(hidden), ids[:, 1:][is_answer[:, 1:]]
    return functional.cross_entropy(logits, wanted), float((logits.argmax(-1) == wanted).float().mean())


def train(model: LlamaForCausalLM, steps: int, seed: int, rate: float) -> dict[str, object]:
    """Returns: what was reached, and what it took."""
    rng, started, stage, right = np.random.default_rng(seed), time.monotonic(), 0, 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    reached: list[int] = []
    for number in range(steps):
        late = max(0.0, number / steps - STEADY) / (1 - STEADY)
        factor = min(1.0, (number + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * late))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss, share = step(model, *lessons(rng, LENGTHS[stage]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        right = 0.98 * right + 0.02 * share
        if number % EVERY == EVERY - 1:
            told: dict[str, object] = {
                name: round(accuracy(model, name, 2 * LENGTHS[stage] // 3, number + 1), 2) for name in TASKS
            }
            told |= {
                "step": number + 1,
                "length": LENGTHS[stage],
                "loss": round(loss.item(), 3),
                "right": round(right, 3),
            }
            print(json.dumps(told | {"s": round(time.monotonic() - started)}), flush=True)
        if right >= ENOUGH and stage + 1 < len(LENGTHS):
            stage, right = stage + 1, 0.0
            reached.append(number + 1)
    return {"steps": steps, "seed": seed, "seconds": time.monotonic() - started, "longer sequences from steps": reached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    model = make(given.layers)
    told = train(model, given.steps, given.seed, given.rate)
    told["accuracy"] = {name: accuracy(model, name, CONTEXT, 10**6, 512) for name in TASKS}
    model.save_pretrained(given.out)
    (given.out / "train.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf8")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
