"""What a decode step spends its time on: operators of an exported graph by share, from onnxruntime's own profiler.

    python benchmarks/llamacpp/operators.py FOLDER [--graph model_gqa.onnx] [--threads 2] [--past 128]

Shares are of the time inside operators. The graph is the one that onnxruntime made of ours, fused and folded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnxruntime

from compress.export.onnx.cache import Shared
from compress.export.onnx.runtime import SHARED, Session, preferred


class Profiled(Session):
    """A session whose steps are written down."""

    def __init__(self, folder: Path, threads: int, graph: str, trace: str) -> None:
        super().__init__(folder, threads, graph=graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        options.enable_profiling, options.profile_file_prefix = True, trace
        self.session = onnxruntime.InferenceSession(str(folder / graph), options, providers=["CPUExecutionProvider"])


def shares(folder: Path, graph: str, threads: int, past: int, steps: int) -> dict[str, tuple[float, int]]:
    """Operator → share of the time, and how many a step has; the longest first."""
    with tempfile.TemporaryDirectory() as scratch:
        session = Profiled(folder, threads, graph, f"{scratch}/trace")
        ids, feeds = np.asarray([[3]]), session.feeds(np.asarray([[3]]), past)
        if graph == SHARED:
            cache = Shared(session, 1, past + 1)
            cache.bind(ids, feeds["attention_mask"])
        for _ in range(steps + 1):
            cache.again() if graph == SHARED else session.session.run(None, feeds)
        events = json.loads(Path(session.session.end_profiling()).read_text())
    kernels = [event for event in events if event["name"].endswith("_kernel_time")]
    each = len(kernels) // (steps + 1)
    spent: dict[str, list[int]] = defaultdict(list)
    for event in kernels[each:]:  # the first step warms up
        spent[event["args"]["op_name"]].append(event["dur"])
    total = sum(map(sum, spent.values()))
    found = {name: (sum(times) / total, len(times) // steps) for name, times in spent.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the onnx folder of an artifact")
    parser.add_argument("--graph", help="default: the one that is used here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    graph = given.graph or preferred(given.folder)
    for name, (share, count) in shares(given.folder, graph, given.threads, given.past, given.steps).items():
        print(f"{name:<32} {share:6.1%}  {count:4d} per step")
    return 0


if __name__ == "__main__":
    sys.exit(main())
