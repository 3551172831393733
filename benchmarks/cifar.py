"""ResNet-20 on CIFAR-10: what INT8 and 4-bit weights and activations cost in accuracy, on the same test images.

    python benchmarks/cifar.py ASSETS/cifar10

Calibrated and tuned on the training images only. The change of accuracy is paired by image, with McNemar's discordant
pairs and the interval of Agresti and Min (compress/stats/proportions.py). Two sets: the JPEG images, of which there are
enough for a narrow interval, decide; the exact ones stand beside them. The bars are on the interval's worse end: INT8
loses at most 0.3 points, 4 bits at most 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import compress
from compress.engine.image_stream import image_logits
from compress.inputs import images
from compress.inputs.images import Images
from compress.models.model import Model
from compress.pipeline import Pipeline
from compress.quality.classification import BatchScore, score_batch, summarize_images

RESULT = Path(__file__).parent / "results" / "cifar.json"
FOUR = "rtn(format=int4(channel), clip=true), act_quant(format=int4(tensor, asymmetric), static=true)"
RECIPES = {
    "INT8": ("rtn(format=int8(channel)), act_quant(format=int8(tensor, asymmetric), static=true)", 0.3),
    "INT8, AdaQuant": (
        "rtn(format=int8(channel)), act_quant(format=int8(tensor, asymmetric), static=true), adaquant(steps=200)",
        0.3,
    ),
    "W4A4, rounding": (FOUR, 2.0),
    "W4A4, AdaQuant": (f"{FOUR}, adaquant(steps=400)", 2.0),
    "W4A4, AdaQuant, tune": (f"{FOUR}, adaquant(steps=400), tune(steps=200, parts=[scales, biases, inputs])", 2.0),
}
SETS = {"jpeg": "cifar10_test_jpeg75_even.npz", "exact": "cifar10_test_exact_even.npz"}


def scores(reference: list[torch.Tensor], model: Model, test: Images) -> list[BatchScore]:
    """Each batch of test images against the original."""
    labels = torch.split(test.labels, images.BATCH)
    return [
        score_batch(first, second, label)
        for first, second, label in zip(reference, image_logits(model, test.batches()), labels, strict=True)
    ]


def judged(reference: list[torch.Tensor], model: Model, test: Images) -> dict[str, Any]:
    """The metrics of a compressed model on one set."""
    found = summarize_images(scores(reference, model, test), "compressed", "torch", test.protocol, test.digest)
    return {name: metric.model_dump() for name, metric in found.metrics.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy of quantized ResNet-20, paired with the original.")
    parser.add_argument("folder", type=Path, help="the assets' cifar10 folder")
    parser.add_argument("--samples", type=int, default=1024, help="training images to calibrate and tune on")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    model = compress.load(f"{folder / 'resnet_cifar.py'}:resnet20")
    assert model.image is not None
    calibration = compress.inputs.datasets.calibrate(
        model, folder / "cifar10_train_exact_7044.npz", samples=arguments.samples
    )
    tests = {name: images.read_images(folder / file, model.image) for name, file in SETS.items()}
    for test in tests.values():
        images.check_disjoint(calibration.windows, test)
    references = {name: list(image_logits(model, test.batches())) for name, test in tests.items()}
    rows = []
    for name, (text, bar) in RECIPES.items():
        started = time.perf_counter()
        made = Pipeline.parse(text).run(model, calibration)
        seconds = round(time.perf_counter() - started, 1)
        found = {key: judged(references[key], made.model, test) for key, test in tests.items()}
        worst = -found["jpeg"]["accuracy_change"]["interval"]["low"]
        row = {"name": name, "passes": text, "seconds": seconds, **found, "loss_at_most": worst, "bar": bar}
        rows.append({**row, "met": worst <= bar})
        change, interval = found["jpeg"]["accuracy_change"]["value"], found["jpeg"]["accuracy_change"]["interval"]
        print(
            f"{name}: {change:+.2f} points ({interval['low']:+.2f} to {interval['high']:+.2f}), {seconds} s", flush=True
        )
    facts = {
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "calibration": calibration.summary(),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
