"""Generate greedily with onnxruntime-genai. Imports nothing of compress: it runs in an environment of its own.

    python client_genai.py FOLDER '[[5, 6, 7], [8]]' 64 [--pad ID] [--graph FILE]

Prints the versions (JSON), then on the last line the tokens generated after each prompt (JSON list of lists).

The folder is opened as it is, with the search settings of its genai_config.json; --graph overrules the graph named in
it by one whose cache is no shared buffer. genai ends a sequence at its end-of-text token; a prompt alone is then taken
up again with that token appended, so there is no early stop. In a padded batch that is not possible: tokens after a
row's end-of-text mean nothing. Batches are padded on the right, as genai's own tokenizer does: it masks trailing pad
tokens only (its src/models/position_inputs.cpp).
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def start(model: Any, prompts: list[list[int]], count: int, pad: int) -> Any:
    """A generator that has read the prompts, padded on the right to one length."""
    longest = max(map(len, prompts))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=longest + count, batch_size=len(prompts))
    generator = og.Generator(model, params)
    rows = np.asarray([prompt + [pad] * (longest - len(prompt)) for prompt in prompts], np.int32)
    generator.append_tokens(rows if len(prompts) > 1 else rows[0])
    return generator


def alone(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` tokens after one prompt, also past an end-of-text token."""
    generator = start(model, [prompt], count, 0)
    tokens: list[int] = []
    while len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
        if generator.is_done() and len(tokens) < count:
            generator.append_tokens(np.asarray(tokens[-1:], np.int32))
    return tokens


def padded(model: Any, prompts: list[list[int]], count: int, pad: int) -> list[list[int]]:
    """At most `count` tokens after each prompt of one batch, until all rows have ended."""
    generator = start(model, prompts, count, pad)
    steps: list[list[int]] = []
    while len(steps) < count and not generator.is_done():
        generator.generate_next_token()
        steps.append([int(token) for token in generator.get_next_tokens()])
    return [list(row) for row in zip(*steps, strict=True)]


def configured(folder: Path, graph: str | None) -> Any:
    """The folder's own configuration, or the same for another graph."""
    config = og.Config(str(folder))
    if graph:
        search = {"past_present_share_buffer": False}
        config.overlay(json.dumps({"model": {"decoder": {"filename": graph}}, "search": search}))
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=json.loads, help="JSON list of lists of token ids")
    parser.add_argument("count", type=int)
    parser.add_argument("--pad", type=int, help="run all prompts as one batch, padded with this token")
    parser.add_argument("--graph", help="another graph of the folder, whose cache is concatenated")
    given = parser.parse_args()
    model = og.Model(configured(given.folder, given.graph))
    print(json.dumps({name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}))
    if given.pad is not None:
        print(json.dumps(padded(model, given.prompts, given.count, given.pad)))
    else:
        print(json.dumps([alone(model, prompt, given.count) for prompt in given.prompts]))


if __name__ == "__main__":
    main()
