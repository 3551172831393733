"""The embedded model and text of `compress quickstart`: pycoder, a 7.3 M-parameter Llama-architecture code model."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from compress import hwprofiles, recipe
from compress.errors import UsageError
from compress.run import Request

RECIPE = "w4a16"
CALIBRATION_SAMPLES = 48
QUALITY_SAMPLES = 48


def folder() -> Path:
    """Where the embedded model is."""
    return Path(str(files("compress") / "quickstart" / "pycoder"))


def request(out: Path, name: str | None = None, overwrite: bool = False) -> Request:
    """The run that `compress quickstart` makes. name: another recipe."""
    chosen = recipe.load(name or RECIPE)
    calibration = recipe.CalibrationSettings(data=str(folder() / "calib.txt.gz"), samples=CALIBRATION_SAMPLES)
    quality = chosen.quality.model_copy(update={"data": str(folder() / "heldout.txt.gz"), "samples": QUALITY_SAMPLES})
    chosen = chosen.model_copy(update={"calibration": calibration, "quality": quality})
    try:
        machine = hwprofiles.detect()
    except hwprofiles.ProfileError as error:
        raise UsageError(str(error)) from error
    return Request(
        str(folder()), chosen, machine, out, overwrite=overwrite, command=f"compress quickstart -o {out}", budget_s=10.0
    )
