"""ONNX files through INT8: a CNN's accuracy on all test images of MNIST, a face detector's outputs, both latencies.

    python benchmarks/onnx_models.py ASSETS [--budget 20]

INT8 is `rtn(format=int8(channel)), act_quant(static=true)`: weights per channel, inputs on static uint8 grids. The CNN
is calibrated on 512 training images and judged on 10,000 test images, paired (an interval of McNemar's table). Of the
detector's 12 photographs the even ones calibrate and the odd ones judge; beside cosine and relative error stand its
faces: anchors whose score is over 0.7, and how far the boxes of those that both have overlap.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from report_figures import figure, speeds

import compress
from compress import hwprofiles, manifest
from compress.recipe import Recipe
from compress.records import Report
from compress.run import run
from compress.run_report import Request

RESULT = Path(__file__).parent / "results" / "onnx_models.json"
PASSES = "rtn(format=int8(channel)), act_quant(static=true)"
FACE = 0.7


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--budget", type=float, default=20, help="Seconds of timing per setting.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [cnn(given.assets / "mnist", folder, given.budget)]
        for name in ("version-RFB-320.onnx", "version-RFB-320_simplified.onnx"):
            rows.append(detector(given.assets / "onnx_face", name, folder, given.budget))
    for row in rows:
        print(json.dumps(row, indent=1))
    found = {
        "name": "onnx-int8",
        "passes": PASSES,
        "machine": hwprofiles.machine_summary(),
        "python": platform.python_version(),
    }
    RESULT.write_text(json.dumps({**found, "versions": manifest.versions(), "models": rows}, indent=1) + "\n")
    return 0


def cnn(assets: Path, folder: Path, budget: float) -> dict[str, Any]:
    """The CNN: accuracy of both, the paired difference, the rest of its quality, latency."""
    for part, count in (("train", 512), ("t10k", 10_000)):
        images = _idx(assets / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:count]
        labels = _idx(assets / f"{part}-labels-idx1-ubyte.gz", 8)[:count]
        np.savez(folder / f"{part}.npz", images=images, labels=labels)
    model = _beside(assets / "mnist_cnn_a.onnx", folder / "mnist", [0.5], [0.5])
    report = _run(model, folder / "train.npz", folder / "t10k.npz", folder / "cnn", budget)
    return _row(report)


def _idx(path: Path, start: int) -> NDArray[np.uint8]:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=start)


def _beside(source: Path, folder: Path, mean: list[float], std: list[float]) -> Path:
    """A copy of a model with its preprocessing.json."""
    folder.mkdir(exist_ok=True)
    shutil.copyfile(source, folder / source.name)
    (folder / "preprocessing.json").write_text(json.dumps({"mean": mean, "std": std}))
    return folder / source.name


def detector(assets: Path, name: str, folder: Path, budget: float) -> dict[str, Any]:
    """The detector: agreement of its outputs and of the faces it finds, latency."""
    with np.load(assets / "face_images.npz") as stored:
        images = stored["images"]
    np.savez(folder / "even.npz", images=images[::2])
    np.savez(folder / "odd.npz", images=images[1::2])
    model = _beside(assets / name, folder / "face", [127 / 255] * 3, [128 / 255] * 3)
    out = folder / Path(name).stem
    report = _run(model, folder / "even.npz", folder / "odd.npz", out, budget)
    engine: Any = compress.load(out)
    anchors = dict(engine.outputs)["scores"][0]
    found = engine.predict(folder / "odd.npz")
    with np.load(assets / "reference_outputs_RFB.npz") as stored:
        boxes = stored["boxes_simplified" if "simplified" in name else "boxes"][1::2]
        wanted = np.concatenate([stored["scores"][1::2].reshape(len(boxes), -1), boxes.reshape(len(boxes), -1)], 1)
    decoded = "simplified" not in name
    return {**_row(report), "faces": _faces(wanted, found, anchors, decoded)}


def _faces(wanted: NDArray[np.float32], found: NDArray[np.float32], anchors: int, decoded: bool) -> dict[str, Any]:
    """Anchors over the threshold in either, in both, and of the latter the mean overlap of their boxes."""
    first, second = ((rows[:, 1 : 2 * anchors : 2] > FACE) for rows in (wanted, found))
    both = first & second
    result = {"reference": int(first.sum()), "int8": int(second.sum()), "both": int(both.sum())}
    if decoded:
        one, two = (rows[:, 2 * anchors :].reshape(len(rows), anchors, 4)[both] for rows in (wanted, found))
        result["mean_iou"] = float(_overlap(one, two).mean())
        result["least_iou"] = float(_overlap(one, two).min())
    return result


def _overlap(one: NDArray[np.float32], two: NDArray[np.float32]) -> NDArray[np.float32]:
    """Intersection over union of boxes (n, 4), corners."""
    inner = np.minimum(one[:, 2:], two[:, 2:]) - np.maximum(one[:, :2], two[:, :2])
    shared = inner.clip(0).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (one, two)]
    overlap: NDArray[np.float32] = shared / (areas[0] + areas[1] - shared)
    return overlap


def _run(model: Path, calibration: Path, quality: Path, out: Path, budget: float) -> Report:
    recipe = Recipe.model_validate(
        {
            "name": "onnx-int8",
            "passes": PASSES,
            "calibration": {"data": str(calibration)},
            "quality": {"data": str(quality)},
        }
    )
    return run(Request(str(model), recipe, hwprofiles.detect(), out, budget_s=budget, overwrite=True))


def _row(report: Report) -> dict[str, Any]:
    assert report.baseline_quality and report.artifact_quality and report.speed and report.verification
    return {
        "model": Path(report.source).name,
        "operators": report.operators,
        "bytes": [report.source_bytes, report.artifact_bytes],
        "agrees": [report.verification.level, report.verification.agrees],
        "baseline": {name: figure(metric) for name, metric in report.baseline_quality.metrics.items()},
        "int8": {name: figure(metric) for name, metric in report.artifact_quality.metrics.items()},
        "speed": speeds(report.speed),
    }


if __name__ == "__main__":
    sys.exit(main())
