"""What operators take, by ONNX Runtime's own profiler, which writes a file of events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import ResourceError, UnsupportedError
from compress.export.onnx import providers
from compress.export.onnx.deployed import deployed
from compress.export.onnx.runtime import load_onnxruntime
from compress.files import read_json, scratch_folder
from compress.speed.operators import WARM_CALLS, Bind, Counted, Profiled, repeat

OUTER = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators whose time is that of the operators inside them, which are counted themselves."""


def profile_operators(folder: Path, threads: int, bind: Bind) -> Profiled:
    """One call of an exported folder, several times.

    Raises: UnsupportedError off the CPU, where the profiler sees what the host does and not what the device does;
    InputError where the graph does not load.
    """
    with scratch_folder("compress-profile-") as scratch:
        session = deployed(folder, threads, scratch / "run")
        placed = session.session.get_providers()[0]
        if placed != providers.CPU:
            session.session.end_profiling()
            raise UnsupportedError(f"ONNX Runtime's profiler tells nothing of what {placed} does on its device")
        calls = repeat(bind(session))
        events = _read(Path(session.session.end_profiling()))
    return Profiled(f"onnxruntime {load_onnxruntime().__version__} profiler", read_events(events, calls))


def _read(path: Path) -> Any:
    """The file of events. Raises: ResourceError where it was cut off, of which ONNX Runtime says nothing."""
    try:
        return read_json(path)
    except ValueError as error:
        raise ResourceError(
            f"{path} is not whole ({error}): its disk is full. Free some, or let TMPDIR name another."
        ) from error


def read_events(events: Iterable[Mapping[str, Any]], calls: int) -> list[Counted]:
    """Operators of the last `calls` calls. An event of a whole run ("model_run") follows those of its operators; a call
    may be several runs, the same number each time. Durations are in microseconds.

    Raises: UnsupportedError for events of another kind than these.
    """
    runs: list[dict[str, tuple[int, float]]] = []
    inside: dict[str, tuple[int, float]] = {}
    for event in events:
        kind = event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and kind and event["name"].endswith("_kernel_time") and kind not in OUTER:
            _add(inside, kind, 1, event["dur"] / 1e6)
        elif event.get("name") == "model_run":
            runs.append(inside)
            inside = {}
    each = len(runs) // (calls + WARM_CALLS)
    if not each or not any(runs):
        raise UnsupportedError("this version of ONNX Runtime writes another kind of profile")
    return [_together(runs[place : place + each]) for place in range(len(runs) - calls * each, len(runs), each)]


def _together(runs: Iterable[Counted]) -> Counted:
    found: dict[str, tuple[int, float]] = {}
    for inside in runs:
        for kind, (nodes, seconds) in inside.items():
            _add(found, kind, nodes, seconds)
    return found


def _add(found: dict[str, tuple[int, float]], kind: str, nodes: int, seconds: float) -> None:
    before = found.get(kind, (0, 0.0))
    found[kind] = before[0] + nodes, before[1] + seconds
