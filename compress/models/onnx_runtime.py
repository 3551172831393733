"""ONNX Runtime on the CPU for graphs that nobody vouches for: what they may allocate is bounded, and errors are ours.

A few kilobytes can ask for any amount: an operator that repeats or fills makes as much as a stored number says. One
arena serves all sessions that are opened here and refuses to grow beyond `SHARE` of the memory that this process may
use. What ONNX Runtime computes while it loads it bounds itself, at 1 GiB for each value.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
import torch

from compress.errors import CompressError, InputError, ResourceError, UnsupportedError
from compress.memory import allowed_memory
from compress.models.folder import first_line

SHARE = 0.5
"""Of the memory that this process may use, the most that a graph's values may take at once."""
_REFUSED = ("is smaller than requested bytes", "bad_alloc", "Failed to allocate memory", "bad allocation")


@cache
def most_bytes() -> int:
    """What the values of a graph may take; 8 GiB where it is not known how much memory there is."""
    allowed = allowed_memory()
    return int(SHARE * allowed) if allowed else 8 << 30


@cache
def _bounded() -> None:
    """Make the arena, once per process."""
    ort = load_onnxruntime()
    kind = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(kind, ort.OrtArenaCfg({"max_mem": most_bytes()}))


def load_onnxruntime() -> Any:
    """The onnxruntime module. Raises: UnsupportedError naming what to install."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UnsupportedError(
            "An ONNX model is read with onnxruntime, which is not installed. Install exactly one of onnxruntime-gpu "
            "and onnxruntime."
        ) from error
    return onnxruntime


def open_session(model: onnx.ModelProto, what: str, optimized: str = "") -> Any:
    """A model in memory in ONNX Runtime on the CPU.

    Args: what: named in errors; optimized: where to write the graph after the basic optimizations, which then are all.
    Raises: InputError where it does not load, ResourceError for too much memory.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    _bounded()
    options.add_session_config_entry("session.use_env_allocators", "1")
    if optimized:
        options.optimized_model_filepath = optimized
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own kinds, which share no base but Exception
        raise failure(error, f"onnxruntime {ort.__version__} cannot load {what}") from error


def failure(error: Exception, what: str) -> CompressError:
    """What an error of ONNX Runtime means: ResourceError for more memory than is allowed, else InputError."""
    text = first_line(error)
    if any(part in str(error) for part in _REFUSED):
        return ResourceError(
            f"{what}: its values take more than {most_bytes() / 2**30:.3g} GiB at once, {SHARE:.0%} of the memory "
            "here, which is the most that a graph may take. Use more memory, or a graph of smaller inputs."
        )
    return InputError(f"{what} ({text}).")
