"""Timing caches of TensorRT: what its builder measured of kernels, kept so that the next build need not repeat it.

With the same cache the builder makes the same choices. It is good for one GPU model and one version of TensorRT, which
its name says and TensorRT checks (`set_timing_cache`); one of another machine is not used.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from compress.files import whole_file

BESIDE = "timing.cache"
"""Its copy beside an engine."""


def automatic(version: str, sm: int, device: str) -> Path:
    """The file in the user's cache folder for builds of this version on this GPU model."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return cache_folder() / f"tensorrt-{version}-sm{sm}-{slug}.timing"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/compress/tensorrt`, or what the system has for it."""
    usual = Path.home() / "AppData" / "Local" if sys.platform == "win32" else Path.home() / ".cache"
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    return (Path(given) if Path(given).is_absolute() else usual) / "compress" / "tensorrt"


def first(*places: Path) -> Path | None:
    """The first that is there."""
    return next((place for place in places if place.is_file()), None)


def keep(content: bytes, place: Path) -> str:
    """Write one whole. Returns: why it was not, empty where it was; the engine is no worse without."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as beside:
            beside.write_bytes(content)
    except OSError as error:
        return f"the timing cache {place} could not be written ({error.strerror or error})"
    return ""
