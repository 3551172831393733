"""Do GPTQModel's torch kernels decode what the checkpoint targets write? Small models, by layout and setting.

    python benchmarks/interop/checkpoints.py --python ENV/bin/python [--json OUT]

ENV holds gptqmodel (benchmarks/rivals/build_envs.py makes one). Prints a row per folder and exits 1 where
weights or logits differ by more than float16 explains, or a layer was not packed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

import compress
from compress.export import find
from compress.export.checkpoint.names import FileNames
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.profiles import as_profile
from compress.quality.evaluate import stream_logits

CASES = (
    ("llama", "checkpoint-gptq", "rtn(format=int4(group=32))"),
    ("llama", "checkpoint-gptq", "rtn(format=int4(group=32, asymmetric))"),
    ("llama", "checkpoint-gptq", "rtn(format=int4(group=32, signed))"),
    ("llama", "checkpoint-gptq", "rtn(format=int2(group=32, asymmetric))"),
    ("llama", "checkpoint-gptq", "rtn(format=int3(group=64, asymmetric))"),
    ("llama", "checkpoint-gptq", "rtn(format=int8(channel))"),
    (
        "llama",
        "checkpoint-gptq",
        'rtn(format=int4(group=32), ignore=["*.o_proj"], overrides={"*.v_proj": {format: int8(group=64)}})',
    ),
    ("llama", "checkpoint-awq", "rtn(format=int4(group=32, asymmetric))"),
    ("llama", "checkpoint-awq", "rtn(format=int4(group=64))"),
    ("llama", "checkpoint-awq", 'rtn(format=int4(group=32), ignore=["*.o_proj"])'),
    ("qwen3-moe", "checkpoint-gptq", "rtn(format=int4(group=32))"),
    (
        "qwen3-moe",
        "checkpoint-gptq",
        'rtn(format=int4(group=32, asymmetric), overrides={"*.down_proj.*": {format: int8(channel)}})',
    ),
    ("qwen3-moe", "checkpoint-gptq", 'rtn(format=int4(group=32), targets=["kind:linear"])'),
    ("qwen3-moe", "checkpoint-awq", "rtn(format=int4(group=32, asymmetric))"),
    ("qwen3-moe", "checkpoint-awq", 'rtn(format=int4(group=32), targets=["kind:expert"])'),
)
SIZES = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
CLIENT = Path(__file__).with_name("client_gptqmodel.py")
WEIGHT_BOUND, LOGIT_BOUND = 1e-3, 1e-2
"""float16 holds a product to 2^-11 of itself; what the layers make of that stays below a hundredth of the largest."""


MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}


def make_source(kind: str, folder: Path) -> Model:
    """A small Llama or Qwen3-MoE in float16 with a tokenizer of bytes, which GPTQModel asks for."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES) if kind == "llama" else transformers.Qwen3MoeConfig(**SIZES, **MIXTURE)
    transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    vocabulary = {char: place for place, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), pad_token="!"
    )
    tokenizer.save_pretrained(folder)
    return compress.load(folder)


def read(python: Path, source: Model, target: str, passes: str, folder: Path) -> dict[str, Any]:
    """Write one folder and what is in it, and let the client read it."""
    made = Pipeline.parse(passes).run(source).model
    find(target).write(made, as_profile("cpu-x86-avx2", target), folder / "written")
    ids = torch.randint(0, source.vocabulary, (4, 32), generator=torch.Generator().manual_seed(0))
    specs = [spec for spec in made.structure.layers.values() if spec.format is not None]
    names = FileNames(made)
    expected = {
        place.module: made.layer(spec).float_weight()[place.start : place.stop].clone()
        for spec in specs
        for place in names.places(spec)
    }
    expected |= {"ids": ids, "logits": torch.stack(list(stream_logits(made, ids)))}
    save_file(expected, folder / "expected.safetensors")
    command = [str(python), str(CLIENT), str(folder / "written"), str(folder / "expected.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def passed(row: dict[str, Any]) -> bool:
    """Every layer packed, and nothing further off than float16 is coarse. (The AWQ kernel shows no weights.)"""
    if "error" in row or row["packed"] != row["expected"] or row["logits"] > LOGIT_BOUND:
        return False
    return row["compared"] == 0 or (row["compared"] == row["packed"] and row["weights"] <= WEIGHT_BOUND)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", type=Path, required=True, help="the interpreter of an environment with gptqmodel")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        sources = {kind: make_source(kind, Path(scratch) / kind) for kind in ("llama", "qwen3-moe")}
        for number, (kind, target, passes) in enumerate(CASES):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            found = read(given.python, sources[kind], target, passes, folder)
            row = {"model": kind, "target": target, "passes": passes, **found}
            rows.append(row)
            print("ok  " if passed(row) else "FAIL", json.dumps(row))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    return 0 if all(map(passed, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
