"""Our side of `cost.py`: a pipeline without export, in a process of its own, as the rivals' clients are run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from client import Meter, finish, read_job

import compress
from compress.inputs.datasets import Calibration
from compress.inputs.windows import Windows
from compress.pipeline import Pipeline


def main() -> None:
    job = read_job()
    pipeline = Pipeline.parse(job.settings["ours"])  # imports the pass
    meter = Meter()
    windows = Windows(job.ids, tuple(range(len(job.ids))), "given", "given")
    with tempfile.TemporaryDirectory(dir=job.out.parent) as folder:
        with meter.timed():
            model = compress.load(job.model)
            dtype = getattr(torch, job.settings.get("stream", "float32"))
            made = pipeline.run(model, Calibration(windows, 0, "given", dtype), folder=Path(folder))
        figures, bits, weights = meter.figures(), 0.0, {}
        for spec in made.model.structure.layers.values():
            if spec.format is None:
                continue
            layer = made.model.layer(spec)
            weights[f"{spec.name}.weight"] = layer.float_weight()
            bits += layer.bits_per_weight * layer.shape[0] * layer.shape[1]
        finish(job, "compress", weights, bits, figures)


if __name__ == "__main__":
    main()
