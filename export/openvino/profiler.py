"""What operators take, by OpenVINO's own counters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress.export.openvino.runtime import Session, version
from compress.speed.operators import Bind, Counted, Profiled, repeat


def profile_operators(folder: Path, threads: int, bind: Bind) -> Profiled:
    """One call of an exported folder, several times. Raises: InputError where the model does not load."""
    session, counted = Session(folder, threads, counts=True), list[Counted]()
    call = bind(session)

    def once() -> None:
        call()
        counted.append(_read(session.counters()))

    calls = repeat(once)
    return Profiled(f"openvino {version()} counters", counted[-calls:])


def _read(counters: Iterable[Any]) -> Counted:
    """Of the nodes that ran in the last call; what was compiled away has no time."""
    found: dict[str, tuple[int, float]] = {}
    for each in counters:
        seconds = each.real_time.total_seconds()
        if seconds <= 0:
            continue
        nodes, before = found.get(each.node_type, (0, 0.0))
        found[each.node_type] = nodes + 1, before + seconds
    return found
