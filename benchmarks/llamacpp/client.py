"""Decode with llama.cpp. Imports nothing of compress: it runs in an environment of its own (llamacpp.txt).

    python client.py FILE.gguf '{"hidden": 2048, ...}' THREADS

Writes FILE with random weights in Q4_0 where it is not there, loads it, prints a JSON object about it, and then answers
each line `COUNT PROMPT` of its input with the seconds that it took to read PROMPT tokens and to decode COUNT after.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def tensors(shape: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape (out, in) of each; norms are vectors."""
    hidden, inner, vocabulary = shape["hidden"], shape["inner"], shape["vocabulary"]
    keys = hidden // shape["heads"] * shape["kv_heads"]
    of_block = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    found: list[tuple[str, tuple[int, ...]]] = [("token_embd", (vocabulary, hidden)), ("output_norm", (hidden,))]
    found += [(f"blk.{i}.{name}", size) for i in range(shape["blocks"]) for name, size in of_block.items()]
    return [*found, ("output", (vocabulary, hidden))]


def write(path: Path, shape: dict[str, int]) -> None:
    """A Llama of this shape; matrices of one shape hold the same random numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["blocks"])
    writer.add_feed_forward_length(shape["inner"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_rope_dimension_count(shape["hidden"] // shape["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape["vocabulary"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")
    random, made = np.random.default_rng(0), {}
    for name, size in tensors(shape):
        if size not in made:
            values = random.standard_normal(size, dtype=np.float32) * 0.02
            made[size] = gguf.quants.quantize(values, Q4_0) if len(size) == 2 else np.ones(size, np.float32)
        writer.add_tensor(f"{name}.weight", made[size], raw_dtype=Q4_0 if len(size) == 2 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(model: Any, count: int, prompt: int) -> tuple[float, float]:
    """Seconds to read `prompt` tokens, and to decode `count` after them."""
    model.reset()
    started = time.perf_counter()
    model.eval(list(range(3, 3 + prompt)))
    read = time.perf_counter()
    for token in range(count):
        model.eval([3 + token])
    return read - started, time.perf_counter() - read


def main() -> None:
    path, shape, threads = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    if not path.is_file():
        write(path, shape)
    model = llama_cpp.Llama(
        str(path), n_ctx=shape["context"], n_threads=threads, n_threads_batch=threads, verbose=False
    )
    table = shape["vocabulary"] * shape["hidden"] * 18 // 32  # 18 bytes hold 32 weights
    facts = {"version": version("llama-cpp-python"), "bytes": path.stat().st_size, "read": path.stat().st_size - table}
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, *map(int, line.split()))), flush=True)


if __name__ == "__main__":
    main()
