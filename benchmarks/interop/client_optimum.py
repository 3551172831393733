"""Generate greedily with optimum's ORTModelForCausalLM. Imports nothing of compress: it runs in its own environment.

    python client_optimum.py FOLDER '[[5, 6, 7], [8]]' 64 [--pad ID]

Prints the versions (JSON), then on the last line the tokens generated after each prompt (JSON list of lists). The
folder is opened as it is; the call to `generate` switches off the end-of-text token, so there is no early stop. Batches
are padded on the left, as transformers asks of decoders.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import ORTModelForCausalLM

PACKAGES = ("optimum", "optimum-onnx", "transformers", "torch", "onnxruntime")


def generate(model: Any, prompts: list[list[int]], count: int, pad: int) -> list[list[int]]:
    """`count` tokens after each prompt of one batch, padded on the left. Settings of the folder are overruled."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=None,
    )
    rows: list[list[int]] = tokens[:, longest:].tolist()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=json.loads, help="JSON list of lists of token ids")
    parser.add_argument("count", type=int)
    parser.add_argument("--pad", type=int, help="run all prompts as one batch, padded with this token")
    given = parser.parse_args()
    model = ORTModelForCausalLM.from_pretrained(given.folder)
    batches = [given.prompts] if given.pad is not None else [[prompt] for prompt in given.prompts]
    print(json.dumps({name: version(name) for name in PACKAGES}))
    print(json.dumps([row for batch in batches for row in generate(model, batch, given.count, given.pad or 0)]))


if __name__ == "__main__":
    main()
