"""Building one engine from an ONNX file, in a process of its own (`python -m compress.export.tensorrt.builder`).

The builder is native code: what it prints, and what it would do to the process if it failed, stay apart from ours.
Imports nothing of ours but errors, so that the process starts quickly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from compress.errors import ResourceError, UnsupportedError

MODULE, EXTRA = "tensorrt_rtx", "tensorrt-rtx"
CAPABILITIES = (75, 80, 86, 89, 120, 121)
"""SMs that TensorRT-RTX 1.7 builds for."""
TIMEOUT_S = 3600


def load_module() -> Any:
    """TensorRT-RTX. Raises: UnsupportedError naming what to install."""
    try:
        import tensorrt_rtx
    except (ImportError, OSError) as error:  # OSError: libraries of its own that are missing or not for this system
        raise UnsupportedError(
            f"TensorRT-RTX is not installed ({error}). Install it with: pip install 'compress[{EXTRA}]'."
        ) from error
    return tensorrt_rtx


def build(onnx: Path, sm: int, ranges: dict[str, Any], engine: Path, log: Path) -> None:
    """Write the engine and the builder's log. The same graph gives an engine of the same size, of which some hundred
    bytes differ at each build (1.7.1).

    Args: ranges: optimization profile → input → (smallest, usual, largest shape).
    Raises: UnsupportedError with the builder's reason where it refuses; ResourceError where it does not get there.
    """
    request = {"onnx": str(onnx), "sm": sm, "ranges": ranges, "engine": str(engine)}
    command = [sys.executable, "-m", "compress.export.tensorrt.builder"]
    try:
        child = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"TensorRT-RTX was not done with {onnx.name} for SM {sm} after {TIMEOUT_S // 60} minutes. Use a faster "
            "machine, or --target onnx."
        ) from error
    if child.returncode < 0:  # by a signal: most often the system, short of memory
        raise ResourceError(
            f"The process that built {onnx.name} for SM {sm} was killed (signal {-child.returncode}), as happens where "
            "memory is short. Free some, then repeat the command."
        )
    answer = _answer(child.stdout)
    log.write_text("\n".join([*answer["log"], child.stderr.strip()]).strip() + "\n", encoding="utf8")
    if child.returncode != 0 or answer["error"] or not engine.is_file():
        reason = answer["error"] or (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise UnsupportedError(
            f"TensorRT-RTX does not build {onnx.name} for SM {sm}: {reason} This should have been refused before: "
            "please report it."
        )


def _answer(printed: str) -> dict[str, Any]:
    """The last line that the process printed; an empty answer where it did not get there."""
    lines = printed.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        found = {}
    return {"log": [], "error": ""} | found


def compile_engine(request: dict[str, Any]) -> dict[str, Any]:
    """What the process does: parse, build, write. Returns the log and the error, empty where it went well."""
    trt = load_module()
    log: list[str] = []
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # types are those of the graph
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request["onnx"]):
        errors = [parser.get_error(place) for place in range(parser.num_errors)]
        told = [f"{each.node_name()} ({each.node_operator()}): {each.desc()}" for each in errors]
        return {"log": log, "error": " ".join("; ".join(told).split())}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{request['sm']}"), 0)
    for inputs in request["ranges"].values():
        shapes = builder.create_optimization_profile()
        for name, (low, usual, high) in inputs.items():
            shapes.set_shape(name, low, usual, high)
        config.add_optimization_profile(shapes)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return {"log": log, "error": next(reversed(log), "no reason was given") + "."}
    Path(request["engine"]).write_bytes(memoryview(engine))
    return {"log": log, "error": ""}


def _logger(trt: Any, log: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                log.append(f"{severity.name}: {message}")

    return Logger()


if __name__ == "__main__":
    print(json.dumps(compile_engine(json.loads(sys.stdin.read()))))
