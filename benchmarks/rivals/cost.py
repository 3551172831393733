"""Time and memory of GPTQ, 4 bit in groups of 128, against llm-compressor on a Llama of random weights.

    python benchmarks/rivals/build_envs.py ENVS
    python benchmarks/rivals/cost.py --envs ENVS --work FOLDER_WITH_2_GB [--pairs 2]

All sides run in processes of their own, in turn, on the same windows of random tokens, from a bfloat16 checkpoint of
341 M parameters; ours twice, with our defaults and with no more than the rival's method. Ours includes reading the
model and writing the store; llm-compressor's time is the quantization alone. All must first give finite weights and
about the same error in the outputs of some layers. The machine may be shared: the ratio of each pair counts, and that
of processor time, which other work moves less, is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from build_envs import HERE, python_of
from safetensors.torch import load_file, save_file
from torch import Tensor

RESULT = HERE.parent / "results" / "rivals_cost.json"
SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
BLOCKS, VOCABULARY = 24, 32000
SAMPLES, LENGTH = 64, 512
BAR = 0.5
WORST_ERROR = 1.25
"""Ours may have this multiple of the rival's output error in a layer; beyond it the two did not do the same work."""
CHECKED = ("0.self_attn.q_proj", "0.mlp.down_proj", "12.mlp.gate_proj", "23.self_attn.o_proj")
SETTINGS = {
    "method": "gptq",
    "bits": 4,
    "group": 128,
    "dtype": "bfloat16",
    "keep": [f"model.layers.{name}.weight" for name in CHECKED],
}
OURS = {
    "compress": {"ours": "gptq(format=int4(group=128))"},
    "compress, same method": {
        "ours": "gptq(format=int4(group=128), mismatch=0, refit=0, clip=false)",
        "stream": "bfloat16",
    },
}
"""Our defaults, which carry a second, uncompressed stream, search ranges and refit scales; and what the rival does, as
it does it: ranges from the extremes, no more than the columns, forward passes in the checkpoint's bfloat16."""
RIVAL = "llmcompressor"
FIGURES = ("seconds", "cpu_seconds", "peak_bytes")


def make_model(folder: Path) -> int:
    """A checkpoint of seeded random weights, made once. Returns its parameters."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS, vocab_size=VOCABULARY, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    if not (folder / "model.safetensors").is_file():
        model.save_pretrained(folder)
        # llm-compressor asks for a tokenizer, though it gets tokens
        words = Tokenizer(WordLevel({"word": 0, "other": 1}, unk_token="other"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="other").save_pretrained(folder)
    return model.num_parameters()


def run_side(python: Path, side: str, model: Path, windows: Path, out: Path) -> dict[str, Any]:
    """One side's job.json, with the machine's load before it. Raises: CalledProcessError; its log is in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    client = RIVAL if side == RIVAL else "compress"
    settings = json.dumps(SETTINGS | OURS.get(side, {}))
    command = [python, HERE / f"client_{client}.py", model, windows, out, settings]
    load = os.getloadavg()[0]
    with (out / "log").open("w") as log:
        subprocess.run(
            [str(word) for word in command],
            check=True,
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    return {**json.loads((out / "job.json").read_text()), "load_before": load}


def layer_inputs(model: Path, ids: Tensor) -> dict[str, Tensor]:
    """What the checked layers read in the original model: name → (tokens, in) float32."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found: dict[str, Tensor] = {}
    for name in CHECKED:
        module = whole.get_submodule(f"model.layers.{name}")
        module.register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, 1).float())
        )
    with torch.no_grad():
        whole.model(ids)
    return found


def output_errors(model: Path, sides: dict[str, Path], ids: Tensor) -> dict[str, dict[str, float]]:
    """Layer → side → squared error of the layer's output as a share of the output's power."""
    inputs, source = layer_inputs(model, ids), load_file(model / "model.safetensors")
    errors: dict[str, dict[str, float]] = {}
    for name in CHECKED:
        key = f"model.layers.{name}.weight"
        weight = source[key].float()
        power = float((inputs[name] @ weight.T).square().sum())
        errors[name] = {
            side: float((inputs[name] @ (load_file(out / "model.safetensors")[key] - weight).T).square().sum()) / power
            for side, out in sides.items()
        }
    return errors


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All pairs, the correctness check after the first, and the bars."""
    model, windows = given.work / "llama", given.work / "windows.safetensors"
    parameters = make_model(model)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, windows)
    ours = {name: OURS[name] for name in given.sides or OURS}
    pythons = {name: Path(sys.executable) for name in ours} | {RIVAL: python_of(given.envs.absolute() / RIVAL)}
    sides = {name: given.work / name.replace(", ", "-").replace(" ", "-") for name in pythons}
    pairs: list[dict[str, dict[str, Any]]] = []
    errors: dict[str, dict[str, float]] = {}
    for place in range(given.pairs):
        order = sorted(pythons, reverse=bool(place % 2))
        pairs.append({name: run_side(pythons[name], name, model, windows, sides[name]) for name in order})
        print({name: {key: pairs[-1][name][key] for key in FIGURES} for name in order}, file=sys.stderr, flush=True)
        if not errors:
            errors = output_errors(model, sides, ids[:4])
            check(pairs[0], errors)
    ratios = {side: {key: [pair[side][key] / pair[RIVAL][key] for pair in pairs] for key in FIGURES} for side in ours}
    middle = {side: {key: statistics.median(values) for key, values in found.items()} for side, found in ratios.items()}
    met = {
        side: {"time": found["seconds"] <= BAR, "memory": found["peak_bytes"] <= BAR} for side, found in middle.items()
    }
    return {"parameters": parameters, "pairs": pairs, "errors": errors, "ratios": ratios, "median": middle, "met": met}


def check(pair: dict[str, dict[str, Any]], errors: dict[str, dict[str, float]]) -> None:
    """Raises: ValueError where the two sides did not do the same work."""
    for name, facts in pair.items():
        if facts["broken"]:
            raise ValueError(f"{name} left values in {facts['broken'][0]} that are not finite")
    for layer, found in errors.items():
        if max(error for side, error in found.items() if side != RIVAL) > WORST_ERROR * found[RIVAL]:
            raise ValueError(f"{layer}: output errors {found} are not comparable")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--sides", nargs="*", choices=OURS, help="of ours [default: both]")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    found = measure(given)
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__}
    calibration = f"{SAMPLES} x {LENGTH} random tokens"
    RESULT.write_text(
        json.dumps({**machine, "calibration": calibration, "settings": SETTINGS, **found}, indent=1) + "\n"
    )
    for side, figures in found["median"].items():
        for key, value in figures.items():
            pairs = ", ".join(f"{x:.3f}" for x in found["ratios"][side][key])
            print(f"{side}: {key} / that of llm-compressor = {value:.3f} (pairs: {pairs})")
    print(found["errors"], found["met"])
    return 0 if all(all(met.values()) for met in found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
