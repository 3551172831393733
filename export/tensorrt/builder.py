"""Building one engine from an ONNX file, in a process of its own (`python -m compress.export.tensorrt.builder`), by
TensorRT-RTX or TensorRT.

The builder is native code: what it prints, and what it would do to the process if it failed, stay apart from ours.
Imports nothing of ours but errors and the table of builders, so that the process starts quickly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.errors import ResourceError, UnsupportedError
from compress.export.tensorrt.flavours import FLAVOURS, RTX, Flavour, load_module, typed

__all__ = ["CAPABILITIES", "build", "compile_engine", "load_module", "require_builder"]

CAPABILITIES = RTX.ahead
"""SMs that TensorRT-RTX 1.7 builds for."""
TIMEOUT_S = 3600
NO_GPU = "no GPU"
NO_CACHE, EMPTY, TAKEN, MISMATCH = "none", "begun empty", "read", "of another GPU or version, not used"
"""What became of a timing cache."""
STREAMING = "WEIGHT_STREAMING"
SPARSE = "SPARSE_WEIGHTS"
SPARSITY = "(Sparsity)"
"""What the builder's lines about sparse kernels begin with; it tells them as information."""
PLANNED = {"strongly_typed": True}
"""Settings before a build; all others are the builder's defaults."""


def build(
    onnx: Path,
    sm: int,
    ranges: dict[str, Any],
    engine: Path,
    log: Path,
    flavour: Flavour = RTX,
    *,
    timing: tuple[Path | None, Path] | None = None,
    stream_weights: bool = False,
    sparse_weights: bool = False,
) -> dict[str, Any]:
    """Write the engine and the builder's log. Returns: the builder's settings, read back.

    TensorRT-RTX numbers the symbols of dynamic shapes anew at each build: engines of one graph have the same size, and
    some hundred bytes, these numbers, differ; with fixed shapes they are the same (1.7.1; neither a timing cache, one
    thread nor fixed addresses change that).

    Args: ranges: optimization profile → input → (smallest, usual, largest shape); timing: the timing cache to begin
    with, if any, and where to write what it has become; stream_weights: the engine may leave weights in host memory;
    sparse_weights: the builder may take kernels for 2:4 weights.
    Raises: UnsupportedError with the builder's reason where it refuses; ResourceError where it does not get there.
    """
    request = {"onnx": str(onnx), "sm": sm, "ranges": ranges, "engine": str(engine), "runtime": flavour.runtime}
    request |= {"stream_weights": stream_weights, "sparse_weights": sparse_weights}
    if timing is not None:
        request |= {"timing_read": str(timing[0] or ""), "timing_write": str(timing[1])}
    child = _run(request, flavour, onnx.name, sm)
    answer = _answer(child.stdout)
    log.write_text("\n".join([*answer["log"], child.stderr.strip()]).strip() + "\n", encoding="utf8")
    if answer["error"] == NO_GPU:
        raise _no_builder(flavour, sm, answer["log"])
    if child.returncode != 0 or answer["error"] or not engine.is_file():
        reason = answer["error"] or (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise UnsupportedError(
            f"{flavour.title} does not build {onnx.name} for SM {sm}: {reason} This should have been refused before: "
            "please report it."
        )
    settings: dict[str, Any] = answer["settings"]
    return settings


def require_builder(flavour: Flavour, sm: int) -> None:
    """Before anything expensive: that it is installed and, where that takes the GPU, that it makes a builder here.
    Raises: UnsupportedError."""
    trt, log = load_module(flavour), list[str]()
    if flavour.ahead:
        return
    try:
        trt.Builder(make_logger(trt, log))
    except TypeError:
        raise _no_builder(flavour, sm, log) from None


def _no_builder(flavour: Flavour, sm: int, log: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"{flavour.title} makes no builder here ({log[-1] if log else 'it does not say why'}): it builds on the GPU "
        f"that it builds for, with a driver that fits. On a machine with a GPU of SM {sm}, `compress verify OUT` "
        "builds the engine, runs it and completes the report."
    )


def _run(request: dict[str, Any], flavour: Flavour, name: str, sm: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress.export.tensorrt.builder"]
    try:
        child = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"{flavour.title} was not done with {name} for SM {sm} after {TIMEOUT_S // 60} minutes. Use a faster "
            "machine, or --target onnx."
        ) from error
    if child.returncode < 0:  # by a signal: most often the system, short of memory
        raise ResourceError(
            f"The process that built {name} for SM {sm} was killed (signal {-child.returncode}), as happens where "
            "memory is short. Free some, then repeat the command."
        )
    return child


def _answer(printed: str) -> dict[str, Any]:
    """The last line that the process printed; an empty answer where it did not get there."""
    lines = printed.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        found = {}
    return {"log": [], "error": "", "settings": {}} | found


def compile_engine(request: dict[str, Any]) -> dict[str, Any]:
    """What the process does: parse, build, write. Returns the log, the settings, and the error: empty where it went
    well."""
    flavour = FLAVOURS[request.get("runtime", RTX.runtime)]
    trt = load_module(flavour)
    log: list[str] = []
    logger = make_logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # the bindings' way of telling that the library made none
        return {"log": log, "error": NO_GPU}
    network = builder.create_network(typed(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        told = [f"{each.node_name()} ({each.node_operator()}): {each.desc()}" for each in errors]
        return {"log": log, "error": " ".join("; ".join(told).split())}
    config = builder.create_builder_config()
    _configure(trt, builder, config, request, flavour)
    cache, state = _set_timing_cache(config, request)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"log": log, "error": next(reversed(log), "no reason was given") + "."}
    Path(request["engine"]).write_bytes(memoryview(engine))
    if cache is not None:
        Path(request["timing_write"]).write_bytes(memoryview(config.get_timing_cache().serialize()))
    settings = _settings(trt, config) | {"timing_cache": state}
    if request.get("sparse_weights"):
        settings["sparsity"] = [line for line in log if SPARSITY in line]
    return {"log": log, "error": "", "settings": settings}


def _configure(trt: Any, builder: Any, config: Any, request: dict[str, Any], flavour: Flavour) -> None:
    """The chip where the builder offers several, flags, and the ranges of the inputs."""
    if flavour.ahead:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['sm']}"), 0)
    if request.get("stream_weights"):
        config.set_flag(getattr(trt.BuilderFlag, STREAMING))
    if request.get("sparse_weights"):
        config.set_flag(getattr(trt.BuilderFlag, SPARSE))
    for inputs in request["ranges"].values():
        shapes = builder.create_optimization_profile()
        for name, (low, usual, high) in inputs.items():
            shapes.set_shape(name, low, usual, high)
        config.add_optimization_profile(shapes)


def _set_timing_cache(config: Any, request: dict[str, Any]) -> tuple[Any, str]:
    """The cache that the build begins with, None where none is wanted, and what became of the one given. The cache must
    live as long as the build."""
    if not request.get("timing_write"):
        return None, NO_CACHE
    given = Path(request["timing_read"]).read_bytes() if request["timing_read"] else b""
    cache = config.create_timing_cache(given)
    if given and cache is not None and config.set_timing_cache(cache, False):
        return cache, TAKEN
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return cache, MISMATCH if given else EMPTY


def _settings(trt: Any, config: Any) -> dict[str, Any]:
    """What decides the engine beside the graph, read back."""
    flags = [name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)]
    return {
        **PLANNED,
        "builder_flags": sorted(flags),
        "builder_optimization_level": int(config.builder_optimization_level),
        "hardware_compatibility": config.hardware_compatibility_level.name,
        "optimization_profiles": int(config.num_optimization_profiles),
    }


def make_logger(trt: Any, log: list[str]) -> Any:
    """What TensorRT tells its warnings and errors to, and which layers it found sparse."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING or message.startswith(SPARSITY):
                log.append(f"{severity.name}: {message}")

    return Logger()


if __name__ == "__main__":
    print(json.dumps(compile_engine(json.loads(sys.stdin.read()))))
