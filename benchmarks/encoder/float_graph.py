"""Float encoders of BERT-base and MiniLM shape, random weights: our graph against others of the same torch model.

    python benchmarks/encoder/float_graph.py [--openvino PYTHON] [--threads 1] [--budget 20] [--int8] [--out FILE]

Arms, all on the same tokens (length 128, no padding), in shuffled rounds against `ours`, the folder's graph in ONNX
Runtime: `plain`, the same without our rewrites; `optimizer`, the torch model exported and fused by ONNX Runtime's own
transformer optimizer (model_type bert), in ONNX Runtime; `openvino`, that export in OpenVINO, float32. --int8: `ours`
is the model in int8 on static grids, and of the others there is OpenVINO with NNCF's int8. `openvino target`, where
OpenVINO is installed here too: what this toolchain exports for it. Told per arm: its seconds as a multiple of ours
(above 1: ours is faster), with a 95 % interval.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import transformers

import compress
from compress import hwprofiles
from compress.export.onnx import target
from compress.export.onnx.runtime import Session
from compress.export.openvino import target as openvino_target
from compress.hwprofiles import Profile
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.speed.timing import pair
from compress.stats import intervals

LENGTH = 128
SHAPES = {  # layers, features, heads, inner features
    "minilm": (6, 384, 12, 1536),
    "bert-base": (12, 768, 12, 3072),
}
INT8 = "rtn(format=int8(channel), targets=[encoder.*]), act_quant(static=true, targets=[encoder.*])"


def portable(profile: Profile) -> Profile:
    """The profile of a provider for which the target rewrites nothing."""
    runtime = profile.runtime("onnxruntime").model_copy(update={"provider": "any"})
    return profile.model_copy(update={"runtimes": {**profile.runtimes, "onnxruntime": runtime}})


class _Hidden(torch.nn.Module):
    """(input_ids, attention_mask) → last_hidden_state."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def export(source: Path, path: Path) -> None:
    """By torch's older exporter, whose graph ONNX Runtime's optimizer knows best."""
    module = transformers.AutoModel.from_pretrained(source, attn_implementation="eager").eval()
    names = ["input_ids", "attention_mask", "last_hidden_state"]
    ids = torch.ones(2, 8, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Hidden(module),
            (ids, torch.ones_like(ids)),
            str(path),
            input_names=names[:2],
            output_names=names[2:],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
            opset_version=17,
            dynamo=False,
        )


def optimize(source: Path, path: Path, heads: int, features: int) -> dict[str, int]:
    """ONNX Runtime's transformer optimizer; what it fused."""
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(str(source), model_type="bert", num_heads=heads, hidden_size=features, opt_level=0)
    model.save_model_to_file(str(path))
    return {name: count for name, count in model.get_fused_operator_statistics().items() if count}


def load(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """As `Session` loads ours."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def openvino(python: Path, model: Path, threads: int, kind: str) -> tuple[Callable[[int], float], dict[str, str]]:
    """How to run a batch in OpenVINO, in a process of its own, and its versions."""
    client = Path(__file__).with_name("client_openvino.py")
    command = [str(python), str(client), str(model), str(threads), str(LENGTH), kind]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line() -> str:
        assert process.stdout is not None
        found = process.stdout.readline()
        if not found:
            raise SystemExit("the OpenVINO client ended; its last words are above")
        return found

    def run(batch: int) -> float:
        assert process.stdin is not None
        process.stdin.write(f"{batch}\n")
        process.stdin.flush()
        return float(line())

    text = ""
    while not text.startswith("{"):  # progress bars come first
        text = line()
    versions: dict[str, str] = json.loads(text)
    return run, versions


def ids(batch: int) -> Any:
    return np.random.default_rng(0).integers(0, 30_000, (batch, LENGTH))


def compare(arms: Mapping[str, Callable[[Any], object]], budget: float) -> dict[str, Any]:
    """Per batch, the seconds of each arm as multiples of ours."""
    found: dict[str, Any] = {}
    for batch in (1, 16):
        tokens = ids(batch)
        feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        calls = {name: (lambda run=run, feeds=feeds: run(feeds)) for name, run in arms.items()}
        samples = pair(calls, baseline="ours", seed=0, budget_s=budget)
        row: dict[str, Any] = {"ours_ms": 1e3 * float(np.median(samples.seconds["ours"])), "rounds": samples.rounds}
        row["control"] = intervals.speedup(samples.control_log_ratios())[1].model_dump()
        for name in arms.keys() - {"ours"}:
            ratio, interval = intervals.speedup(-samples.log_ratios(name))
            row[name] = {"times ours": ratio, "interval": interval.model_dump()}
        found[f"batch {batch}"] = row
    return found


def quantized(model: Model) -> Model:
    """Every layer of the blocks in int8 with static inputs, fitted on random tokens."""
    tokens = torch.from_numpy(ids(16))
    return (
        Pipeline.parse(INT8)
        .run(model, Calibration(Windows(tokens, tuple(range(len(tokens))), "random", "random"), 0, "random"))
        .model
    )


def measure(name: str, given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One shape."""
    layers, features, heads, inner = SHAPES[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": features, "num_hidden_layers": layers, "intermediate_size": inner}
    transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=heads)).save_pretrained(scratch / "hf")
    model, profile = compress.load(scratch / "hf"), hwprofiles.detect()
    graph = target.capture(model, profile)
    target.write(quantized(model) if given.int8 else model, profile, scratch / "ours", graph)
    export(scratch / "hf", scratch / "export.onnx")
    arms: dict[str, Callable[[Any], object]] = {}
    result: dict[str, Any] = {}
    ours = Session(scratch / "ours", given.threads).session
    arms["ours"] = lambda feeds: ours.run(None, feeds)
    if importlib.util.find_spec("openvino"):
        openvino_target.write(quantized(model) if given.int8 else model, profile, scratch / "target", graph)
        target_session = openvino_target.session(scratch / "target", given.threads)
        arms["openvino target"] = target_session.run
    if not given.int8:
        target.write(model, portable(profile), scratch / "plain", graph)
        plain = Session(scratch / "plain", given.threads).session
        result["fused by the optimizer"] = optimize(
            scratch / "export.onnx", scratch / "optimized.onnx", heads, features
        )
        theirs = load(scratch / "optimized.onnx", given.threads)
        arms |= {"plain": lambda feeds: plain.run(None, feeds), "optimizer": lambda feeds: theirs.run(None, feeds)}
        feeds = {"input_ids": ids(2), "attention_mask": np.ones((2, LENGTH), np.int64)}
        first, second = ours.run(None, feeds)[0], theirs.run(None, feeds)[0]
        result["largest difference to the optimizer's"] = float(np.abs(first - second).max() / np.abs(second).max())
    if given.openvino:
        kind = "int8" if given.int8 else "float32"
        run, result["versions"] = openvino(given.openvino, scratch / "export.onnx", given.threads, kind)
        arms["openvino"] = lambda feeds: run(len(feeds["input_ids"]))
    return {**result, **compare(arms, given.budget)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openvino", type=Path, help="python of an environment with openvino (and nncf for --int8)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per shape and batch")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result: dict[str, Any] = {"threads": given.threads, "onnxruntime": onnxruntime.__version__}
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            result[name] = measure(name, given, Path(scratch))
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
