"""session_options.json: the execution providers that a folder for a GPU is run with, and their options.

    {"profile": "nvidia-l4", "providers": [["CUDAExecutionProvider", {…}]],
     "tensorrt": [["TensorrtExecutionProvider", {…}], ["CUDAExecutionProvider", {…}]]}

Both lists are as `InferenceSession(…, providers=…)` takes them, paths from the folder: `providers` is what this
toolchain loads, `tensorrt` the same graph through ONNX Runtime's TensorRT provider. Nothing here was run on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from compress.errors import InputError, UnsupportedError

NAME = "session_options.json"
GENAI = "genai_config.json"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
Providers = list[tuple[str, dict[str, str]]]

# The arena grows by what is asked for, not by powers of two. A convolution's algorithm is looked up: trying every one
# takes seconds for each new shape.
CUDA_OPTIONS = {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"}
# Engines take minutes to build, so they and their timings are kept beside the graph.
TENSORRT_OPTIONS = {
    "trt_engine_cache_enable": "1",
    "trt_engine_cache_path": "trt_cache",
    "trt_timing_cache_enable": "1",
    "trt_timing_cache_path": "trt_cache",
    "trt_fp16_enable": "1",
}


def write(folder: Path, profile: str, provider: str, ranges: Mapping[str, Mapping[str, Any]]) -> None:
    """The file, and the provider in genai_config.json where there is one; for the CPU neither.

    ranges: optimization profile → input → (smallest, usual, largest shape), as the tensorrt target has them.
    """
    if provider == CPU:
        (folder / NAME).unlink(missing_ok=True)
        return
    options = CUDA_OPTIONS if provider == CUDA else {}
    content = {
        "profile": profile,
        "providers": [[provider, options]],
        "tensorrt": [[TENSORRT, {**TENSORRT_OPTIONS, **_shapes(ranges)}], [CUDA, CUDA_OPTIONS]],
    }
    (folder / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf8")
    if provider == CUDA and (folder / GENAI).is_file():
        genai = json.loads((folder / GENAI).read_text(encoding="utf8"))
        genai["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": options}]
        (folder / GENAI).write_text(json.dumps(genai, indent=2) + "\n", encoding="utf8")


def _shapes(ranges: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`input_ids:1x128,…` for each end of the ranges; an input that is named again begins the next profile."""
    return {
        f"trt_profile_{end}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, span[place]))}" for inputs in ranges.values() for name, span in inputs.items()
        )
        for place, end in enumerate(("min", "opt", "max"))
    }


def wanted(folder: Path) -> Providers:
    """What a folder says that it is run with; the CPU's where it says nothing.

    Raises: InputError, also for other options than `write` gives: some of onnxruntime's name libraries to be loaded.
    """
    path = folder / NAME
    if not path.is_file():
        return [(CPU, {})]
    try:
        found = json.loads(path.read_text(encoding="utf8"))["providers"]
        pairs = [(str(name), {str(key): str(value) for key, value in options.items()}) for name, options in found]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not what the exporter wrote ({error!r}). Export the model again.") from error
    if not pairs:
        raise InputError(f"{path} names no provider. Export the model again.")
    others = sorted({key for _, options in pairs for key in options} - set(CUDA_OPTIONS))
    if others:
        raise InputError(
            f"{path} has the options {', '.join(others[:5])}, which are not passed on; allowed: "
            f"{', '.join(CUDA_OPTIONS)}. For others open the graph with onnxruntime itself."
        )
    return pairs


@cache
def usable(provider: str) -> bool:
    """Whether a session really gets a provider here: onnxruntime-gpu lists CUDA on machines without a GPU as well."""
    if provider == CPU:
        return True
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    if provider not in onnxruntime.get_available_providers():
        return False
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert isinstance(model, onnx.ModelProto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception:  # onnxruntime raises its own kinds; what cannot be opened cannot be used
        return False
    return bool(session.get_providers()[0] == provider)


def check(session: Any, asked: str) -> None:
    """Raises: UnsupportedError where a session does not run on the provider that it was asked for."""
    got = session.get_providers()[0]
    if got != asked:
        raise UnsupportedError(
            f"onnxruntime was asked for {asked} and runs on {got}: what the provider needs (driver, CUDA, cuDNN) did "
            "not load. Install it and onnxruntime-gpu, or export for a profile of this machine's CPU."
        )


def note(provider: str) -> str:
    """For the report of a folder that is for another provider than the CPU's, on a machine without it."""
    return (
        f"The graph has not run on {provider}, which this machine lacks. Quality and agreement are those of the same "
        "graph on the CPU; speed was not measured. Repeat `compress verify` on the machine that has it."
    )
