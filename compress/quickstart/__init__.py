"""The embedded model and text of `compress quickstart`: pycoder, a 7.3 M-parameter Llama-architecture code model."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path

from compress import defaults, recipe
from compress.profiles import as_profile
from compress.run_report import Request

CALIBRATION_SAMPLES = 48
QUALITY_SAMPLES = 48


def folder() -> Path:
    """Where the embedded model is."""
    return Path(str(files("compress") / "quickstart" / "pycoder"))


def request(out: Path, name: str | None = None, overwrite: bool = False) -> Request:
    """The run that `compress quickstart` makes. name: another recipe."""
    chosen = recipe.load(name or defaults.QUICKSTART)
    calibration = recipe.CalibrationSettings(data=str(folder() / "calib.txt.gz"), samples=CALIBRATION_SAMPLES)
    quality = chosen.quality.model_copy(update={"data": str(folder() / "heldout.txt.gz"), "samples": QUALITY_SAMPLES})
    chosen = chosen.model_copy(update={"calibration": calibration, "quality": quality})
    command = shlex.join(["compress", "quickstart", "-o", str(out)])
    return Request(str(folder()), chosen, as_profile(None), out, overwrite=overwrite, command=command, budget_s=10.0)
