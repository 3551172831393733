"""Hardware profiles: one YAML file per machine or class of machines, and a small loader.

`load` reads one, `detect` finds the one that fits this machine, `Runtime.support` says which kernel a format runs on.
Nothing here imports the rest of compress, torch or onnx; every mistake in a profile raises `ProfileError`.
"""

from __future__ import annotations

if __name__ != "compress.hwprofiles":
    raise ImportError(f"import this as 'compress.hwprofiles', not as '{__name__}': a second copy has its own types")

from compress.hwprofiles.detect import detect, machine_summary
from compress.hwprofiles.facts import machine
from compress.hwprofiles.files import digest, load, names
from compress.hwprofiles.schema import Element, Figure, Gpu, KernelSpeed, Profile, ProfileError, Runtime, Support, Use

__all__ = [
    "Element",
    "Figure",
    "Gpu",
    "KernelSpeed",
    "Profile",
    "ProfileError",
    "Runtime",
    "Support",
    "Use",
    "detect",
    "digest",
    "load",
    "machine",
    "machine_summary",
    "names",
]
