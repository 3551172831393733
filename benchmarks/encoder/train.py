"""Trains the encoder that the encoder benchmarks compress, since no weights are shipped: BERT's shape, 6 blocks of 384.

    python benchmarks/encoder/train.py --sts FOLDER --out FOLDER [--steps 150] [--seed 0] [--threads 1]

Sentences of STS-benchmark's train split, a WordPiece vocabulary trained on them, and pairs that were scored 4 or more
as each other's positives among the rest of their batch (InfoNCE; van den Oord et al. 2018, arXiv 1807.03748), mean
pooling, cosine at temperature 0.05. Prints Spearman's correlation on the dev split: far below that of a pre-trained
encoder, yet with real embeddings to keep the order of. `--out` is a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

Rows = list[tuple[str, str, float]]

PAIRS = 32
TEMPERATURE = 0.05
LONGEST = 128


def read_rows(folder: Path, part: str) -> Rows:
    """(sentence, sentence, score 0 … 5) of a split."""
    with gzip.open(folder / f"stsb-en-{part}.csv.gz", "rt", encoding="utf8", newline="") as stream:
        return [(first, second, float(score)) for first, second, score in csv.reader(stream)]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer of 8192 entries, with BERT's special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=8192, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=LONGEST, **names)


def embed(model: BertModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """(texts, features) mean of the last hidden states over the tokens, at length 1."""
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def correlation(model: BertModel, tokenizer: PreTrainedTokenizerFast, rows: Rows) -> float:
    """Spearman's correlation of cosine and score."""
    model.eval()
    with torch.no_grad():
        parts = [rows[start : start + 64] for start in range(0, len(rows), 64)]
        cosines = [
            float(value)
            for part in parts
            for value in (
                embed(model, tokenizer, [row[0] for row in part]) * embed(model, tokenizer, [row[1] for row in part])
            ).sum(-1)
        ]
    return float(spearmanr(cosines, [row[2] for row in rows]).statistic)


def train(model: BertModel, tokenizer: PreTrainedTokenizerFast, pairs: Rows, steps: int, seed: int) -> float:
    """Trains in place. Returns the mean loss of the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-4, total_steps=steps, pct_start=0.1)
    losses, order = [], torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(steps):
        if len(order) < PAIRS:
            order = torch.randperm(len(pairs), generator=generator)
        chosen, order = [pairs[int(place)] for place in order[:PAIRS]], order[PAIRS:]
        first = embed(model, tokenizer, [row[0] for row in chosen])
        second = embed(model, tokenizer, [row[1] for row in chosen])
        scores, right = first @ second.T / TEMPERATURE, torch.arange(len(chosen))
        loss = (functional.cross_entropy(scores, right) + functional.cross_entropy(scores.T, right)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    rows = read_rows(given.sts, "train")
    tokenizer = make_tokenizer([text for row in rows for text in row[:2]])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=LONGEST,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)  # its pooler stays as it was drawn: nothing here reads it
    started = time.perf_counter()
    loss = train(model, tokenizer, [row for row in rows if row[2] >= 4], given.steps, given.seed)
    model.eval().save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    dev = correlation(model, tokenizer, read_rows(given.sts, "dev"))
    told = {"steps": given.steps, "seed": given.seed, "loss": loss, "dev_spearman": dev}
    print(json.dumps({**told, "seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
