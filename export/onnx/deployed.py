"""Which graph of a folder is used and measured. Imports numpy and onnxruntime only, as `runtime` does: it is also what
measures memory."""

from __future__ import annotations

from pathlib import Path

from compress.export.onnx.growing_session import GrowingSession
from compress.export.onnx.runtime import ROUNDED, SLOTS, Session, preferred
from compress.export.onnx.slot_session import SlotSession
from compress.runtime import probing


def deployed(folder: Path, threads: int, profile_to: Path | None = None) -> Session:
    """The graph whose cache is compressed, where there is one; of two that do the same the faster one."""
    if (folder / SLOTS).is_file():
        return SlotSession(folder, threads, profile_to=profile_to)
    kind = GrowingSession if (folder / ROUNDED).is_file() else Session
    return kind(folder, threads, graph=preferred(folder), profile_to=profile_to)


if __name__ == "__main__":
    probing.main(deployed)
