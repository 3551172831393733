"""ResNet-20 on CIFAR-10 with channels taken out: accuracy against measured latency, paired with the original.

    python benchmarks/channels.py ASSETS/cifar10 [--after "heal"] [--part curve|criteria|both] [--budget 20]

`criteria`: at one share, which channels go and what makes up for them, by accuracy alone. `curve`: whole runs of
`prune_channels` at several shares, with what `--after` adds: accuracy of the exported graph and its speed against the
original's graph. Calibrated (and healed) on training images only; judged on the 5,000 JPEG test images, paired by image
(compress/stats/proportions.py).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report_figures import figure, speeds

import compress
from compress import hwprofiles, manifest
from compress.engine.image_stream import image_logits
from compress.inputs import images
from compress.inputs.datasets import calibrate
from compress.pipeline import Pipeline
from compress.quality.classification import score_batch, summarize_images
from compress.recipe import Recipe
from compress.records import Report
from compress.run import run
from compress.run_report import Request

RESULT = Path(__file__).parent / "results" / "channels.json"
TRAINING, TEST = "cifar10_train_exact_7044.npz", "cifar10_test_jpeg75_even.npz"
CRITERIA = (
    {"by": "output", "refit": "weights"},
    {"by": "l2", "refit": "weights"},
    {"by": "activation", "refit": "weights"},
    {"by": "output", "refit": "all"},
)
SHARES = (0.25, 0.5, 0.75)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the assets' cifar10 folder")
    parser.add_argument("--after", default="", help="passes after prune_channels, such as heal")
    parser.add_argument("--settings", default="", help="further settings of prune_channels, such as residual=true")
    parser.add_argument("--part", choices=("curve", "criteria", "both"), default="both")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--samples", type=int, default=512, help="training images")
    parser.add_argument("--budget", type=float, default=20, help="seconds of timing per run")
    given = parser.parse_args()
    facts = {
        "machine": hwprofiles.machine_summary(),
        "python": platform.python_version(),
        "versions": manifest.versions(),
        "samples": given.samples,
    }
    done: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if given.part != "curve":
        done["criteria"] = {**facts, "share": 0.5, "rows": criteria(given.folder, given.samples)}
        RESULT.write_text(json.dumps(done, indent=1) + "\n")
    if given.part != "criteria":
        name = f"curve {given.settings} {given.after}".strip()
        done[name] = {**facts, "rows": []}
        for share in given.shares:
            done[name]["rows"].append(point(given, share))
            RESULT.write_text(json.dumps(done, indent=1) + "\n")
    return 0


def criteria(folder: Path, samples: int) -> list[dict[str, Any]]:
    """Accuracy of each way to choose channels and to make up for them, half of the channels gone."""
    model = compress.load(f"{folder / 'resnet_cifar.py'}:resnet20")
    assert model.image is not None
    calibration = calibrate(model, folder / TRAINING, samples=samples)
    test = images.read_images(folder / TEST, model.image)
    images.check_disjoint(calibration.windows, test)
    reference, labels = list(image_logits(model, test.batches())), test.labels.split(images.BATCH)
    rows = []
    for settings in CRITERIA:  # the most telling first
        text = f"prune_channels(share=0.5, {', '.join(f'{name}={value}' for name, value in settings.items())})"
        started = time.perf_counter()
        made = Pipeline.parse(text).run(model, calibration).model
        seconds = round(time.perf_counter() - started, 1)
        logits = image_logits(made, test.batches())
        scores = [score_batch(*each) for each in zip(reference, logits, labels, strict=True)]
        found = summarize_images(scores, "compressed", "torch", test.protocol, test.digest).metrics
        row = {**settings, "seconds": seconds, **{name: figure(found[name]) for name in ("accuracy_change", "kl")}}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def point(given: argparse.Namespace, share: float) -> dict[str, Any]:
    """One whole run: quality of the artifact and its speed, against the original."""
    settings = f"share={share}{', ' if given.settings else ''}{given.settings}"
    passes = f"prune_channels({settings}){', ' if given.after else ''}{given.after}"
    recipe = Recipe.model_validate(
        {
            "name": "channels",
            "passes": passes,
            "calibration": {"data": str(given.folder / TRAINING), "samples": given.samples},
            "quality": {"data": str(given.folder / TEST), "samples": 5000},
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        source = f"{given.folder / 'resnet_cifar.py'}:resnet20"
        out = Path(scratch) / "out"
        report = run(Request(source, recipe, hwprofiles.detect(), out, budget_s=given.budget))
        before, after = compress.load(source).image, compress.artifact.open_artifact(out).model().image
    assert before is not None and after is not None
    row = {"passes": passes, "multiplications": [before.multiplications, after.multiplications], **_row(report)}
    print(json.dumps(row), flush=True)
    return row


def _row(report: Report) -> dict[str, Any]:
    assert report.baseline_quality and report.artifact_quality and report.speed and report.verification
    return {
        "bytes": [report.source_bytes, report.artifact_bytes],
        "agrees": report.verification.agrees,
        "baseline": figure(report.baseline_quality.metrics["accuracy"]),
        **{name: figure(report.artifact_quality.metrics[name]) for name in ("accuracy", "accuracy_change", "kl")},
        "speed": speeds(report.speed),
    }


if __name__ == "__main__":
    sys.exit(main())
