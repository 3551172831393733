"""The figures that hold where a user gives none, each told by `--help` as it is here. Imports nothing."""

from __future__ import annotations

SAMPLES = 128
"""Calibration windows."""
IMAGES = 512
"""Calibration images, or other samples of a row each."""
QUALITY_SAMPLES = 128
"""Quality windows; images are all taken unless a number is given."""
LENGTH = 512
"""Tokens of a window."""
SEED = 0
BUDGET_S = 20.0
"""Seconds of timing per setting, all arms together."""
QUICKSTART = "w4a16"
"""The recipe of `compress quickstart`."""
